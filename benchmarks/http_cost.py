"""What the HTTP front costs: tokens a second over HTTP against direct `submit`, and the event loop's lag.

    OMP_NUM_THREADS=1 python benchmarks/http_cost.py [--streams 32] [--step-ms 30] [--tokens 60] [--rounds 5]

One process serves, as `neustream serve` is one: a tiny Llama whose every call also sleeps for `--step-ms`,
as a device works, without Python's lock. In turns, `--streams` requests are submitted to its service in
the process itself, and streamed over HTTP to a client in another process. Told: medians over rounds of
tokens a second of both, and of the ratio within a round; microseconds of CPU a token that HTTP adds to
the server's process; the share of looks at the event loop that were late by at most 50 ms.

Asked for: a ratio of 0.97 or more at 32 streams and steps of 30 ms; 99.9 percent of looks within 50 ms.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from arguments import at_least_one
from http_here import Here
from http_load import streamed
from rich.console import Console

from neustream import serve
from neustream.analysis.tables import new_table
from neustream.core.steps import Step
from neustream.server.lifecycle import keep_still
from neustream.server.loading import Loaded
from neustream.server.metrics import Metrics
from neustream.server.models import TextModel
from neustream.service.service import Service

PROMPT = list(range(1, 9))
LATE_S = 0.05


@dataclass
class Steady:
    """The profile of a model whose steps all take so many seconds."""

    each_s: float
    name: str = "llm"
    device: str = "sleeping"
    learns: bool = False
    error: float = 0.0

    def seconds(self, step: Step) -> float:
        return self.each_s

    def profiled(self, step: Step) -> float:
        return self.each_s

    def observe(self, step: Step, seconds: float) -> None:
        pass


def model(step_s: float, positions: int) -> Any:
    """A Llama that takes so long for each call."""

    class Slow(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            time.sleep(step_s)
            return super().forward(*args, **kwargs)

        forward.__signature__ = inspect.signature(transformers.LlamaForCausalLM.forward)  # type: ignore[attr-defined]

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Slow(config).eval()


class Front(Here):
    """A front of a tiny Llama whose calls take `--step-ms`.

    Attributes:
        service: what it serves.
    """

    service: Service

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        super().__init__(self._made)

    def _made(self, metrics: Metrics) -> Loaded:
        options = self._options
        step_s, positions = options.step_ms / 1e3, len(PROMPT) + options.tokens
        made: Any = serve(
            model(step_s, positions), None, profile=Steady(step_s), slots=options.streams, observers=[metrics]
        )
        self.service, self._metrics = made, metrics
        keep_still()  # as the command does
        text = TextModel("tiny", None, positions, 64, batch=options.streams)
        return Loaded(made, [text])

    def lag(self) -> tuple[float, float]:
        """Looks at the event loop, and those that were late by at most 50 ms."""
        registry = self._metrics.table.registry
        name = "neustream:event_loop_lag_seconds"
        within = registry.get_sample_value(f"{name}_bucket", {"le": str(LATE_S)})
        return registry.get_sample_value(f"{name}_count") or 0.0, within or 0.0


def direct(service: Service, streams: int, tokens: int) -> float:
    """Seconds until so many requests are done; in the server's process."""
    began = time.perf_counter()
    answers = [service.submit(PROMPT, max_tokens=tokens, ignore_eos=True) for _ in range(streams)]
    for answer in answers:
        answer.result()
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=at_least_one, default=32)
    parser.add_argument("--step-ms", type=float, default=30.0)
    parser.add_argument("--tokens", type=at_least_one, default=60)
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    count = options.streams * options.tokens
    rounds = []
    front = Front(options)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(streamed, (front.port, PROMPT, options.streams, 2))  # both are warm then
            looked = front.lag()
            for _ in range(options.rounds):
                before = time.process_time()
                alone_s = direct(front.service, options.streams, options.tokens)
                middle = time.process_time()
                over_s = pool.apply(streamed, (front.port, PROMPT, options.streams, options.tokens))
                cpu_s = (time.process_time() - middle) - (middle - before)
                rounds.append((count / alone_s, count / over_s, alone_s / over_s, cpu_s / count * 1e6))
            looks, within = (after - early for after, early in zip(front.lag(), looked, strict=True))
    finally:
        front.close()
    medians = [statistics.median(each) for each in zip(*rounds, strict=True)]
    names = ("direct, tokens/s", "HTTP, tokens/s", "ratio", "CPU, us/token")
    table = new_table(f"{options.streams} streams, steps of {options.step_ms:g} ms", "", ["median", "least", "most"])
    for name, median, each in zip(names, medians, zip(*rounds, strict=True), strict=True):
        table.add_row(name, f"{median:,.3f}", f"{min(each):,.3f}", f"{max(each):,.3f}")
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(f"event loop late by at most {LATE_S * 1e3:g} ms in {within / looks:.3%} of {looks:.0f} looks")
    if options.json is not None:
        found = {"options": {**vars(options), "json": None}, "rounds": rounds, "within": within, "looks": looks}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
