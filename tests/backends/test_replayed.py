"""Denoisers whose calls are replayed: here by the operations of one call, done again in the same memory."""

from __future__ import annotations

import contextlib
import logging
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from pipelines import FAMILIES, alone, build, difference, requests, stock, together
    from places import DEVICE
    from small_pipelines import SD_SHAPE, close_to, serve, words
    from taped import Tapes

    from neustream.backends import capturing
    from neustream.backends.diffusers import PipelineMount, from_config, replayed
    from neustream.backends.diffusers.parts import parts_of
    from neustream.backends.diffusers.replayed import Replayed

import neustream as ns  # noqa: E402
from neustream.errors import BackendError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2's, of how schedulers call it

KINDS = ["dit", "stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "wan"]
ERRORS = [capturing.NotCaptured("it waits"), RuntimeError("no"), torch.OutOfMemoryError("full")]


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """Tapes in place of graphs, and one torch thread."""
    torch.set_num_threads(1)
    monkeypatch.setitem(capturing.CAPTURES, DEVICE.type, Tapes)


def denoisers(parts):
    return [part for methods in parts.values() for part in methods.values() if part.role == "denoise"]


@pytest.mark.parametrize("name", KINDS)
def test_replayed_alone_is_bitwise_stock_and_in_company_equal_to_rounding(name):
    assert name in FAMILIES
    pipe = build(name)
    some = requests(name)
    wanted = [stock(pipe, request) for request in some]
    parts = parts_of(pipe, graphs=True)
    (part,) = denoisers(parts)
    for request, one in [*zip(some, wanted, strict=True)] * 2:
        assert torch.equal(alone(pipe, request, parts), one)
    assert part.function.replays > len(some)
    before = part.function.replays
    for _ in range(2):
        for got, one in zip(together(pipe, some, parts), wanted, strict=True):
            assert difference(got, one) < FAMILIES[name].tolerance
    assert part.function.replays > before


def call(model, at, **more):
    sample, steps, texts = args(at)
    with contextlib.nullcontext() if torch.is_inference_mode_enabled() else torch.no_grad():
        return model(sample, steps, encoder_hidden_states=texts, return_dict=False, **more)[0]


def test_results_are_ones_own_and_kinds_of_calls_have_graphs_of_their_own(sd):
    model = Replayed("unet", sd.unet)
    wanted = [call(sd.unet, at) for at in range(6)]
    got = [call(model, at) for at in range(6)]
    assert all(map(torch.equal, got, wanted))
    assert model.replays == 5  # the first of its kind is not
    assert torch.equal(call(model, 1, cross_attention_kwargs={}), wanted[1]) and model.replays == 5
    with torch.inference_mode():
        assert torch.equal(call(model, 1), wanted[1]) and model.replays == 5  # another mode
        assert torch.equal(call(model, 3), wanted[3]) and model.replays == 6


def args(at):
    made = torch.Generator().manual_seed(at)
    sample, texts = torch.randn(2, 4, 8, 8, generator=made), torch.randn(2, 7, 32, generator=made)
    return sample.to(DEVICE), torch.tensor([at, at], device=DEVICE), texts.to(DEVICE)


def test_hooks_gradients_autocast_and_calls_that_nobody_knows_run_as_ever(sd):
    model = Replayed("unet", sd.unet)
    for at in range(3):
        call(model, at)
    assert model.replays == 2
    seen = []
    handle = sd.unet.mid_block.register_forward_pre_hook(lambda *_: seen.append(1))
    call(model, 4)
    handle.remove()
    assert seen == [1] and model.replays == 2
    sample, step, texts = args(1)
    assert model(sample.requires_grad_(), step, texts, return_dict=False)[0].grad_fn is not None
    for _ in range(3):
        call(model, 1, cross_attention_kwargs={"what": object()})
    assert model.replays == 2
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: seen.append(2))
    call(model, 4)
    handle.remove()
    assert 2 in seen and model.replays == 2


def residuals(at):
    """A T2I-Adapter's, one for each down block; UNets take them out of the list."""
    made = torch.Generator().manual_seed(100 + at)
    sizes = ((16, 8), (32, 4))
    return [torch.randn(2, channels, side, side, generator=made).to(DEVICE) for channels, side in sizes]


def test_calls_take_things_out_of_lists_and_dicts_that_they_are_given(sd, monkeypatch):
    model = Replayed("unet", sd.unet)
    wanted = [call(sd.unet, at, down_intrablock_additional_residuals=residuals(at)) for at in range(4)]
    assert not torch.equal(wanted[0], call(sd.unet, 0))
    got = [call(model, at, down_intrablock_additional_residuals=residuals(at)) for at in range(4)]
    assert all(map(torch.equal, got, wanted)) and model.replays == 3


def test_weights_that_went_elsewhere_begin_anew(sd):
    model = Replayed("unet", sd.unet)
    for _ in range(3):
        call(model, 1)
    wanted = call(sd.unet, 1)
    sd.unet.conv_in.weight.data = sd.unet.conv_in.weight.data.clone()
    for turn in range(3):
        assert torch.equal(call(model, 1), wanted)
        assert model.replays == 2 + max(0, turn)
    with torch.no_grad():
        sd.unet.conv_in.weight.mul_(2)  # where it is: the next replay reads it
    assert torch.equal(call(model, 1), call(sd.unet, 1)) and not torch.equal(call(model, 1), wanted)


