"""Pipelines of which an instance has only what its stages need, and graphs of which it loads only its modules."""

from __future__ import annotations

import itertools
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from pipelines import build, requests, stock, tensor_of
    from places import DEVICE
    from small_pipelines import SD
    from test_served_roles import Leg
    from toys import Step, table

    from neustream import BackendError, Graph, Stage, seq
    from neustream.backends.diffusers import from_config, keep_only, load_part
    from neustream.backends.diffusers.partly import moved
    from neustream.backends.diffusers.parts import models_of
    from neustream.backends.diffusers.replica import Replica
    from neustream.core.profile import GuessedProfile

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ROLES = ["encode", "denoise", "decode"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def loaded(pipe):
    """The models whose weights are there."""
    return {name for name, model in models_of(pipe) if not next(model.parameters()).is_meta}


def passed(legs, roles, request):
    """What comes of a request that each of some services has its own part of."""
    here = there = legs[0].service.submit(**request.arguments())
    for (source, target), role in zip(itertools.pairwise(legs), roles[1:], strict=True):
        here = source.pass_on(target, role)
    found = tensor_of(here.result(60))
    assert there.outcome(60).code == "moved"
    return found


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_img2img", "dit", "wan", "stable_audio"])
def test_three_instances_with_a_part_of_the_weights_each_make_the_same_picture(name):
    whole, request = build(name), requests(name)[0]
    wanted = stock(whole, request)
    roles = ROLES[name == "dit" :]
    parts = [keep_only(build(name), [role]) for role in roles]
    there = [loaded(part) for part in parts]
    assert set.union(*there) == loaded(whole) and all(some < loaded(whole) for some in there)
    legs = [Leg(part, samples=[], measure_s=0.0, stages=[role]) for part, role in zip(parts, roles, strict=True)]
    assert torch.equal(passed(legs, roles, request), wanted)
    for leg, part, some in zip(legs, parts, there, strict=True):
        leg.service.close()
        assert loaded(part) == some


def test_what_the_first_step_needs_of_pictures_stays_with_the_encoder():
    assert loaded(keep_only(build("stable_diffusion_img2img"), ["encode"])) == {"text_encoder", "vae"}
    assert loaded(keep_only(build("stable_diffusion"), ["encode"])) == {"text_encoder"}
    assert loaded(keep_only(build("stable_diffusion"), ["encode", "denoise"])) == {"text_encoder", "unet"}


@pytest.mark.parametrize("name", ["pixart", "stable_diffusion_xl", "flux", "kandinsky_prior"])
def test_what_requests_look_like_is_told_without_the_weights_of_others(name):
    """T5's masks are asked whether they hide nothing: of values that there are not that is not known."""
    request = requests(name)[0]
    wanted = Replica(build(name)).probe(request.arguments())
    assert Replica(keep_only(build(name), ["denoise"])).probe(request.arguments()) == wanted


def test_a_checkpoint_is_read_as_far_as_some_stages_need_it(tmp_path):
    whole, request = build("stable_diffusion"), requests("stable_diffusion")[0]
    wanted = stock(whole, request)
    whole.save_pretrained(tmp_path)
    models, legs = {"encode": "text_encoder", "denoise": "unet", "decode": "vae"}, []
    for role, model in models.items():
        others = [tmp_path / other for other in models.values() if other != model]
        hidden = [file.rename(file.with_suffix(".hidden")) for one in others for file in one.glob("*.safetensors")]
        assert len(hidden) == 2
        part = moved(load_part(tmp_path, [role]), DEVICE)
        assert loaded(part) == {model}
        legs.append(Leg(part, samples=[], measure_s=0.0, stages=[role]))
        for file in hidden:
            file.rename(file.with_suffix(".safetensors"))
    for model in legs:
        model.service.models[""].pipe.set_progress_bar_config(disable=True)
    assert torch.equal(passed(legs, ROLES, request), wanted)
    for leg in legs:
        leg.service.close()


def test_a_config_makes_the_same_weights_whatever_is_kept_of_them():
    options = from_config.Options(
        pipeline="StableDiffusionPipeline", components=SD, arguments={"requires_safety_checker": False}
    )
    whole, part = from_config.build(options), from_config.build(options, roles=["denoise"])
    assert loaded(part) == {"unet"}
    pairs = zip(whole.unet.parameters(), part.unet.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        (None, r"stage 'decode': the weights of vae are not loaded: load them, or say .* stages=all here"),
        (["decode"], r"stage 'decode': the weights of vae are not loaded: .* stages=\['decode'\] here"),
        (["encode@4x8x8"], r"stage 'encode': the weights of text_encoder are not loaded"),
    ],
)
def test_what_is_not_loaded_is_not_served(stages, why):
    part = keep_only(build("stable_diffusion"), ["denoise"])
    with pytest.raises(BackendError, match=why):
        Leg(part, samples=[], measure_s=0.0, stages=stages)
    Leg(part, samples=[], measure_s=0.0, stages=["denoise"]).service.close()  # and is free for another


