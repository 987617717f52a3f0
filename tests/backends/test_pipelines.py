"""A stock pipeline behind an engine: what callers get, what goes wrong, and what is left of a request."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import warnings
from concurrent.futures import CancelledError

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler

    from neustream.backends.diffusers import PipelineMount, from_config
    from neustream.backends.diffusers.replica import Dimensions
    from neustream.backends.diffusers.shapes import Shape, predicted

import neustream as ns  # noqa: E402

pytestmark = [
    # numpy 2's complaints about how diffusers 0.42 calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

VAE = {
    "class": "AutoencoderKL",
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 16,
}
DIT = {
    "transformer": {
        "class": "DiTTransformer2DModel",
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 8,
        "num_embeds_ada_norm": 1000,
    },
    "vae": VAE,
    "scheduler": {"class": "DDIMScheduler", "clip_sample": False},
}
SD = {
    "unet": {
        "class": "UNet2DConditionModel",
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "vae": VAE,
    "tokenizer": "bytes",
    "text_encoder": {
        "class": "CLIPTextModel",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "scheduler": {
        "class": "DDIMScheduler",
        "clip_sample": False,
        "steps_offset": 1,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
    "safety_checker": None,
    "feature_extractor": None,
}
DIT_SHAPE, SD_SHAPE = "4x8x8", "4x8x8"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def dit():
    return from_config.build(from_config.Options(pipeline="DiTPipeline", components=DIT))


@pytest.fixture
def sd():
    arguments = {"requires_safety_checker": False}
    return from_config.build(
        from_config.Options(pipeline="StableDiffusionPipeline", components=SD, arguments=arguments)
    )


def profiles(*shapes, model="", step_s=0.002):
    return {
        f"{model}{role}@{shape}": ns.TableProfile(role, [1, 64], [step_s, 2 * step_s])
        for shape in shapes
        for role in ("encode", "denoise", "decode")
    }


def serve(pipe, *shapes, **options):
    """An engine with profiles that say nothing true, so that nothing has to be measured."""
    options = {"profiles": profiles(*shapes), "policy": ns.FCFS(drop_hopeless=False), "progress": False, **options}
    return ns.serve(pipe, **options)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def call(at, steps=4, **more):
    """Arguments of a DiT call."""
    return {
        "class_labels": [at],
        "num_inference_steps": steps,
        "generator": seeded(at),
        "output_type": "pt",
        **more,
    }


def words(at, steps=4, **more):
    """Arguments of a Stable Diffusion call."""
    return {
        "prompt": f"a cat {at}",
        "num_inference_steps": steps,
        "generator": seeded(at),
        "output_type": "pt",
        **more,
    }


def close_to(ours, stock):
    return float((ours - stock).abs().max() / stock.abs().max()) < 1e-5


# -- what callers get ---------------------------------------------------------------------------------------


def test_three_lines(dit):
    engine = serve(dit, DIT_SHAPE, slo=60.0)
    answer = engine.submit(class_labels=[3], num_inference_steps=3, generator=seeded(1))
    output = answer.result(timeout=60)
    engine.close()
    expected = dit(class_labels=[3], num_inference_steps=3, generator=seeded(1))
    assert type(output) is type(expected)
    assert list(output.images[0].getdata()) == list(expected.images[0].getdata())
    assert answer.ended.on_time


def test_positional_arguments_tuples_and_latents_come_back_as_from_the_pipeline(sd):
    with serve(sd, SD_SHAPE) as engine:
        common = {"num_inference_steps": 3, "output_type": "latent", "return_dict": False}
        ours = engine("a cat", generator=seeded(2), **common)
        stock = sd("a cat", generator=seeded(2), **common)
    assert isinstance(ours, tuple) and len(ours) == len(stock) == 2
    assert torch.equal(ours[0], stock[0]) and ours[1] is stock[1] is None


def test_many_callers_at_once(sd):
    """Threads that know nothing of each other; every image is its own."""
    with serve(sd, SD_SHAPE) as engine:
        found = {}

        def ask(at):
            found[at] = engine(**words(at, steps=3 + at % 3, guidance_scale=[7.5, 1.0, 3.0][at % 3])).images

        threads = [threading.Thread(target=ask, args=(at,)) for at in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sizes = [step.mean for name, step in engine.report.batch_size.items() if name.startswith("denoise")]
        counts = engine.report.counts["on_time"]
    assert counts == 8 and max(sizes) > 1.5  # they shared steps
    for at in range(8):
        expected = sd(**words(at, steps=3 + at % 3, guidance_scale=[7.5, 1.0, 3.0][at % 3])).images
        assert close_to(found[at], expected)


def test_asyncio(dit):
    async def main(engine):
        first, second = await asyncio.gather(engine.submit(**call(1)), engine.submit(**call(2)))
        lost = asyncio.wrap_future(engine.submit(**call(3, steps=400)))
        await asyncio.sleep(0.05)
        lost.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lost
        return first, second

    with serve(dit, DIT_SHAPE) as engine:
        outputs = asyncio.run(main(engine))
        engine(**call(4))  # behind the cancelled one
        assert engine.report.counts["cancelled"] == 1
    for output, at in zip(outputs, (1, 2), strict=True):
        assert close_to(output.images, dit(**call(at)).images)


def test_cancel(dit):
    with serve(dit, DIT_SHAPE) as engine:
        begun = threading.Event()
        answer = engine.submit(**call(1, steps=900), on_step=lambda progress: begun.set())
        assert begun.wait(30)
        assert answer.cancel() and answer.cancelled()
        with pytest.raises(CancelledError):
            answer.result()
        assert engine(**call(2)).images.shape == (1, 3, 16, 16)
        assert engine.report.counts["cancelled"] == 1
        done = engine.submit(**call(3))
        done.result(timeout=30)
        assert not done.cancel()


def test_progress_and_previews(dit):
    seen = []
    with serve(dit, DIT_SHAPE) as engine:
        engine(**call(1, steps=5), on_step=seen.append)
    assert [(progress.step, progress.total) for progress in seen] == [(k, 5) for k in range(1, 6)]
    assert all(progress.latents.shape[1:] == (4, 8, 8) for progress in seen)
    assert not torch.equal(seen[0].latents, seen[-1].latents)


def test_the_pipelines_own_callback(sd):
    """It gets the request's view of the pipeline, may change the latents, and may interrupt."""
    steps = []

    def on_end(pipe, step, timestep, tensors):
        steps.append((step, pipe.num_timesteps))
        return {"latents": tensors["latents"] * 0.5 if step == 1 else tensors["latents"]}

    def on_end_stock(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.5 if step == 1 else tensors["latents"]}

    with serve(sd, SD_SHAPE) as engine:
        changed = engine.submit(**words(1), callback_on_step_end=on_end)
        plain = engine.submit(**words(2))
        assert close_to(changed.result(30).images, sd(**words(1), callback_on_step_end=on_end_stock).images)
        assert close_to(plain.result(30).images, sd(**words(2)).images)
    assert steps == [(step, 4) for step in range(4)]


