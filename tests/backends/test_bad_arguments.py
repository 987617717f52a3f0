"""Arguments of wrong type or size: each has one answer, at once where it can be known, and harms nobody else."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    diffusers = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from plainly_served import close_to, seeded, serve, words

    from neustream.backends.diffusers.arguments import check_arguments
    from neustream.backends.diffusers.signatures import signature_of
    from tests.backends import pipelines

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
    ({"prompt": 3}, "prompt must be text or a list of texts, got 3"),
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
    ({"num_inference_steps": True}, "num_inference_steps must be a whole number from 1 to 100000, got True"),
    ({"latents": "noise"}, "latents must be a tensor or a list of them, got 'noise'"),
    ({"latents": np.zeros((1, 4, 8, 8))}, "latents must be a tensor or a list of them"),
    ({"prompt": None, "prompt_embeds": 3}, "prompt_embeds must be a tensor or a list of them, got 3"),
    ({"negative_prompt": 5}, "negative_prompt must be text or a list of texts, got 5"),
    (
        {"latents": torch.zeros(1, 4, 8, 8, dtype=torch.int64)},
        "latents must be of floating point numbers, got torch.int64",
    ),
    ({"latents": torch.zeros(8)}, r"latents must have 2 dimensions or more, .* got the shape \[8\]"),
    ({"latents": torch.zeros(1, 1, 1, 1).expand(1, 4, 8, 1 << 16)}, "latents must be at most 16384 pixels in width"),
    ({"height": 10**7}, "height must be at most 16384 pixels in height, got 10000000"),
    ({"height": 1 << 14, "width": 1 << 14}, "are 268435456, more than max_pixels=134217728"),
    ({"height": 64, "width": 64, "num_images_per_prompt": 10**6}, r"1000000 sample\(s\) of 1 frame\(s\) of 64 x 64"),
    ({"timesteps": "all"}, "timesteps must be a list of numbers, got 'all'"),
    ({"clip_skip": "1"}, "clip_skip must be a whole number, got '1'"),
    ({"num_inference_steps": np.int64(0)}, "num_inference_steps must be a whole number from 1 to 100000, got"),
    ({"num_inference_steps": 10**9}, "num_inference_steps must be a whole number from 1 to 100000, got 1000000000"),
    ({"num_inference_steps": None}, "num_inference_steps must be a number, got None"),
    ({"num_images_per_prompt": None}, "num_images_per_prompt must be a whole number of at least 1, got None"),
    ({"guidance_scale": None}, "guidance_scale must be a number, got None"),
    ({"guidance_scale": [1]}, r"guidance_scale must be a number, got \[1\]"),
    ({"guidance_scale": {"a": 1}}, "guidance_scale must be a number, got {'a': 1}"),
    ({"guidance_scale": torch.ones(2)}, "guidance_scale must be a number, got tensor"),
    ({"guidance_rescale": "0.5"}, "guidance_rescale must be a number, got '0.5'"),
    ({"eta": [0.0]}, r"eta must be a number, got \[0.0\]"),
    ({"height": [16]}, r"height must be a number, got \[16\]"),
    ({"timesteps": [1, "2"]}, "timesteps must be a list of numbers"),
    ({"sigmas": [float("nan")]}, "sigmas must be finite, got "),
    ({"sigmas": 3}, "sigmas must be a list of numbers, got 3"),
    ({"cross_attention_kwargs": 5}, "cross_attention_kwargs must be a mapping, got 5"),
    ({"prompt": ["a cat", 5]}, r"prompt must be text or a list of texts, got \['a cat', 5\]"),
    ({"prompt": ["a cat", None]}, "prompt must be text or a list of texts"),
    ({"negative_prompt": ["", None]}, "negative_prompt must be text or a list of texts"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt must be as many texts as there are prompts, 1, got 2"),
    ({"negative_prompt": ["a"]}, r"negative_prompt must be text as prompt is, got \['a'\]"),
    ({"prompt": ["a", "b"], "negative_prompt": "c"}, "negative_prompt must be a list as prompt is, got 'c'"),
    ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt must be as many texts .*, 2, got 1"),
    ({"generator": (seeded(0),)}, "generator must be a torch.Generator or a list of them"),
    ({"generator": []}, "generator must be one, or as many as the call has samples, 1, got a list of 0"),
    ({"generator": [seeded(0), seeded(1)]}, "generator must be one, .* samples, 1, got a list of 2"),
    ({"prompt": ["a"] * 2, "num_images_per_prompt": np.int64(2), "generator": [seeded(0)] * 2}, "samples, 4, got a li"),
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


OPTIONS = [
    ({"max_batch": "4"}, "max_batch must be a whole number from 1 on, got '4'"),
    ({"max_batch": 0}, "max_batch must be a whole number from 1 on, got 0"),
    ({"encode_batch": None}, "encode_batch must be a whole number from 1 on, got None"),
    ({"decode_batch": 2.5}, "decode_batch must be a whole number from 1 on, got 2.5"),
    ({"max_shapes": "2"}, "max_shapes must be a whole number from 1 on, got '2'"),
    ({"max_pixels": 0}, "max_pixels must be a whole number from 1 on, got 0"),
    ({"max_pixels": 16, "samples": [words()]}, "samples: .* pixels .* are .*, more than max_pixels=16"),
    ({"measure_s": -1}, "measure_s must be seconds, 0 or more, got -1"),
    ({"measure_s": float("nan")}, "measure_s must be seconds, 0 or more, got nan"),
    ({"buckets": 4}, "buckets must be a list of whole numbers, got 4"),
    ({"buckets": [0]}, r"buckets must be whole numbers of at least 1, got \[0\]"),
    ({"buckets": ["4"]}, "buckets must be whole numbers of at least 1"),
    ({"compile": "yes"}, "compile must be True, False, or arguments of torch.compile, got 'yes'"),
    ({"samples": {}}, "samples must be a list of the arguments of calls, by name, got {}"),
    ({"samples": ["x"]}, "samples must be a list of the arguments of calls, by name, got 'x'"),
    ({"profiles": 3}, "profiles must be profiles by stage, or their folder, got 3"),
    ({"cache": 5}, "cache must be a folder, got 5"),
    ({"check_finite": "no"}, "check_finite must be True or False, got 'no'"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_that_are_none(sd, options, message):
    with pytest.raises(ns.BackendError, match=message):
        serve(sd, **options)
    with serve(sd) as service:  # nothing holds it
        assert not service.report.submitted


@pytest.mark.parametrize("image", ["cat.png", 3, b"bytes", [], ["cat.png"]])
def test_an_image_that_is_none(image):
    pipe = pipelines.ready(pipelines.stable_diffusion_img2img(), torch.float32)
    with serve(pipe) as service, pytest.raises(ns.RequestError, match=r"image (must be a PIL image|is an empty list)"):
        service.submit(prompt="x", image=image, strength=0.5, num_inference_steps=2)


def test_a_schedule_in_place_of_a_number_of_steps(sd):
    named = {"num_inference_steps": None, "timesteps": range(900, 0, -300)}
    check_arguments(named, signature_of(sd), torch.device("cpu"))


def test_none_where_the_pipeline_looks_for_it():
    """SanaSprint's middle timestep is annotated as a number, and has to be None for other than two steps."""
    signature, here = signature_of(object.__new__(diffusers.SanaSprintPipeline)), torch.device("cpu")
    check_arguments({"intermediate_timesteps": None}, signature, here)
    with pytest.raises(ns.RequestError, match="num_inference_steps must be a number, got None"):
        check_arguments({"num_inference_steps": None}, signature, here)


