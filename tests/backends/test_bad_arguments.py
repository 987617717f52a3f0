"""Arguments of wrong type or size: each has one answer, at once where it can be known, and harms nobody else."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from neustream.backends.diffusers.arguments import check_arguments
    from tests.backends import pipelines
    from tests.backends.test_never_wrong import close_to, seeded, serve, words

import neustream as ns  # noqa: E402

pytestmark = [
    # numpy 2's complaints about how diffusers calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def sd():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return pipelines.ready(pipelines.stable_diffusion(), torch.float32)


REFUSED = [
    ({"prompt": "a \ud800 cat"}, "prompt has half of a surrogate pair at character 2"),
    ({"prompt": ["fine", "\udfff"]}, "prompt has half of a surrogate pair at character 0"),
    ({"negative_prompt": "\ud800"}, "negative_prompt has half of a surrogate pair"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"slo": "5"}, "slo must be an SLO or seconds, got '5'"),
    ({"slo": float("nan")}, "total must be greater than 0, got nan"),
    ({"id": ["x"]}, r"id is a string, got \['x'\]"),
    ({"id": 3}, "id is a string, got 3"),
    ({"generator": 3}, "generator must be a torch.Generator or a list of them, got 3"),
    ({"on_step": 3}, "on_step must be a function, got 3"),
    ({"callback_on_step_end": 3}, "callback_on_step_end must be a function, got 3"),
    ({"guidance_scale": "5"}, "guidance_scale must be a number, got '5'"),
    ({"guidance_scale": True}, "guidance_scale must be a number, got True"),
    ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number, got inf"),
    ({"height": -8}, "height must be a whole number of at least 1, got -8"),
    ({"height": "16"}, "height must be a whole number of at least 1, got '16'"),
    ({"height": 16.0}, "height must be a whole number of at least 1, got 16.0"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of at least 1, got 0"),
    ({"num_inference_steps": True}, "num_inference_steps must be a whole number of at least 1, got True"),
    ({"latents": "noise"}, "latents must be a tensor or a list of them, got 'noise'"),
    ({"latents": np.zeros((1, 4, 8, 8))}, "latents must be a tensor or a list of them"),
    ({"prompt": None, "prompt_embeds": 3}, "prompt_embeds must be a tensor or a list of them, got 3"),
    ({"negative_prompt": 5}, "negative_prompt must be text or a list of texts, got 5"),
    ({"timesteps": "all"}, "timesteps must be a list of numbers, got 'all'"),
    ({"clip_skip": "1"}, "clip_skip must be a number, got '1'"),
    ({"num_inference_steps": np.int64(0)}, "num_inference_steps must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_no_pipeline_takes(sd, change, message):
    with serve(sd) as service:
        with pytest.raises(ns.RequestError, match=message):
            service.submit(**{**words(), **change})
        assert service.report.submitted == 0
        generator = seeded(0)
        with pytest.raises(ns.RequestError, match=message):
            service.submit(**{**words(), "generator": generator, **change})
        assert torch.equal(service(**{**words(), "generator": generator}).images, sd(**words()).images)


@pytest.mark.parametrize("image", ["cat.png", 3, b"bytes", [], ["cat.png"]])
def test_an_image_that_is_none(image):
    pipe = pipelines.ready(pipelines.stable_diffusion_img2img(), torch.float32)
    with serve(pipe) as service, pytest.raises(ns.RequestError, match=r"image (must be a PIL image|is an empty list)"):
        service.submit(prompt="x", image=image, strength=0.5, num_inference_steps=2)


def test_a_generator_on_another_device():
    elsewhere = torch.Generator()
    named = {"generator": [seeded(0), elsewhere]}
    check_arguments(named, {}, torch.device("cpu"))

    class There(torch.Generator):
        device = torch.device("cuda:0")

    with pytest.raises(ns.RequestError, match="generator is on cuda:0, the pipeline on cpu"):
        check_arguments({"generator": There()}, {}, torch.device("cpu"))


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": np.int64(3)},
        {"guidance_scale": np.float32(5)},
        {"guidance_scale": np.int64(1)},
        {"height": np.int64(16)},
        {"num_images_per_prompt": np.int64(2)},
        {"prompt": ""},
        {"prompt": "x" * 10_000},
        {"prompt": ["a cat", "a dog"]},
    ],
)
def test_what_stock_takes(sd, change):
    with serve(sd) as service:
        ours = service(**{**words(), **change}, slo=np.float32(60)).images
    assert torch.equal(ours, sd(**{**words(), **change}).images)


def test_what_only_the_device_tells_fails_its_request_alone(sd):
    with serve(sd) as service:
        bad = service.submit(**words(latents=torch.zeros(1, 3, 8, 8)))
        fine = service.submit(**words(1))
        with pytest.raises(ns.RequestFailed, match="expected input"):
            bad.result(30)
        assert close_to(fine.result(30).images, sd(**words(1)).images)