def test_a_dropped_request_says_why(dit):
    with serve(dit, DIT_SHAPE, policy="priced", profiles=profiles(DIT_SHAPE, step_s=1.0)) as engine:
        answer = engine.submit(**call(1), slo=0.5)
        with pytest.raises(ns.RequestError, match="dropped: hopeless: needs 5"):
            answer.result(timeout=30)
        assert answer.ended.status == "dropped"
        assert engine.submit(**call(2), slo=ns.SLO(total=100.0)).result(timeout=60).images.shape[0] == 1


def test_resolutions_share_the_device_in_batches_of_their_own(sd):
    small, large = {"height": 16, "width": 16}, {"height": 32, "width": 24}
    log = ns.EventLog()
    sizes = [SD_SHAPE, "4x16x12"]
    with serve(sd, *sizes, samples=[{"prompt": "x", **small}, {"prompt": "x", **large}], observers=[log]) as engine:
        answers = [engine.submit(**words(at, **(large if at % 2 else small))) for at in range(6)]
        images = [answer.result(timeout=60).images for answer in answers]
    for at, image in enumerate(images):
        assert close_to(image, sd(**words(at, **(large if at % 2 else small))).images)
    shapes = {answer.id: sizes[at % 2] for at, answer in enumerate(answers)}
    steps = [step for step in log.steps if step["stage"].startswith("denoise")]
    assert {step["stage"] for step in steps} == {f"denoise@{size}" for size in sizes}
    for step in steps:
        assert {f"denoise@{shapes[job]}" for job in step["jobs"]} == {step["stage"]}


