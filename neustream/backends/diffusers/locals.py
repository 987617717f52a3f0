"""What the functions of a stopped call still need of their local variables, as a digest of each."""

from __future__ import annotations

import dis
import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

FAST = re.compile("(LOAD|STORE|DELETE)_FAST")
"""What instructions do to local variables."""
ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE")
ALWAYS = ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE")
DEPTH = 8
"""How deep values inside of values are looked at."""
PAIRED = frozenset(("noise_pred_text",))
"""Variables that are read where they were written in the same step only, which their code does not show."""


def needed(frame: FrameType | None, outermost: CodeType) -> dict[str, bytes]:
    """Digests of the variables that may still be read, of the frames up to that of `outermost`.

    Names are those of the function and the variable.
    """
    found: dict[str, bytes] = {}
    while frame is not None and frame.f_code is not outermost:
        if not frame.f_globals.get("__name__", "").startswith("neustream."):  # no stand-in
            values, code = frame.f_locals, frame.f_code
            live = _live(code)
            at = max(offset for offset in live if offset <= frame.f_lasti)
            for name in sorted((live[at] & set(values)) - PAIRED):
                found[f"{code.co_name}: {name}"] = _digest(values[name])
        frame = frame.f_back
    return found


@cache
def _live(code: CodeType) -> Mapping[int, frozenset[str]]:
    """By the offset of an instruction: the variables that may be read behind it before they are written."""
    steps = list(dis.get_instructions(code))
    place = {step.offset: at for at, step in enumerate(steps)}
    before: list[frozenset[str]] = [frozenset()] * len(steps)
    after: list[frozenset[str]] = [frozenset()] * len(steps)
    shared = frozenset(code.co_cellvars + code.co_freevars)  # others may read them at any time
    changed = True
    while changed:
        changed = False
        for at in range(len(steps) - 1, -1, -1):
            step = steps[at]
            out = shared
            if step.opname not in (*ENDS, *ALWAYS) and at + 1 < len(steps):
                out |= before[at + 1]
            if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
                out |= before[place[step.argval]]
            into = _through(step, out)
            if into != before[at] or out != after[at]:
                before[at], after[at], changed = into, out, True
    return {step.offset: after[at] for at, step in enumerate(steps)}


def _through(step: dis.Instruction, out: frozenset[str]) -> frozenset[str]:
    """The variables that are needed in front of an instruction, by those that are needed behind it."""
    names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    kinds = FAST.findall(step.opname)  # some instructions are two in one
    live = set(out)
    for kind, name in zip(reversed(kinds), reversed(names), strict=False):
        if kind == "LOAD":
            live.add(name)
        else:
            live.discard(name)
    return frozenset(live)


def _digest(value: Any) -> bytes:
    hashed = hashlib.blake2b(digest_size=16)
    for part in _parts(value, DEPTH):
        hashed.update(part)
    return hashed.digest()


def _parts(value: Any, depth: int) -> Iterator[bytes]:
    """What makes up a value, in an order that is the same in every process."""
    kind = type(value)
    yield kind.__name__.encode()
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        yield repr(value).encode()
    elif isinstance(value, torch.Tensor):
        yield f"{tuple(value.shape)}{value.dtype}".encode()
        flat = value.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
        yield flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(value, torch.Generator):
        yield value.get_state().numpy().tobytes()
    elif isinstance(value, np.ndarray | Image.Image):
        yield value.tobytes()
    elif depth:
        for inner in _inside(value):
            yield from _parts(inner, depth - 1)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield inner
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, set | frozenset):
        yield from sorted(value, key=repr)
    elif isinstance(value, DiffusionPipeline):  # what its call has set, and not its parts
        own = ((name, inner) for name, inner in sorted(vars(value).items()) if name.startswith("_"))
        yield from (inner for name, inner in own if not name.startswith(("_neustream", "_internal")))
    elif not isinstance(value, torch.nn.Module):
        every = sorted(getattr(value, "__dict__", {}).items())
        yield from (inner for name, inner in every if not name.startswith("_neustream"))
