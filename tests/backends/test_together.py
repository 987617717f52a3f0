"""Pipelines and language models behind one service; shapes that come and go; several devices."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
from small_pipelines import SD_SHAPE, call, close_to, profiles, serve, words  # noqa: E402
from texts import alone, model_of, prompts  # noqa: E402
from toys import Flat  # noqa: E402

import neustream as ns  # noqa: E402
from neustream.backends.copies import twin  # noqa: E402
from neustream.backends.diffusers import PipelineMount  # noqa: E402
from neustream.backends.transformers import TextMount  # noqa: E402
from neustream.engine.events import Finished  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def pictures(pipe, name, **options):
    return PipelineMount(pipe, profiles=profiles(SD_SHAPE, model=f"{name}/"), progress=False, **options)


def chat(kind, **options):
    return TextMount(twin(model_of(kind)), profile=Flat(), slots=4, **options)


@pytest.mark.parametrize("policy", ["priced", "fcfs", "edf"])
def test_images_and_two_language_models_on_one_device(sd, policy):
    """One scheduler decides; everyone gets what the stock library gives alone."""
    log = ns.EventLog()
    models = {"sd": pictures(sd, "sd"), "opt": chat("opt"), "llama": chat("llama")}
    asked = prompts(6)
    with ns.serve(models, policy=policy, slo=60.0, observers=[log]) as service:
        images = [service.submit(model="sd", **words(at)) for at in range(3)]
        texts = [service.submit(prompt, model="opt", max_tokens=8) for prompt in asked]
        others = [service.submit(prompt, model="llama", max_tokens=8) for prompt in asked]
        for at, answer in enumerate(images):
            assert close_to(answer.result(60).images, sd(**words(at)).images)
        for kind, answers in (("opt", texts), ("llama", others)):
            wanted = [tuple(alone(model_of(kind), prompt, 8)) for prompt in asked]
            assert [answer.result(60).token_ids for answer in answers] == wanted
        (member,) = service.engine.members
        assert set(member.scheduler.pools["device"].kv_caches) == {"opt", "llama"}
    assert service.report.counts["on_time"] == 15
    kinds = {step["stage"].partition("/")[0].partition(".")[0] for step in log.steps}
    assert kinds == {"sd", "opt", "llama"}


def test_a_copy_of_a_pipeline_on_each_device(sd):
    places = {}

    def note(record):
        if isinstance(record, Finished):
            for id in record.step.ids:
                places.setdefault(id, set()).add(record.member)

    with serve(sd, SD_SHAPE, devices=["cpu", "cpu"], observers=[note]) as service:
        answers = [service.submit(**words(at)) for at in range(6)]
        images = [answer.result(60).images for answer in answers]
    for at, image in enumerate(images):
        assert close_to(image, sd(**words(at)).images)
    assert set().union(*places.values()) == {"cpu#0", "cpu#1"}
    assert all(len(some) == 1 for some in places.values())


def test_submit_of_a_new_shape_does_not_wait_for_the_device(sd):
    shapes = (SD_SHAPE, "4x16x8", "4x8x16")
    with serve(sd, *shapes) as service:
        held = threading.Event()
        service._devices[0].executor.call(lambda: held.wait(60))
        known = service.submit(**words(1))
        new = [service.submit(**words(at, height=16 * at, width=16 * (3 - at))) for at in (1, 2)]
        assert not any(answer.done() for answer in (known, *new))
        held.set()
        assert close_to(known.result(60).images, sd(**words(1)).images)
        for at, answer in zip((1, 2), new, strict=True):
            assert close_to(answer.result(60).images, sd(**words(at, height=16 * at, width=16 * (3 - at))).images)


def sizes(count):
    return [{"height": 16 + 8 * (at % 4), "width": 16 + 8 * (at // 4)} for at in range(count)]


def test_shapes_are_bounded_and_the_least_recently_used_forgotten(sd, tmp_path):
    options = {"cache": tmp_path, "measure_s": 0.0, "max_shapes": 3, "progress": False, "samples": []}
    with ns.serve(sd, **options) as service:
        for turn in range(2):
            for at, size in enumerate(sizes(8)):
                image = service(**words(at, **size)).images
                assert close_to(image, sd(**words(at, **size)).images), turn
        service.engine.add("device", {}).result(30)  # what was posted before is done
        (member,) = service.engine.members
        stages = set(member.scheduler.pools["device"].stages)
        assert len(stages) == 1 + 3 * 3 == len(service.models[""].graphs) * 3 + 1
        times = member.scheduler.times
        assert set(times.profiles) == stages == set(service._devices[0].executor._workers[0].modules)
        assert set(times.spread) <= stages and set(times.corrections) <= stages


def test_a_shape_in_use_is_not_forgotten(sd, tmp_path):
    options = {"cache": tmp_path, "measure_s": 0.0, "max_shapes": 1, "progress": False, "samples": []}
    small, large = sizes(2)
    with ns.serve(sd, **options) as service:
        begun, go = threading.Event(), threading.Event()

        def wait(progress):
            begun.set()
            go.wait(60)

        first = service.submit(**words(1, **small), on_step=wait)
        assert begun.wait(60)
        second = service.submit(**words(2, **large))
        go.set()
        with pytest.raises(ns.RequestError, match="requests of 1 shapes are under way, and max_shapes is 1"):
            second.result(60)
        assert second.outcome().status == "refused"
        assert close_to(first.result(60).images, sd(**words(1, **small)).images)
        assert service(**words(2, **large)).images.shape[0] == 1  # now there is room


def test_a_new_shape_is_measured_while_the_device_idles(sd, tmp_path):
    options = {"cache": tmp_path, "measure_s": 5.0, "max_batch": 4, "decode_batch": 2, "encode_batch": 2}
    with ns.serve(sd, samples=[], progress=False, **options) as service:
        assert not list(tmp_path.rglob("*.json"))
        service(**words(1))
        deadline = time.monotonic() + 60
        while len(list(tmp_path.rglob("*.json"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert service.report.submitted == 1 == service.report.counts["on_time"]
    files = {path.stem: path for path in tmp_path.rglob("*.json")}
    assert set(files) == {f"{role}@{SD_SHAPE}" for role in ("encode", "denoise", "decode")}
    measured = ns.load_profile(files[f"denoise@{SD_SHAPE}"])
    assert {1, 2, 4} <= set(measured.batch) and all(seconds > 0 for seconds in measured.latency_s)
    with ns.serve(sd, samples=[], progress=False, **options) as service:  # found from now on
        service(**words(1))
        assert isinstance(service.profiles[f"denoise@{SD_SHAPE}"], ns.UnitProfile)


def test_serving_again_in_a_notebook(sd):
    """The cell is run twice: the second is told to close the first, and can then go on."""
    service = serve(sd, SD_SHAPE)
    with pytest.raises(ns.BackendError, match="of StableDiffusionPipeline is served already: close that service first"):
        service = serve(sd, SD_SHAPE)
    assert service(**words(1)).images.shape[0] == 1  # the first is as it was
    service.close()
    with serve(sd, SD_SHAPE) as service:
        assert service(**words(1)).images.shape[0] == 1
    model = twin(model_of("opt"))
    with (
        ns.serve(model, profile=Flat(), slots=2) as service,
        pytest.raises(ns.BackendError, match="its weights of OPTForCausalLM is served already"),
    ):
        ns.serve(model, profile=Flat(), slots=2)
    with ns.serve(model, profile=Flat(), slots=2) as service:
        assert service([3, 4], max_tokens=2).token_ids


def test_who_is_refused_a_model_leaves_it_alone(sd, monkeypatch):
    """Neither a service that could not be made, nor one that is closed twice, touches hooks of another."""
    freed = []
    monkeypatch.setattr(type(sd), "maybe_free_model_hooks", lambda pipe: freed.append(pipe))
    first = serve(sd, SD_SHAPE)
    with pytest.raises(ns.BackendError, match="is served already"):
        serve(sd, SD_SHAPE)
    assert first(**words(1)).images.shape[0] == 1
    before = len(freed)  # stock calls free them too
    first.close()
    assert len(freed) == before + 1
    with serve(sd, SD_SHAPE) as second:
        first.close()
        assert len(freed) == before + 1
        with pytest.raises(ns.BackendError, match="is served already"):
            serve(sd, SD_SHAPE)
        assert second(**words(1)).images.shape[0] == 1


def test_mounts_can_be_served_again(sd):
    mounts = {"sd": pictures(sd, "sd"), "chat": chat("opt")}
    for _ in range(2):
        with ns.serve(mounts) as service:
            assert service(model="sd", **words(1)).images.shape[0] == 1
            assert service(prompts(1)[0], model="chat", max_tokens=2).token_ids
            assert mounts["chat"].used == 0


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("neustream")]


def test_a_model_that_cannot_start_leaves_the_others_free(sd):
    model = model_of("opt", num_hidden_layers=1)
    before = workers()
    broken = TextMount(model, profile="/nowhere/steps.json")
    with pytest.raises(ns.NeustreamError, match=r"model 'chat': no step profile at /nowhere"):
        ns.serve({"sd": pictures(sd, "sd"), "chat": broken})
    assert not {*workers()} - {*before}
    with serve(sd, SD_SHAPE), ns.serve(model, profile=Flat(), slots=2):
        pass


def test_a_closed_service_frees_its_models(dit, tmp_path):
    with ns.serve(dit, samples=[], measure_s=0.0, cache=tmp_path, progress=False) as service:
        service(**call(1))
    gone = weakref.ref(dit.transformer)
    dit.__dict__.clear()
    del service
    gc.collect()
    assert gone() is None
