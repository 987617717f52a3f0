"""`neustream bench serve`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from neustream.bench.plan import Plan
from neustream.bench.planning import Law, Timing, plan_of, warming
from neustream.bench.records import Since
from neustream.bench.runs import DETAILS_BYTES, Run, expected_size, records_file, write_runs
from neustream.bench.summary import summary, valid
from neustream.commands.bench_data import DataOptions
from neustream.commands.bench_options import PromiseOptions, ServerOptions
from neustream.commands.bench_parsing import pair
from neustream.commands.bench_playing import play, target_of
from neustream.commands.bench_printing import say_lengths, show_run
from neustream.commands.bench_refused import VllmFlags
from neustream.commands.bench_reporting import since_of
from neustream.commands.bench_twin import TwinOptions, bound_here, play_here
from neustream.commands.interrupts import INTERRUPTED
from neustream.commands.options import JsonOption, QuietOption
from neustream.commands.outputs import (
    append_line,
    check_folder,
    check_outputs,
    check_room,
    json_file,
    json_output,
    json_text,
    write_each,
    write_text,
)
from neustream.commands.printing import hushed, notes, problems, wrote
from neustream.commands.sharing import taking
from neustream.errors import ConfigError, nearest
from neustream.workload.arrivals import Ramp
from neustream.workload.asks import Ask
from neustream.workload.mixing import with_classes, with_limits, with_models, without_arrivals
from neustream.workload.sources import Asked
from neustream.workload.texts import Texts

CLASS = VllmFlags
INVALID, NOTHING_DONE = 3, 4


@dataclass(frozen=True)
class RateOptions:
    """When requests come."""

    request_rate: Annotated[float, typer.Option(help="Requests a second; inf: at once, or as a trace has them.")] = (
        math.inf
    )
    burstiness: Annotated[float, typer.Option(help="1 / cv**2 of the gaps; 1: Poisson.")] = 1.0
    arrivals: Annotated[str, typer.Option(help="gamma, constant, or conditioned: the rate is exact.")] = "gamma"
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="The most under way at once.")] = None
    ramp_up_strategy: Annotated[str | None, typer.Option(help="linear or exponential.")] = None
    ramp_up_start_rps: Annotated[float | None, typer.Option(help="Of a ramp.")] = None
    ramp_up_end_rps: Annotated[float | None, typer.Option(help="Of a ramp.")] = None

    def timing(self) -> Timing:
        """ConfigError names the option that is wrong."""
        for name in ("request_rate", "burstiness"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name):g}: expected more than 0")
        if self.arrivals not in get_args(Law):
            raise ConfigError(f"--arrivals {self.arrivals!r}: {nearest(self.arrivals, get_args(Law))}")
        rate = None if math.isinf(self.request_rate) else self.request_rate
        law: Any = self.arrivals
        return Timing(rate, self.burstiness, law, self.max_concurrency, self._ramp())

    def _ramp(self) -> Ramp | None:
        strategy, start, end = self.ramp_up_strategy, self.ramp_up_start_rps, self.ramp_up_end_rps
        if strategy is None:
            if start is not None or end is not None:
                raise ConfigError("--ramp-up-start-rps, --ramp-up-end-rps: need --ramp-up-strategy")
            return None
        if strategy not in ("linear", "exponential"):
            raise ConfigError(f"--ramp-up-strategy {strategy!r}: {nearest(strategy, ['linear', 'exponential'])}")
        if start is None or end is None or not (0 < start < math.inf and 0 < end < math.inf):
            raise ConfigError("--ramp-up-strategy: needs --ramp-up-start-rps and --ramp-up-end-rps, above 0")
        if not math.isinf(self.request_rate):
            raise ConfigError("--ramp-up-strategy: takes the place of --request-rate")
        return Ramp(start, end, strategy == "exponential")


@dataclass(frozen=True)
class ResultOptions:
    """What is kept."""

    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for records, for compare and reports.")] = (
        None
    )
    save_result: Annotated[bool, typer.Option("--save-result", help="Write vllm bench serve's JSON.")] = False
    append_result: Annotated[bool, typer.Option("--append-result", help="The same, as a line more of that file.")] = (
        False
    )
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="With a value for each request.")] = False
    result_dir: Annotated[Path, typer.Option(help="Where --save-result writes.")] = Path()
    result_filename: Annotated[str | None, typer.Option(help="What it writes.")] = None
    label: Annotated[str, typer.Option(help="Of these results.")] = ""
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, kept in the results.")] = None
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests before all, of which nothing is kept.")] = 0
    ready_check_timeout_sec: Annotated[float, typer.Option(min=0, help="Wait so long for the server.")] = 0.0
    percentile_metrics: Annotated[str | None, typer.Option(hidden=True)] = None
    metric_percentiles: Annotated[str | None, typer.Option(hidden=True)] = None
    disable_tqdm: Annotated[bool, typer.Option("--disable-tqdm", hidden=True)] = False
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", hidden=True)] = False
    skip_tokenizer_init: Annotated[bool, typer.Option("--skip-tokenizer-init", hidden=True)] = False
    skip_chat_template: Annotated[bool, typer.Option("--skip-chat-template", hidden=True)] = False

    def told(self) -> dict[str, str]:
        return dict(pair("--metadata", each, "=") for each in self.metadata or ())


@taking(ServerOptions, DataOptions, RateOptions, PromiseOptions, ResultOptions, TwinOptions)
def command(
    server: ServerOptions,
    data: DataOptions,
    rate: RateOptions,
    promises: PromiseOptions,
    results: ResultOptions,
    twin: TwinOptions,
    json_: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Send a workload to a server by schedule, and say what came of all that was offered.

    Flags are those of vllm bench serve. Latencies count from when a request was to be sent. Exit
    codes beside those below: 3 the client was so late that its results mean nothing; 4 no request
    was done. With --backend neustream the same workload is simulated, or served in this process.
    """
    with json_output(json_) as write, hushed(quiet):
        timing, since = rate.timing(), since_of(promises.from_sent)
        data.check_timing(timing.rate is not None or timing.ramp is not None)
        texts = server.texts()
        told = results.told()
        _check(results, json_)
        asks = asks_of(data, promises, texts)
        plan = plan_of(asks, timing, promises.seed, results.label, tokenizer=server.tokenizer, **told)
        _check_room(results, plan, server.ignore_eos or server.backend == "neustream")
        name = server.served_model_name or server.model
        bound = bound_here(plan, twin, name) if twin.bound else None
        if server.backend == "neustream":
            run = play_here(plan, twin, name)
        else:
            run = _asked(server, promises, results, plan, texts)
        if bound is not None and not run.interrupted:
            run.meta["bound"] = bound
        show_run(run, since)
        say_lengths(run, plan.asks, server.tokenizer)
        content = {**told, **summary(run, since, results.save_detailed)}
        write_each(
            lambda: write(content),
            lambda: _save(run, results, since),
            lambda: _save_result(run, results, content),
        )
        end(run)


