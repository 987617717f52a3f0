"""Attention of texts is torch's without cuDNN's, which makes a plan for each new length; others find theirs again."""

from __future__ import annotations

import threading

import pytest
import torch
from texts import made
from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp

from neustream.backends.torch import without_cudnn_attention
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.slots import Row

CUDA = torch.device("cuda")


@pytest.fixture(params=[True, False], ids=["on", "off"])
def before(request):
    """Whether cuDNN's attention is on, by the user's choice."""
    was = cudnn_sdp_enabled()
    enable_cudnn_sdp(request.param)
    yield request.param
    enable_cudnn_sdp(was)


def test_it_is_off_for_as_long_as_any_call_runs(before):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with without_cudnn_attention(CUDA):
            inside.set()
            leave.wait(60)

    with without_cudnn_attention(torch.device("cpu")):
        assert cudnn_sdp_enabled() is before
    thread = threading.Thread(target=other)
    with without_cudnn_attention(CUDA):
        thread.start()
        assert inside.wait(60) and cudnn_sdp_enabled() is False
    assert cudnn_sdp_enabled() is False  # the other one runs
    leave.set()
    thread.join()
    assert cudnn_sdp_enabled() is before
    with pytest.raises(KeyError), without_cudnn_attention(CUDA):
        raise KeyError("a model")
    assert cudnn_sdp_enabled() is before


def test_calls_of_a_model_run_under_it(before, monkeypatch):
    model, seen = made("opt"), []
    model.model.decoder.layers[0].register_forward_pre_hook(lambda *_: seen.append(cudnn_sdp_enabled()))
    served = LanguageModel(model, slots=2)
    seen.clear()
    monkeypatch.setattr(
        "neustream.backends.transformers.model.without_cudnn_attention", lambda device: without_cudnn_attention(CUDA)
    )
    served.forward([Row(0, 0, (5, 6, 7))])
    served.forward([Row(0, 3, (5,)), Row(1, 0, (6, 7))])
    served.all_logits(Row(1, 2, (5, 6)))
    assert seen == [False] * 3 and cudnn_sdp_enabled() is before
