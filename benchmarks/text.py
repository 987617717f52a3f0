"""Language models side by side in one run: `generate`, `generate_batch`, vLLM on CPU, and ours.

    OMP_NUM_THREADS=1 python benchmarks/text.py --vllm .venv-vllm/bin/python --out benchmarks/results/text.json
    OMP_NUM_THREADS=1 python benchmarks/text.py --models tiny --rounds 1

    python benchmarks/text.py --device cuda:0 --dtype float16 --models opt-13b --each 2 --rounds 1 --seconds 100

Models are Llamas with random weights, one of them with the sizes of SmolLM-135M; by name also OPTs and a Llama 3 with
the sizes of real ones (`text_models.py`). Requests have prompts of 16 to 127 tokens at random, and 16 to 95 outputs. So
many are under way at once; when one ends, the next is asked. Systems take turns, so that what else the machine does
falls on all; figures are medians over rounds. All have the same weights.
`generate` serves one after the other. `generate_batch` is the manager behind it, which streams. vLLM has a
process of its own, steps its engine in place (`text_vllm.py`), on CUDA with its graphs and its compiler unless
`--vllm-options` say otherwise, and is left out where `--vllm` names no Python that has it. Ours reads larger linear
layers in oneDNN's layout on a CPU; the plain one has `prepack=False`. On CUDA its decodes are graphs; one more has
`graphs=False`. What fails is told, and left out. Greedy tokens are compared with those of `generate`, as far as it was
asked: `other` counts requests with a difference. An empty `--beside` leaves out all but vLLM and ours, which are
compared with each other then. With `--handed`, ours is also measured with all turns of the engine on its own thread:
none follows a brief step on the worker's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import logging
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from all_causal_models import Flat
from arguments import at_least_one
from rich.console import Console
from text_models import LENGTH, MODELS, PREPACKED, SMALL, made
from transformers.generation.streamers import BaseStreamer

import neustream as ns
from neustream.analysis.tables import new_table
from neustream.backends.copies import twin
from neustream.backends.torch import device_name
from neustream.errors import told
from neustream.profiling import versions

BLOCK = 32
"""Tokens of a block of `generate_batch`, which takes all memory where it is not told how many."""
CONCURRENT = (1, 8, 32)
SAID = 3000
"""Of what vLLM says before it ends, so many last characters are shown."""
BESIDE = ("generate", "generate_batch", "ours, plain")
"""What may be left out."""


@dataclass(frozen=True)
class Work:
    prompts: list[list[int]]
    counts: list[int]

    def first(self, requests: int) -> Work:
        return Work(self.prompts[:requests], self.counts[:requests])


@dataclass(frozen=True)
class Served:
    """What a client saw of one request, in seconds from the beginning of the run."""

    asked: float
    first: float
    last: float
    tokens: list[int]


System = Callable[[Work, int], list[Served]]


def work_of(requests: int, vocabulary: int, seed: int) -> Work:
    draw = random.Random(seed)
    prompts = [[draw.randrange(4, vocabulary) for _ in range(draw.randint(16, 127))] for _ in range(requests)]
    return Work(prompts, [draw.randint(16, 95) for _ in prompts])


class _First(BaseStreamer):  # type: ignore[misc]
    """Notes when the first new token comes: the prompt is put before it."""

    def __init__(self) -> None:
        self.puts: list[float] = []

    def put(self, value: Any) -> None:
        self.puts.append(perf_counter())

    def end(self) -> None:
        pass


def by_generate(model: Any, work: Work, concurrent: int) -> list[Served]:
    """One after the other: a request is asked when the one `concurrent` before it has ended."""
    began, found = perf_counter(), list[Served]()
    for at, (prompt, count) in enumerate(zip(work.prompts, work.counts, strict=True)):
        streamer, ids = _First(), torch.tensor([prompt], device=model.device)
        how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": None}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **how)
        asked = found[at - concurrent].last if at >= concurrent else 0.0
        tokens = out[0, len(prompt) :].tolist()
        found.append(Served(asked, streamer.puts[1] - began, perf_counter() - began, tokens))
    return found


def by_manager(manager: Any, work: Work, concurrent: int) -> list[Served]:
    began, left = perf_counter(), list(range(len(work.prompts)))[::-1]
    asked: dict[str, list[Any]] = {}

    def submit() -> None:
        at = left.pop()
        id = manager.add_request(work.prompts[at], max_new_tokens=work.counts[at], streaming=True, eos_token_id=-1)
        asked[id] = [at, perf_counter() - began, 0.0]

    done: dict[int, Served] = {}
    for _ in range(min(concurrent, len(left))):
        submit()
    while len(done) < len(work.prompts):
        result = manager.get_result(timeout=60)
        if result is None or result.error:
            raise SystemExit(f"generate_batch failed: {result and result.error}")
        now = perf_counter() - began
        one = asked[result.request_id]
        one[2] = one[2] or now
        if result.is_finished():
            done[one[0]] = Served(one[1], one[2], now, list(result.generated_tokens))
            if left:
                submit()
    return [done[at] for at in range(len(done))]


def by_ours(service: ns.Service, work: Work, concurrent: int) -> list[Served]:
    began = perf_counter()

    def ask(at: int) -> Served:
        asked = perf_counter() - began
        done = service(work.prompts[at], max_tokens=work.counts[at], ignore_eos=True)
        return Served(asked, asked + done.ttft_s, perf_counter() - began, list(done.token_ids))

    with ThreadPoolExecutor(concurrent) as threads:
        return list(threads.map(ask, range(len(work.prompts))))


def by_handing(service: ns.Service, work: Work, concurrent: int) -> list[Served]:
    executors = [device.executor for device in service._devices]
    before = [executor.alone_s for executor in executors]
    for executor in executors:
        executor.alone_s = 0.0
    try:
        return by_ours(service, work, concurrent)
    finally:
        for executor, seconds in zip(executors, before, strict=True):
            executor.alone_s = seconds


class Vllm:
    """A vLLM in a process of its own. `options`: its engine arguments, as JSON."""

    def __init__(self, python: str, model: Any, seats: int, dtype: str, options: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        model.save_pretrained(self._folder.name)
        script = str(Path(__file__).with_name("text_vllm.py"))
        command = [python, script, self._folder.name, str(seats), str(LENGTH), "--dtype", dtype, "--options", options]
        self._log = Path(self._folder.name) / "log"
        pipe = subprocess.PIPE
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return line.removeprefix("RESULT ")
        code, said = self._process.wait(), self._log.read_text(errors="replace")
        self._folder.cleanup()
        raise SystemExit(f"vLLM ended with {code}: {said[-SAID:]}")

    def __call__(self, work: Work, concurrent: int) -> list[Served]:
        asked = {"prompts": work.prompts, "counts": work.counts, "concurrent": concurrent}
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return [Served(*one) for one in json.loads(self._answer())]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()


@contextlib.contextmanager
def telling(system: str) -> Iterator[None]:
    """Go on without a system that fails."""
    try:
        yield
    except (Exception, SystemExit) as error:  # noqa: BLE001  others are measured all the same
        print(f"{system} is left out: {told(error)}", file=sys.stderr)


def _pages(seats: int) -> Any:
    """Memory of `generate_batch` for so many contexts; transformers before 5.18 calls pages blocks."""
    known = {one.name for one in fields(transformers.ContinuousBatchingConfig)}
    size = {"page_size" if "page_size" in known else "block_size": BLOCK}
    return transformers.ContinuousBatchingConfig(**size, num_blocks=seats * LENGTH // BLOCK, max_batch_tokens=LENGTH)


def _manager(model: Any, seats: int, stack: contextlib.ExitStack) -> System:
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=96, eos_token_id=-1, pad_token_id=1)
    sizes = _pages(seats)
    manager = stack.enter_context(
        model.continuous_batching_context_manager(generation_config=config, continuous_batching_config=sizes, timeout=5)
    )
    return lambda work, concurrent: by_manager(manager, work, concurrent)


def _ours(model: Any, seats: int, stack: contextlib.ExitStack, **options: Any) -> ns.Service:
    serving = ns.serve(model, profile=Flat(), slots=seats, max_len=LENGTH, devices=[str(model.device)], **options)
    return stack.enter_context(serving)


@contextlib.contextmanager
def systems_of(model: Any, args: argparse.Namespace, name: str) -> Iterator[dict[str, System]]:
    """All that serve a model, each by its name; all with the same weights."""
    seats = max(args.concurrent)
    with contextlib.ExitStack() as stack:
        found: dict[str, System] = {}
        if "generate" in args.beside:
            found["generate"] = lambda work, concurrent: by_generate(model, work, concurrent)
        if "generate_batch" in args.beside:
            with telling("generate_batch"):
                found["generate_batch"] = _manager(twin(model), seats, stack)  # it changes its model's attention
        if args.vllm is not None:
            with telling("vllm"):
                process = Vllm(args.vllm, model, seats, args.dtype, args.vllm_options)
                stack.callback(process.close)
                found["vllm"] = process
        service = _ours(twin(model), seats, stack)
        found["ours"] = lambda work, concurrent: by_ours(service, work, concurrent)
        if args.handed:
            found["ours, handed"] = lambda work, concurrent: by_handing(service, work, concurrent)
        if args.device != "cpu":
            plain = _ours(twin(model), seats, stack, graphs=False)
            found["ours, no graphs"] = lambda work, concurrent: by_ours(plain, work, concurrent)
        elif name in PREPACKED and "ours, plain" in args.beside:
            plain = _ours(twin(model), seats, stack, prepack=False)
            found["ours, plain"] = lambda work, concurrent: by_ours(plain, work, concurrent)
        yield found


def figures(served: Sequence[Served]) -> dict[str, float]:
    """Tokens per second; means of TTFT and TPOT in milliseconds."""
    tokens = sum(len(one.tokens) for one in served)
    pace = [(one.last - one.first) / (len(one.tokens) - 1) for one in served]
    return {
        "tokens_s": tokens / max(one.last for one in served),
        "ttft_ms": statistics.mean(one.first - one.asked for one in served) * 1e3,
        "tpot_ms": statistics.mean(pace) * 1e3,
    }


def measure(name: str, args: argparse.Namespace, done: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """The rows of one model: each system at each concurrency; `done` is told of those so far behind each."""
    model = made(name, args.device, args.dtype)
    vocabulary = model.config.vocab_size
    cells: dict[tuple[str, int], Cell] = defaultdict(Cell)

    def rows() -> list[dict[str, Any]]:
        return [
            {"model": name, "system": system, "concurrent": concurrent, **cell.row()}
            for (system, concurrent), cell in cells.items()
        ]

    least = min(args.concurrent)
    with systems_of(model, args, name) as systems:
        for called, run in list(systems.items()):  # first calls make what later ones use
            del systems[called]
            with telling(called):
                run(work_of(2, vocabulary, 99), 2)
                systems[called] = run
        for turn in range(args.rounds):
            work = work_of(max(args.requests, args.each * max(args.concurrent)), vocabulary, turn)
            wanted: list[list[int]] = []
            for concurrent, (called, run) in itertools.product(sorted(args.concurrent), systems.items()):
                if called == "generate" and concurrent > least:
                    continue  # the same, one after the other
                if perf_counter() > args.until:
                    return rows()
                with telling(called):
                    served = run(work.first(args.each * concurrent) if args.each else work, concurrent)
                    wanted = wanted or [one.tokens for one in served]  # of the first, `generate` if it is there
                    cells[called, concurrent].add(served, wanted)
                    done(rows())
    return rows()


@dataclass
class Cell:
    """What one system did at one concurrency: figures of each round, and texts that were others than wanted."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    other: int = 0

    def add(self, served: Sequence[Served], wanted: Sequence[Sequence[int]]) -> None:
        self.rounds.append(figures(served))
        self.other += sum(one.tokens != tokens for one, tokens in zip(served, wanted, strict=False))

    def row(self) -> dict[str, Any]:
        """Medians over the rounds, and tokens per second of each."""
        medians = {key: round(statistics.median(one[key] for one in self.rounds), 2) for key in self.rounds[0]}
        return {**medians, "rounds": [round(one["tokens_s"], 1) for one in self.rounds], "other": self.other}


