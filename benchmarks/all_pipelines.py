"""Every pipeline class of the installed diffusers through `neustream.serve`, against the stock call.

Each class is built tiny, with random weights (`tiny_pipelines.py`), and asked four requests: other
steps, guidance, prompts and seeds. Alone, one after the other, by an engine that measures its own
profiles, results must be those of the stock call to the last bit. In company, all four at once, by an
engine that is given profiles by which sharing pays, the largest difference may be 1e-3 of the largest
value: rounding of float32 in batches of other sizes, which random weights enlarge. Where it is larger,
all is done again in float64, where rounding would leave 1e-8 at most. How many requests shared a call is counted at the
denoisers: calls of the stock runs over calls of the served ones.

    OMP_NUM_THREADS=1 python benchmarks/all_pipelines.py --jobs 2
    python benchmarks/all_pipelines.py --only WanPipeline
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from each_class import Found, NotBuilt, Phase, Refused, Sweep, main

from neustream import LatencyProfile, TableProfile
from neustream.profiling import versions

if TYPE_CHECKING:
    from tiny_pipelines import Tiny

TOLERANCE, TOLERANCE_64 = 1e-3, 1e-8
ANSWER_S = 90.0
"""How long one answer may take."""
START_S = 5.0
"""How long the first step in company waits for the others to be asked: tiny requests end before the next one comes."""
Leaves = list[np.ndarray[Any, Any]]
OUT = Path(__file__).parent / "results" / "all_pipelines"
PRELOAD = (
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.wan.pipeline_wan",
    "transformers.models.clip.modeling_clip",
    "neustream.backends.diffusers.from_config",
)


def check(name: str, phase: Phase) -> Found:
    """One class: built, called, served alone and in company."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import diffusers
    import tqdm
    import transformers
    from tiny_pipelines import REQUESTS, build

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    tqdm.tqdm.set_lock(threading.RLock())  # its own is one of all processes, which outlives them
    tiny = build(name)
    phase("stock")
    every = range(REQUESTS)
    with counted(tiny.pipe) as stock_calls:
        wanted = [leaves(tiny.pipe(**tiny.arguments(at))) for at in every]
    if any(difference(one, one) != 0 for one in wanted):
        raise NotBuilt("stock's own result is not finite")
    torch.manual_seed(1)
    if difference(leaves(tiny.pipe(**tiny.arguments(0))), wanted[0]) != 0:
        raise NotBuilt("stock's own result is another one each time: it draws from torch's global stream")
    phase("serve")
    alone = []
    with tempfile.TemporaryDirectory() as cache, served(tiny.pipe, cache=Path(cache), measure_s=0.05) as engine:
        phase("alone")
        for at in every:
            got = leaves(submitted(engine, tiny.arguments(at)).result(ANSWER_S))
            if (off := difference(got, wanted[at])) != 0:
                alone.append(f"request {at} is off by {off:.1e}")
        phase("close")
    off, batch = company(tiny, wanted, stock_calls[0], phase)
    if not off > TOLERANCE:
        return Found("; ".join(alone), off, TOLERANCE, batch)
    tiny = tiny.double()
    wanted = [leaves(tiny.pipe(**tiny.arguments(at))) for at in every]
    sharp, _ = company(tiny, wanted, stock_calls[0], phase)
    note = f"{off:.1e} in float32, {sharp:.1e} in float64"
    return Found("; ".join(alone), sharp, TOLERANCE_64, batch, note)


def company(tiny: Tiny, wanted: Sequence[Leaves], stock_calls: int, phase: Phase) -> tuple[float, float]:
    """All requests at once: the largest difference from what is wanted, and how many requests shared a call."""
    every = range(len(wanted))
    phase("serve again")
    with served(tiny.pipe, profiles=Flat()) as engine:
        phase("company")
        for at in every:  # shapes are known from now on
            submitted(engine, tiny.arguments(at)).result(ANSWER_S)
        everyone = threading.Event()
        with counted(tiny.pipe, everyone) as calls:
            answers = [submitted(engine, tiny.arguments(at)) for at in every]
            everyone.set()
            together = [leaves(answer.result(ANSWER_S)) for answer in answers]
        phase("close")
    off = max(difference(got, one) for got, one in zip(together, wanted, strict=True))
    return off, round(stock_calls / calls[0], 2) if calls[0] else 1.0


