"""Linear layers in oneDNN's layout: the tokens of `generate`, in the service's own calls alone."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from places import DEVICE
from test_texts import engine
from texts import Drive, alone, made, model_of, prompts

import neustream as ns
from neustream import BackendError
from neustream.backends.memory import free_bytes
from neustream.backends.transformers import LanguageModel, prepacked
from neustream.backends.transformers.measured import fingerprint
from neustream.backends.transformers.prepacked import Prepacked, prepacked_of
from neustream.backends.transformers.slots import Row

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="layouts of oneDNN are for CPUs")

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


WRITES = {
    "a row": lambda weight: weight[7].fill_(100.0),
    "a column": lambda weight: weight[:, 300].fill_(100.0),
}


@pytest.mark.parametrize("written", WRITES)
@pytest.mark.parametrize("layer", ["self_attn.q_proj", "mlp.down_proj"])
def test_a_part_that_is_written_past_the_counts_of_torch_is_noticed(written, layer):
    model = made("llama", **WIDE["llama"])
    drive = Drive(model, slots=1, prepack=True)
    for _ in range(prepacked.LOOKS):
        drive.texts.step([])
    WRITES[written](model.model.layers[0].get_submodule(layer).weight.data)
    with pytest.raises(ns.StageFailed, match="its weights were written to"):
        for _ in range(prepacked.LOOKS):
            drive.texts.step([])


def test_a_forward_that_a_layer_is_given_between_steps_stays_and_is_noticed():
    model = made("llama", **WIDE["llama"])
    drive = Drive(model, slots=1, prepack=True)
    layer = model.lm_head
    given = layer.forward = lambda input: torch.nn.functional.linear(input, layer.weight) * 2
    with drive.texts.model.prepacked.used():
        assert layer.forward is given
    assert layer.forward is given
    with pytest.raises(ns.StageFailed, match="lm_head has another forward"):
        drive.texts.step([])


def test_a_model_that_two_serve_reads_copies_in_each_ones_calls():
    model = torch.nn.Sequential(torch.nn.Linear(512, 512))
    one, two = Prepacked(model), Prepacked(model)
    input = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        stock = model(input)
        with one.used():
            own = model(input)
            with ThreadPoolExecutor(1) as other:
                other.submit(_used_once, two).result()
            assert torch.equal(model(input), own)
            late = Prepacked(model)
        assert torch.equal(model(input), stock)
    assert not torch.equal(own, stock)
    assert len(late) == 1
    assert "forward" not in model[0].__dict__


def test_two_devices_on_one_cpu_share_the_copies():
    model, given = made("llama", **WIDE["llama"]), prompts(4, seed=3)
    model.requires_grad_(False)
    expected = [alone(model, prompt, 8, eos_token_id=None) for prompt in given]
    with ns.serve(model, slots=2, devices=["cpu"] * 3, prepack=True, measure_s=0.1) as service:
        packed = [texts.model.prepacked for _, texts in service.models[""]._devices]
        laid_out = [[copy[0] for copy in one._copies.values()] for one in packed]
        assert [len(one) for one in laid_out] == [LAYERS["llama"]] * 3
        assert all(one is other for first in laid_out for one, other in zip(first, laid_out[0], strict=True))
        asked = [service.submit(prompt, max_tokens=8, ignore_eos=True) for prompt in given]
        assert [list(answer.result(60).token_ids) for answer in asked] == expected
        model.model.norm.weight.data.mul_(1)  # as it was
        model.lm_head.weight.data.mul_(3)
        with pytest.raises(ns.RequestFailed, match="was changed while it is served"):
            for _ in range(16):
                service(given[0], max_tokens=1)


@pytest.mark.parametrize("wanted", [None, False, True])
def test_weights_of_another_model_are_not_shared(wanted):
    one, other = (made("llama", **WIDE["llama"]) for _ in range(2))
    first = prepacked_of(one, True)
    second = prepacked_of(other, wanted, first)
    assert (second is None) == (wanted is False)
    if second is not None:
        assert not {id(copy[0]) for copy in first._copies.values()} & {id(copy[0]) for copy in second._copies.values()}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_is_copied_while_a_step_runs_is_one_of_its_own(copied):
    model = torch.nn.Sequential(torch.nn.Linear(512, 512))
    packed, input = Prepacked(model), torch.ones(3, 512)
    with packed.used(), torch.inference_mode(False):
        other = copied(model)
    with torch.no_grad():
        other[0].weight.mul_(2)
        wanted = other(input)
        with packed.used():
            assert torch.equal(other(input), wanted)
        with Prepacked(other).used():
            own = other(input)
    torch.testing.assert_close(own, wanted)
    assert not torch.equal(own, wanted)  # other kernels round otherwise


def _used_once(packed):
    with packed.used():
        pass


def test_weights_that_begin_at_one_place_have_copies_of_their_own():
    flat = torch.randn(1024 * 512, generator=torch.Generator().manual_seed(2))
    model = torch.nn.ModuleList([torch.nn.Linear(512, 512), torch.nn.Linear(512, 1024)])
    model[0].weight = torch.nn.Parameter(flat[: 512 * 512].view(512, 512))
    model[1].weight = torch.nn.Parameter(flat.view(1024, 512))
    packed, input = Prepacked(model), torch.ones(2, 512)
    with torch.inference_mode(), packed.used():
        assert [layer(input).shape for layer in model] == [(2, 512), (2, 1024)]


def test_a_weight_that_is_computed_from_others_has_no_copy():
    layers = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))
    torch.nn.utils.parametrizations.weight_norm(layers[0])
    assert len(Prepacked(layers)) == 1


def test_bfloat16_has_copies_where_the_cpu_computes_with_it(monkeypatch):
    layers = torch.nn.Sequential(torch.nn.Linear(512, 512, dtype=torch.bfloat16))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(BackendError, match=r"of 262144 weights or more in torch\.float32$"):
        Prepacked(layers)


@pytest.mark.parametrize("shape", [(512, 1024), (1024, 512), (768, 768), (1, 5), (5, 1), (1000, 999)])
def test_the_values_that_are_looked_at_are_of_every_row_and_column(shape):
    rows, columns = shape
    values = torch.arange(rows * columns).view(shape)
    some = prepacked._some(values)
    assert set((some // columns).tolist()) == set(range(rows))
    assert set((some % columns).tolist()) == set(range(columns))


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
        (wide, 1, "prepack must be True, False or None, got 1"),
    ],
    ids=["small", "double", "one"],
)
def test_what_cannot_be_prepacked_is_refused_by_name(model, prepack, why):
    with pytest.raises(BackendError, match=why):
        engine(model(), prepack=prepack)


def test_copies_that_nobody_asked_for_need_memory_and_float32(monkeypatch):
    model = wide()
    size = sum(layer.weight.nbytes for layer in Prepacked(model)._layers)
    for free, there in ((4 * size, True), (4 * size - 1, False), (None, False)):
        monkeypatch.setattr(prepacked, "free_bytes", lambda free=free: free)
        assert (LanguageModel(model, slots=1).prepacked is not None) == there
    monkeypatch.setattr(prepacked, "free_bytes", lambda: 100 * size)
    assert LanguageModel(model, slots=1, prepack=False).prepacked is None
    assert LanguageModel(made("llama", **WIDE["llama"]).bfloat16(), slots=1).prepacked is None
    assert LanguageModel(model_of("llama"), slots=1).prepacked is None  # none of its layers is large enough
    compiled = made("llama", **WIDE["llama"])
    monkeypatch.setattr(compiled.model, "_compiled_call_impl", compiled.model._call_impl)
    assert prepacked_of(compiled, None) is None


def test_free_memory_is_that_of_the_system_and_of_the_container(tmp_path):
    system = tmp_path / "meminfo"
    assert free_bytes(system, tmp_path) is None
    system.write_text("MemTotal: 9 kB\nMemAvailable:  4 kB\n")
    assert free_bytes(system, tmp_path) == 4096
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    assert free_bytes(system, tmp_path) == 4096
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_bytes(system, tmp_path) == 2000
    (tmp_path / "memory.stat").write_text("active_file 7\ninactive_file 500\n")  # a checkpoint that was read
    assert free_bytes(system, tmp_path) == 2500
    (tmp_path / "memory.stat").unlink()
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_bytes(system, tmp_path) == 0


def test_a_compiled_model_is_refused(monkeypatch):
    model = made("llama", **WIDE["llama"])
    monkeypatch.setattr(model.model, "_compiled_call_impl", model.model._call_impl)
    with pytest.raises(BackendError, match="prepack: LlamaForCausalLM is compiled"):
        LanguageModel(model, slots=1, prepack=True)
