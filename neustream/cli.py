"""The command `neustream`: its table of commands, and how errors end it."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neustream.commands.line import typed
from neustream.errors import NeustreamError

if TYPE_CHECKING:
    import typer

COMMANDS = {
    "simulate": "Serve a workload in virtual time, by latency profiles.",
    "sweep": "Simulate over rates, burstinesses or SLOs; figures.",
    "plan": "Find which stages to put on which devices, and say why.",
    "models": "Say what a config's model is and what of it is measured.",
    "profile": "Measure every stage of a real model.",
    "trace": "Say what a trace holds: rate, burstiness, lengths.",
    "run": "Serve a workload for real, beside the prediction.",
    "serve": "Serve models over HTTP: OpenAI's routes, with promises.",
    "cluster": "Say how the instances of a cluster are.",
    "client": "Ask a server, and say what became of the promise.",
    "bench": "Put load on a server, a service or a simulator.",
}
"""Name -> what `neustream --help` says of it; the function is `command` in `neustream/commands/NAME.py`.

A file that has `COMMANDS` of its own is a group; those are in `neustream/commands/NAME_THEIRS.py`.
"""

EXITS = (
    "Exit codes: 0 all went well; 1 a fault of this library, with a traceback; 2 wrong arguments, "
    "config, files, device, policy or model, told in one line on stderr; 130 interrupted (Ctrl-C), "
    "with the results until then; 141 whoever read the output has seen enough."
)
LONGEST = 1500
"""Characters of a message: names in it may be longer than any file's."""


def main() -> None:
    """The entry point: errors of ours are one line and exit status 2."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # where --policy module:Class and kind: module:function are looked for
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises to install what is not needed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names in a config may be more than the terminal can show
    try:
        application(sys.argv[1:])()
    except NeustreamError as error:
        _complain(type(error).__name__, " ".join(str(error).split()))
    except OSError as error:
        what = f"{error.filename}: " if error.filename is not None else ""
        _complain("cannot read or write", f"{what}{error.strerror or error}")
    except KeyboardInterrupt:  # while modules are imported; later the command itself sees to it
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except MemoryError:
        _complain("MemoryError", "this experiment needs more memory than there is here")


def application(arguments: list[str]) -> typer.Typer:
    """The commands, of which only the one asked for is imported: `--help` needs none of what they do."""
    import typer  # here, so that Ctrl-C meanwhile is seen by `main`

    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # boxes would cost a third of the time that `--help` takes
        epilog=EXITS,
        help="SLO-aware serving of models that run in steps.",
    )
    words = [each for each in typed(arguments) if not each.startswith("-")]
    _fill(app, COMMANDS, "", words)
    return app


def _fill(app: typer.Typer, commands: Mapping[str, str], prefix: str, words: Sequence[str]) -> None:
    """Add commands, of which the one that the first word names is imported."""
    import typer

    for name, about in commands.items():
        if name != next(iter(words), None):
            app.command(name, short_help=about)(_not_asked)
            continue
        from neustream.commands.interrupts import interruptible

        module = importlib.import_module(f"neustream.commands.{prefix}{name.replace('-', '_')}")
        theirs = getattr(module, "COMMANDS", None)
        if theirs is None:
            cls = getattr(module, "CLASS", None)
            app.command(name, epilog=EXITS, cls=cls)(interruptible(module.command))
            continue
        group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, epilog=EXITS, help=module.__doc__)
        _fill(group, theirs, f"{name}_", words[1:])
        app.add_typer(group, name=name, short_help=about)


def _not_asked() -> None:
    """Stands for a command in the list."""


def _complain(kind: str, message: str) -> None:
    from neustream.commands.printing import problems

    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message[:LONGEST])
    problems.print(kind, style="bold red", end="")
    problems.print(f": {shown}{'...' if len(message) > LONGEST else ''}", soft_wrap=True)
    raise SystemExit(2) from None


if __name__ == "__main__":
    main()
