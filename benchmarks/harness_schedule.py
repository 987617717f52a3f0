"""Load generators of others and ours on one recorded schedule: do they count and measure the same?

    python benchmarks/harness_schedule.py [--vllm BIN/python] [--guidellm BIN/guidellm] [--requests 200] [--rate 10]

`make harness` installs them. The schedule is a file: when each request comes, how long its prompt is, how many
tokens it is to get. Each generator plays it against a stub in a process of its own, whose streams have a token
every 5 ms after 20 ms (`load_client.py`). Printed: what each counts, and its median TTFT, ITL and time of a
request, from the sending; beside it by how many ms these are off what the stub's own log says of the same requests.
The status is 1 where counts are not those of the schedule, or a median is over `--within` ms off ours.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from arguments import at_least_one
from harness import CLI, run
from load_client import Log, with_stub
from rich.console import Console

from neustream.analysis.tables import new_table
from neustream.backends.loading.texts import BYTES_TEMPLATE
from neustream.backends.transformers.from_config import byte_tokenizer
from neustream.workload.arrivals import gamma_arrivals

BLOCK = 16
"""Tokens of a block of a prompt (`hash_ids`), without which vLLM's client makes no prompt."""


@dataclass(frozen=True)
class Measured:
    """Counts, and medians in ms: TTFT, ITL, the whole request."""

    done: int
    failed: int
    tokens: int
    medians: tuple[float, float, float]


def schedule(path: Path, requests: int, rate: float, seed: int) -> int:
    """Write it; returns its tokens. JSON lines, seconds."""
    rng = np.random.default_rng(seed)
    arrivals = gamma_arrivals(requests, rate=rate, cv=1.0, seed=seed)
    outputs = rng.integers(2, 41, requests)
    lines, blocks = [], 0
    for at, output in zip(arrivals, outputs, strict=True):
        length = int(rng.integers(16, 129))
        count = -(-length // BLOCK)
        row = {"timestamp": round(float(at), 6), "input_length": length, "output_length": int(output)}
        lines.append(json.dumps({**row, "hash_ids": list(range(blocks, blocks + count))}))
        blocks += count
    path.write_text("\n".join(lines) + "\n")
    return int(outputs.sum())


def neustream(program: Path, url: str, folder: Path) -> Measured:
    command = [program, "-c", "from neustream.cli import main; main()", "bench", "serve", "--base-url", url]
    command += ["--model", "m", "--tokenizer", "bytes", "--dataset-name", "trace", "--trace-format", "guidellm"]
    command += ["--dataset-path", folder / "schedule.jsonl", "--ignore-eos", "--from-sent"]
    run([*command, "--num-prompts", 10**6, "--json", folder / "ours.json"], own=True)
    return _summed(json.loads((folder / "ours.json").read_text()))


def vllm(program: Path, url: str, folder: Path) -> Measured:
    command = [program, CLI, "bench", "serve", "--backend", "openai", "--base-url", url, "--model", "m"]
    command += ["--tokenizer", folder, "--dataset-name", "timed_trace", "--dataset-path", folder / "schedule.jsonl"]
    command += ["--timed-trace-chunk-hash-size", BLOCK, "--num-prompts", 10**6, "--ignore-eos"]
    command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result", "--result-dir", folder]
    run([*command, "--result-filename", "vllm.json"])
    return _summed(json.loads((folder / "vllm.json").read_text()))


def _summed(found: dict[str, Any]) -> Measured:
    medians = (found["median_ttft_ms"], found["median_itl_ms"], found["median_e2el_ms"])
    return Measured(found["completed"], found["failed"], found["total_output_tokens"], medians)


def guidellm(program: Path, url: str, folder: Path) -> Measured:
    path = folder / "guidellm.json"
    command = [program, "run", "--backend", f"kind=openai_http,target={url},model=m,request_format=/v1/completions"]
    command += ["--profile", "kind=replay,schedule_turn=timestamp"]
    command += ["--data", f"kind=trace_synthetic,source.kind=json_file,source.path={folder / 'schedule.jsonl'}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={folder}"]
    run([*command, "--output", f"kind=json,path={path}", "--disable-progress"])
    (benchmark,) = json.loads(path.read_text())["benchmarks"]
    metrics, totals = benchmark["metrics"], benchmark["metrics"]["request_totals"]
    tokens = sum(request["output_metrics"]["text_tokens"] for request in benchmark["requests"]["successful"])
    names = {"time_to_first_token_ms": 1.0, "inter_token_latency_ms": 1.0, "request_latency": 1e3}
    ttft, itl, whole = (metrics[name]["successful"]["median"] * unit for name, unit in names.items())
    return Measured(totals["successful"], totals["errored"] + totals["incomplete"], tokens, (ttft, itl, whole))


GENERATORS: dict[str, Callable[..., Measured]] = {
    "neustream": neustream,
    "vllm": vllm,
    "guidellm": guidellm,
}


def of_log(log: Log) -> tuple[float, float, float]:
    """The medians (ms) of what the stub itself did."""
    firsts = [sent[0] - came for came, *sent in log.values()]
    gaps = [later - earlier for _, *sent in log.values() for earlier, later in pairwise(sent)]
    whole = [sent[-1] - came for came, *sent in log.values()]
    ttft, itl, all_ = (float(np.median(seconds)) * 1e3 for seconds in (firsts, gaps, whole))
    return ttft, itl, all_


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neustream", type=Path, default=Path(sys.executable), help="the Python that runs ours")
    parser.add_argument("--vllm", type=Path, help="the Python of its venv; None: not tried")
    parser.add_argument("--guidellm", type=Path, help="the program; None: not tried")
    parser.add_argument("--requests", type=at_least_one, default=200)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, default=2.0)
    options = parser.parse_args(arguments)
    table = new_table("median ms, and off the log", "", ["done", "failed", "tokens", "TTFT", "ITL", "whole"])
    wrong, first = False, None
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = BYTES_TEMPLATE
        tokenizer.save_pretrained(folder)
        tokens = schedule(folder / "schedule.jsonl", options.requests, options.rate, options.seed)
        for name, play in GENERATORS.items():
            program = getattr(options, name)
            if program is None:
                continue
            found, log = with_stub(0, partial(play, program, folder=folder))
            assert isinstance(found, Measured)
            first = first or found
            cells = [
                f"{median:.2f}, {median - own:+.2f}" for median, own in zip(found.medians, of_log(log), strict=True)
            ]
            table.add_row(name, str(found.done), str(found.failed), str(found.tokens), *cells)
            off = max(abs(a - b) for a, b in zip(found.medians, first.medians, strict=True))
            counts = (found.done, found.failed, found.tokens)
            wrong = wrong or counts != (options.requests, 0, tokens) or off > options.within
    Console(markup=False, highlight=False).print(table)
    print(f"the schedule: {options.requests} requests, {tokens} tokens")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
