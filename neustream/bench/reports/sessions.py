"""Conversations of a run: how many went through to their end, and how long they took."""

from __future__ import annotations

from collections import defaultdict

from neustream.bench.records import Record
from neustream.bench.reports.figures import Figures, only_mean, statistics
from neustream.bench.reports.schema import Sessions

NEVER = ("blocked", "interrupted")
"""Ends of turns that came to nothing because of something else."""


def sessions(figures: Figures) -> Sessions | None:
    """Of the requests that belong to a session; None if none does."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in figures.run.records:
        if record.session:
            found[record.session].append(record)
    if not found:
        return None
    turns = list(found.values())
    good = [each for each in turns if all(record.done for record in each)]
    cancelled = [sum(record.outcome in NEVER for record in each) for each in turns]
    return Sessions(
        total=len(turns),
        succeeded=len(good),
        failed=len(turns) - len(good),
        total_events=sum(map(len, turns)),
        total_events_completed=sum(record.done for each in turns for record in each),
        total_events_cancelled=sum(cancelled),
        session_rate=only_mean(figures.rate(len(good)), "queries/s"),
        session_duration=statistics(map(_seconds, good), "s"),
        events_per_session=statistics(map(len, turns), "count"),
        events_cancelled_per_session=statistics(cancelled, "count"),
        input_tokens_per_session=statistics(
            (sum(record.input_tokens or 0 for record in each if record.done) for each in turns),
            "count",
        ),
        output_tokens_per_session=statistics(
            (sum(record.output_tokens or 0 for record in each if record.done) for each in turns),
            "count",
        ),
    )


def _seconds(turns: list[Record]) -> float | None:
    ends = [record.end_s for record in turns if record.end_s is not None]
    return max(ends) - min(record.scheduled_s for record in turns) if ends else None
