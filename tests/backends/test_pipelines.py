"""A stock pipeline behind an engine: what callers get, and the profiles that it is served with."""

from __future__ import annotations

import asyncio
import threading
import warnings
from concurrent.futures import CancelledError

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from small_pipelines import DIT_SHAPE, SD_SHAPE, call, close_to, profiles, seeded, serve, words

    from neustream.backends.diffusers import PipelineMount
    from neustream.backends.diffusers.replica import Dimensions
    from neustream.backends.diffusers.shapes import Shape, predicted

import neustream as ns  # noqa: E402

pytestmark = [
    # numpy 2's complaints about how diffusers 0.42 calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

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
