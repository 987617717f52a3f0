"""`neustream client`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from neustream.analysis.tables import new_table
from neustream.commands.asking import Server, Told, budgets, judge
from neustream.commands.keys import keys_in
from neustream.commands.options import JsonOption, QuietOption
from neustream.commands.outputs import check_outputs, json_file, json_output
from neustream.commands.printing import console, hushed, notes, problems
from neustream.errors import ConfigError, nearest

STATUS = {"done": 0, "on_time": 0, "refused": 2, "late": 3, "dropped": 4, "failed": 5}
"""Exit codes by outcome."""
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
KEY = "NEUSTREAM_API_KEY"


def command(
    prompt: Annotated[str, typer.Argument(help="Of a text or an image.")],
    url: Annotated[str, typer.Option(help="Of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Which, if there are several.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Of an image: .png, .jpg or .webp.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of a text; default: 64.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message of a chat.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=100.0, help="Of a text; default: 0.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=200, help="Of an image.")] = None,
    size: Annotated[str | None, typer.Option(help="Of an image, as 512x512.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what is drawn at random.")] = None,
    ttft_ms: Annotated[float | None, typer.Option(min=0.001, help="Promise: until the first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(min=0.001, help="Promise: each token after it.")] = None,
    e2e_ms: Annotated[float | None, typer.Option(min=0.001, help="Promise: all of it.")] = None,
    class_: Annotated[str | None, typer.Option("--class", help="A class of promises of the server.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help=f"A file with a key; or set {KEY}.")] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, max=86_400.0, help="Of each read.")] = 300.0,
    json_: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Ask a server for one text or image, and say what became of its promise.

    A text is printed as it comes. Exit codes beside those below: 3 it was late; 4 the server gave it
    up, or had no room; 5 it failed, or the stream was cut.
    """
    with json_output(json_) as write, hushed(quiet):
        files = [] if out is None else [("--out", out)]
        check_outputs([*files, *json_file(json_)])
        key = keys_in(api_key_file)[0] if api_key_file else os.environ.get(KEY)
        server = Server(url, key, timeout_s)
        name, kind = _model(server, model, image=out is not None)
        of_text = {"max_tokens": max_tokens, "temperature": temperature, "chat": chat or None}
        of_image = {"num_inference_steps": steps, "size": size}
        slo = {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "e2e_ms": e2e_ms, "class": class_}
        body = {"model": name, "seed": seed, "slo": _given(slo)}
        if out is not None:
            _none_of(of_text, kind)
            path = "/v1/images/generations"
            body |= {"prompt": prompt, "output_format": _format(out), **of_image}
        else:
            _none_of(of_image, kind)
            path = "/v1/chat/completions" if chat else "/v1/completions"
            body |= _text(prompt, chat, max_tokens, temperature)
        found = server.ask(path, _given(body), lambda piece: console.print(piece, end="", soft_wrap=True))
        promised = budgets(found.promised)
        judge(found, promised)
        if found.image and out is not None:
            out.write_bytes(found.image)
            console.print(f"wrote {out}", soft_wrap=True)
        elif found.text:
            console.print()
        _show(found, promised)
        record = asdict(found)
        del record["image"]
        write({"url": url, "model": name, "kind": kind, **record, "promised": promised})
    if status := STATUS[found.outcome]:
        raise typer.Exit(status)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _none_of(options: Mapping[str, Any], kind: str) -> None:
    """ConfigError if one of these is given, of another kind of request."""
    for name in _given(options):
        option = {"num_inference_steps": "steps"}.get(name, name).replace("_", "-")
        raise ConfigError(f"--{option} is nothing for a model that makes {kind}s")


def _text(prompt: str, chat: bool, max_tokens: int | None, temperature: float | None) -> dict[str, Any]:
    """The body of a streamed text."""
    asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    return {
        **asked,
        "max_tokens": max_tokens or 64,
        "temperature": temperature or 0.0,
        "stream": True,
        "stream_options": {"include_usage": True, "include_slo": True},
    }


def _format(path: Path) -> str:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"--out {path}: an image is {', '.join(FORMATS)}")
    return kind


def _model(server: Server, name: str | None, *, image: bool) -> tuple[str, str]:
    """The model that is meant, and its kind; ConfigError unless it is clear."""
    models = server.models()
    if name is None:
        wanted = "image" if image else "text"
        fitting = [each for each, kind in models.items() if kind == wanted]
        if len(fitting) != 1:
            what = "one of images" if image else "a text model"
            raise ConfigError(f"--model: {what} is needed; served: {', '.join(models) or 'none'}")
        return fitting[0], wanted
    if name not in models:
        raise ConfigError(f"--model {name!r}: {nearest(name, models)}")
    kind = models[name]
    if (kind == "image") != image:
        hint = "give --out FILE" if kind == "image" else "a text goes to stdout, without --out"
        raise ConfigError(f"model {name!r} makes {kind}s: {hint}")
    return name, kind


# -- what is printed --------------------------------------------------------------------------------


def _show(found: Told, promised: dict[str, float]) -> None:
    """What became of the promise: in a line, with the times in a table."""
    line = found.outcome.replace("_", " ")
    if found.outcome == "done":
        line += ", nothing was promised"
    if found.reason:
        line += f" ({found.code or 'error'}, status {found.status}): {found.reason}"
    if found.retry_after_s is not None:
        line += f"; again in {found.retry_after_s:g} s"
    well = found.outcome in ("done", "on_time")
    (notes if well else problems).print(line, style="bold green" if well else "bold red", soft_wrap=True)
    if found.warning:
        notes.print(f"not taken: {found.warning}", soft_wrap=True)
    seen = {"ttft": found.ttft_s, "tpot": found.tpot_s, "e2e": found.e2e_s}
    if found.outcome in ("done", "on_time", "late"):
        table = new_table("milliseconds", "", ["promised", "by the server", "seen here"])
        for name, seconds in seen.items():
            told = found.server.get(f"{name}_ms")
            table.add_row(name, _ms(promised.get(name)), _ms(told and told / 1e3), _ms(seconds))
        notes.print(table)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"
