"""Graphs of a CPU: the operations of one call, done again with the memory that they had, as CUDA graphs do."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from neustream.backends.capturing import Graphs, NotCaptured

VALUES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
"""Operations that wait for a device."""


class Outside:
    """A tensor that was there before a capture, which a graph reads and does not keep."""

    def __init__(self, tensor):
        self._storage, self._at = StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr()
        self._like = tensor.device, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()

    def tensor(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        assert storage is not None, f"a graph reads a tensor of shape {tuple(self._like[3])} that is gone"
        device, dtype, *where = self._like
        found = torch.empty(0, dtype=dtype, device=device).set_(storage, *where)
        assert found.data_ptr() == self._at, "a graph reads a tensor that is elsewhere"
        return found


class Tape(TorchDispatchMode):
    """Takes down operations: what of their arguments is older is not kept, what they make is."""

    def __init__(self):
        super().__init__()
        self.steps, self._made = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in VALUES:
            raise NotCaptured(f"its calls wait for the device ({func})")
        flat, spec = tree_flatten((args, kwargs or {}))
        given = [one for one in flat if isinstance(one, torch.Tensor)]
        kept = [self._kept(one) if isinstance(one, torch.Tensor) else one for one in flat]
        output = func(*args, **(kwargs or {}))
        results = [one for one in tree_flatten(output)[0] if isinstance(one, torch.Tensor)]
        shared = {storage(one) for one in given}
        if func._schema.is_mutable or any(storage(one) not in shared for one in results):
            self.steps.append((func, kept, spec, [None if storage(one) in shared else one for one in results]))
        self._made |= {storage(one): one for one in results if storage(one) not in shared}
        return output

    def _kept(self, tensor):
        return tensor if storage(tensor) in self._made else Outside(tensor)

    def play(self):
        for *_, results in self.steps:
            for one in results:
                if one is not None and one.is_floating_point():
                    one.fill_(float("nan"))
        for func, kept, spec, results in self.steps:
            flat = [one.tensor() if isinstance(one, Outside) else one for one in kept]
            args, kwargs = tree_unflatten(flat, spec)
            anew = [one for one in tree_flatten(func(*args, **kwargs))[0] if isinstance(one, torch.Tensor)]
            for mine, other in zip(results, anew, strict=True):
                if mine is not None:
                    mine.copy_(other)


def storage(tensor):
    return tensor.untyped_storage()._cdata


class Tapes(Graphs):
    """See `Graphs`: what is captured is a tape, and all else as for a GPU."""

    def record(self, function):
        tape, inference = Tape(), torch.is_inference_mode_enabled()
        with tape:
            output = function()

        def launch():
            with torch.inference_mode(inference), torch.no_grad():
                tape.play()

        return launch, output
