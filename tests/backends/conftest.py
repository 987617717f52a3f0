"""Models that several files of this folder serve."""

from __future__ import annotations

import pytest


@pytest.fixture
def sd():
    """A tiny Stable Diffusion with the same weights each time."""
    import torch
    from pipelines import ready, stable_diffusion

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return ready(stable_diffusion(), torch.float32)


@pytest.fixture
def dit():
    """A tiny DiT."""
    import torch
    from small_pipelines import small_dit

    torch.set_num_threads(1)
    return small_dit()
