"""Every causal model type of the installed transformers through `neustream.serve`, against the stock `generate`.

Each type is built tiny, with random weights (`tiny_models.py`), and asked six requests over four slots: prompts of
other lengths, greedy and drawn tokens with other temperatures, top-p, top-k and seeds. They cross every window,
RoPE threshold and, the longest one, the last position. Alone, one after the other, tokens must be those of stock.
In company, all at once, they must be too; where one differs, it counts as rounding if the stock model's own logits of
the two tokens are within 1e-4 of the largest logit (greedy tokens only). How many requests shared a call is counted
at the model, in one more run, since hooks keep calls from being taken down: calls of the stock runs over calls of
the served ones.

    OMP_NUM_THREADS=1 python benchmarks/all_causal_models.py --jobs 2
    python benchmarks/all_causal_models.py --only gpt_neo --only phi3:longrope
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from each_class import Found, NotBuilt, Phase, Refused, Sweep, main
from tiny_models import POSITIONS, build, names, prompt

from neustream.core.steps import Step
from neustream.profiling import versions

TOLERANCE = 1e-4
ANSWER_S = 90.0
START_S = 5.0
"""How long the first step in company waits for the others to be asked: tiny requests end before the next one comes."""
SLOTS = 4
OUT = Path(__file__).parent / "results" / "all_causal_models"
PRELOAD = (
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "neustream.backends.transformers",
)


@dataclass(frozen=True)
class Ask:
    """One request. `spread`: the temperature over the spread of the model's logits; 0: greedy."""

    prompt: Sequence[int]
    max_tokens: int
    spread: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


ASKS = (
    Ask(prompt(0, 3), 20),
    Ask(prompt(1, 40), 16, spread=0.6, seed=1),
    Ask(prompt(2, 11), 24, spread=0.4, top_p=0.9, seed=2),
    Ask(prompt(3, 100), POSITIONS - 100, spread=0.6, top_k=20, seed=3),
    Ask(prompt(4, 1), 12, spread=0.8, seed=4),
    Ask(prompt(5, 25), 16),
)


class Flat:
    """Steps that take a while whatever is in them, so that sharing pays."""

    name, device, learns, error = "llm", "here", False, 0.0

    def seconds(self, step: Step) -> float:
        return 1e-3

    def profiled(self, step: Step) -> float:
        return 1e-3

    def observe(self, step: Step, seconds: float) -> None:
        """It is always the same."""