def test_two_models_on_one_device(sd, dit):
    known = {"profiles": profiles(SD_SHAPE, model="sd/"), "progress": False}
    mine = {"profiles": profiles(DIT_SHAPE, model="dit/"), "progress": False}
    both = {"sd": PipelineMount(sd, **known), "dit": PipelineMount(dit, **mine)}
    with ns.serve(both, policy=ns.FCFS(drop_hopeless=False)) as engine:
        image, other = engine.submit(model="sd", **words(1)), engine.submit(model="dit", **call(1))
        assert torch.equal(image.result(60).images, sd(**words(1)).images)
        assert torch.equal(other.result(60).images, dit(**call(1)).images)
        with pytest.raises(ns.RequestError, match="did you mean 'dit'"):
            engine.submit(model="dit2", **call(1))
        with pytest.raises(ns.RequestError, match="allowed: dit, sd"):
            engine.submit(**call(1))


def test_more_images_count_for_more(sd):
    """Their rows are in the step's size, so that latency is predicted for what really runs."""
    log = ns.EventLog()
    with serve(sd, SD_SHAPE, observers=[log]) as engine:
        engine(**words(1, num_images_per_prompt=4))
        engine(**words(1, guidance_scale=1.0))
    expected = [step["expected_s"] for step in log.steps if step["stage"].startswith("denoise")]
    table = ns.UnitProfile(ns.TableProfile("denoise", [1, 64], [0.002, 0.004]))
    assert expected[0] == pytest.approx(table.latency(1, 4.0))
    assert expected[-1] == pytest.approx(table.latency(1, 0.5))


def test_offloaded_sliced_and_tiled_as_users_of_diffusers_know_it(sd):
    sd.enable_model_cpu_offload(device="cpu")
    sd.vae.enable_slicing()
    sd.vae.enable_tiling()
    with serve(sd, SD_SHAPE) as engine:
        answers = [engine.submit(**words(at)) for at in range(3)]
        images = [answer.result(timeout=60).images for answer in answers]
    for at, image in enumerate(images):
        assert close_to(image, sd(**words(at)).images)


# -- profiles -----------------------------------------------------------------------------------------------


def test_profiles_are_measured_once_and_kept(dit, tmp_path):
    options = {"cache": tmp_path, "measure_s": 0.5, "max_batch": 4, "decode_batch": 2, "progress": False}
    with ns.serve(dit, slo=60.0, **options) as engine:
        measured = dict(engine.profiles)
        assert engine(**call(1)).images.shape == (1, 3, 16, 16)
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert set(files) == {f"{role}@{DIT_SHAPE}.json" for role in ("denoise", "decode")}
    with ns.serve(dit, **{**options, "cache": str(tmp_path)}) as engine:
        again = engine.profiles
        assert again.keys() == measured.keys()
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*.json")} == files
    folder = next(tmp_path.rglob("*.json")).parent
    with ns.serve(dit, profiles=str(folder), progress=False) as engine:  # the same files, named by the caller
        assert engine(**call(1)).images.shape == (1, 3, 16, 16)
    dit.to(torch.float64)
    with ns.serve(dit, **options):  # another dtype is another profile
        assert len(list(tmp_path.rglob("*.json"))) == 4


def test_profiles_of_a_size_that_nobody_measured_are_predicted_from_a_known_one(sd, tmp_path):
    options = {"cache": tmp_path, "measure_s": 0.5, "max_batch": 4, "decode_batch": 2, "progress": False}
    large = {"height": 32, "width": 16}
    with ns.serve(sd, slo=60.0, samples=[{"prompt": "x", "height": 16, "width": 16}], **options) as engine:
        before = {path.name for path in tmp_path.rglob("*.json")}
        image = engine(**words(1, **large)).images
        known = engine.profiles
    assert close_to(image, sd(**words(1, **large)).images)
    assert {path.name for path in tmp_path.rglob("*.json")} == before  # only what is measured is kept
    for role in ("encode", "denoise", "decode"):  # how they are predicted: the next test
        assert known[f"{role}@4x16x8"].max_batch == known[f"{role}@4x8x8"].max_batch


