"""Language models of transformers, served: what checking, fixed shapes and Python cost, and a storm of requests.

    OMP_NUM_THREADS=1 python benchmarks/served_texts.py checks [--layers 2 12 32]
    OMP_NUM_THREADS=1 python benchmarks/served_texts.py fixed [--dtype bfloat16] [--requests 48] [--rounds 3]
    OMP_NUM_THREADS=1 python benchmarks/served_texts.py sampling [--rows 64] [--vocabulary 32000]
    OMP_NUM_THREADS=1 python benchmarks/served_texts.py recorded [--rounds 60]
    OMP_NUM_THREADS=1 python benchmarks/served_texts.py storm [--requests 2000] [--threads 16]

`checks`: medians in microseconds of what is looked at to see that a model is still the one that was
served: at a submit, and after a step; beside them, a submit and a decode of one request.
Models are Llamas, 64 wide, with random weights. Looking costs the same for wider ones.

`fixed`: a Llama, 512 wide with 8 layers, serves requests one after the other and all at once, without
and with `buckets`: medians over rounds of the seconds per token alone, and of tokens per second in
company; and how many requests got other tokens in company than alone.

`sampling`: steps of so many rows of that Llama, a decode and the choice of tokens, by what the requests
want: medians of both parts, taken in turns, and the step's cost over that of greedy ones. Of two steps
the second counts: what the first draws ahead is drawn beside it. Logits are scaled to the spread that
those of trained models have.

`recorded`: calls of Llamas of 2 layers, 128 wide, and of 8 layers, 512 wide, as torch's tracer took them
down and as the model makes them, in turns: medians in milliseconds, by what is in the call.

`storm`: that many threads submit requests, of which one in twenty has arguments that are none, one
in twenty a callback that raises, one in twenty a temperature at which no token has a probability,
and one in ten is cancelled. Each must be answered once. Tokens of the good ones must be those of the
stock `generate`.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import torch
import transformers
from all_causal_models import Flat
from arguments import at_least_one
from rich.console import Console

import neustream as ns
from neustream.analysis.tables import new_table
from neustream.backends.transformers import LanguageModel
from neustream.backends.transformers.choosing import Chooser, choose
from neustream.backends.transformers.said import Place
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.slots import Row
from neustream.backends.transformers.text import Ask, Text
from neustream.errors import RequestError, RequestFailed

VOCABULARY = 96
TOKENS = 32
"""Outputs of each request of `fixed`."""


def llama(layers: int, width: int = 64, positions: int = 128, vocabulary: int = VOCABULARY) -> Any:
    """A Llama with random weights, large enough for its tokens to vary."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(4 if weight.dim() > 1 else 1)
    return model


def micros(work: Callable[[], object], repeats: int = 300) -> float:
    """The median of one call, in microseconds."""
    took = []
    for _ in range(repeats):
        began = perf_counter()
        work()
        took.append(perf_counter() - began)
    return statistics.median(took) * 1e6


def checks(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    table = new_table("us, medians", "layers", ("modules", "weights", "check", "submit", "check of a step", "decode"))
    for layers in args.layers:
        stock = llama(layers)
        model = LanguageModel(stock, slots=1)
        model.forward([Row(0, 0, [5, 6, 7])])
        submits = []
        with ns.serve(stock, profile=Flat(), slots=1) as service:
            for _ in range(50):
                began = perf_counter()
                answer = service.submit([5, 6, 7], max_tokens=2)
                submits.append(perf_counter() - began)
                answer.result()
        cells = [
            len(list(stock.modules())),
            len(list(stock.parameters())),
            micros(model.unchanged.check),
            statistics.median(submits) * 1e6,
            micros(model.unchanged.check_step),
            micros(lambda model=model: model.forward([Row(0, 3, [8])])),  # type: ignore[misc]
        ]
        table.add_row(str(layers), *[f"{cell:.0f}" for cell in cells])
    Console().print(table)


def fixed(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    draw = random.Random(0)
    asked = [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(4, 200))] for _ in range(args.requests)]
    model = llama(8, 512, 256).to(getattr(torch, args.dtype))
    with torch.no_grad():
        for weight in model.parameters():
            weight.div_(2 if weight.dim() > 1 else 1)
    columns = ("ms a token alone", "tokens/s in company", "other tokens in company")
    table = new_table(f"{args.requests} requests of {TOKENS} tokens, 8 slots, {args.dtype}", "buckets", columns)
    for buckets in ((), (256,), (64, 128, 256)):
        with ns.serve(model, profile=Flat(), slots=8, buckets=buckets) as service:
            table.add_row(str(list(buckets)), *_served(service, asked, args.rounds))
    Console().print(table)