@pytest.mark.parametrize("stages", [["denoise", "upscale"], "denoise", []])
def test_stages_that_pipelines_do_not_have_are_refused(stages):
    with pytest.raises(BackendError, match=r"stages.*(no stage 'upscale'|a list of names)"):
        keep_only(build("dit"), stages)


def test_an_instance_measures_what_it_runs_and_finds_what_others_measured(tmp_path):
    profiles = {}
    for role in ("decode", "denoise", "encode"):
        part = keep_only(build("stable_diffusion"), [role])
        with Leg(part, measure_s=0.5, cache=tmp_path, max_batch=2, stages=[role]) as leg:
            profiles[role] = {
                name.partition("@")[0]
                for name, profile in leg.service.profiles.items()
                if not isinstance(profile, GuessedProfile)
            }
    assert profiles == {"decode": {"decode"}, "denoise": {"decode", "denoise"}, "encode": set(ROLES)}


# -- own graphs ---------------------------------------------------------------------------------------


class Diary(Step):
    """Keeps what happened to a request by itself."""

    def __init__(self):
        super().__init__(self.note)
        self.kept = {}

    def note(self, given):
        self.kept.setdefault(given.id, []).append(given.stage)
        return {"diary": tuple(self.kept[given.id])}

    def release(self, id):
        self.kept.pop(id, None)

    def export(self, given):
        return self.kept[given.id]

    def adopt(self, given, piece):
        self.kept[given.id] = list(piece)


def test_modules_of_stages_that_are_served_elsewhere_are_not_loaded_and_what_they_keep_goes_along():
    graph = Graph("way", seq(Stage("begin"), Stage("think"), Stage("end")))
    profiles = {name: table(name, 0.001, device="toy") for name in graph.stages}
    think, diaries = Step(lambda given: {}), [Diary(), Diary()]
    first = Leg(graph, {"begin": diaries[0], "end": diaries[0], "think": think}, profiles, stages=["begin"])
    assert diaries[0].loaded == ["cpu"] and not think.loaded
    then = Leg(graph, {"think": think}, profiles, stages=["think"])
    assert think.loaded == ["cpu"]
    last = Leg(graph, {"begin": diaries[1], "end": diaries[1]}, profiles, stages=["end"])
    answer = first.service.submit({})
    assert answer is not None
    first.pass_on(then, "think")
    answer = then.pass_on(last, "end")
    assert answer.result(60)["diary"] == ("begin", "end")
    assert not diaries[0].kept and not diaries[1].kept
    for leg in (first, then, last):
        leg.service.close()


def test_a_stage_that_is_served_needs_its_module():
    graph = Graph("way", seq(Stage("begin"), Stage("end")))
    profiles = {name: table(name, 0.001, device="toy") for name in graph.stages}
    with pytest.raises(BackendError, match="stage 'end' of 'way' has no module"):
        Leg(graph, {"begin": Step()}, profiles, stages=["end"])