def test_predicted_profiles_are_in_proportion_to_what_a_row_holds():
    tables = {role: ns.TableProfile(role, [1, 4], [1.0, 2.0]) for role in ("encode", "denoise", "decode")}
    stages = {role: role for role in tables}
    near = Shape(Dimensions("near", "4x8x8", 2, 256), None, stages, rows=2, samples=1, profiles=tables)
    new = predicted(near, Shape(Dimensions("new", "4x16x8", 1, 512), None, stages, rows=1, samples=2))
    assert [profile.latency(1, 1.0) for profile in new.values()] == [2.0, 1.0, 4.0]
    assert [profile.latency(1, 4.0) for profile in new.values()] == [4.0, 2.0, 8.0]


def test_a_folder_without_the_profile(dit, tmp_path):
    with pytest.raises(ns.ProfileError, match=f"denoise@{DIT_SHAPE}"):
        ns.serve(dit, profiles=tmp_path, progress=False)


def test_a_wrong_profile_is_corrected_and_told_once(dit, caplog):
    with serve(dit, DIT_SHAPE, profiles=profiles(DIT_SHAPE, step_s=1e-4)) as engine:
        for at in range(3):
            engine(**call(at, steps=40))
    told = [record.getMessage() for record in caplog.records]
    assert len([text for text in told if "'denoise@4x8x8' take 2.00 times what its profile says" in text]) == 1
    factors = engine.report.to_dict()["corrections"][f"denoise@{DIT_SHAPE}"]
    assert factors == {1: 2.0}  # bounded
    assert engine.profiles[f"denoise@{DIT_SHAPE}"].latency(1, 1.0) == pytest.approx(2e-4)


# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stepz": 3}, TypeError, "unexpected keyword argument 'stepz'"),
        (
            {"num_inference_steps": 0},
            ns.RequestError,
            "num_inference_steps must be a whole number from 1 to 100000, got 0",
        ),
        ({"num_inference_steps": -3}, ns.RequestError, "got -3"),
        ({"num_inference_steps": 2.5}, ns.RequestError, "got 2.5"),
        ({"num_inference_steps": 2000}, ValueError, "2000"),
        ({"class_labels": None}, TypeError, None),
    ],
)
def test_bad_arguments_are_the_pipelines_own_errors_before_anything_is_queued(dit, change, error, message):
    with serve(dit, DIT_SHAPE) as engine:
        with pytest.raises(error, match=message):
            engine.submit(**call(1, **change)) if "class_labels" not in change else engine.submit(
                **{**call(1), **change}
            )
        assert engine.report.submitted == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 20, "width": 16}, "divisible by 8"),
        ({"negative_prompt_embeds": torch.zeros(1, 77, 32), "negative_prompt": "x"}, "negative_prompt_embeds"),
    ],
)
def test_what_check_inputs_says(sd, change, message):
    with serve(sd, SD_SHAPE) as engine:
        generator = seeded(5)
        with pytest.raises(ValueError, match=message):
            engine.submit(**{**words(1), "generator": generator, **change})
        assert torch.equal(generator.get_state(), seeded(5).get_state())  # nothing was drawn
        assert engine.report.submitted == 0


def test_a_generator_draws_for_one_request_at_a_time(dit):
    with serve(dit, DIT_SHAPE) as engine:
        mine = seeded(1)
        answer = engine.submit(**{**call(1, steps=100), "generator": mine}, id="first")
        with pytest.raises(ns.RequestError, match="in use by another request"):
            engine.submit(**{**call(2), "generator": mine})
        answer.result(timeout=60)
        again = engine.submit(**{**call(2), "generator": mine})  # free again, and further on, as in stock
        stock = seeded(1)
        dit(**{**call(1, steps=100), "generator": stock})
        assert torch.equal(again.result(60).images, dit(**{**call(2), "generator": stock}).images)


def test_a_duplicate_id(dit):
    with serve(dit, DIT_SHAPE) as engine:
        first = engine.submit(**call(1, steps=100), id="x")
        with pytest.raises(ns.RequestError, match="'x' is already being served"):
            engine.submit(**call(2), id="x")
        first.result(timeout=60)


@pytest.mark.parametrize(("what", "message"), [("text", "got 'a pipeline'"), ("nothing", "its models: none")])
def test_what_cannot_be_served(what, message):
    class Nothing(DiffusionPipeline):
        def __call__(self, prompt):
            return prompt

    with pytest.raises(ns.BackendError, match=message):
        ns.serve("a pipeline" if what == "text" else Nothing())