class Flat(dict[str, LatencyProfile]):
    """A profile for every stage, by which sharing pays: what is measured in seconds on a busy machine says anything."""

    def __contains__(self, stage: object) -> bool:
        return True

    def __missing__(self, stage: str) -> LatencyProfile:
        return TableProfile(stage, [1, 64], [1e-3, 2e-3])


@contextlib.contextmanager
def served(pipe: Any, **options: Any) -> Iterator[Any]:
    """An engine with its own `options`. Refused: with what the library says against the pipeline."""
    import neustream
    from neustream import BackendError, RequestError
    from neustream.backends.diffusers import measured

    measured.LOOPED_STEPS, measured.REPEATS = 4, 1  # a few steps instead of hundreds
    try:
        engine = neustream.serve(pipe, samples=[], progress=False, **options)
    except (BackendError, RequestError) as error:
        raise Refused(str(error)) from error
    with engine:
        yield engine


def submitted(engine: Any, arguments: Mapping[str, Any]) -> Any:
    """A request under way. Refused: with what the library says against it, at once."""
    from neustream import BackendError, RequestError

    try:
        return engine.submit(**arguments)
    except (BackendError, RequestError) as error:
        raise Refused(f"the request: {error}") from error


@contextlib.contextmanager
def counted(pipe: Any, start: threading.Event | None = None) -> Iterator[list[int]]:
    """How often denoisers are called, as the one item of a list; they wait for `start`, but not for ever."""
    from neustream.backends.diffusers.parts import models_of, role_of

    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1
        if start is not None:
            start.wait(START_S)

    hooks = [
        model.register_forward_pre_hook(count) for name, model in models_of(pipe) if role_of(name, model) == "denoise"
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def leaves(output: Any) -> Leaves:
    """All arrays of a pipeline's output, in order."""
    if isinstance(output, torch.Tensor):
        half = output.dtype in (torch.float16, torch.bfloat16)  # numpy has no bfloat16
        return [(output.float() if half else output).detach().cpu().numpy()]
    if isinstance(output, np.ndarray):
        return [output]
    if hasattr(output, "convert"):  # a picture
        return [np.asarray(output)]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [leaf for one in output for leaf in leaves(one)]
    return []


def difference(got: Leaves, wanted: Leaves) -> float:
    """The largest difference over the largest value; NaN or infinite where shapes differ or values are not finite."""
    if [one.shape for one in got] != [one.shape for one in wanted] or not wanted:
        return float("inf")
    worst = 0.0
    for one, other in zip(got, wanted, strict=True):
        if one.dtype.kind not in "fiub" or not one.size:
            continue
        a, b = one.astype(np.float64), other.astype(np.float64)
        if not np.isfinite(b).all() or not np.isfinite(a).all():
            return float("nan")
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-20)))
    return worst


def sweep_of(out: Path) -> Sweep:
    from tiny_pipelines import names

    about = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "requests": "four, of other steps, guidance, prompts and seeds; float32 on a CPU, one thread",
        "tolerance": f"alone none; in company {TOLERANCE:g} of the largest value, or {TOLERANCE_64:g} in float64",
    }
    title = "Pipelines of diffusers, served, against their stock calls"
    command = "OMP_NUM_THREADS=1 python benchmarks/all_pipelines.py"
    return Sweep(title, command, check, names(), about, out, PRELOAD, limit_s=300.0)


if __name__ == "__main__":
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["OMP_NUM_THREADS"] = "1"
    main(sweep_of, OUT, __doc__ or "")
