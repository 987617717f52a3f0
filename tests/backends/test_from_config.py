"""Pipelines as configs describe them: what they build, serve and refuse."""

from __future__ import annotations

import json
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from small_pipelines import DIT, SD, profiles, seeded
    from toys import command

    from neustream.backends.diffusers import PalettePipeline, from_config, profile

import neustream as ns  # noqa: E402
from neustream.backends import Wanted  # noqa: E402
from neustream.backends.serving import Part  # noqa: E402
from neustream.errors import BackendError  # noqa: E402

pytestmark = [
    # numpy 2's complaints about how diffusers 0.42 calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PALETTE = {
    "unet": {
        "class": "UNet2DModel",
        "sample_size": 16,
        "in_channels": 6,
        "out_channels": 3,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    "scheduler": {"class": "DDPMScheduler"},
}
NAMED = {
    "dit": {"pipeline": "DiTPipeline", "components": DIT, "request": {"guidance_scale": 4.0}},
    "sd": {
        "pipeline": "StableDiffusionPipeline",
        "components": SD,
        "arguments": {"requires_safety_checker": False},
    },
    "palette": {
        "pipeline": "neustream.backends.diffusers.palette:PalettePipeline",
        "components": PALETTE,
    },
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


STAGES = {"dit": ("unet", "vae"), "sd": ("clip", "unet", "vae"), "palette": ("unet",)}


def wanted(names, max_batch=4, looped=("unet", "denoise"), prefix=""):
    """What a config says of a pipeline with these stages."""
    nodes, known = [], {}
    for name in names:
        stage = ns.Stage(prefix + name, max_batch=max_batch)
        nodes.append(ns.loop(stage, times=lambda job: job.params["steps"]) if name in looped else stage)
        known[stage.name] = ns.TableProfile(stage.name, [1, 64], [0.01, 0.02])
    return Wanted(ns.Graph("config", ns.seq(*nodes)), prefix, known, {}, None, False)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("max_batch", [1, 4])
def test_requests_of_a_config_equal_the_stock_pipeline(name, max_batch):
    model = from_config.make(NAMED[name], "cpu")
    requests = [{**model.params(at), "steps": 3 + at % 3} for at in range(4)]
    asked = wanted(STAGES[name], max_batch)
    with ns.serve({"x": model.mount(asked)}, policy=ns.FCFS(drop_hopeless=False)) as service:
        answers = [service.submit(**model.arguments(params, None)[1]) for params in requests]
        outputs = [answer.result(timeout=60) for answer in answers]
        found = {model.stage_of(asked, "x", stage) for stage in service.report.batch_size}
    assert found == set(STAGES[name])
    for output, params in zip(outputs, requests, strict=True):
        stock = model.pipe(**model.arguments(params, None)[1]).images[0]
        ours = model.image(output)
        same = list(ours.getdata()) == list(stock.getdata())
        assert same or max_batch > 1
        assert sum(a != b for a, b in zip(ours.tobytes(), stock.tobytes(), strict=True)) <= 2  # a rounding, at most


@pytest.mark.parametrize(
    ("stages", "looped", "message"),
    [
        (
            ("clip", "unet"),
            ("unet",),
            "no stage is there to decode: decode, vae",
        ),
        (("clip", "unet", "upscale"), ("unet",), "stage 'upscale': a pipeline has no such stage; allowed: "),
        (("clip", "unet", "vae"), (), "stage 'unet' denoises step by step: give it times: steps"),
        (("clip", "unet", "vae"), ("unet", "vae"), "stage 'vae' runs once: give it no times"),
        (
            ("clip", "encode", "unet"),
            ("unet",),
            "stages 'clip' and 'encode': StableDiffusionPip",
        ),
    ],
)
def test_stages_that_a_pipeline_has_not(stages, looped, message):
    model = from_config.make(NAMED["sd"], "cpu")
    with pytest.raises(BackendError, match=message):
        model.mount(wanted(stages, looped=looped, prefix="sd."))


def test_a_stage_that_there_is_no_model_for():
    model = from_config.make(NAMED["dit"], "cpu")
    with pytest.raises(BackendError, match="stage 'clip': DiTPipeline has nothing to encode"):
        model.mount(wanted(("clip", "unet", "vae")))


def test_a_palette_pipeline_is_saved_loaded_and_served(tmp_path):
    """It is written as diffusers' own are: folders, arguments, errors; images given as PIL or tensors."""
    pipe = from_config.build(from_config.Options(**NAMED["palette"]))
    pipe.save_pretrained(tmp_path / "palette")
    loaded = PalettePipeline.from_pretrained(tmp_path / "palette", local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    given = torch.rand(1, 3, 16, 16, generator=seeded(0))
    call = {"num_inference_steps": 4, "output_type": "pt"}
    expected = loaded(given, generator=seeded(1), **call).images
    assert (pipe(given, generator=seeded(1), **call).images - expected).abs().max() < 1e-4
    known = profiles("6x16x16")
    with ns.serve(loaded, profiles=known, samples=[{"image": given}], progress=False) as engine:
        answers = [engine.submit(given, generator=seeded(seed), **call) for seed in (1, 2, 3)]
        images = [answer.result(timeout=60).images for answer in answers]
        with pytest.raises(ns.RequestError, match=r"image must be a PIL image, .* got 'a path'"):
            engine.submit("a path", **call)
    assert (images[0] - expected).abs().max() < 1e-5
    assert (images[1] - images[0]).abs().max() > 1e-2
    (image,) = loaded(pipe.numpy_to_pil(given.permute(0, 2, 3, 1).numpy()), num_inference_steps=2, return_dict=False)
    assert image[0].size == (16, 16)


def test_profiles_over_sizes(tmp_path):
    pipe = from_config.build(from_config.Options(**NAMED["sd"]))
    calls = [{"prompt": "x", "height": 16, "width": 16}, {"prompt": "x", "height": 16, "width": 32}]
    files = profile(pipe, calls, tmp_path, max_batch=2, encode_batch=2, decode_batch=1, measure_s=0.1, progress=False)
    shapes = ("4x8x8", "4x8x16")
    names = {f"{role}@{shape}.json" for role in ("encode", "denoise", "decode") for shape in shapes}
    assert {path.name for path in files} == names
    with ns.serve(pipe, profiles=tmp_path, samples=calls, progress=False) as engine:
        assert {*engine.profiles} - {"probe"} == {name.removesuffix(".json") for name in names}
        assert engine("x", height=16, width=32, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 32)
    with pytest.raises(BackendError, match="divisible by 8"):
        profile(pipe, [{"prompt": "x", "height": 17, "width": 16}], tmp_path, progress=False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "checkpoint"),
        ({"pipeline": "NoPipeline"}, "NoPipeline"),
        ({"pipeline": "DiTPipeline", "components": {**DIT, "vae": None, "scheduler": None, "transformer": 3}}, "class"),
        ({"pipeline": "DiTPipeline", "components": {**DIT, "scheduler": {"class": "Nope"}}}, "Nope"),
        ({"pipeline": "DiTPipeline", "components": {"transformer": {**DIT["transformer"], "hedas": 3}}}, "hedas"),
        ({"pipeline": "DiTPipeline", "components": {"vae": DIT["vae"]}}, "pipeline: TypeError"),
        ({**NAMED["dit"], "dtype": "fp7"}, "fp7"),
        ({"checkpoint": "no/such/folder"}, "no/such/folder"),
        ({"checkpoint": "model.safetensors"}, "name the class in backend.pipeline"),
        ({"weights": 1}, "weights"),
    ],
)
def test_bad_backend_options(options, named):
    with pytest.raises(BackendError, match=named):
        from_config.make(options, "cpu")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 0}, "num_inference_steps"),
        ({"steps": 2000}, "2000"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"height": 20, "width": 16}, "divisible by 8"),
        ({"prompt": 3}, "prompt"),
        ({"stepz": 3}, "stepz"),
    ],
)
def test_bad_request_parameters(change, named):
    model = from_config.make(NAMED["sd"], "cpu")
    asked = wanted(STAGES["sd"])
    request = ns.Request("one", asked.graph, params={**model.params(0), "steps": 3, **change})
    part = Part("", None, model, asked, ["cpu"])
    with pytest.raises(BackendError, match=f"request 'one': .*{named}"):
        part.check([request], {})