def test_a_pipeline_whose_arguments_are_taken(dit):
    class Odd(type(dit)):
        def __call__(self, class_labels, slo=1):
            return slo

    dit.__class__ = Odd
    with pytest.raises(ns.BackendError, match=r"\['slo'\], which submit\(\) takes itself"):
        serve(dit, DIT_SHAPE)


def test_a_policy_by_name(dit):
    with pytest.raises(ns.ConfigError, match="did you mean 'fcfs'"):
        serve(dit, DIT_SHAPE, policy="fcsf")


# -- faults -------------------------------------------------------------------------------------------------


def wrapped(engine, make):
    """Have the denoiser's calls made by `make(its own function)`; returns that function."""
    (part,) = engine.models[""].parts("denoise")
    stock, part.function = part.function, make(part.function)
    return stock


def limited(engine, most):
    """Make a denoiser that runs out of memory above `most` rows; returns the row counts it was called with."""
    seen = []

    def make(stock):
        def function(*args, **kwargs):
            rows = len(args[0] if args else kwargs["hidden_states"])
            seen.append(rows)
            if rows > most:
                raise torch.OutOfMemoryError(f"no room for {rows} rows")
            return stock(*args, **kwargs)

        return function

    wrapped(engine, make)
    return seen


def test_out_of_memory_halves_the_batch_and_is_remembered(dit, caplog):
    expected = [dit(**call(at, guidance_scale=1.0)).images for at in range(4)]
    with serve(dit, DIT_SHAPE) as engine:
        seen = limited(engine, 2)
        engine(**call(9, guidance_scale=1.0))
        gate = threading.Event()
        engine._devices[0].executor.call(gate.wait)  # until all are there
        answers = [engine.submit(**call(at, guidance_scale=1.0)) for at in range(4)]
        gate.set()
        images = [answer.result(timeout=60).images for answer in answers]
        assert engine.report.counts["on_time"] == 5
    (large,) = [rows for rows in seen if rows > 2]  # not in every step
    told = f"transformer: out of memory with {large} rows; from now on at most {large // 2} such rows run together"
    assert told in caplog.messages
    for ours, stock in zip(images, expected, strict=True):
        assert close_to(ours, stock)


def test_a_request_that_never_fits_fails_alone(dit):
    with serve(dit, DIT_SHAPE) as engine:
        limited(engine, 2)
        with pytest.raises(ns.RequestError, match="transformer: out of memory with 8 row"):
            engine(**{**call(1), "class_labels": [1, 2, 3, 4]})
        assert engine(**call(2)).images.shape == (1, 3, 16, 16)


def test_latents_that_are_not_finite_fail_before_they_are_decoded(sd):
    bad = torch.full((1, 4, 8, 8), float("nan"))
    with serve(sd, SD_SHAPE) as engine:
        broken, fine = engine.submit(**words(1, latents=bad)), engine.submit(**words(2))
        with pytest.raises(ns.RequestError, match="NaN or infinity after 4 steps"):
            broken.result(timeout=60)
        assert close_to(fine.result(timeout=60).images, sd(**words(2)).images)
    with serve(sd, SD_SHAPE, check_finite=False) as engine:
        assert engine(**words(1, latents=bad)).images.isnan().any()  # as in stock


def test_a_callback_that_raises_fails_its_request_alone(dit):
    def bad(progress):
        if progress.step == 2:
            raise LookupError("no such preview")

    with serve(dit, DIT_SHAPE) as engine:
        broken, fine = engine.submit(**call(1), on_step=bad), engine.submit(**call(2))
        with pytest.raises(ns.RequestError, match="LookupError: no such preview"):
            broken.result(timeout=60)
        assert close_to(fine.result(timeout=60).images, dit(**call(2)).images)
        assert engine.report.counts == {"on_time": 1, "late": 0, "dropped": 0, "failed": 1, "cancelled": 0}


