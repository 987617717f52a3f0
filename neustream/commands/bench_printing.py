"""What the commands of `neustream bench` print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from neustream.analysis.tables import new_table
from neustream.bench.records import FAILURES, Since
from neustream.bench.runs import Run
from neustream.bench.shares import Share
from neustream.bench.summary import summary
from neustream.commands.printing import console, notes, problems, wrote
from neustream.workload.asks import Ask

APART = 0.1
"""Prompts are as long as was asked for if they are off by less than this share."""
FIGURES = ("cdfs.png", "rates.png", "scales.png", "throughput.png")


def share_of(told: Mapping[str, Any] | None) -> str:
    """A share as a summary has it, with its interval."""
    return "-" if told is None else str(Share(told["number"], told["of"]))


def show_runs(runs: Sequence[tuple[str, Run]], since: Since) -> None:
    """Print two tables with a row for each load: what became of all that was offered, and latencies."""
    kept = new_table("", "", ["offered/s", "of", "done", "SLO met (95 %)", "goodput/s"])
    spread = new_table("milliseconds, of requests that are done", "", ["TTFT", "p99", "TPOT", "p99", "E2E", "p99"])
    for name, run in runs:
        told = summary(run, since)
        rate = run.plan.get("rate")
        cells = ["-" if rate is None else f"{rate:g}", str(told["offered"]), str(told["completed"])]
        kept.add_row(name, *cells, share_of(told.get("slo_attainment")), _number(told.get("goodput_all"), 2))
        kinds = [f"{rank}_{kind}_ms" for kind in ("ttft", "tpot", "e2el") for rank in ("median", "p99")]
        spread.add_row(name, *(_number(told[kind], 1) for kind in kinds))
    console.print(kept)
    console.print(spread)


def show_run(run: Run, since: Since) -> None:
    """Print what came of one load: totals, latencies, failures, classes, and the client's own part."""
    told = summary(run, since)
    console.print(_totals(told))
    if told["completed"]:
        console.print(_latencies(told))
    if told["failures"]:
        console.print(_failures(told["failures"]))
        _say_examples(run)
    if "classes" in told:
        console.print(_classes(told["classes"]))
    lag = told["client_lag_ms"]
    events = run.client.get("events") or 0
    cost = f", {run.client['cpu_s'] / events * 1e6:.0f} us an event" if events and "cpu_s" in run.client else ""
    console.print(f"client: lag p50 {lag['p50']:.1f} ms, p99 {lag['p99']:.1f} ms{cost}")
    say_warnings(run, told)


def say_lengths(run: Run, asks: Iterable[Ask], tokenizer: str | None) -> None:
    """Say if prompts are longer or shorter than was asked for, as the server counts them.

    tokenizer: by which they were made; None: by words.
    """
    asked = {ask.id: ask.input_tokens for ask in asks if ask.input_tokens and not ask.follows}
    heard = [each for each in run.records if each.counted_by == "usage" and each.id in asked and each.input_tokens]
    wanted = sum(asked[each.id] or 0 for each in heard)
    got = sum(each.input_tokens or 0 for each in heard)
    if heard and not 1 - APART < got / wanted < 1 + APART:
        why = "--tokenizer says which are its own"
        if tokenizer is not None:
            why = f"its tokens may be others than those of --tokenizer {tokenizer}, and a chat's template adds some"
        notes.print(
            f"prompts have {got / wanted:.3g} times the tokens that were asked for, as the server counts them; {why}",
            soft_wrap=True,
        )


def say_warnings(run: Run, told: Mapping[str, Any]) -> None:
    """Say what a reader of the results must know."""
    for sentence in told["client_warnings"]:
        problems.print(sentence, soft_wrap=True)
    counted = set(told["tokens_counted_by"]) - {"usage"}
    if counted:
        problems.print(f"the server tells no usage of some: tokens counted by {', '.join(sorted(counted))}")


def _totals(told: Mapping[str, Any]) -> Table:
    table = new_table("", "", [""])
    rows = {
        "offered": f"{told['offered']}",
        "done": f"{told['completed']} in {told['duration']:.2f} s, {told['request_throughput']:.2f}/s",
        "failed": share_of(told["failed_share"]),
    }
    if told["total_output_tokens"] or "images" not in told:
        rows["tokens in, out"] = f"{told['total_input_tokens']}, {told['total_output_tokens']}"
        rows["output tokens/s"] = f"{told['output_throughput']:.1f}"
    if "slo_attainment" in told:
        rows["SLO met"] = share_of(told["slo_attainment"])
        rows["goodput/s"] = f"{told['goodput_all']:.3f}"
        scale = told["slo_scale_at_90"]
        rows["90 % at SLO scale"] = "none" if scale is None else f"{scale:.3g}"
    if told.get("bound_ratio") is not None:
        rows["of the bound"] = f"{told['bound_ratio']:.3f}"
    if "images" in told:
        rows["images"] = f"{told['images']}, {told['image_throughput']:.2f}/s"
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _latencies(told: Mapping[str, Any]) -> Table:
    ranks = ("mean", "p50", "p90", "p99")
    table = new_table(f"milliseconds from {told['since']}, of requests that are done", "", list(ranks))
    for kind, title in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2E")):
        if told[f"mean_{kind}_ms"] is not None:
            table.add_row(title, *(_number(told[f"{rank}_{kind}_ms"], 2) for rank in ranks))
    return table


def _failures(counts: Mapping[str, int]) -> Table:
    table = new_table("failures", "", ["requests", "meaning"])
    for name, count in counts.items():
        status = name.removeprefix("status_")
        meaning = f"status {status}" if status != name else FAILURES[name]  # type: ignore[index]
        table.add_row(name, str(count), meaning)
    return table


def _say_examples(run: Run) -> None:
    """Say what was first heard of each kind of failure."""
    heard: set[tuple[str, int]] = set()
    for record in run.records:
        kind = (record.outcome, record.status)
        if record.error and not record.done and kind not in heard:
            heard.add(kind)
            name = f"status {record.status}" if record.outcome == "status" else record.outcome
            console.print(f"{name}, first of request {record.id}: {record.error}", soft_wrap=True)


def _classes(classes: Mapping[str, Mapping[str, Any]]) -> Table:
    table = new_table("by class", "", ["SLO met (95 %)", "done", "TTFT p50 ms", "E2E p50 ms"])
    for name, told in classes.items():
        medians = [_number(told[f"median_{kind}_ms"], 1) for kind in ("ttft", "e2el")]
        table.add_row(name or "no class", share_of(told["slo_attainment"]), str(told["completed"]), *medians)
    return table


def write_figures(named: Mapping[str, Sequence[Run]], folder: Path, since: Since) -> None:
    """Draw all figures that the runs have something for."""
    from neustream.bench import figures

    wrote(figures.plot_cdfs(named, folder / "cdfs.png", since))
    if any(record.limits.promises for runs in named.values() for run in runs for record in run.records):
        wrote(figures.plot_scales(named, folder / "scales.png", since))
        if any(len(runs) > 1 for runs in named.values()):
            wrote(figures.plot_rates(named, folder / "rates.png", since))
    if any(len(runs) > 1 for runs in named.values()):
        wrote(figures.plot_throughput(named, folder / "throughput.png", since))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
