"""Stock pipelines with processors, caches, hooks and forwards of somebody's own: exact, or refused by name."""

from __future__ import annotations

import functools
import threading
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    import diffusers as d
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache, apply_layerwise_casting
    from diffusers.models.attention_processor import AttnProcessor2_0
    from plainly_served import Plain, close_to, seeded, serve, together, words

    from neustream.backends.diffusers.parts import parts_of
    from tests.backends import pipelines

import neustream as ns  # noqa: E402

pytestmark = [
    # numpy 2's complaints about how diffusers calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# -- processors -----------------------------------------------------------------------------------------


class FirstRow(Plain):
    """Everybody attends to the first row: it alone gets what it would get alone."""

    def given(self, hidden, encoded):
        return hidden[:1].expand_as(hidden) if encoded is None else encoded


class LastRow(Plain):
    def given(self, hidden, encoded):
        return hidden[-1:].expand_as(hidden) if encoded is None else encoded


class Pairs(Plain):
    """Rows attend to the first of their four: batches of one or two requests show nothing."""

    def given(self, hidden, encoded):
        if encoded is not None:
            return encoded
        return hidden[[at - at % 4 for at in range(len(hidden))]] if len(hidden) > 4 else hidden


class Remembering(Plain):
    """Attends to what it saw last, too."""

    last = None

    def given(self, hidden, encoded):
        before, self.last = self.last, hidden
        return (hidden if before is None or before.shape != hidden.shape else before) if encoded is None else encoded


@pytest.mark.parametrize("kind", [Plain, FirstRow, LastRow, Pairs])
def test_processors_of_somebodys_own(sd, kind):
    sd.unet.set_attn_processor(kind())
    calls = [words(at, guidance_scale=1.0) for at in range(5)]
    stock = [sd(**{**one, "generator": seeded(at)}).images for at, one in enumerate(calls)]
    with serve(sd) as service:
        for size in (2, 5):
            found = together(service, calls[:size])
            assert all(map(close_to, found, stock)), size
        (part,) = service.models[""].parts("denoise")
    assert (False in part._rows_apart.values()) is (kind is not Plain)


def test_a_processor_that_remembers_is_noticed(sd):
    sd.unet.set_attn_processor(Remembering())
    with serve(sd) as service, pytest.raises(ns.RequestFailed, match=r"processor\.last was"):
        service(**words(steps=6))


def test_a_row_mixing_processor_set_while_it_is_served(sd):
    with serve(sd) as service:
        service(**words())
        before = sd.unet.attn_processors
        sd.unet.set_attn_processor(FirstRow())
        with pytest.raises(
            ns.RequestError, match=r"StableDiffusionPipeline was changed while it is served: unet.*proc"
        ):
            service.submit(**words())
        sd.unet.set_attn_processor(before)
        assert service(**words()).images.shape == (1, 3, 16, 16)


# -- caches, hooks and forwards --------------------------------------------------------------------------


def counting(stock):
    """A forward that skips every other call."""
    state = {"count": 0}

    def forward(*args, **kwargs):
        state["count"] += 1
        if state["count"] % 2:
            state["last"] = stock(*args, **kwargs)
        return state["last"]

    return forward


def wrap_model(pipe):
    pipe.unet.forward = counting(pipe.unet.forward)


def wrap_block(pipe):
    block = pipe.unet.mid_block
    block.forward = functools.wraps(block.forward)(counting(block.forward))


def hook_output(pipe):
    pipe.unet.register_forward_hook(lambda module, args, output: output)


def hook_input(pipe):
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: args)