def test_a_request_that_a_model_cannot_take_fails_alone(dit):
    """It raises for the whole batch; who is to blame is found out."""

    def picky(stock):
        def function(*args, **kwargs):
            if 13 in kwargs["class_labels"]:
                raise ArithmeticError("bad luck")
            return stock(*args, **kwargs)

        return function

    with serve(dit, DIT_SHAPE) as engine:
        engine(**call(1))
        gate = threading.Event()
        engine._devices[0].executor.call(gate.wait)  # until all are there
        wrapped(engine, picky)
        answers = [engine.submit(**call(at)) for at in (12, 13, 14)]
        gate.set()
        with pytest.raises(ns.RequestError, match="ArithmeticError: bad luck"):
            answers[1].result(timeout=60)
        assert close_to(answers[0].result(60).images, dit(**call(12)).images)
        assert close_to(answers[2].result(60).images, dit(**call(14)).images)


def test_a_model_that_raises_fails_the_requests_in_that_call(dit):
    with serve(dit, DIT_SHAPE) as engine:
        stock = wrapped(engine, lambda _: lambda *args, **kwargs: (_ for _ in ()).throw(ArithmeticError("bad kernel")))
        with pytest.raises(ns.RequestError, match="ArithmeticError: bad kernel"):
            engine(**call(1))
        wrapped(engine, lambda _: stock)
        assert torch.equal(engine(**call(1)).images, dit(**call(1)).images)


def test_a_pipeline_that_is_changed_while_it_is_served(sd):
    with serve(sd, SD_SHAPE) as engine:
        engine(**words(1))
        sd.scheduler = EulerDiscreteScheduler.from_config(sd.scheduler.config)  # requests copy theirs: allowed
        assert torch.equal(engine(**words(1)).images, sd(**words(1)).images)
        unet, sd.unet = sd.unet, torch.nn.Linear(1, 1)
        with pytest.raises(ns.RequestError, match="unet of StableDiffusionPipeline was replaced"):
            engine.submit(**words(2))
        sd.unet = unet.to(torch.float64)
        with pytest.raises(ns.RequestError, match="unet of StableDiffusionPipeline was moved or changed"):
            engine.submit(**words(2))
        sd.unet.to(torch.float32)
        assert engine(**words(1)).images.shape == (1, 3, 16, 16)


def test_two_engines_on_one_pipeline(dit):
    with (
        serve(dit, DIT_SHAPE),
        pytest.raises(ns.BackendError, match="transformer of DiTPipeline is served already: close that service first"),
    ):
        serve(dit, DIT_SHAPE)
    with serve(dit, DIT_SHAPE) as engine:
        assert engine(**call(1)).images.shape == (1, 3, 16, 16)