def check(name: str, phase: Phase) -> Found:
    """One type: built, asked, served alone and in company."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = build(name)
    phase("stock")
    spread = _spread(model)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or -1
    with counted(model) as stock_calls:
        wanted = [stock(model, ask, spread) for ask in ASKS]
    if len({token for tokens in wanted for token in tokens}) < 3:
        raise NotBuilt("its tokens do not vary: nothing to compare")
    phase("serve")
    with served(model, POSITIONS if limit < 0 else None) as engine:
        phase("alone")
        alone = [list(submitted(engine, ask, spread).result(ANSWER_S).token_ids) for ask in ASKS]
        phase("company")
        together = in_company(engine, spread)
        phase("counted")
        everyone = threading.Event()
        with counted(model, everyone) as calls:
            in_company(engine, spread, everyone)
        phase("close")
    offs = [_off(model, ask, got, one) for ask, got, one in zip(ASKS, together, wanted, strict=True)]
    others = [f"request {at}" for at, pair in enumerate(zip(together, wanted, strict=True)) if pair[0] != pair[1]]
    note = f"{', '.join(others)} differ(s) in company" if others else ""
    batch = stock_calls[0] / calls[0] if calls[0] else 1.0
    return Found("; ".join(_differences(alone, wanted)), max(offs), TOLERANCE, round(batch, 2), note)


def _differences(got: Sequence[list[int]], wanted: Sequence[list[int]]) -> Iterator[str]:
    """Which requests got other tokens than stock calls gave, and from where on."""
    for at, (tokens, stock_tokens) in enumerate(zip(got, wanted, strict=True)):
        if tokens != stock_tokens:
            yield f"request {at} differs from token {_first(tokens, stock_tokens)} of {len(stock_tokens)} on"


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
    return out[0, -1].float()


def _spread(model: Any) -> float:
    """How far apart its logits are; drawn tokens then depend on all of them."""
    return max(float(_logits(model, ASKS[1].prompt).std()), 1e-3)


def stock(model: Any, ask: Ask, spread: float) -> list[int]:
    """What the stock library makes of a request: its new tokens."""
    ids = torch.tensor([list(ask.prompt)])
    options: dict[str, Any] = {"do_sample": False}
    if ask.spread:
        torch.manual_seed(ask.seed)
        options = {"do_sample": True, "top_k": ask.top_k, "top_p": ask.top_p, "temperature": ask.spread * spread}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ask.max_tokens,
        eos_token_id=None,
        pad_token_id=1,
        **options,
    )
    tokens: list[int] = out[0, len(ask.prompt) :].tolist()
    if len(tokens) != ask.max_tokens:
        raise NotBuilt(f"stock gives {len(tokens)} tokens where {ask.max_tokens} are asked for")
    return tokens


@contextlib.contextmanager
def served(model: Any, max_len: int | None) -> Iterator[Any]:
    """An engine. Refused: with what the library says against the model."""
    import neustream
    from neustream import BackendError, RequestError

    try:
        engine = neustream.serve(model, profile=Flat(), slots=SLOTS, max_len=max_len)
    except (BackendError, RequestError) as error:
        raise Refused(str(error)) from error
    with engine:
        yield engine


def submitted(engine: Any, ask: Ask, spread: float) -> Any:
    """A request under way. Refused: with what the library says against it, at once."""
    from neustream import BackendError, RequestError

    drawn: Mapping[str, Any] = {}
    if ask.spread:
        drawn = {"temperature": ask.spread * spread, "top_p": ask.top_p, "top_k": ask.top_k, "seed": ask.seed}
    try:
        return engine.submit(list(ask.prompt), max_tokens=ask.max_tokens, ignore_eos=True, **drawn)
    except (BackendError, RequestError) as error:
        raise Refused(f"the request: {error}") from error


def in_company(engine: Any, spread: float, everyone: threading.Event | None = None) -> list[list[int]]:
    """The tokens of all requests, asked at once; `everyone` is set once they are."""
    answers = [submitted(engine, ask, spread) for ask in ASKS]
    if everyone is not None:
        everyone.set()
    return [list(answer.result(ANSWER_S).token_ids) for answer in answers]


@contextlib.contextmanager
def counted(model: Any, start: threading.Event | None = None) -> Iterator[list[int]]:
    """How often the model is called, as the one item of a list; calls wait for `start`, but not for ever."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1
        if start is not None:
            start.wait(START_S)

    hook = model.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


def _first(got: Sequence[int], wanted: Sequence[int]) -> int:
    return next((at for at, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), len(got))


def _off(model: Any, ask: Ask, got: Sequence[int], wanted: Sequence[int]) -> float:
    """How far apart stock's own logits are where tokens first differ, over the largest; 1 for drawn tokens."""
    if list(got) == list(wanted):
        return 0.0
    at = _first(got, wanted)
    if ask.spread or at >= min(len(got), len(wanted)):
        return 1.0
    logits = _logits(model, [*ask.prompt, *wanted[:at]])
    return float((logits[wanted[at]] - logits[got[at]]).abs() / logits.abs().max())


def sweep_of(out: Path) -> Sweep:
    about = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "requests": f"{len(ASKS)} over {SLOTS} slots, prompts of 1 to 100 tokens, greedy and drawn; float32",
        "tolerance": f"alone none; in company the same tokens, or logits within {TOLERANCE:g} of the largest",
    }
    title = "Causal models of transformers, served, against their stock generate"
    command = "OMP_NUM_THREADS=1 python benchmarks/all_causal_models.py"
    return Sweep(title, command, check, names(), about, out, PRELOAD, limit_s=300.0)


if __name__ == "__main__":
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["OMP_NUM_THREADS"] = "1"
    main(sweep_of, OUT, __doc__ or "")