def _asked(server: ServerOptions, promises: PromiseOptions, results: ResultOptions, plan: Plan, texts: Texts) -> Run:
    """The plan put to a server over HTTP."""
    target = target_of(server, plan.asks, results.ready_check_timeout_sec)
    if results.num_warmups:
        play(warming(plan.asks, results.num_warmups), target, texts)
    run = play(plan, target, texts, promises.workers, results.save_detailed)
    run.target["backend"] = server.backend
    return run


def asks_of(data: DataOptions, promises: PromiseOptions, texts: Texts, number: int | None = None) -> list[Ask]:
    """The requests with what they are promised, without arrivals of a schedule."""
    limits, classes = promises.limits(), promises.classes()
    with notes.status("drawing requests"):
        asks = data.dataset().asks(Asked(number or data.num_prompts, promises.seed, texts))
    if not data.timed:
        asks = without_arrivals(asks)
    asks = with_models(asks, data.models, data.assignment, promises.seed)
    asks = with_classes(asks, classes, promises.seed)
    return with_limits(asks, limits) if limits.promises else asks


def _check(results: ResultOptions, json_: Path | None) -> None:
    check_outputs(json_file(json_))
    if results.out is not None:
        check_folder("--out", results.out, ["runs.json", records_file(0), "stage_0.json"])
    if results.save_result or results.append_result:
        check_folder("--result-dir", results.result_dir, [results.result_filename or "vllm.json"])
    if results.append_result and results.result_filename:
        _check_text(results.result_dir / results.result_filename)


def _check_room(results: ResultOptions, plan: Plan, exact: bool) -> None:
    """ConfigError if the disk has no room for what is known beforehand."""
    if results.out is not None:
        size = expected_size(plan.asks, exact)
        check_room("--out", results.out, size.least, size.most)
    if results.save_detailed and (results.save_result or results.append_result):
        size = expected_size(plan.asks, exact, DETAILS_BYTES)
        check_room("--result-dir", results.result_dir, size.least, size.most)


def _check_text(path: Path) -> None:
    """ConfigError if a file that is there takes no line more, before anything is measured."""
    try:
        if path.is_file():
            path.read_text("utf-8")
    except ValueError:
        raise ConfigError(f"--append-result {path}: is no text in UTF-8") from None


def _save(run: Run, results: ResultOptions, since: Since) -> None:
    """As `--out` asks for it."""
    if results.out is not None:
        for path in write_runs(results.out, [run], write_text):
            wrote(path)
        write_text(path := results.out / "stage_0.json", json_text(summary(run, since)))
        wrote(path)


def _save_result(run: Run, results: ResultOptions, content: Mapping[str, Any]) -> None:
    """As `vllm bench serve` does."""
    if results.save_result or results.append_result:
        path = results.result_dir / (results.result_filename or _vllm_name(run))
        if results.append_result:
            append_line(path, json.dumps(content, allow_nan=False))
        else:
            write_text(path, json_text(content))
        wrote(path)


def _vllm_name(run: Run) -> str:
    told = summary(run)
    bound = f"-concurrency{told['max_concurrency']}" if told["max_concurrency"] else ""
    model = str(told["model_id"] or "model").rpartition("/")[2]
    return f"{told['backend']}-{told['request_rate']}qps{bound}-{model}-{told['date']}.json"


def end(run: Run) -> None:
    """How the command ends, after all is written."""
    if run.interrupted:
        problems.print(f"interrupted: {len(run.records)} requests had been offered")
        raise typer.Exit(INTERRUPTED)
    if not valid(run):
        raise typer.Exit(INVALID)
    if not any(record.done for record in run.records):
        problems.print("no request was done")
        raise typer.Exit(NOTHING_DONE)