def test_after_a_fork_the_child_is_told(dit):
    with serve(dit, DIT_SHAPE) as engine:
        engine(**call(1))
        reading, writing = os.pipe()
        child = os.fork()
        if not child:  # pragma: no cover  # another process
            try:
                engine.submit(**call(2))
            except ns.RequestError as error:
                os.write(writing, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        assert f"lives in process {os.getpid()}" in os.read(reading, 1000).decode()
        os.close(reading)
        assert engine(**call(2)).images.shape == (1, 3, 16, 16)


def test_closing(dit):
    engine = serve(dit, DIT_SHAPE)
    open_ones = [engine.submit(**call(at, steps=500)) for at in range(2)]
    engine.close(cancel=True)
    for answer in open_ones:
        with pytest.raises(ns.RequestError, match="cancelled"):
            answer.result(timeout=30)
    for known in (True, False):  # a shape that would have to be looked at first
        with pytest.raises(ns.RequestError, match="not serving"):
            engine.submit(**call(1, guidance_scale=4.0 if known else 1.0))


# -- what is left of a request ------------------------------------------------------------------------------


def tensors():
    gc.collect()
    return sum(1 for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


def test_tensors_of_ended_requests_are_gone(sd):
    with serve(sd, SD_SHAPE, policy="priced") as engine:
        engine(**words(0))
        engine.submit(**words(0, guidance_scale=1.0)).result(timeout=30)
        runs = engine._devices[0].executor._workers[0].modules[f"denoise@{SD_SHAPE}"]._runs

        def settled():
            deadline = time.monotonic() + 20
            while len(runs) and time.monotonic() < deadline:
                time.sleep(0.01)
            engine._devices[0].executor.call(lambda: None).result()  # what was released before is gone
            return tensors()

        before = settled()
        engine(**words(1))
        assert settled() <= before, "done"
        with pytest.raises(ns.RequestError):
            engine.submit(**words(2), slo=1e-4).result(timeout=30)
        assert settled() <= before, "dropped"
        begun = threading.Event()
        answer = engine.submit(**words(3, steps=400), on_step=lambda progress: begun.set())
        begun.wait(30)
        answer.cancel()
        del answer
        engine(**words(4))
        assert settled() <= before, "cancelled"
        with pytest.raises(ns.RequestError):
            engine(**words(5, latents=torch.full((1, 4, 8, 8), float("nan"))))
        assert settled() <= before, "failed"


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_a_thousand_requests_leave_the_memory_they_found(dit):
    with serve(dit, DIT_SHAPE) as engine:

        def wave(count):
            for answer in [engine.submit(**call(at, steps=1)) for at in range(count)]:
                answer.result(timeout=120)

        wave(100)
        gc.collect()
        objects, memory = tensors(), resident()
        for _ in range(10):
            wave(100)
        assert engine.report.counts["on_time"] == 1100
        assert tensors() <= objects
        assert resident() <= memory * 1.05


# -- compiled -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_per_bucket(dit):
    """Dynamo with the eager backend: the graphs are those of the buckets, the results those of stock."""
    expected = [dit(**call(at)).images for at in range(3)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with serve(dit, DIT_SHAPE, compile={"backend": backend}, buckets=(2, 8)) as engine:
        answers = [engine.submit(**call(at)) for at in range(3)]
        for answer, stock in zip(answers, expected, strict=True):
            assert close_to(answer.result(timeout=120).images, stock)
    assert 1 <= len(graphs) <= 2


def test_the_scheduler_class_of_each_request_is_its_own(sd):
    """A pipeline's scheduler may be replaced between requests; both kinds share batches."""
    other = DDIMScheduler.from_config(sd.scheduler.config, prediction_type="v_prediction")
    with serve(sd, SD_SHAPE) as engine:
        first = engine.submit(**words(1, steps=30))
        time.sleep(0.05)  # it has begun, with its own copy
        stock, sd.scheduler = sd.scheduler, other
        second = engine.submit(**words(2))
        assert close_to(second.result(timeout=60).images, sd(**words(2)).images)
        sd.scheduler = stock
        assert close_to(first.result(timeout=60).images, sd(**words(1, steps=30)).images)


def test_a_request_that_waits_has_the_scheduler_that_it_was_asked_with(sd):
    stock = sd.scheduler
    other = EulerDiscreteScheduler.from_config(stock.config)
    expected = sd(**words(1)).images
    with serve(sd, SD_SHAPE) as engine:
        gate = threading.Event()
        engine._devices[0].executor.call(gate.wait)
        first, sd.scheduler = engine.submit(**words(1)), other
        second, sd.scheduler = engine.submit(**words(1)), stock
        gate.set()
        assert close_to(first.result(timeout=60).images, expected)
        sd.scheduler = other
        assert close_to(second.result(timeout=60).images, sd(**words(1)).images)
        sd.scheduler = stock


def test_calls_that_change_what_requests_share_are_refused(sd):
    """Where their source does not show it, by the method that they call."""

    def helper(unet):
        unet.set_attn_processor(None)

    class Patching(type(sd)):
        def __call__(self, prompt):
            helper(self.unet)

    sd.__class__ = Patching
    with (
        serve(sd, SD_SHAPE, samples=[]) as engine,
        pytest.raises(ns.RequestFailed, match=r"calls set_attn_processor\(\) of a model in its call cannot share"),
    ):
        engine(prompt="x")


def test_a_call_in_inference_mode(dit):
    """Requests interleave inside of it, and none of them ends it for the others."""

    class Inferring(type(dit)):
        @torch.inference_mode()
        def __call__(self, class_labels, num_inference_steps=4, generator=None, output_type="pt"):
            return super().__call__(
                class_labels, num_inference_steps=num_inference_steps, generator=generator, output_type=output_type
            )

    expected = [dit(**call(at, steps=3 + at)).images for at in range(3)]
    dit.__class__ = Inferring
    with serve(dit, DIT_SHAPE) as engine:
        answers = [engine.submit(**call(at, steps=3 + at)) for at in range(3)]
        for answer, stock in zip(answers, expected, strict=True):
            images = answer.result(timeout=60).images
            assert images.is_inference() and close_to(images, stock)
