"""Requests that choose an adapter of PEFT's: what the model gives with that one set, in mixed company."""

import copy

import pytest

peft = pytest.importorskip("peft", reason="needs peft")
torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from pictures import MARKERS, picture, sighted  # noqa: E402
from pictures import alone as seen_alone  # noqa: E402
from places import DEVICE  # noqa: E402
from texts import alone, made, prompts  # noqa: E402
from toys import Flat  # noqa: E402

import neustream  # noqa: E402
from neustream import BackendError, KVCache, RequestError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
WIDE = {"r": 8, "lora_alpha": 32, "target_modules": ["k_proj", "down_proj", "embed_tokens"], "init_lora_weights": False}
NAMES = ["default", "wide", "__base__", None]
HOWS = [{}, {"temperature": 1.2, "seed": 1}]


def wrapped(attention="sdpa", kind="llama"):
    torch.manual_seed(0)
    model = peft.get_peft_model(made(kind, attention), peft.LoraConfig(**LORA)).eval()
    model.add_adapter("wide", peft.LoraConfig(**WIDE))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model.requires_grad_(False)


class _ByName:
    def __init__(self, model):
        self._model, self.device = model, model.device

    def generate(self, ids, **how):
        return self._model.generate(input_ids=ids, **how)


def wanted(model, prompt, name, most=8, **how):
    """Of `generate` with an adapter set; None: as the model is."""
    if name == "__base__":
        with model.disable_adapter():
            return alone(_ByName(model), prompt, most, eos_token_id=None, **how)
    before = model.active_adapter
    model.set_adapter(name or before)
    try:
        return alone(_ByName(model), prompt, most, eos_token_id=None, **how)
    finally:
        model.set_adapter(before)
        model.requires_grad_(False)


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("sdpa", {"slots": 8}),
        ("sdpa", {"slots": 1}),
        ("sdpa", {"slots": 8, "prefix_tokens": 0, "policy": "fcfs", "kv_cache": KVCache(14, 8)}),
        ("sdpa", {"slots": 4, "buckets": [64]}),
        ("sdpa", {"slots": 4, "devices": [str(DEVICE)] * 2}),
        ("eager", {"slots": 8}),
    ],
    ids=["packed", "one slot", "little memory", "buckets", "two devices", "lanes"],
)
def test_tokens_are_those_of_the_model_with_the_adapter_set(attention, options):
    model, given = wrapped(attention), prompts(2, seed=3, low=18)
    kinds = [(prompt, name, how) for prompt in given for name in NAMES for how in HOWS]
    expected = [wanted(model, prompt, name, **how) for prompt, name, how in kinds]
    assert len({*map(tuple, expected)}) > 9  # of 12: adapters and ways to draw make other texts
    with neustream.serve(model, measure_s=0.1, **options) as service:
        asked = [
            service.submit(prompt, adapter=name, max_tokens=8, ignore_eos=True, **how) for prompt, name, how in kinds
        ]
        assert [list(answer.result(60).token_ids) for answer in asked] == expected
        several = service(given[0], adapter="wide", n=2, seed=1, temperature=1.2, max_tokens=8, ignore_eos=True)
        assert list(several[0].token_ids) == wanted(model, given[0], "wide", **HOWS[1])


def test_rows_of_several_adapters_share_a_call():
    model, given = wrapped(), prompts(3, seed=4, low=8)
    with neustream.serve(model, slots=4, measure_s=0.1, step_tokens=2048) as service:
        texts = service.models[""]._devices[0][1]
        calls = []
        forward = texts.model.forward
        texts.model.forward = lambda rows: calls.append({row.adapter for row in rows}) or forward(rows)
        asked = [
            service.submit(prompt, adapter=name, max_tokens=8, ignore_eos=True)
            for prompt, name in zip(given, ["default", "wide", "__base__"], strict=True)
        ]
        for answer in asked:
            answer.result(60)
    assert {None, "wide", "__base__"} in calls  # the active one is nothing that is chosen


def test_what_one_adapter_computed_of_a_prompt_is_not_taken_for_another():
    model, (prompt,) = wrapped(), prompts(1, seed=5, low=39)
    expected = {name: wanted(model, prompt, name) for name in NAMES}
    with neustream.serve(model, slots=2, prefix_tokens=500, measure_s=0.1) as service:
        for again in range(2):
            for name in NAMES:
                found = service(prompt, adapter=name, max_tokens=8, ignore_eos=True)
                assert list(found.token_ids) == expected[name]
                assert (found.cached_tokens > 0) == (again == 1 or name is None)
        first = service.submit(prompt, adapter="wide", id="first", max_tokens=30, ignore_eos=True)
        other = service.submit(prompt, adapter="default", like="first", max_tokens=8, ignore_eos=True)
        assert list(other.result(60).token_ids) == expected["default"]
        first.result(60)


