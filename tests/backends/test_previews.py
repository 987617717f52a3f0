"""Pictures of requests under way: what the stock call would return if this step were its last."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

from pipelines import FAMILIES, build, difference, requests, stock, tensor_of

from neustream import RequestError, serve
from neustream.errors import BackendError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SHOWN = [
    "stable_diffusion",
    "stable_diffusion_img2img",
    "stable_diffusion_inpaint",
    "controlnet",
    "stable_diffusion_xl",
    "stable_diffusion_3",
    "flux",
    "pixart",
    "dit",
    "wan",
    "sana",
    "qwenimage",
]
OPTIONS = {"measure_s": 0.0, "samples": [], "max_batch": 4}


class Frozen:
    """A scheduler's step that stops after so many: later ones give what that one did."""

    def __init__(self, scheduler, last):
        self._step, self._last, self._count, self._result = scheduler.step, last, 0, None

    def __call__(self, *args, **kwargs):
        self._count += 1
        if self._count <= self._last:
            self._result = self._step(*args, **kwargs)
        return self._result


def frozen(pipe, kwargs, last):
    """What the stock call returns whose latents stay as they are after step number `last`."""
    one = copy.deepcopy(pipe)
    one.scheduler.step = Frozen(one.scheduler, last)
    given = {
        name: value.clone_state() if isinstance(value, torch.Generator) else value for name, value in kwargs.items()
    }
    return tensor_of(one(**given))


def previewed(service, kwargs, steps):
    """The picture of each step in `steps`, and the request's own result."""
    found, ready = {}, threading.Event()

    def on_step(progress):
        if progress.step in steps:
            found[progress.step] = service.submit(progress.preview())
        if progress.step == max(steps):
            ready.set()

    result = service.submit(**kwargs, on_step=on_step).result(120)
    assert ready.wait(60)
    return {step: tensor_of(answer.result(120)) for step, answer in found.items()}, tensor_of(result)


@pytest.mark.parametrize("name", SHOWN)
def test_a_preview_is_what_the_stock_call_makes_of_the_latents(name, tmp_path):
    pipe = build(name)
    request = requests(name)[0]
    wanted = {step: frozen(pipe, request.arguments(), step) for step in (1, 2)}
    whole = stock(pipe, request)
    with serve(pipe, cache=tmp_path, **OPTIONS) as service:
        found, result = previewed(service, request.arguments(), (1, 2))
    assert difference(result, whole) <= FAMILIES[name].tolerance
    for step, picture in wanted.items():
        assert difference(found[step], picture) <= FAMILIES[name].tolerance
    assert difference(found[1], found[2]) > 1e-4  # it goes on


def test_previews_are_batched_and_nobody_else_changes(tmp_path):
    pipe = build("stable_diffusion")
    some = requests("stable_diffusion")
    wanted = [stock(pipe, one) for one in some]
    pictures = {at: frozen(pipe, one.arguments(), 2) for at, one in enumerate(some)}
    sizes, found = [], {}

    def observe(record):
        if type(record).__name__ == "Finished" and record.step.stage.startswith("preview@"):
            sizes.append(len(record.step))

    with serve(pipe, cache=tmp_path, observers=[observe], **OPTIONS) as service:

        def ask(at, one):
            def on_step(progress):
                if progress.step == 2:
                    found[at] = service.submit(progress.preview())

            return service.submit(**one.arguments(), on_step=on_step)

        answers = [ask(at, one) for at, one in enumerate(some)]
        results = [tensor_of(answer.result(120)) for answer in answers]
        shown = {at: tensor_of(answer.result(120)) for at, answer in found.items()}
    for result, whole in zip(results, wanted, strict=True):
        assert difference(result, whole) <= 1e-5
    for at, picture in pictures.items():
        assert difference(shown[at], picture) <= 1e-5
    assert sum(sizes) == len(some)


def test_without_a_generator_nobody_elses_draws_change(tmp_path):
    pipe = build("stable_diffusion")
    kwargs = {"prompt": "a cat", "num_inference_steps": 3, "output_type": "pt"}
    drawn = []
    for steps in ((), (1, 2)):
        with serve(pipe, cache=tmp_path, **OPTIONS) as service:
            service(**kwargs)  # the first one is looked at
            torch.manual_seed(5)
            pictures = []

            def on_step(progress, steps=steps, service=service, pictures=pictures):
                if progress.step in steps:
                    pictures.append(service.submit(progress.preview()))

            answer = service.submit(**kwargs, on_step=on_step)
            drawn.append((tensor_of(answer.result(60)), [picture.result(60) for picture in pictures]))
            drawn.append(torch.rand(2))
    assert torch.equal(drawn[0][0], drawn[2][0]) and torch.equal(drawn[1], drawn[3])
    assert len(drawn[2][1]) == 2


def test_where_there_is_none_it_says_so(tmp_path):
    told = []

    def on_step(progress):
        try:
            progress.preview()
        except BackendError as error:
            told.append(str(error))

    pipe = build("ddpm")
    with serve(pipe, cache=tmp_path, **OPTIONS) as service:
        service(num_inference_steps=3, on_step=on_step)
    assert told and "ddpm" in told[0].lower()


def test_a_shape_that_is_forgotten_has_no_previews(tmp_path):
    pipe = build("stable_diffusion_3")
    one = requests("stable_diffusion_3")[0]
    kept = []
    with serve(pipe, cache=tmp_path, max_shapes=1, **OPTIONS) as service:
        service(**one.arguments(), on_step=lambda progress: kept.append(progress.preview()))
        service.submit(kept[0]).result(60)
        service(**one.arguments(height=48, width=48))
        with pytest.raises(RequestError, match="not served any more"):
            service.submit(kept[0])
