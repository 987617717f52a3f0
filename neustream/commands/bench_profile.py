"""`neustream bench profile`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from neustream.bench.looking import models_of
from neustream.bench.plan import Plan
from neustream.bench.profiles import (
    Given,
    Profile,
    Unrunnable,
    read_profile,
)
from neustream.bench.profiles.running import expected_bytes
from neustream.bench.profiles.server import readiness, with_model, words_a_token
from neustream.bench.profiles.telling import lines, told
from neustream.bench.profiles.words import Words, tokenizer_of
from neustream.bench.reports.building import About
from neustream.bench.reports.folder import report_file, write_reports, yaml_text
from neustream.bench.reports.nothing import report_of_nop
from neustream.bench.reports.stack import read_stack
from neustream.bench.runs import Run, write_runs
from neustream.bench.summary import summary, valid
from neustream.commands.bench_playing import CountingTexts
from neustream.commands.bench_printing import say_warnings, show_runs
from neustream.commands.bench_reporting import SentOption, StackOption, since_of
from neustream.commands.interrupts import INTERRUPTED, Interrupts
from neustream.commands.options import JsonOption, QuietOption
from neustream.commands.outputs import (
    check_folder,
    check_outputs,
    check_room,
    json_file,
    json_output,
    write_each,
    write_text,
)
from neustream.commands.printing import console, hushed, new_progress, note, notes, problems, wrote
from neustream.errors import BackendError, ConfigError
from neustream.workload.texts import Texts

NOP_S = 600.0
"""How long a profile of nop waits for the server."""
TOO_LATE = 3
"""The exit code for results that are not valid, since the client was late."""
NOT_RUN = 4
"""The exit code for a profile that is read, and asks for what neustream does not do."""


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The profile, as YAML.")],
    base_url: Annotated[
        str | None, typer.Option(help="Of the server; or LLMDBENCH_HARNESS_STACK_ENDPOINT_URL.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Its name; or LLMDBENCH_DEPLOY_CURRENT_MODEL.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer.json, or its folder, to make and count texts by.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--override", "-o", metavar="PATH=VALUE", help="As load.stages.0.rate=2."),
    ] = None,
    harness: Annotated[str | None, typer.Option(help="The tool that it is for; default: told by its keys.")] = None,
    lenient: Annotated[bool, typer.Option(help="Leave out keys that its tool does not know.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and ask no server.")] = False,
    report: Annotated[Path | None, typer.Option(help="Folder for all results; default: results-NAME.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes of the client.")] = 1,
    scrape_s: Annotated[
        float,
        typer.Option(min=0, max=3600, help="Read the server's /metrics so often, for the reports; 0: not."),
    ] = 0.0,
    sent: SentOption = False,
    stack: StackOption = None,
    wait_s: Annotated[
        float | None,
        typer.Option(
            "--ready-check-timeout-sec",
            min=0,
            max=86_400,
            help="Wait so long for the server; default: 600 for a profile of nop, else 0.",
        ),
    ] = None,
    json_: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run one of llm-d-benchmark's workload profiles, and write its reports.

    Read in the dialects of inference-perf, guidellm, vllm-benchmark and nop. Exit codes beside those
    below: 3 the client was too late; 4 the profile asks for something that is not run here; key and reason are told.
    """
    given = Given(model, tokenizer, base_url, override or (), harness, lenient)
    with json_output(json_) as write, hushed(quiet):
        check_outputs(json_file(json_))
        try:
            profile = read_profile(file, given)
        except Unrunnable as error:
            problems.print(f"not run: {error}", soft_wrap=True)
            raise typer.Exit(NOT_RUN) from None
        texts = Texts(tokenizer if tokenizer is not None else tokenizer_of(profile.tokenizer))
        if dry_run:
            for line in lines(profile, texts):
                console.print(line, soft_wrap=True)
            write(told(profile, texts))
            return
        if profile.lacks:
            raise ConfigError(f"{file}: needs {'; '.join(profile.lacks)}")
        about = About(
            description=file.name.removesuffix(".in").removesuffix(".yaml"),
            config={"dialect": profile.dialect, "profile": profile.values},
            stack=read_stack(stack),
            since=since_of(sent),
            constraints=profile.constraints,
        )
        folder = report or Path(f"results-{about.description}")
        check_folder("--report", folder, ["runs.json", report_file(0)])
        size = expected_bytes(profile, texts)
        check_room("--report", folder, size.least, size.most)
        if profile.dialect == "nop":
            _wait(profile, about, folder, wait_s, write)
        else:
            _run(profile, texts, about, folder, workers, wait_s, scrape_s, write)


