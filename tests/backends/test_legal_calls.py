"""Every call that the stock pipeline takes is served: while measuring, in odd pipelines, from odd places."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    import diffusers as d
    import pipeline_parts
    from diffusers.guiders import ClassifierFreeGuidance, SkipLayerGuidance
    from PIL import Image
    from places import DEVICE
    from plainly_served import Flat, close_to, seeded, serve, together, words

    from neustream.backends.diffusers import rehearsals
    from tests.backends import pipelines

import neustream as ns  # noqa: E402

pytestmark = [
    # numpy 2's complaints about how diffusers calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

RED = Image.new("RGB", (16, 16), "red")


def ready(pipe):
    torch.set_num_threads(1)
    return pipelines.ready(pipe, torch.float32)


@pytest.fixture
def sd():
    torch.manual_seed(0)
    return ready(pipelines.stable_diffusion())


# -- measuring --------------------------------------------------------------------------------------------


def lcm():
    """As many steps as it was taught, and no more."""
    scheduler = d.LCMScheduler(**pipeline_parts.BETAS, original_inference_steps=4)
    return pipelines.stable_diffusion(scheduler), words(steps=3)


def scm():
    """Its second step is in the middle, unless another number of steps is asked for."""

    class Middle(d.DDIMScheduler):
        def set_timesteps(self, num_inference_steps, device=None, middle=None):
            if num_inference_steps != 2 and middle is None:
                raise ValueError("only 2 steps have a middle")
            super().set_timesteps(num_inference_steps, device)

    return pipelines.stable_diffusion(Middle(**pipeline_parts.DDIM)), words(steps=2)


def inpaint():
    mask = Image.new("L", (16, 16), 255)
    return pipelines.stable_diffusion_inpaint(), words(steps=20, image=RED, mask_image=mask, strength=0.3)


def image_to_image():
    call = words(steps=10, image=RED, strength=0.2)
    del call["height"], call["width"]
    return pipelines.stable_diffusion_img2img(), call


def own_sigmas():
    flux = pipelines.stable_diffusion_3()
    return flux, words(steps=None, sigmas=[1.0, 0.6, 0.3])


@pytest.mark.parametrize("make", [lcm, scm, inpaint, image_to_image, own_sigmas])
def test_samples_are_measured_with_what_the_pipeline_takes(make, tmp_path):
    pipe, call = make()
    call = {name: value for name, value in call.items() if value is not None}
    stock = ready(pipe)(**call).images
    options = {"max_batch": 2, "encode_batch": 1, "decode_batch": 1, "measure_s": 0.1, "progress": False}
    sample = {**call, "generator": seeded(0)}
    with ns.serve(pipe, samples=[sample], cache=tmp_path, **options) as service:
        assert torch.equal(service(**{**call, "generator": seeded(0)}).images, stock)
        assert not service._mounts[""]._rehearsals.next()[1]  # all is known
    assert len(list(tmp_path.rglob("*.json"))) == 3


def test_rehearsals_ask_for_what_the_pipeline_takes(tmp_path, monkeypatch):
    """What it does not take with six steps is rehearsed with those of the call."""
    monkeypatch.setattr(rehearsals, "STEPS", 9)
    pipe, call = lcm()
    ready(pipe)
    options = {"max_batch": 2, "encode_batch": 1, "decode_batch": 1, "progress": False}
    with ns.serve(pipe, samples=[], cache=tmp_path, **options) as service:
        service(**call)
        deadline = time.monotonic() + 30
        while not list(tmp_path.rglob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(list(tmp_path.rglob("*.json"))) == 3


def test_given_profiles_mean_that_nothing_is_measured(sd, tmp_path):
    calls = []

    def count(module, args, kwargs):
        calls.append(1)

    sd.unet.register_forward_pre_hook(count, with_kwargs=True)
    sample = words(guidance_scale=1.0)
    with ns.serve(sd, samples=[sample], profiles=Flat(), cache=tmp_path, progress=False) as service:
        assert len(calls) <= 2 * 3  # warmed up
        service(**words(height=32))
        time.sleep(0.1)
        before = len(calls)
        time.sleep(0.1)
        assert len(calls) == before  # nothing runs that nobody asked for
    assert not list(tmp_path.rglob("*.json"))


def test_callbacks_are_told_of_their_own_request_alone(sd, tmp_path):
    told, stepped = [], []

    def on_end(pipe, step, timestep, tensors):
        told.append(step)
        return tensors

    call = {**words(steps=4), "callback_on_step_end": on_end}
    options = {"max_batch": 1, "encode_batch": 1, "decode_batch": 1, "measure_s": 5.0, "progress": False}
    with ns.serve(sd, samples=[call], cache=tmp_path, **options) as service:
        service(
            **{**call, "height": 32, "generator": seeded(1)}, on_step=lambda progress: stepped.append(progress.step)
        )
        deadline = time.monotonic() + 30  # for rehearsals of the new size
        while len(list(tmp_path.rglob("*.json"))) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(list(tmp_path.rglob("*.json"))) == 6
    assert told == [0, 1, 2, 3] and stepped == [1, 2, 3, 4]


# -- odd pipelines -----------------------------------------------------------------------------------------


def test_a_compiled_denoiser(sd):
    stock = [sd(**words(at)).images for at in range(3)]
    sd.unet = torch.compile(sd.unet, backend="eager")
    with serve(sd) as service:
        assert all(map(close_to, together(service, [words(at) for at in range(3)]), stock))


def test_compiled_blocks(sd):
    stock = sd(**words()).images
    sd.unet.mid_block.compile(backend="eager")
    sd.unet.conv_in.forward = torch.compile(sd.unet.conv_in.forward, backend="eager")
    with serve(sd) as service:
        assert close_to(service(**words()).images, stock)


class Perturbed(d.StableDiffusionPipeline):
    """Changes its denoiser before each call of it, and back after the last one."""

    @torch.no_grad()
    def __call__(self, *args, layers=("mid",), **kwargs):
        stock = self.unet.attn_processors
        self.unet.set_attn_processor({name: Weak() if name.startswith(layers) else one for name, one in stock.items()})
        self.unet.extra = layers
        output = super().__call__(*args, **kwargs)
        self.unet.set_attn_processor(stock)
        return output


class Weak:
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states * 0.5


def test_calls_that_change_their_denoiser_have_their_own(sd):
    sd.__class__ = Perturbed
    calls = [words(at, layers=layers) for at, layers in enumerate([("mid",), ("down",), ("up", "mid")])]
    stock = [sd(**{**one, "generator": seeded(at)}).images for at, one in enumerate(calls)]
    assert not close_to(stock[0], sd(**words(0, layers=("down",))).images)
    del sd.unet.extra
    before = sd.unet.attn_processors
    with serve(sd) as service:
        assert all(map(close_to, together(service, calls), stock))
        answer = service.submit(**words(steps=500, layers=("down",)))
        answer.cancel()
        assert torch.equal(service(**{**calls[0], "generator": seeded(0)}).images, stock[0])
        (unet,) = {part.model for part in service.models[""].parts("denoise")}
        assert unet is sd.unet and sd.unet.attn_processors == before and not hasattr(unet, "extra")


def test_perturbed_attention_guidance(sd):
    parts = {**sd.components, "requires_safety_checker": False}
    pag = ready(d.StableDiffusionPAGPipeline(**parts, pag_applied_layers=["mid"]))
    calls = [words(at, pag_scale=3.0, guidance_scale=[5.0, 1.0][at % 2]) for at in range(3)]
    stock = [pag(**{**one, "generator": seeded(at)}).images for at, one in enumerate(calls)]
    with serve(pag) as service:
        assert all(map(close_to, together(service, calls), stock))


class Guided(d.DiffusionPipeline):
    """A guider that knows at which step it is."""

    def __init__(self, unet, scheduler, guider):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, guider=guider)

    @torch.no_grad()
    def __call__(self, num_inference_steps=4, generator=None):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64).to(DEVICE)
        for at, t in enumerate(self.scheduler.timesteps):
            self.guider.set_state(step=at, num_inference_steps=num_inference_steps, timestep=t)
            self.guider.prepare_models(self.unet)
            noise = self.unet(latents, t).sample
            self.guider.cleanup_models(self.unet)
            latents = self.scheduler.step(noise * (1 + self.guider._step), t, latents).prev_sample
        return d.ImagePipelineOutput(images=latents)


def test_guiders_are_of_one_request():
    torch.manual_seed(0)
    pipe = ready(pipelines.ddpm()).to(torch.float64)
    guided = Guided(pipe.unet, d.DDIMScheduler(), ClassifierFreeGuidance())
    stock = [guided(3 + at, seeded(at)).images for at in range(4)]
    with serve(guided) as service:
        found = together(service, [{"num_inference_steps": 3 + at} for at in range(4)])
    assert all(map(close_to, found, stock))


def test_guiders_that_change_the_denoiser_change_their_own():
    guider = SkipLayerGuidance(skip_layer_config=d.LayerSkipConfig(indices=[0], fqn="auto"))
    pipe = ready(pipelines.ddpm())
    assert pipelines.parts_of(Guided(pipe.unet, d.DDIMScheduler(), guider)).own


def test_schedulers_that_step_by_other_names_are_of_one_request(sd):
    class Other(d.DDIMScheduler):
        step = None

        def go(self, *args, **kwargs):
            assert len(self.timesteps) == self.num_inference_steps
            return d.DDIMScheduler.step(self, *args, **kwargs)

    class Going(Guided):
        @torch.no_grad()
        def __call__(self, num_inference_steps=4, generator=None):
            self.scheduler.set_timesteps(num_inference_steps)
            latents = torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64).to(DEVICE)
            for t in self.scheduler.timesteps:
                latents = self.scheduler.go(self.unet(latents, t).sample, t, latents).prev_sample
            return d.ImagePipelineOutput(images=latents)

    pipe = Going(ready(pipelines.ddpm()).to(torch.float64).unet, Other(), None)
    stock = [pipe(3 + at, seeded(at)).images for at in range(3)]
    with serve(pipe) as service:
        found = together(service, [{"num_inference_steps": 3 + at} for at in range(3)])
    assert all(map(close_to, found, stock))


def test_gradients_through_a_denoiser(sd):
    """Requests whose calls want gradients do not share them, and turn nobody else's on."""
    modes = []

    class Steered(type(sd)):
        def __call__(self, steer=True, num_inference_steps=2, generator=None, prompt="x"):
            latents = torch.randn(1, 4, 8, 8, generator=generator).to(DEVICE)
            states = torch.zeros(1, 5, 32, device=DEVICE)
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                with torch.set_grad_enabled(steer):
                    given = latents.detach().requires_grad_(steer)
                    noise = self.unet(given, t, encoder_hidden_states=states).sample
                    modes.append((steer, torch.is_grad_enabled()))
                    if steer:
                        latents = latents - torch.autograd.grad(noise.square().mean(), given)[0]
                latents = self.scheduler.step(noise.detach(), t, latents).prev_sample
            return d.ImagePipelineOutput(images=latents)

    sd.__class__ = Steered
    calls = [{"steer": at % 2 == 0} for at in range(4)]
    stock = [sd(**one, generator=seeded(at)).images for at, one in enumerate(calls)]
    with serve(sd) as service:
        assert all(map(close_to, together(service, calls), stock))
    assert all(steer == on for steer, on in modes)