def test_a_generator_on_another_device(sd):
    signature, here = signature_of(sd), torch.device("cpu")
    check_arguments({"generator": [seeded(0), torch.Generator(), None]}, signature, here)

    class There(torch.Generator):
        device = torch.device("cuda:0")

    with pytest.raises(ns.RequestError, match="generator is on cuda:0, the pipeline on cpu"):
        check_arguments({"generator": There()}, signature, here)


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
        {"guidance_scale": torch.tensor(5.0)},
        {"guidance_scale": 1, "negative_prompt": ["unread", "unread"]},
        {"prompt": ["a cat", "a dog"], "negative_prompt": ["a", "b"]},
    ],
)
def test_what_stock_takes(sd, change):
    with serve(sd) as service:
        ours = service(**{**words(), **change}, slo=np.float32(60)).images
    assert torch.equal(ours, sd(**{**words(), **change}).images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (5, "class_labels must be a list of whole numbers, got 5"),
        ([], "class_labels must be a list of whole numbers"),
        (["cat"], "class_labels must be whole numbers from 0 to 1000, got"),
        ([-1], "class_labels must be whole numbers from 0 to 1000, got"),
        ([1001], "class_labels must be whole numbers from 0 to 1000, got"),
        ([True], "class_labels must be whole numbers from 0 to 1000, got"),
    ],
)
def test_labels_that_are_none(labels, message):
    """On a GPU a label that is not there ends the process for everybody."""
    pipe = pipelines.ready(pipelines.dit(), torch.float32)
    with serve(pipe) as service, pytest.raises(ns.RequestError, match=message):
        service.submit(class_labels=labels, num_inference_steps=2)


def test_more_generators_than_samples():
    """Pipelines that do not count them take the first ones."""
    pipe = pipelines.ready(pipelines.dit(), torch.float32)
    call = {"class_labels": [1, 2], "num_inference_steps": 2, "output_type": "pt"}
    stock = pipe(**call, generator=[seeded(at) for at in range(3)]).images
    with serve(pipe) as service:
        assert close_to(service(**call, generator=[seeded(at) for at in range(3)]).images, stock)


@pytest.mark.parametrize(
    ("latents", "brought"),
    [
        (torch.zeros(1, 3, 8, 8), r"latents as torch.float32 \[1, 3, 8, 8\]; the pipeline is in torch.float32"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.float64), r"latents as torch.float64 \[1, 4, 8, 8\]"),
    ],
)
def test_what_only_the_device_tells_fails_its_request_alone(sd, latents, brought):
    with serve(sd) as service:
        bad = service.submit(**words(latents=latents))
        fine = service.submit(**words(1))
        with pytest.raises(ns.RequestFailed, match=brought):
            bad.result(30)
        assert close_to(fine.result(30).images, sd(**words(1)).images)