def image(model, at):
    made = torch.Generator().manual_seed(at)
    given = torch.randn(1, 16, 16, generator=made), torch.randn(1, 5, 16, generator=made), torch.tensor([0.5])
    given = [one.to(DEVICE) for one in given]
    with torch.no_grad():
        return model(given[0], given[1], timestep=given[2], img_shapes=[[(1, 4, 4)]], return_dict=False)[0]


def test_tables_that_a_model_forgets_are_there_for_graphs_that_read_them():
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    qwen = (
        QwenImageTransformer2DModel(in_channels=16, out_channels=4, joint_attention_dim=16, **sizes).eval().to(DEVICE)
    )
    model = Replayed("transformer", qwen)
    wanted = [image(qwen, at) for at in range(4)]
    assert all(torch.equal(image(model, at), wanted[at]) for at in range(2)) and model.replays == 1
    for height in range(1, 150):
        qwen.pos_embed([(1, height, 3)], max_txt_seq_len=5, device=DEVICE)
    assert all(torch.equal(image(model, at), wanted[at]) for at in range(4)) and model.replays == 5


@pytest.mark.parametrize("error", ERRORS)
def test_what_cannot_be_captured_is_told_once_and_runs_as_ever(sd, monkeypatch, caplog, error):
    def refuse(function):
        raise error

    monkeypatch.setitem(capturing.CAPTURES, DEVICE.type, lambda device: refuse)
    model = Replayed("unet", sd.unet)
    wanted = call(sd.unet, 1)
    with caplog.at_level(logging.WARNING, "neustream"):
        assert all(torch.equal(call(model, 1), wanted) for _ in range(4))
    (record,) = caplog.records
    assert "unet: its calls are no CUDA graphs from now on" in record.getMessage() and model.replays == 0


def test_graphs_are_bounded_and_rare_kinds_do_not_push_others_out(sd, monkeypatch):
    monkeypatch.setattr(replayed, "MOST", 2)
    model = Replayed("unet", sd.unet)
    kinds = [{"cross_attention_kwargs": {"a": number}} for number in range(3)]
    for kind in kinds[:2] * 3:
        call(model, 1, **kind)
    assert model.replays == 4
    for _ in range(replayed.USES_FULL - 1):
        call(model, 1, **kinds[2])
    assert model.replays == 4
    call(model, 1, **kinds[2])
    call(model, 1, **kinds[1])
    assert model.replays == 6
    call(model, 1, **kinds[0])  # the one that was not used for the longest time
    assert model.replays == 6


def test_served_requests_are_those_of_stock(sd):
    wanted = [sd(**words(at)).images for at in range(4)]
    with serve(sd, SD_SHAPE, graphs=True) as service:
        for at in range(4):
            assert torch.equal(service(**words(at)).images, wanted[at])
        answers = [service.submit(**words(at)) for at in range(4)]
        assert all(close_to(answer.result(60).images, one) for answer, one in zip(answers, wanted, strict=True))


def test_graphs_that_are_asked_for_and_cannot_be(sd, monkeypatch):
    with pytest.raises(BackendError, match="graphs must be True, False or None, got 'yes'"):
        PipelineMount(sd, graphs="yes")
    with pytest.raises(BackendError, match="graphs=True beside compile"):
        parts_of(sd, compile=True, graphs=True)
    mount = PipelineMount(sd, graphs=True)
    monkeypatch.delitem(capturing.CAPTURES, DEVICE.type)
    where = f"it is on {sd.device}; leave graphs out"
    with pytest.raises(BackendError, match=f"calls of unet cannot be CUDA graphs: {where}"):
        mount.check("")
    assert denoisers(parts_of(sd, graphs=None))[0].function is sd.unet
    assert from_config.Options(graphs=False).graphs is False


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=GPU) for dtype in ("float32", "float16", "bfloat16")])
@pytest.mark.parametrize("name", KINDS[:-1])
def test_real_graphs_give_the_bits_of_the_call(name, dtype, monkeypatch):
    monkeypatch.setitem(capturing.CAPTURES, "cuda", capturing.CudaGraphs)
    pipe = build(name, getattr(torch, dtype)).to("cuda")
    some = requests(name, getattr(torch, dtype))
    wanted = [stock(pipe, request) for request in some]
    parts = parts_of(pipe, graphs=True)
    (part,) = denoisers(parts)
    for request, one in [*zip(some, wanted, strict=True)] * 2:
        assert torch.equal(alone(pipe, request, parts), one)
    assert part.function.replays > len(some) and not part.function.why
    plain = together(pipe, some, parts_of(pipe, graphs=False))
    for _ in range(3):
        assert all(map(torch.equal, together(pipe, some, parts), plain))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_service_on_a_gpu_replays_by_itself(sd, monkeypatch):
    monkeypatch.setitem(capturing.CAPTURES, "cuda", capturing.CudaGraphs)
    sd.to("cuda")
    wanted = [sd(**words(at)).images for at in range(4)]
    mount = PipelineMount(sd, measure_s=0.5, progress=False)
    with ns.serve({"sd": mount}) as service:
        assert all(torch.equal(service(**words(at)).images, wanted[at]) for at in range(4))
        (part,) = mount.parts("denoise")
        assert part.function.replays > 10 and not part.function.why


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@torch.no_grad()
def test_real_graphs_that_are_all_gone_do_not_keep_others_from_being_captured():
    capture, given = capturing.CudaGraphs(torch.device("cuda")), torch.ones(4, device="cuda")
    kept = []  # memory of graphs that are gone
    for _ in range(3):
        replay = capture(lambda: given * 2)
        kept.append(replay())
        assert kept[-1].tolist() == [2.0] * 4
        del replay