def test_other_methods_of_a_model_run_on_the_devices_thread_alone(sd):
    threads = []

    class Encoder(type(sd.text_encoder)):
        def get_text_features(self, value):
            threads.append(threading.current_thread())
            return value + 1

    class Asking(type(sd)):
        @torch.no_grad()
        def __call__(self, *args, **kwargs):
            assert self.text_encoder.get_text_features(1) == 2
            return super().__call__(*args, **kwargs)

    sd.text_encoder.__class__, sd.__class__ = Encoder, Asking
    with serve(sd) as service:
        service(**words())
        threads.clear()
        service(**words())
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


def test_a_model_behind_the_last_step(sd):
    """As the priors of Kandinsky do: they encode once more, and there is no decoder."""

    class Late(type(sd)):
        @torch.no_grad()
        def __call__(self, *args, **kwargs):
            latents = super().__call__(*args, **{**kwargs, "output_type": "latent"}).images
            ids = torch.zeros(1, 4, dtype=torch.long, device=DEVICE)
            return d.ImagePipelineOutput(images=latents + self.text_encoder(ids)[0].mean())

    sd.__class__ = Late
    stock = [sd(**words(at)).images for at in range(3)]
    with serve(sd) as service:
        assert all(map(close_to, together(service, [words(at) for at in range(3)]), stock))