def test_the_model_is_its_own_for_others_while_requests_choose():
    model, (prompt,) = wrapped(), prompts(1, seed=6)
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode(), neustream.serve(model, slots=2, measure_s=0.1) as service:
        before = model(input_ids=ids).logits
        answer = service.submit(prompt, adapter="wide", max_tokens=40, ignore_eos=True)
        for _ in answer:
            assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("name", "why"),
    [("other", "adapter='other'.*wide"), ("", "adapter=''"), (3, "adapter is the name of one, got 3")],
)
def test_an_adapter_that_is_not_there_is_refused_by_name(name, why):
    with neustream.serve(wrapped(), slots=1, measure_s=0.1) as service, pytest.raises(RequestError, match=why):
        service.submit([5], adapter=name)


def refusal(model, name):
    with neustream.serve(model, slots=1, measure_s=0.1) as service, pytest.raises(RequestError) as told:
        service.submit([5], adapter=name)
    return str(told.value)


def test_what_cannot_be_mixed_is_refused_with_its_reason():
    assert refusal(made("llama"), "x") == "adapter='x': LlamaForCausalLM has no adapters"
    model = wrapped()
    model.merge_adapter()
    assert "default is merged into the weights: unmerge it" in refusal(model, "wide")
    model.unmerge_adapter()
    model.base_model.set_adapter(["default", "wide"])
    assert "several adapters are active together, of default, wide" in refusal(model.requires_grad_(False), "wide")
    ia3 = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapted = peft.get_peft_model(made("llama"), ia3).eval()
    assert "PEFT cannot tell rows of a batch apart in a Linear" in refusal(adapted, "default")


def test_an_adapter_that_cannot_be_mixed_leaves_the_others_to_be_chosen():
    model, (prompt,) = wrapped(), prompts(1, seed=9)
    model.add_adapter("dora", peft.LoraConfig(**LORA, use_dora=True))
    model.set_adapter("default")
    expected = wanted(model, prompt, "wide")
    assert "adapter='dora': PEFT mixes no adapters with DoRA" in refusal(model, "dora")
    with neustream.serve(model, slots=1, measure_s=0.1) as service:
        assert list(service(prompt, adapter="wide", max_tokens=8, ignore_eos=True).token_ids) == expected


class Mixing:
    """PEFT's layers, which do `what` where they are to mix adapters in a batch."""

    def __init__(self, monkeypatch, what):
        layer = peft.tuners.lora.layer.LoraLayer
        stock = layer._mixed_batch_forward

        def mixed(self, x, *args, adapter_names, **kwargs):
            found = stock(self, x, *args, adapter_names=adapter_names, **kwargs)
            return what(found) if len({*adapter_names}) > 1 else found

        monkeypatch.setattr(layer, "_mixed_batch_forward", mixed)


def fails(found):
    raise ValueError("rows are not mine to tell apart")


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (fails, "the call fails: ValueError: rows are not mine to tell apart"),
        (lambda found: found + 1, "logits are not those of a call alone"),
    ],
)
def test_adapters_that_cannot_share_a_call_have_one_each_and_the_log_says_why(monkeypatch, caplog, what, why):
    model, (prompt,) = wrapped(), prompts(1, seed=12)
    expected = [wanted(model, prompt, name) for name in NAMES]
    Mixing(monkeypatch, what)
    with neustream.serve(model, slots=4, measure_s=0.1) as service:
        asked = [service.submit(prompt, adapter=name, max_tokens=8, ignore_eos=True) for name in NAMES]
        assert [list(answer.result(60).token_ids) for answer in asked] == expected
    (said,) = [record.getMessage() for record in caplog.records if record.name == "neustream"]
    assert said == f"LlamaForCausalLM: requests with different adapters share no calls: with 'wide' {why}"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_no_memory_to_try_adapters_is_no_reason_to_serve_them_slowly(monkeypatch, error):
    def lacks(found):
        raise error

    Mixing(monkeypatch, lacks)
    with pytest.raises(BackendError, match=r"LlamaForCausalLM: no memory to try its adapters .*give fewer slots"):
        neustream.serve(wrapped(), slots=4, measure_s=0.1)