def test_a_scheduler_that_calls_more_often_than_steps_is_refused_for_configs():
    components = {**DIT, "scheduler": {"class": "HeunDiscreteScheduler"}}
    model = from_config.make({"pipeline": "DiTPipeline", "components": components}, "cpu")
    asked = wanted(STAGES["dit"])
    part = Part("", None, model, asked, ["cpu"])
    with pytest.raises(BackendError, match=r"stage 'unet' runs 5 times .* and 9 times on DiTP"):
        part.check([ns.Request("one", asked.graph, params={**model.params(0), "steps": 5})], {})


def test_unknown_devices():
    with pytest.raises(BackendError, match="tpu"):
        from_config.make(NAMED["dit"], "tpu:0")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="0 CUDA"):
            from_config.make(NAMED["dit"], "cuda:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_alone_is_bitwise_stock():
    model = from_config.make(NAMED["sd"], "cuda:0")
    call = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "pt"}
    with ns.serve(model.pipe, progress=False, measure_s=1.0) as engine:
        assert torch.equal(engine(**call, generator=seeded(1)).images, model.pipe(**call, generator=seeded(1)).images)


def test_images_and_texts_of_a_config_are_served_by_one_service(root, tmp_path):
    path = root / "configs/demo/tiny_pair.yaml"
    settings = ["--set", f"models.sd.profiles={tmp_path / 'sd'}", "--set", f"models.chat.profiles={tmp_path / 'chat'}"]
    timing = ["--repeats", "3", "--warmup", "0", "--seconds", "0.2"]
    few = ["models.sd.stages.unet.max_batch=2", "models.sd.stages.clip.max_batch=2", "models.sd.stages.vae.max_batch=2"]
    few += ["models.sd.workload.requests=5", "models.chat.workload.requests=7", "models.sd.slo={total_s: 300}"]
    few += ["models.chat.slo={first_s: 300, step_s: 60}"]
    settings += [part for setting in few for part in ("--set", setting)]
    for name in ("sd", "chat"):
        told = command("profile", path, *settings, "--model", name, "--out", tmp_path / name, *timing)
        assert told.status == 0, told.err
    assert {file.name for file in (tmp_path / "sd").iterdir()} == {"clip.json", "unet.json", "vae.json"}
    told = command("run", path, *settings, "-p", "fcfs", "--out", tmp_path / "out")
    assert told.status == 0, told.err
    (entry,) = json.loads((tmp_path / "out/report.json").read_text())
    assert {name: part["counts"]["on_time"] for name, part in entry["models"].items()} == {"sd": 5, "chat": 7}
    simulated = entry["simulated"]["models"]["chat"]["tokens"]["outputs"]
    assert entry["models"]["chat"]["tokens"]["outputs"] == simulated
    assert {"sd.clip", "sd.unet", "sd.vae"} < set(entry["busy_s"]) and "sd/probe" not in entry["busy_s"]
    assert (tmp_path / "out/images.png").exists()
