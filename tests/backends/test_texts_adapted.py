"""Models that PEFT has wrapped: served with their active adapters as their own `generate` does it."""

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
        self._model = model

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


def test_adapters_that_put_something_before_prompts_are_refused():
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(made("llama"), config).eval()
    with pytest.raises(BackendError, match="adapter 'default' is of PromptTuningConfig, which puts tokens or keys"):
        neustream.serve(model, slots=1)
