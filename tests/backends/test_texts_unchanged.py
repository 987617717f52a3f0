"""A model that is changed while it is served: its requests fail by name, and none gets other tokens."""

from __future__ import annotations

import threading
import warnings

import peft
import pytest
import torch
from test_texts import engine
from texts import VOCABULARY, alone, made, prompts
from transformers.integrations import sdpa_attention
from transformers.models.llama import modeling_llama

import neustream as ns
from neustream import RequestError, RequestFailed, StageFailed
from neustream.backends.copies import twin
from neustream.backends.transformers import LanguageModel, TextMount
from neustream.backends.transformers import model as served_model
from neustream.backends.transformers.modules import Texts
from neustream.backends.transformers.text import Ask
from neustream.core.batch import StepInput


class Steps:
    """All steps take as long."""

    name, device = "llm", "here"

    def seconds(self, step):
        return 1e-3


LLAMA = {"intermediate_size": 128, "num_key_value_heads": 2}
LORA = {"r": 4, "target_modules": ["q_proj"], "lora_alpha": 64, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def adapted(model):
    """Adapters of PEFT in the layers of a model, one of them active."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are several
        for name in ("one", "two"):
            peft.inject_adapter_in_model(peft.LoraConfig(**LORA), model, name)
    return switched(model.eval(), lambda layer: layer.set_adapter("one"))


def with_adapters():
    return adapted(made("llama", **LLAMA))


def switched(model, how):
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            how(module)
    return model


def q_proj(model):
    return model.model.layers[1].self_attn.q_proj


def optimize(model):
    weights = [weight.requires_grad_(True) for weight in model.parameters()]
    model(input_ids=torch.tensor([[5, 6, 7]], device=model.device)).logits.sum().backward()
    torch.optim.SGD(weights, lr=1.0).step()


def load(model):
    model.load_state_dict({name: weight * 1.5 for name, weight in model.state_dict().items()})


def merge(model):
    switched(model, lambda layer: layer.merge())


def scale(model):
    q_proj(model).scaling["one"] = 3.0


def replace_layer(model):
    model.model.layers[1].mlp = torch.nn.Identity()


def replace_weight(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)


def replace_forward(model):
    model.model.layers[0].forward = model.model.layers[1].forward


def write_data(model):
    for weight in model.parameters():
        weight.data.mul_(1.5)


def steer(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.5)


def dropout(model):
    model.model.layers[0].self_attn.train()


def set_on(name, value):
    """A change of this attribute, of all modules that have it."""
    return lambda model: [setattr(module, name, value) for module in model.modules() if hasattr(module, name)]


SEEN = [
    (None, torch.nn.Module.train, "the model is in training mode"),
    (None, dropout, r"model\.layers\.0\.self_attn is in training mode"),
    (None, torch.nn.Module.double, r"model\.embed_tokens\.weight was moved or replaced"),
    (None, torch.nn.Module.bfloat16, "was moved or replaced"),
    (None, lambda model: model.to("meta"), "was replaced"),
    (None, load, r"model\.embed_tokens\.weight was written to"),
    (None, optimize, "was written to"),
    (None, replace_layer, r"model\.layers\.1\.mlp was replaced, added or removed"),
    (None, replace_weight, r"lm_head\.weight was replaced"),
    (None, replace_forward, r"model\.layers\.0 has another forward"),
    (None, lambda model: model.set_attn_implementation("eager"), "its attention is 'eager' now"),
    (None, set_on("scaling", 3.0), r"layers\.0\.self_attn\.scaling was 0\.25 and is 3\.0"),
    (None, set_on("variance_epsilon", 50), r"layers\.0\.input_layernorm\.variance_epsilon was 1e-06 and is 50"),
    (None, lambda model: vars(model.model.norm).pop("variance_epsilon"), "variance_epsilon was 1e-06 and is None"),
    (None, lambda model: setattr(model.config, "num_hidden_layers", 1), r"config\.num_hidden_layers was 2 and is 1"),
    (None, adapted, "was replaced, added or removed"),
    (with_adapters, lambda model: switched(model, lambda layer: layer.set_adapter("two")), "has other adapters"),
    (with_adapters, lambda model: switched(model, lambda layer: layer.enable_adapters(False)), "has other adapters"),
    (
        with_adapters,
        lambda model: switched(model, lambda layer: layer.delete_adapter("one")),
        "was replaced, added or removed|has other adapters",
    ),
    (with_adapters, merge, "has other adapters"),
    (with_adapters, scale, "has other adapters"),
]
FELT = [
    (None, write_data, "its weights were written to"),
    (None, steer, "it has other hooks, which change what it computes"),
]
"""What only a step can notice."""


@pytest.mark.filterwarnings("ignore:Adapter one was active")
@pytest.mark.parametrize(("make", "change", "reason"), SEEN)
def test_a_changed_model_is_refused_at_submit(make, change, reason):
    model = make() if make else made("llama", **LLAMA)
    with engine(model) as running:
        assert running([5, 6, 7], max_tokens=3).token_ids
        change(model)
        with pytest.raises(RequestError, match=rf"LlamaForCausalLM was changed while it is served: .*({reason})"):
            running.submit([5, 6, 7], max_tokens=3)


@pytest.mark.filterwarnings("ignore:Adapter one was active")
@pytest.mark.parametrize(("make", "change", "reason"), [*SEEN, *FELT])
def test_requests_under_way_fail_when_their_model_is_changed(make, change, reason):
    model = make() if make else made("llama", **LLAMA)
    wanted = [alone(model, prompt, 60, eos_token_id=-1) for prompt in prompts(3, high=20)]
    go, at_step = threading.Event(), threading.Event()

    def wait(module, inputs):
        at_step.set()
        assert go.wait(60)

    with engine(model) as running:
        handle = model.register_forward_pre_hook(wait)
        answers = [running.submit(prompt, max_tokens=60, ignore_eos=True) for prompt in prompts(3, high=20)]
        assert at_step.wait(60)
        changer = threading.Thread(target=lambda: (handle.remove(), change(model)))
        if change is optimize:  # calls the model itself
            go.set()
        changer.start()
        changer.join()
        go.set()
        errors = [answer.exception(60) for answer in answers]
    assert any(errors)
    for answer, error, tokens in zip(answers, errors, wanted, strict=True):
        got = [output.update["token"] for output in answer.outputs]
        assert got == tokens[: len(got)]
        if error is not None:
            assert isinstance(error, RequestFailed) and "was changed while it is served" in str(error)


def test_a_model_that_is_as_it_was_is_served_again():
    model = made("llama", **LLAMA)
    wanted = alone(model, [5, 6, 7], 8)
    with engine(model) as running:
        model.train()
        with pytest.raises(RequestError, match="training mode"):
            running.submit([5, 6, 7], max_tokens=8)
        model.eval()
        assert list(running([5, 6, 7], max_tokens=8).token_ids) == wanted


def test_hooks_that_watch_are_let_in_and_let_go():
    model = made("llama", **LLAMA)
    wanted = alone(model, [5, 6, 7], 8)
    seen = []
    with engine(model) as running:
        handle = model.model.layers[0].register_forward_hook(lambda *told: seen.append(told))
        assert list(running([5, 6, 7], max_tokens=8).token_ids) == wanted and len(seen) > 7
        handle.remove()
        assert list(running([5, 6, 7], max_tokens=8).token_ids) == wanted


def test_stock_calls_beside_it_change_nothing():
    model = made("llama", **LLAMA)
    wanted = alone(model, [5, 6, 7], 8)
    with engine(model) as running:
        assert list(running([5, 6, 7], max_tokens=8).token_ids) == wanted
        assert alone(model, [5, 6, 7], 8) == wanted and model.eval() is model and model.to("cpu") is model
        model.requires_grad_(True)
        assert list(running([5, 6, 7], max_tokens=8).token_ids) == wanted


def test_a_replica_notices_a_change_of_the_weights_that_it_shares():
    model = made("llama", **LLAMA)
    replica = LanguageModel(twin(model), slots=1)
    replica.unchanged.check()
    load(model)
    with pytest.raises(RequestError, match="was written to"):
        replica.unchanged.check()
    with pytest.raises(StageFailed, match="was written to"):
        replica.unchanged.check_step()


def test_kept_buffers_are_weights():
    model = made("llama", **LLAMA)
    model.register_buffer("calibration", torch.ones(3))
    model = LanguageModel(model, slots=1)
    texts = Texts(model, lambda given: Ask([0]))
    texts.step([])
    model.model.calibration = torch.zeros(3)
    with pytest.raises(RequestError, match="calibration was replaced"):
        model.unchanged.check()


@pytest.mark.parametrize("write", [lambda table: table.add_(1), lambda table: table.data.add_(1)])
def test_tables_that_are_not_saved_are_weights_too(write):
    model = made("llama", **LLAMA)
    model.register_buffer("table", torch.ones(3), persistent=False)
    with engine(model) as running:
        running([5, 6, 7], max_tokens=2)
        write(model.table)
        with pytest.raises((RequestError, RequestFailed), match="was changed while it is served"):
            running([5, 6, 7], max_tokens=2)
        model.table = torch.zeros(4)  # models that extend their tables do so


def test_weights_made_in_inference_mode_and_tied_ones_are_served():
    with torch.inference_mode():
        model = made("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=96)
    wanted = alone(model, [5, 6, 7], 8)
    with engine(model) as running:
        assert list(running([5, 6, 7], max_tokens=8).token_ids) == wanted
        with torch.inference_mode():
            model.transformer.wte.weight.mul_(2)
        with pytest.raises(RequestFailed, match="its weights were written to"):
            running([5, 6, VOCABULARY - 1], max_tokens=8)


def test_a_mount_that_is_opened_again_is_not_tried_again(monkeypatch):
    """As `neustream run` does it, for one policy after the other; unless the model was changed."""
    trials = []
    prove = served_model.prove
    monkeypatch.setattr(served_model, "prove", lambda model: (trials.append(model), prove(model)))
    stock = made("llama", **LLAMA)
    mount = TextMount(stock, profile=Steps(), slots=2)
    wanted = alone(stock, [5, 6, 7], 4)
    for _ in range(3):
        with ns.serve(mount) as service:
            assert list(service([5, 6, 7], max_tokens=4).token_ids) == wanted
    assert len(trials) == 1
    load(stock)
    with ns.serve(mount) as service:
        assert list(service([5, 6, 7], max_tokens=4).token_ids) == alone(stock, [5, 6, 7], 4)
    assert len(trials) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda said: setattr(said, "repetition_penalty", 3.0), r"repetition_penalty was None and is 3\.0; give it as"),
        (lambda said: said.eos_token_id.append(7), r"eos_token_id was \[2\] and is \[2, 7\]"),
    ],
)
def test_another_generation_config_is_refused_at_submit(change, reason):
    model = made("llama", **LLAMA)
    model.generation_config.eos_token_id = [2]
    with engine(model) as running:
        under_way = running.submit([5, 6, 7], max_tokens=20, ignore_eos=True)
        change(model.generation_config)
        with pytest.raises(RequestError, match=reason):
            running.submit([5, 6, 7], max_tokens=3)
        assert len(under_way.result(60).token_ids) == 20  # what it said then


def test_another_forward_of_a_class_and_hooks_of_all_modules_are_noticed(monkeypatch):
    model = made("llama", **LLAMA)
    mlp = type(model.model.layers[0].mlp)
    with engine(model) as running:
        with monkeypatch.context() as patched:
            patched.setattr(mlp, "forward", lambda module, x: -x)
            with pytest.raises(RequestError, match="LlamaMLP has another forward"):
                running.submit([5, 6, 7], max_tokens=3)
        hook = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
        try:
            assert list(running([5, 6, 7], max_tokens=3).token_ids) == alone(model, [5, 6, 7], 3)  # it watches
        finally:
            hook.remove()
        assert list(running([5, 6, 7], max_tokens=3).token_ids) == alone(model, [5, 6, 7], 3)


@pytest.mark.parametrize(
    ("where", "name", "told"),
    [
        (modeling_llama, "apply_rotary_pos_emb", r"modeling_llama\.apply_rotary_pos_emb"),
        (modeling_llama, "rotate_half", r"modeling_llama\.rotate_half"),
        (modeling_llama, "eager_attention_forward", r"modeling_llama\.eager_attention_forward"),
        (sdpa_attention, "repeat_kv", r"sdpa_attention\.repeat_kv"),
        (torch.nn.functional, "scaled_dot_product_attention", r"functional\.scaled_dot_product_attention"),
        (torch.nn.functional, "silu", r"functional\.silu"),
    ],
)
def test_another_function_that_its_code_calls_is_noticed(monkeypatch, where, name, told):
    model = made("llama", **LLAMA)
    wanted, stock = alone(model, [5, 6, 7], 3), getattr(where, name)
    with engine(model) as running:
        with monkeypatch.context() as patched:
            patched.setattr(where, name, lambda *args, **kwargs: stock(*args, **kwargs))
            with pytest.raises(RequestError, match=rf"LlamaForCausalLM was changed .*{told} was replaced"):
                running.submit([5, 6, 7], max_tokens=3)
        with monkeypatch.context() as patched:
            patched.delattr(where, name)
            with pytest.raises(RequestError, match=rf"{told} was replaced"):
                running.submit([5, 6, 7], max_tokens=3)
        assert list(running([5, 6, 7], max_tokens=3).token_ids) == wanted  # it is back


def test_a_function_that_is_replaced_while_a_step_runs_fails_its_requests(monkeypatch):
    model = made("llama", **LLAMA)
    texts = Texts(LanguageModel(model, slots=2), lambda given: given.params["ask"])
    forward, stock = texts.model.forward, modeling_llama.rotate_half

    def patching(rows):
        monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: -stock(x))
        return forward(rows)

    texts.model.forward = patching
    given = StepInput("a", {"ask": Ask([5, 6, 7])}, {}, "llm.prefill", size=3.0, whole=3.0)
    with pytest.raises(StageFailed, match=r"rotate_half was replaced"):
        texts.step([given])


def test_a_number_that_a_model_counts_with_is_no_setting():
    model = made("llama", **LLAMA)
    norm, forward = model.model.norm, type(model.model.norm).forward

    class Counting(type(norm)):
        def forward(self, x):
            self.calls += 1
            return forward(self, x)

    norm.__class__, norm.calls = Counting, 0
    with engine(model) as running:
        assert list(running([5, 6, 7], max_tokens=3).token_ids) == alone(model, [5, 6, 7], 3)
    assert norm.calls