def show(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    columns = ("model", "concurrent", "tokens/s", "TTFT ms", "TPOT ms", "other")
    asked = f"{args.each} requests each" if args.each else f"{args.requests} requests"
    table = new_table(f"{asked} a round, medians", "system", columns)
    for row in rows:
        numbers = [f"{row[key]:.1f}" for key in ("tokens_s", "ttft_ms", "tpot_ms")]
        table.add_row(row["system"], row["model"], str(row["concurrent"]), *numbers, str(row["other"]))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(SMALL))
    parser.add_argument("--concurrent", type=at_least_one, nargs="+", default=list(CONCURRENT))
    parser.add_argument("--requests", type=at_least_one, default=48)
    parser.add_argument("--each", type=at_least_one, default=0, help="in place of that: requests for each under way")
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0; default: cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--seconds", type=at_least_one, help="behind so many nothing more is begun")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM, as `make test-vllm` makes one")
    parser.add_argument("--vllm-options", default="{}", metavar="JSON", help="vLLM's engine arguments")
    parser.add_argument(
        "--beside", nargs="*", choices=BESIDE, default=list(BESIDE), help="what is measured beside vLLM and ours"
    )
    parser.add_argument("--handed", action="store_true", help="ours with turns on the engine's thread alone, too")
    parser.add_argument("--out", type=Path, help="a JSON file for the results, written behind each of them")
    args = parser.parse_args()
    args.until = perf_counter() + (args.seconds or math.inf)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    if args.vllm is None:
        print("vllm is left out: no --vllm PYTHON is given", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        before = list(rows)
        rows += measure(name, args, lambda some: write([*before, *some], args))  # noqa: B023  called at once
        gc.collect()
    show(rows, args)


def write(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    if args.out is not None:
        command = "python benchmarks/text.py " + " ".join(sys.argv[1:])
        place = device_name(torch.device(args.device))
        asked = args.each or args.requests
        origin = {"command": command, "place": place, "dtype": args.dtype, "requests": asked, "versions": versions()}
        args.out.write_text(json.dumps({**origin, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