def test_a_model_with_states_computes_adapters_one_by_one():
    torch.manual_seed(0)
    config = peft.LoraConfig(**{**LORA, "target_modules": ["in_proj"]})
    model = peft.get_peft_model(
        made("mamba2", "eager", num_heads=4, head_dim=32, n_groups=1, state_size=16), config
    ).eval()
    model.requires_grad_(False)
    (prompt,) = prompts(1, seed=7, low=9)
    names = ["default", "__base__"]
    expected = [wanted(model, prompt, name) for name in names]
    assert expected[0] != expected[1]
    with neustream.serve(model, slots=4, max_len=64, measure_s=0.1) as service:
        asked = [service.submit(prompt, adapter=name, max_tokens=8, ignore_eos=True) for name in names * 2]
        assert [list(answer.result(60).token_ids) for answer in asked] == expected * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_images_are_looked_at_with_the_adapter_of_their_request(family):
    stock, processor = map(copy.deepcopy, sighted(family))  # adapters stay in a model
    towers = {"llava": ["q_proj", "v_proj"], "qwen2_vl": ["qkv", "v_proj"]}  # of the tower, and of the language model
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=towers[family], init_lora_weights=False)
    model = peft.get_peft_model(stock, config).eval()
    model.add_adapter("other", config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.5)
    assert any("vis" in name and "lora_" in name for name, _ in model.named_parameters())
    text, images = f"what is {MARKERS.get(family, '<image>')}?", [picture(1)]
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = seen_alone(model, processor, text, images, 6)
    model.set_adapter("default")
    model.requires_grad_(False)
    assert expected["default"] != expected["other"]
    with neustream.serve(model, processor, profile=Flat(), slots=4) as service:
        asked = [service.submit(text, images=images, adapter=name, max_tokens=6) for name in list(expected) * 2]
        assert [list(answer.result(60).token_ids) for answer in asked] == list(expected.values()) * 2


@pytest.mark.parametrize("cached", [True, False])
def test_a_request_moves_with_its_adapter(cached):
    model, (prompt,) = wrapped(), prompts(1, seed=10)
    expected = wanted(model, prompt, "wide", most=20)
    with (
        neustream.serve(model, slots=2, measure_s=0.1) as here,
        neustream.serve(wrapped(), slots=2, measure_s=0.1) as there,
    ):
        answer = here.submit(prompt, id="moves", adapter="wide", max_tokens=20, ignore_eos=True)
        for at, _ in enumerate(answer):
            if at == 2:
                break
        moved = here.give("moves", cached=cached).result(60)
        assert list(there.take(moved).result(60).result(60).token_ids) == expected
    assert answer.outcome().code == "moved"


def test_an_encoder_reads_a_prompt_with_the_adapter_of_its_request():
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **ids)
    stock = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in stock.parameters():
            weight.mul_(3)
    lora = peft.LoraConfig(r=4, target_modules=["q", "wo"], init_lora_weights=False)
    model = peft.get_peft_model(stock, lora).eval()
    model.add_adapter("other", lora)
    model.requires_grad_(False)
    (prompt,) = prompts(1, seed=11)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        expected[name] = out[0, 1:].tolist()
    model.set_adapter("default")
    model.requires_grad_(False)
    assert expected["default"] != expected["other"]
    with neustream.serve(model, slots=4, max_len=64, measure_s=0.1) as service:
        asked = [service.submit(prompt, adapter=name, max_tokens=8) for name in list(expected) * 2]
        assert [list(answer.result(60).token_ids) for answer in asked] == list(expected.values()) * 2


def test_adapters_that_are_added_or_removed_are_noticed():
    model = wrapped()
    with neustream.serve(model, slots=1, measure_s=0.1) as service:
        assert service([5, 6], adapter="wide", max_tokens=2, ignore_eos=True).token_ids
        model.add_adapter("late", peft.LoraConfig(**LORA))
        with pytest.raises(RequestError, match="was changed while it is served"):
            service.submit([5, 6], adapter="late")
        model.delete_adapter("late")
        model.requires_grad_(False)
        assert service([5, 6], adapter="wide", max_tokens=2, ignore_eos=True).token_ids


def test_a_service_of_the_same_model_again_has_its_adapters():
    model, (prompt,) = wrapped(), prompts(1, seed=8)
    expected = wanted(model, prompt, "wide")
    for _ in range(2):
        with neustream.serve(model, slots=2, measure_s=0.1) as service:
            assert list(service(prompt, adapter="wide", max_tokens=8, ignore_eos=True).token_ids) == expected
    with pytest.raises(BackendError, match="is of PromptTuningConfig"):
        neustream.serve(
            peft.get_peft_model(made("llama"), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        )
