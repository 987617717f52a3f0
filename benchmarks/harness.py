"""Load generators of others against `neustream serve`: do they count what the server itself counts?

    python benchmarks/harness.py --vllm BIN/python --guidellm BIN/guidellm [--requests 40] [--rate 8]

`make harness` installs them, each in a venv of its own (1.8 and 1.5 GB), and runs this. A server in a
process of its own serves a tiny language model. Each generator sends completions and chats, streamed;
its successes, failures and tokens are put beside what the server's own metrics grew by meanwhile. Where
they differ, the status is 1. `--looks` allows for requests that a generator sends and does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import at_least_one
from http_load import Served, serving, total
from rich.console import Console

from neustream.analysis.tables import new_table
from neustream.backends.demo import TEXT
from neustream.backends.loading.texts import BYTES_TEMPLATE
from neustream.backends.transformers.from_config import byte_tokenizer

MODEL = "text"
PROMPT, OUTPUT = 32, 16
LONGEST_S = 900.0
"""Of one run of a generator; its imports alone take a minute on a small machine."""
CONFIG = {
    "models": [
        {
            "name": MODEL,
            "kind": "text",
            "backend": TEXT,
            "tokenizer": "bytes",
            "options": {"measure_s": 3.0, "slots": 16},
        }
    ],
    "limits": {"max_queued": 1000},
}


@dataclass(frozen=True)
class Count:
    """Requests that are done, others, and tokens that were generated."""

    done: int
    failed: int
    tokens: int


def own(server: Served) -> Count:
    """What the server has counted so far."""
    samples = server.metrics()
    done = total(samples, "request_success_total")
    other = total(samples, "requests_total") - done
    return Count(int(done), int(other), int(total(samples, "generation_tokens_total")))


CLI = Path(__file__).parent.parent / "tests/vllm/vllm_cli.py"
"""vLLM's command, which does not start by itself where its CPU wheel is installed."""


def neustream(program: Path, server: Served, folder: Path, options: argparse.Namespace, chat: bool) -> Count:
    """`neustream bench serve`, by this Python."""
    command = [program, "-c", "from neustream.cli import main; main()", "bench", "serve", "--base-url", server.url]
    command += ["--backend", "openai-chat" if chat else "openai", "--model", MODEL, "--tokenizer", "bytes"]
    command += ["--random-input-len", PROMPT, "--random-output-len", OUTPUT, "--ignore-eos"]
    command += ["--num-prompts", options.requests, "--request-rate", options.rate]
    command += ["--json", folder / "neustream.json"]
    run(command, own=True)
    found = json.loads((folder / "neustream.json").read_text())
    return Count(found["completed"], found["failed"], found["total_output_tokens"])


def vllm(program: Path, server: Served, folder: Path, options: argparse.Namespace, chat: bool) -> Count:
    """`vllm bench serve`."""
    route = "/v1/chat/completions" if chat else "/v1/completions"
    command = [program, CLI, "bench", "serve", "--backend", "openai-chat" if chat else "openai"]
    command += ["--base-url", server.url, "--endpoint", route, "--model", MODEL, "--tokenizer", folder]
    command += ["--dataset-name", "random", "--random-input-len", PROMPT, "--random-output-len", OUTPUT]
    command += ["--num-prompts", options.requests, "--request-rate", options.rate]
    command += ["--goodput", "ttft:2000", "tpot:400", "--save-result", "--result-dir", folder]
    command += ["--result-filename", "vllm.json"]
    run(command)
    found = json.loads((folder / "vllm.json").read_text())
    failed = found.get("failed", options.requests - found["completed"])
    return Count(found["completed"], failed, found["total_output_tokens"])


def guidellm(program: Path, server: Served, folder: Path, options: argparse.Namespace, chat: bool) -> Count:
    """`guidellm run`."""
    route = "/v1/chat/completions" if chat else "/v1/completions"
    path = folder / "guidellm.json"
    command = [program, "run"]
    command += ["--backend", f"kind=openai_http,target={server.url},model={MODEL},request_format={route}"]
    command += ["--profile", f"kind=constant,rate={options.rate:g}"]
    command += ["--constraint", f"kind=max_requests,count={options.requests}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={folder}"]
    command += ["--output", f"kind=json,path={path}", "--disable-progress"]
    run(command)
    (benchmark,) = json.loads(path.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    tokens = sum(_tokens(request) for request in benchmark["requests"]["successful"])
    return Count(totals["successful"], totals["errored"] + totals["incomplete"], tokens)


def _tokens(request: dict[str, Any]) -> int:
    """Generated tokens of one request."""
    count: int = request["output_metrics"]["text_tokens"]
    return count


def run(command: list[Any], own: bool = False) -> None:
    """Run a generator; ours is of this environment, and has status 3 where it was late itself."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if not own:
        environment.pop("PYTHONPATH", None)  # its own venv, and nothing else
    words = [str(part) for part in command]
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{' '.join(words[:3])} had not ended after {LONGEST_S:g} s") from None
    if done.returncode not in ((0, 3) if own else (0,)):
        raise SystemExit(f"{' '.join(map(str, command[:3]))} ended with {done.returncode}:\n{done.stderr[-2000:]}")


HARNESSES: dict[str, Callable[[Path, Served, Path, argparse.Namespace, bool], Count]] = {
    "neustream": neustream,
    "vllm": vllm,
    "guidellm": guidellm,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neustream", type=Path, default=Path(sys.executable), help="the Python that runs ours")
    parser.add_argument("--vllm", type=Path, help="the Python of its venv; None: not tried")
    parser.add_argument("--guidellm", type=Path, help="the program; None: not tried")
    parser.add_argument("--requests", type=at_least_one, default=40)
    parser.add_argument("--rate", type=float, default=8.0)
    parser.add_argument(
        "--looks", type=int, default=0, help="requests that a generator may send beside those it counts"
    )
    options = parser.parse_args(arguments)
    table = new_table("counted", "", ["done", "server", "failed", "server", "tokens", "server"])
    wrong = False
    with serving(CONFIG) as server, tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = BYTES_TEMPLATE
        tokenizer.save_pretrained(folder)
        for name, count in HARNESSES.items():
            program = getattr(options, name)
            for chat in () if program is None else (False, True):
                before = own(server)
                theirs = count(program, server, folder, options, chat)
                after = own(server)
                ours = Count(after.done - before.done, after.failed - before.failed, after.tokens - before.tokens)
                cells = [theirs.done, ours.done, theirs.failed, ours.failed, theirs.tokens, ours.tokens]
                table.add_row(f"{name}, {'chats' if chat else 'texts'}", *map(str, cells))
                wrong = wrong or not same(theirs, ours, options.looks)
    Console(markup=False, highlight=False).print(table)
    return 1 if wrong else 0


def same(theirs: Count, ours: Count, looks: int) -> bool:
    """Whether two counts agree, but for some requests by which a generator sees whether anybody is there."""
    more = ours.done - theirs.done
    return 0 <= more <= looks and theirs.failed == ours.failed and 0 <= ours.tokens - theirs.tokens <= more * OUTPUT


if __name__ == "__main__":
    sys.exit(main())