# -- odd places --------------------------------------------------------------------------------------------


def test_requests_from_callbacks(sd):
    """Of another size, from a step and from an answer: nobody waits for anybody."""
    with serve(sd) as service:
        more = []
        on_step = lambda progress: more.append(service.submit(**words(progress.step, height=24)))  # noqa: E731
        service(**words(), on_step=on_step)
        answer = service.submit(**words())
        answer.add_done_callback(lambda _: more.append(service.submit(**words(height=32))))
        answer.result(30)
        deadline = time.monotonic() + 30
        while len(more) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [one.result(30).images.shape[2] for one in more] == [24, 24, 24, 32]
        with pytest.raises(ns.RequestFailed, match="waits for this thread"):
            service(**words(), on_step=lambda progress: service.close())
        assert service(**words()).images.shape == (1, 3, 16, 16)


def test_asyncio_wait(sd):
    async def main(service):
        answers = [service.submit(**words(at)) for at in range(3)]
        done, waiting = await asyncio.wait(answers, timeout=30)
        first, _ = await asyncio.wait([service.submit(**words(4)), *answers], return_when=asyncio.FIRST_COMPLETED)
        return done, waiting, first

    with serve(sd) as service:
        done, waiting, first = asyncio.run(main(service))
        assert len(done) == 3 and not waiting and first
        assert all(answer.result().images.shape == (1, 3, 16, 16) for answer in done)


class Counts(d.StableDiffusionPipeline):
    """Looks at the lists of blocks in its models and at the size of its vocabulary, before it calls any of them."""

    @torch.no_grad()
    def __call__(self, **given):
        blocks = self.unet.up_blocks
        assert self.unet and blocks and len(blocks) == 2
        assert [type(block).__name__ for block in blocks] == [type(blocks[at]).__name__ for at in range(2)]
        assert len(self.tokenizer) == self.text_encoder.config.vocab_size
        if given["height"] % 2 ** len(blocks):
            raise ValueError("height must be a multiple of 4")
        return super().__call__(**given)


def test_a_call_that_counts_blocks(sd):
    pipe = ready(Counts(**sd.components, requires_safety_checker=False))
    call = words(height=16)
    with serve(pipe) as service:
        assert torch.equal(service(**call).images, pipe(**words(height=16)).images)
        with pytest.raises(ValueError, match="a multiple of 4"):
            service.submit(**words(height=17))
