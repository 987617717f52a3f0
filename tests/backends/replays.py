"""What tests of decodes that are replayed share, on a CPU and on a GPU."""

from __future__ import annotations

import torch

from neustream.backends.transformers.slots import Row


@torch.inference_mode()
def fill(served, seed):
    """Noise in all slots of a model."""
    noise = torch.Generator(served.device).manual_seed(seed)
    for layer in served.cache.used:
        for storage in (layer.keys, layer.values):
            storage.normal_(generator=noise)


def random_rows(draw, slots, most):
    """A token for some slots, behind contexts of any length; or a prompt, for two at most."""
    some = sorted(draw.sample(range(slots), draw.randint(1, slots)))
    rows = [Row(slot, draw.randrange(most), (draw.randrange(96),)) for slot in some]
    for at in draw.sample(range(len(rows)), min(draw.randint(0, 2), len(rows))):
        rows[at] = Row(rows[at].slot, 0, [draw.randrange(96) for _ in range(draw.randint(2, 64))])
    return rows


@torch.inference_mode()
def company_changes_no_bit(served):
    """Of a model with four slots of up to 96 tokens and `buckets=[16, 48]`: a graph for each length."""
    rows = [Row(0, 5, (7,)), Row(1, 40, (8,)), Row(3, 90, (9,))]
    fill(served, 3)
    together = served.forward(rows)
    assert served.replayed.replays == {(4, 1, 16): 1, (4, 1, 48): 1, (4, 1, 96): 1}
    assert torch.equal(served.stock_forward(rows), together)
    for row, logits in zip(rows, together, strict=True):
        assert torch.equal(served.forward([row])[0], logits)
