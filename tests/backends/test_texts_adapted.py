"""Models that PEFT has wrapped: served with their active adapters as their own `generate` does it."""

import threading

import pytest

peft = pytest.importorskip("peft", reason="needs peft")
torch = pytest.importorskip("torch")

from texts import alone, made, prompts  # noqa: E402

import neustream  # noqa: E402
from neustream import BackendError, RequestError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads what transformers has renamed

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
KINDS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "head": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
}


def wrapped(kind):
    torch.manual_seed(0)
    return peft.get_peft_model(made("llama"), KINDS[kind]()).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merged", [False, True])
def test_tokens_are_those_of_the_wrapped_models_generate(kind, merged):
    model, given = wrapped(kind), prompts(4, seed=3)
    if merged:
        model.merge_adapter()
    hows = [{}, {"temperature": 1.2, "seed": 1}, {}, {"temperature": 0.8, "seed": 2}]
    wanted = [_alone(model, prompt, how) for prompt, how in zip(given, hows, strict=True)]
    with neustream.serve(model, slots=3, measure_s=0.1) as service:
        asked = [
            service.submit(prompt, max_tokens=8, ignore_eos=True, **how)
            for prompt, how in zip(given, hows, strict=True)
        ]
        found = [list(answer.result(60).token_ids) for answer in asked]
    assert found == wanted
    if not merged:
        model.disable_adapter_layers()
        assert [_alone(model, prompt, how) for prompt, how in zip(given, hows, strict=True)] != wanted


def _alone(model, prompt, how):
    return alone(_ByName(model), prompt, 8, eos_token_id=None, **how)


class _ByName:
    """`generate` of a wrapped model takes its ids by name."""

    def __init__(self, model):
        self._model, self.device = model, model.device

    def generate(self, ids, **how):
        return self._model.generate(input_ids=ids, **how)


@pytest.mark.parametrize("kind", ["lora", "head"])
def test_adapters_that_are_switched_while_serving_are_noticed(kind):
    model = wrapped(kind)
    model.add_adapter("other", KINDS[kind]())
    with neustream.serve(model, slots=1, measure_s=0.1) as service:
        service([5, 6], max_tokens=2)
        model.set_adapter("other")
        model.requires_grad_(False)
        with pytest.raises(RequestError, match="has other adapters, or they are switched otherwise"):
            service.submit([5, 6], max_tokens=2)
        model.set_adapter("default")
        service([5, 6], max_tokens=2)


@pytest.mark.parametrize("prepack", [False, True])
def test_requests_that_are_open_when_adapters_are_switched_get_no_token_of_the_other(prepack):
    torch.manual_seed(0)
    wide = {**LORA, "target_modules": ["q_proj", "down_proj"]}
    model = peft.get_peft_model(made("llama", hidden_size=512, intermediate_size=512), peft.LoraConfig(**wide)).eval()
    model.add_adapter("other", peft.LoraConfig(**wide))
    (prompt,) = prompts(1, seed=5)
    expected = _alone(model, prompt, {})
    for change, back in (
        (lambda: model.set_adapter("other"), lambda: model.set_adapter("default")),
        (model.base_model.disable_adapter_layers, model.base_model.enable_adapter_layers),
        (model.merge_adapter, model.unmerge_adapter),
    ):
        with neustream.serve(model, slots=2, prepack=prepack, measure_s=0.1) as service:
            gate = threading.Event()

            def wait(ids, logits, gate=gate):
                if ids.shape[1] == len(prompt) + 3:
                    gate.wait(60)
                return logits

            wait.gate = gate  # it cannot be copied
            answer = service.submit(prompt, max_tokens=8, processors=[wait], ignore_eos=True)
            tokens = iter(answer)
            came = [next(tokens).id for _ in range(3)]
            change()
            gate.set()
            with pytest.raises(neustream.RequestFailed, match="was changed while it is served"):
                came += [token.id for token in tokens]
            assert came == expected[:3]
            with pytest.raises(RequestError, match="was changed while it is served"):
                service.submit(prompt, max_tokens=2)
            back()
        with neustream.serve(model, slots=2, prepack=prepack, measure_s=0.1) as service:
            again = service(prompt, max_tokens=8, ignore_eos=True)
            assert list(again.token_ids) == expected[:8]


def test_a_model_that_gets_its_first_adapter_while_it_is_served_is_noticed():
    model = made("llama", hidden_size=512, intermediate_size=512)
    (prompt,) = prompts(1, seed=5)
    expected = alone(model, prompt, 8, eos_token_id=None)
    with neustream.serve(model, slots=1, prepack=True, measure_s=0.1) as service:
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()
        with pytest.raises(RequestError, match="was changed while it is served"):
            service.submit(prompt, max_tokens=8)
    with neustream.serve(wrapped, slots=1, prepack=True, measure_s=0.1) as service:
        base = service(prompt, adapter="__base__", max_tokens=8, ignore_eos=True)
        assert list(base.token_ids) == expected
        own = service(prompt, max_tokens=8, ignore_eos=True)
        assert list(own.token_ids) == _alone(wrapped, prompt, {}) != expected


def test_adapters_that_put_something_before_prompts_are_refused():
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(made("llama"), config).eval()
    with pytest.raises(BackendError, match="adapter 'default' is of PromptTuningConfig, which puts tokens or keys"):
        neustream.serve(model, slots=1)
