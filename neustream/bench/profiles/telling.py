"""What a profile asks for, told: for `--dry-run`, and as data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from neustream.bench.profiles.profile import Load, Profile
from neustream.bench.profiles.words import Words
from neustream.workload.texts import Texts


def told(profile: Profile, texts: Texts) -> dict[str, Any]:
    """As JSON has it."""
    target = profile.target
    return {
        "profile": str(profile.path),
        "dialect": profile.dialect,
        "target": {
            "url": target.url,
            "model": target.model,
            "api": target.api,
            "stream": target.stream,
            "ignore_eos": target.ignore_eos,
            "timeout_s": target.timeout_s,
            "headers": sorted([*target.headers, *target.told_headers]),
        },
        "requests": None if profile.source is None else str(profile.source),
        "tokens": tokens_of(profile, texts),
        "slo": {**profile.limits.to_dict(), **profile.constraints},
        "stages": [_load(load) for load in profile.played_first],
        "sweep": None if profile.sweep is None else str(profile.sweep),
        "pause_s": profile.pause_s,
        "warmups": profile.warmups,
        "seed": profile.seed,
        "models": list(profile.models),
        "shares": list(profile.shares),
        "ignored": {each.key: each.why for each in profile.left},
        "notes": list(profile.notes),
        "lacks": list(profile.lacks),
    }


def _load(load: Load) -> dict[str, Any]:
    return {
        "load": str(load),
        "rate": load.rate,
        "concurrency": load.concurrency,
        "requests": load.requests,
        "duration_s": load.duration_s,
        "arrivals": load.law,
    }


def lines(profile: Profile, texts: Texts) -> Iterator[str]:
    """In sentences, the stages one a line."""
    yield f"{profile.path}: {profile.dialect}"
    yield from _asked(profile, texts)
    slo = {**profile.limits.to_dict(), **profile.constraints}
    if promises := ", ".join(f"{key} {value:g}" for key, value in slo.items() if key != "weight"):
        yield f"promises, in seconds: {promises}"
    if profile.warmups:
        yield f"before all: {profile.warmups} requests of which nothing is kept"
    for number, load in enumerate(profile.played_first):
        yield f"stage {number}: {load}"
    if profile.sweep is not None:
        yield f"then: {profile.sweep}"
    yield from _total(profile)
    yield from (f"ignored: {each.key}: {each.why}" for each in profile.left)
    yield from (f"note: {text}" for text in profile.notes)
    yield from (f"needed before a run: {text}" for text in profile.lacks)


def _asked(profile: Profile, texts: Texts) -> Iterator[str]:
    """Who is asked, and for what."""
    target = profile.target
    server = target.url or "a server"
    if profile.source is None:
        yield f"asks {server} until it tells its models, and sends no load"
        return
    model = target.model or "its first model"
    answers = "streamed" if target.stream else "whole"
    exact = ", exactly as long as asked" if target.ignore_eos else ""
    yield f"asks {server}, {model}: {target.api}, {answers}{exact}"
    yield f"requests: {profile.source}"
    if profile.models:
        yield _models(profile)
    yield f"tokens: {tokens_of(profile, texts)}"


def _models(profile: Profile) -> str:
    if not profile.shares:
        how = "in turns" if profile.in_turns else "drawn"
        return f"models, {how}: {', '.join(profile.models)}"
    pairs = zip(profile.models, profile.shares, strict=True)
    return f"models, drawn: {', '.join(f'{name} {share:.0%}' for name, share in pairs)}"


def tokens_of(profile: Profile, texts: Texts) -> str:
    """How tokens are counted."""
    if texts.exact:
        return f"by the server's usage, else by {texts.name}; prompts are cut by that too"
    name = (
        f"tokenizer {profile.tokenizer!r} is no local file" if profile.tokenizer else "no tokenizer"
    )
    word = "a word for each token"
    if isinstance(texts, Words):
        word = f"words of {1 / texts.a_token:.2f} tokens, as the server counts"
    return f"by the server's usage, else by events ({name}: prompts have {word})"


def _total(profile: Profile) -> Iterator[str]:
    loads = profile.played_first
    if not loads:
        return
    known = [load.requests for load in loads]
    count = sum(number for number in known if number is not None)
    requests = f"{count:,} requests" + (" and more" if None in known else "")
    seconds = [load.seconds for load in loads if load.seconds is not None]
    pauses = profile.pause_s * (len(loads) - 1)
    least = f"at least {sum(seconds) + pauses:,.0f} s" if seconds else "as long as they take"
    yield f"in all: {len(loads)} stage{'s' if len(loads) > 1 else ''}, {requests}, {least}"