def _served(service: ns.Service, asked: list[list[int]], rounds: int) -> list[str]:
    how: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}
    lonely, crowded, differ = [], [], 0
    for _ in range(rounds):
        single = [service(prompt, **how) for prompt in asked]
        lonely += [one.tpot_s for one in single]
        began = perf_counter()
        answers = [service.submit(prompt, **how) for prompt in asked]
        crowd = [answer.result() for answer in answers]
        crowded.append(TOKENS * len(asked) / (perf_counter() - began))
        differ = sum(one.token_ids != other.token_ids for one, other in zip(single, crowd, strict=True))
    return [
        f"{statistics.median(lonely) * 1e3:.2f}",
        f"{statistics.median(crowded):.0f}",
        f"{differ} of {len(asked)}",
    ]


# -- the storm -------------------------------------------------------------------------------------

WRONG: tuple[dict[str, Any], ...] = (
    {"max_tokens": 0},
    {"max_tokens": "5"},
    {"prompt": [VOCABULARY]},
    {"prompt": []},
    {"prompt": "text without a tokenizer"},
    {"prompt": [3] * 128},
    {"temperature": float("nan")},
    {"seed": -1},
    {"top_p": 2},
    {"slo": "5"},
    {"stop_token_ids": [1.5]},
)


class Storm:
    """What was asked, and what came of it."""

    def __init__(self, service: ns.Service, seed: int) -> None:
        self.service = service
        self.outcomes: Counter[str] = Counter()
        self.answered: Counter[int] = Counter()
        self.good: list[tuple[list[int], dict[str, Any], list[int]]] = []
        self._seed = seed

    def ask(self, number: int) -> str:
        """One request of some kind, waited for: what came of it."""
        draw = random.Random(f"{self._seed}/{number}")
        kind = draw.random()
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 40))]
        drawn = {"temperature": draw.choice([0.7, 1.5]), "seed": number} if draw.random() < 0.5 else {}
        given: dict[str, Any] = {"prompt": prompt, "max_tokens": draw.randint(1, 12), "ignore_eos": True, **drawn}
        if kind < 0.05:
            return self._wrong({**given, **draw.choice(WRONG)})
        if kind < 0.10:
            given["temperature"] = 1e-40
        answer = self.service.submit(**given)
        answer.add_done_callback(lambda done: self._told(number, raises=0.10 <= kind < 0.15))
        if 0.15 <= kind < 0.25:
            answer.cancel()
        if answer.cancelled():
            return "cancelled"
        try:
            tokens = list(answer.result(120).token_ids)
        except RequestFailed:
            return "failed" if kind < 0.10 else "A GOOD ONE FAILED"
        self.good.append((prompt, drawn, tokens))
        return "done" if kind >= 0.10 else "A BAD ONE WAS SERVED"

    def _wrong(self, given: dict[str, Any]) -> str:
        try:
            self.service.submit(**given)
        except RequestError:
            return "refused"
        return "WRONG ARGUMENTS ACCEPTED"

    def _told(self, number: int, raises: bool) -> None:
        self.answered[number] += 1
        if raises:
            raise SystemExit(1)


SPREAD = 4.0
"""Standard deviation of logits: a trained model is as sure of its next token."""
WISHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "temperature, seeds": {"temperature": 0.8},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top_p 0.95, seeds": {"temperature": 0.8, "top_p": 0.95},
    "top_k 50, top_p 0.95, seeds": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "presence and repetition": {"presence_penalty": 0.5, "repetition_penalty": 1.1},
}
WARM = 2
"""First rounds, which are not counted."""


def sampling(args: argparse.Namespace) -> None:
    """A step of many rows by what their requests want of their tokens."""
    asked = {name: _asked(name, args.rows) for name in WISHES}
    served = LanguageModel(llama(8, 512, vocabulary=args.vocabulary), slots=args.rows, max_len=64)
    rows = [Row(slot, 40, [slot + 3]) for slot in range(args.rows)]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WISHES}
    for _ in range(args.rounds + WARM):
        for name, each in asked.items():
            for _ in range(2):  # what the first step draws ahead is drawn beside the second
                began = perf_counter()
                logits = served.forward(rows)
                decode = perf_counter() - began
                logits = logits * (SPREAD / logits.std())
                began = perf_counter()
                choose(logits, each)
                choice = perf_counter() - began
            times[name].append((decode, choice))
    greedy = statistics.median(map(sum, times["greedy"][WARM:]))
    table = new_table(f"a step of {args.rows} rows, ms", "requests", ["decode", "choice", "step / greedy"])
    for name, each in times.items():
        decode, choice = (statistics.median(part) * 1e3 for part in zip(*each[WARM:], strict=True))
        over = statistics.median(map(sum, each[WARM:])) / greedy
        table.add_row(name, f"{decode:.1f}", f"{choice:.2f}", f"{over:.2f}")
    Console().print(table)


