"""Linear layers in oneDNN's layout: the tokens of `generate`, in the service's own calls alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_texts import engine
from texts import Drive, alone, made, model_of, prompts

import neustream as ns
from neustream import BackendError
from neustream.backends.transformers import LanguageModel
from neustream.backends.transformers.measured import fingerprint
from neustream.backends.transformers.slots import Row

WIDE = {
    "llama": {"hidden_size": 512, "intermediate_size": 512},
    "gpt2": {"n_embd": 512, "n_layer": 1},
    "bloom": {"hidden_size": 512, "n_layer": 1, "n_head": 4},
}
LAYERS = {"llama": 10, "gpt2": 4, "bloom": 8}
"""Of each model, those that have 2 ** 18 weights: Llama's keys and values have half of that."""


def wide(kind="llama"):
    return model_of(kind, "eager" if kind == "bloom" else "sdpa", **WIDE[kind])


@pytest.mark.parametrize("kind", WIDE)
def test_tokens_are_those_of_generate(kind):
    model, asked = wide(kind), prompts(5, seed=1)
    drive = Drive(model, slots=3, prepack=True)
    assert len(drive.texts.model.prepacked) == LAYERS[kind]
    drawn = [{}, {"temperature": 0.7, "seed": 3}, {}, {"temperature": 1.2, "seed": 4}, {}]
    jobs = [drive.job(prompt, 8, ignore_eos=True, **how) for prompt, how in zip(asked, drawn, strict=True)]
    wanted = [alone(model, prompt, 8, eos_token_id=None, **how) for prompt, how in zip(asked, drawn, strict=True)]
    assert drive.shuffle(jobs, seed=2, chunk=9, evict=0.1) == wanted


def test_others_call_the_model_as_ever_while_a_step_runs():
    model = wide()
    served = LanguageModel(model, slots=2, prepack=True)
    ids = torch.tensor([prompts(1, seed=5, low=40)[0]])

    def call():
        with torch.inference_mode():
            return model(input_ids=ids).logits

    stock = call()
    with served.prepacked.used(), ThreadPoolExecutor(1) as other:
        own = call()
        served.unchanged.check()
        assert torch.equal(other.submit(call).result(), stock)
    assert not torch.equal(own, stock)  # other kernels round otherwise
    torch.testing.assert_close(own, stock, rtol=1e-4, atol=1e-4)
    assert torch.equal(call(), stock)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_with_buckets_results_are_the_same_to_the_last_bit():
    served = LanguageModel(wide(), slots=3, buckets=[64], prepack=True)
    texts = prompts(3, seed=6, low=10)
    together = served.forward([Row(slot, 0, text) for slot, text in enumerate(texts)])
    for text, logits in zip(texts, together, strict=True):
        assert torch.equal(served.forward([Row(1, 0, text)])[0], logits)


def test_a_layer_whose_forward_is_its_own_keeps_it():
    model = made("llama", **WIDE["llama"])
    layer = model.model.layers[0].mlp.down_proj
    layer.forward = lambda input: torch.nn.functional.linear(input, layer.weight) * 2
    given = layer.forward
    served = LanguageModel(model, slots=1, prepack=True)
    assert len(served.prepacked) == LAYERS["llama"] - 1
    with served.prepacked.used():
        assert layer.forward is given
    served.unchanged.check()


def test_weights_that_change_while_it_is_served_are_noticed():
    model = made("llama", **WIDE["llama"])
    served = LanguageModel(model, slots=1, prepack=True)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    with pytest.raises(ns.RequestError, match=r"down_proj.weight was written to"):
        served.unchanged.check()


def test_steps_are_measured_anew():
    plain, packed = (LanguageModel(wide(), slots=1, prepack=prepack) for prepack in (False, True))
    assert fingerprint(plain) != fingerprint(packed)


def test_it_is_an_option_of_serve():
    prompt = prompts(1, seed=8)[0]
    with engine(wide(), prepack=True) as service:
        assert list(service(prompt, max_tokens=6, ignore_eos=True).token_ids) == alone(
            wide(), prompt, 6, eos_token_id=None
        )


@pytest.mark.parametrize(
    ("model", "prepack", "why"),
    [
        (lambda: model_of("llama"), True, "LlamaForCausalLM has no stock linear layer of 262144 weights or more"),
        (lambda: made("llama", **WIDE["llama"]).double(), True, "LlamaForCausalLM has no stock linear layer of"),
        (wide, 1, "prepack must be True or False, got 1"),
    ],
    ids=["small", "double", "one"],
)
def test_what_cannot_be_prepacked_is_refused_by_name(model, prepack, why):
    with pytest.raises(BackendError, match=why):
        engine(model(), prepack=prepack)


def test_a_compiled_model_is_refused(monkeypatch):
    model = made("llama", **WIDE["llama"])
    monkeypatch.setattr(model.model, "_compiled_call_impl", model.model._call_impl)
    with pytest.raises(BackendError, match="prepack: LlamaForCausalLM is compiled"):
        LanguageModel(model, slots=1, prepack=True)