def _wait(profile: Profile, about: About, folder: Path, wait_s: float | None, write: Callable[[Any], None]) -> None:
    """Time how long the server takes to be ready."""
    ready = readiness(profile.target, NOP_S if wait_s is None else wait_s)
    found = report_of_nop(profile.target, ready, about)
    write_text(path := folder / report_file(0), yaml_text(found))
    console.print(f"ready after {ready.seconds:.3f} s: {', '.join(ready.models)}", soft_wrap=True)
    wrote(path)
    write(found.content())


def _run(
    profile: Profile,
    texts: Texts,
    about: About,
    folder: Path,
    workers: int,
    wait_s: float | None,
    scrape_s: float,
    write: Callable[[Any], None],
) -> None:
    from neustream.bench.load import Options
    from neustream.bench.profiles.running import Running

    target = with_model(profile.target, models_of(profile.target, wait_s or 0.0))
    if not texts.exact and (words := words_a_token(target)) is not None:
        texts = Words(words)
        notes.print(f"no tokenizer: a word is {1 / words:.2f} tokens for this server", soft_wrap=True)
    options = Options(workers, CountingTexts(texts) if texts.exact else None)
    runs: list[Run] = []
    with new_progress() as progress, Interrupts() as interrupts:
        task = progress.add_task("drawing requests", total=None)

        def begin(number: int, plan: Plan) -> None:
            progress.reset(task, total=len(plan.asks), description=f"{_stage(number)}: {plan.name}")

        running = Running(
            profile,
            target,
            texts,
            options=options,
            scrape_s=scrape_s,
            begins=begin,
            tick=lambda record: progress.advance(task),
        )
        interrupts.watch(running)
        fault: BackendError | None = None
        try:
            for run in running.runs():
                runs.append(run)
                note(progress, f"stage {len(runs) - 1}: {run.name}")
        except BackendError as error:  # what was played before is written all the same
            fault = error
    _finish(told(profile, texts), about, folder, runs, running.interrupted, write)
    if fault is not None:
        raise fault
    if not all(map(valid, runs)):
        raise typer.Exit(TOO_LATE)


def _stage(number: int) -> str:
    return f"stage {number}" if number >= 0 else "probe"


def _finish(
    plan: Mapping[str, Any],
    about: About,
    folder: Path,
    runs: Sequence[Run],
    interrupted: bool,
    write: Callable[[Any], None],
) -> None:
    """Show and write what there is."""
    if runs:
        show_runs([(run.name, run) for run in runs], about.since)
        for run in runs:
            say_warnings(run, summary(run, about.since))
            if "note" in run.meta:
                problems.print(f"{run.name}: {run.meta['note']}", soft_wrap=True)
        more = {
            "harness_name": "neustream",
            "harness_workload": Path(plan["profile"]).name,
            "harness_args": f"bench profile {plan['profile']}",
            "harness_rc": INTERRUPTED if interrupted else 0,
        }
        write_each(
            lambda: _wrote(write_runs(folder, runs, write_text, profile=plan)[:1]),
            lambda: _wrote(write_reports(folder, runs, about, write_text, **more)),
            lambda: write([summary(run, about.since) for run in runs]),
        )
    if interrupted:
        problems.print(f"interrupted: {len(runs)} stages are written", soft_wrap=True)
        raise typer.Exit(INTERRUPTED)


def _wrote(paths: Sequence[Path]) -> None:
    for path in paths:
        wrote(path)
