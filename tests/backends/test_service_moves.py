"""Texts and images that go from one running service to another, at each of their steps."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from crossing import Crossing
    from pipelines import build, requests, stock, tensor_of
    from test_texts import engine
    from texts import model_of, prompts

    from neustream import StageFailed, serve

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

MAX = 6
SAMPLINGS = {"greedy": {}, "sampled": {"temperature": 1.1, "top_p": 0.9, "seed": 5, "logprobs": 2}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# -- texts --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats():
    with engine(copy.deepcopy(model_of("llama"))) as one, engine(copy.deepcopy(model_of("llama"))) as other:
        yield one, other


@pytest.mark.parametrize("cached", [True, False], ids=["keys and values", "tokens"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_text_that_moves_at_any_step_is_the_unmoved_one(chats, name, cached):
    source, target = chats
    asked = {"max_tokens": MAX, "ignore_eos": True, **SAMPLINGS[name]}
    prompt = prompts(4)[1]
    alone = source.submit(prompt, **asked)
    wanted = list(alone)
    for step in range(1, MAX):
        crossing = Crossing(source, f"r{step}", step, cached=cached)
        source.submit(prompt, id=f"r{step}", **asked)
        moved = crossing.left.result(60)
        assert bool(moved.there.pieces) == cached
        here = crossing.to(target)
        tokens = list(here)
        assert [(one.index, one.id, one.text) for one in tokens] == [(one.index, one.id, one.text) for one in wanted]
        if "logprobs" in asked:  # keys and values that are computed anew are so up to rounding
            likely = [one.likelihood.logprob for one in tokens]
            assert likely == pytest.approx([one.likelihood.logprob for one in wanted], abs=0 if cached else 1e-4)
        assert [one.at_s for one in tokens] == sorted(one.at_s for one in tokens)
        assert here.result(60).token_ids == alone.result().token_ids
        assert source.models[""].used == target.models[""].used == 0


def test_what_moves_of_a_text_does_not_grow_with_the_square_of_its_length(chats):
    source, target = chats
    crossing = Crossing(source, "long", 40)
    source.submit(prompts(1)[0], max_tokens=50, ignore_eos=True, id="long")
    moved = crossing.left.result(60)
    assert len(moved.outputs) == 40 and all(set(one.update) == {"token", "ended"} for one in moved.outputs)
    assert len(target.take(moved).result(60).result(60).token_ids) == 50


def test_a_completion_in_another_process_has_its_text_and_no_tokenizer():
    class Words:
        """A tokenizer that cannot leave its process."""

        lock = threading.Lock()

        def __call__(self, text):
            return {"input_ids": [5]}

        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    with engine(model_of("llama"), Words()) as chat:
        done = chat.submit([5, 6], max_tokens=3, ignore_eos=True).result(60)
    there = pickle.loads(pickle.dumps(done))
    assert there == done and there.text == done.text == " ".join(map(str, done.token_ids))


# -- images -------------------------------------------------------------------------------------------


def painting(name):
    return serve(build(name), samples=[], measure_s=0.0)


@pytest.mark.parametrize("name", ["stable_diffusion", "dit"])
def test_an_image_that_moves_at_any_step_is_bitwise_stock(name):
    pipe = build(name)
    request = requests(name)[0]
    wanted = stock(pipe, request)
    with painting(name) as source, painting(name) as target:
        step, moved = 0, 0
        while True:
            step += 1
            crossing = Crossing(source, f"r{step}", step)
            there = source.submit(**request.arguments(), id=f"r{step}")
            if crossing.left.exception(60) is not None:  # it ended with that step
                assert torch.equal(tensor_of(there.result(60)), wanted)
                break
            assert torch.equal(tensor_of(crossing.to(target).result(60)), wanted), step
            assert there.outcome(60).code == "moved"
            moved += 1
        assert moved >= request.steps
        for service in (source, target):
            runs = service.models[""]._places.replicas[0].module._runs
            service._devices[0].executor.call(lambda: None).result(60)
            assert len(runs) == 0
            assert service.snapshot().open == 0


def test_a_pipeline_that_cannot_move_says_so_by_name_and_goes_on():
    request = requests("animatediff")[0]
    wanted = stock(build("animatediff"), request)
    with painting("animatediff") as source:
        crossing = Crossing(source, "x", 2)
        answer = source.submit(**request.arguments(), id="x")
        with pytest.raises(StageFailed, match=r"request 'x' stays: stage .*: AnimateDiffPipeline cannot move"):
            crossing.left.result(60)
        assert torch.equal(tensor_of(answer.result(60)), wanted)
