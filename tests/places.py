"""Where models of tests are: `NEUSTREAM_TEST_DEVICE=cuda` puts those of tests/backends on a GPU (`make test-gpu`)."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("NEUSTREAM_TEST_DEVICE", "cpu"))
if DEVICE.type == "cuda":  # float32 is to be float32, and a result the same each time
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