def _asked(name: str, rows: int) -> list[Any]:
    """What each row wants of its token, as `choose` takes it."""
    if not WISHES[name]:
        return [None] * rows
    text = Text(Ask(list(range(3, 40))), tuple(range(3, 13)))
    seeds = [at if "seeds" in name else None for at in range(rows)]
    return [(Chooser(Sampling(**WISHES[name], seed=seed), place=Place(begin=37)), text) for seed in seeds]


def stock_tokens(model: Any, prompt: list[int], drawn: dict[str, Any], count: int) -> list[int]:
    """What the stock library makes of a prompt alone."""
    options: dict[str, Any] = {"do_sample": False}
    if drawn:
        torch.manual_seed(drawn["seed"])
        options = {"do_sample": True, "top_k": 0, "temperature": drawn["temperature"]}
    ids = torch.tensor([prompt])
    known = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 1}
    out = model.generate(ids, max_new_tokens=count, **known, **options)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def storm(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("neustream").setLevel(logging.CRITICAL + 1)  # a line for each callback that raises
    model = llama(2)
    began = perf_counter()
    with ns.serve(model, profile=Flat(), slots=args.slots) as service:
        tried = Storm(service, args.seed)
        with ThreadPoolExecutor(args.threads) as threads:
            tried.outcomes.update(threads.map(tried.ask, range(args.requests)))
        after = service([5, 6, 7], max_tokens=3).finish_reason
        used = service.models[""].used  # type: ignore[attr-defined]
    seconds = perf_counter() - began
    twice = sum(count != 1 for count in tried.answered.values())
    wrong = sum(stock_tokens(model, prompt, drawn, len(got)) != got for prompt, drawn, got in tried.good)
    print(f"{args.requests} requests of {args.threads} threads in {seconds:.1f} s: {dict(tried.outcomes)}")
    print(
        f"other tokens than stock: {wrong} of {len(tried.good)}; answered more than once: {twice}; slots kept: {used}"
    )
    if wrong or twice or used or after not in ("stop", "length") or any(name.isupper() for name in tried.outcomes):
        raise SystemExit("the storm did harm")


CALLS: dict[str, list[Row]] = {
    **{f"{count} decodes": [Row(at, 100 + 3 * at, [5 + at]) for at in range(count)] for count in (1, 2, 8, 32)},
    "prompt of 65": [Row(0, 0, list(range(5, 70)))],
}


def recorded(args: argparse.Namespace) -> None:
    for layers, width in ((2, 128), (8, 512)):
        served = LanguageModel(llama(layers, width, positions=512), slots=32)
        if served.recorded is None:
            raise SystemExit(f"not taken down: {served.unrecorded}")
        table = new_table(f"{layers} layers, {width} wide: ms of a call", "call", ["taken down", "stock"])
        for name, rows in CALLS.items():
            took: dict[Callable[..., Any], list[float]] = {served.forward: [], served.stock_forward: []}
            for _ in range(args.rounds + WARM):
                for call, seconds in took.items():
                    began = perf_counter()
                    call(rows)
                    seconds.append(perf_counter() - began)
            medians = [statistics.median(seconds[WARM:]) * 1e3 for seconds in took.values()]
            table.add_row(name, *[f"{median:.2f}" for median in medians])
        Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    of_checks = commands.add_parser("checks")
    of_checks.add_argument("--layers", type=at_least_one, nargs="+", default=[2, 12, 32])
    of_checks.set_defaults(run=checks)
    of_fixed = commands.add_parser("fixed")
    of_fixed.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    of_fixed.add_argument("--requests", type=at_least_one, default=48)
    of_fixed.add_argument("--rounds", type=at_least_one, default=3)
    of_fixed.set_defaults(run=fixed)
    of_sampling = commands.add_parser("sampling")
    of_sampling.add_argument("--rows", type=at_least_one, default=64)
    of_sampling.add_argument("--vocabulary", type=at_least_one, default=32_000)
    of_sampling.add_argument("--rounds", type=at_least_one, default=30)
    of_sampling.set_defaults(run=sampling)
    of_recorded = commands.add_parser("recorded")
    of_recorded.add_argument("--rounds", type=at_least_one, default=60)
    of_recorded.set_defaults(run=recorded)
    of_storm = commands.add_parser("storm")
    of_storm.add_argument("--requests", type=at_least_one, default=2000)
    of_storm.add_argument("--threads", type=at_least_one, default=16)
    of_storm.add_argument("--slots", type=at_least_one, default=8)
    of_storm.add_argument("--seed", type=int, default=0)
    of_storm.set_defaults(run=storm)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