CHANGES = {
    wrap_model: "unet.forward",
    wrap_block: "unet.mid_block.forward",
    hook_output: "unet",
    hook_input: "unet.conv_in",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_may_remember_calls_is_refused(sd, change):
    change(sd)
    with pytest.raises(ns.BackendError, match=f"{CHANGES[change]}.* results may depend on calls before them"):
        serve(sd)


@pytest.mark.parametrize("change", CHANGES)
def test_what_may_remember_calls_is_noticed_while_it_is_served(sd, change):
    with serve(sd) as service:
        begun, go = threading.Event(), threading.Event()
        open_one = service.submit(**words(steps=9), on_step=lambda _: (begun.set(), go.wait(30)))
        assert begun.wait(30)
        change(sd)
        try:
            with pytest.raises(ns.RequestError, match=CHANGES[change]):
                service.submit(**words(1))
        finally:
            go.set()
        with pytest.raises(ns.RequestFailed, match=CHANGES[change]):
            open_one.result(30)


def test_a_forward_that_was_replaced_in_the_class(sd):
    class Unet(d.UNet2DConditionModel):
        pass

    sd.unet.__class__ = Unet
    with serve(sd) as service:
        stock = service(**words()).images
        Unet.forward = counting(Unet.forward)
        with pytest.raises(ns.RequestError, match="the forward of Unet was replaced"):
            service.submit(**words())
        del Unet.forward
        assert torch.equal(service(**words()).images, stock)


def doubled(stock):
    def call(*args, **kwargs):
        return 2 * stock(*args, **kwargs)

    return call


def of_the_processors(pipe, patch):
    patch.setattr(AttnProcessor2_0, "__call__", doubled(AttnProcessor2_0.__call__))


def of_torch(pipe, patch):
    patch.setattr(torch.nn.functional, ATTENTION, doubled(getattr(torch.nn.functional, ATTENTION)))


def for_all_modules(pipe, patch):
    hooks = torch.nn.modules.module._global_forward_hooks
    patch.setitem(hooks, "mine", lambda module, args, output: None if module is not pipe.unet.conv_in else output * 2)


def of_a_config(pipe, patch):
    pipe.vae.register_to_config(scaling_factor=3.0)


def of_a_text_encoders_config(pipe, patch):
    pipe.text_encoder.config._attn_implementation = "eager"


def of_a_text_encoders_module(pipe, patch):
    pipe.text_encoder.encoder.layers[0].layer_norm1.eps = 0.5


ATTENTION = "scaled_dot_product_attention"
CODE = {
    of_the_processors: "the call of AttnProcessor2_0 was replaced",
    of_torch: f"the {ATTENTION} of torch.nn.functional was replaced",
    for_all_modules: "torch has other hooks for all modules",
    of_a_config: r"vae\._internal_dict was",
    of_a_text_encoders_config: r"text_encoder\.config.* was",
    of_a_text_encoders_module: r"text_encoder\..*layer_norm1\.eps was 1e-05 and is 0\.5",
}


@pytest.mark.parametrize("change", CODE)
def test_code_and_settings_that_were_replaced(sd, change, monkeypatch):
    with serve(sd) as service:
        service(**words())
        change(sd, monkeypatch)
        with pytest.raises(ns.RequestError, match=CODE[change]):
            service.submit(**words())


def test_hooks_of_all_modules_are_refused(sd, monkeypatch):
    for_all_modules(sd, monkeypatch)
    with pytest.raises(ns.BackendError, match="torch has a hook for all modules"):
        serve(sd)


@pytest.mark.parametrize("change", [of_the_processors, of_torch])
def test_attention_that_was_replaced_is_tried(sd, change, monkeypatch):
    """What stands in its place may mix rows."""
    change(sd, monkeypatch)
    part = parts_of(sd)[id(sd.unet)][""]
    assert part.foreign and not part.usual


def test_caches_that_were_applied_by_a_function():
    flux = pipelines.ready(pipelines.flux(), torch.float32)
    apply_first_block_cache(flux.transformer, FirstBlockCacheConfig(threshold=50.0))
    with pytest.raises(ns.BackendError, match=r"transformer\.transformer_blocks\.0 has a FBCHeadBlockHook"):
        serve(flux)


def test_hooks_that_keep_nothing_are_served(sd):
    """Casts of layers, hooks that only look, and a forward that was put back."""
    seen = []

    def look(module, args):
        seen.append(len(args))

    apply_layerwise_casting(sd.unet, storage_dtype=torch.float16, compute_dtype=torch.float32)
    sd.unet.forward = sd.unet.forward
    sd.text_encoder.forward = sd.text_encoder.forward
    sd.unet.register_forward_pre_hook(look)
    stock = sd(**words()).images
    with serve(sd) as service:
        assert torch.equal(service(**words()).images, stock)
        sd.vae.register_forward_pre_hook(look)
        assert torch.equal(service(**words()).images, stock)
    assert seen
