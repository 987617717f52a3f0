"""A vLLM engine as a model of a service: its texts, and texts that go on at another engine."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from neustream import RequestError, serve
from neustream.errors import StageFailed

PROMPTS = [[4 + (7 * at + 13 * number) % 500 for at in range(20 + number)] for number in range(6)]
MOST = {"max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def rigs(engines):
    """Two engines of one model, that step in turn: vLLM's kernels on a CPU are not for two threads of a process."""
    found, turn = (engines(), engines(seed=1)), threading.Lock()

    def in_turn(step):
        with turn:
            return step()

    with pytest.MonkeyPatch.context() as patch:
        for rig in found:
            patch.setattr(rig.engine, "step", partial(in_turn, rig.engine.step))
        yield found


@pytest.fixture
def services(rigs):
    from neustream.backends.vllm import VLLMMount

    made = [serve({"chat": VLLMMount(rig.llm)}) for rig in rigs]
    yield made
    for service in made:
        service.close(cancel=True)
    for rig in rigs:
        rig.assert_empty()


@pytest.fixture(scope="module")
def alone(rigs):
    """What vLLM itself makes of each prompt."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    found = rigs[0].llm.generate(prompts, SamplingParams(temperature=0, **MOST), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


def finish_of(answer):
    return answer.outputs[-1].update["finish_reason"]


def moved(services, answer, count):
    """Have a text leave the first service once `count` tokens came, and go on at the second."""
    reading = iter(answer)
    for _ in range(count):
        next(reading)
    left = services[0].give(answer.id).result(60)
    assert len(left.outputs) >= count
    return services[1].take(left).result(60)


def test_texts_are_those_of_vllm_and_stream(services, alone):
    answers = [services[0].submit(prompt, model="chat", **MOST) for prompt in PROMPTS]
    assert [[token.id for token in answer] for answer in answers] == alone
    for answer, tokens in zip(answers, alone, strict=True):
        found = answer.result(60)
        assert list(found.token_ids) == tokens and finish_of(answer) == "length"
        assert found.text == services[0].models["chat"].tokenizer.decode(
            [4, *tokens], skip_special_tokens=True
        ).removeprefix("w4")
    by_text = services[0]("w4 w11 w18", model="chat", max_tokens=3)
    by_ids = services[0]([4, 11, 18], model="chat", max_tokens=3)
    assert by_text.token_ids == by_ids.token_ids


def test_a_text_ends_where_vllm_ends_it(services, alone):
    stop = alone[1][9]
    asked = {**MOST, "stop_token_ids": [stop]}
    answer = services[0].submit(PROMPTS[1], model="chat", **asked)
    assert list(answer.result(60).token_ids) == alone[1][: alone[1].index(stop) + 1] and finish_of(answer) == "stop"


@pytest.mark.parametrize("count", [1, 2, 17, 38])
def test_a_greedy_text_goes_on_at_another_engine_behind_its_tokens(services, rigs, alone, count):
    others = [services[at].submit(PROMPTS[5 - at], model="chat", **MOST) for at in range(2)]
    answer = moved(services, services[0].submit(PROMPTS[0], model="chat", **MOST), count)
    assert [token.id for token in answer] == alone[0] == list(answer.result(60).token_ids)
    assert [output.index for output in answer.outputs] == list(range(40))
    assert answer.result(60).text == services[0](PROMPTS[0], model="chat", **MOST).text
    assert [list(other.result(60).token_ids) for other in others] == [alone[5], alone[4]]


def test_a_text_that_ended_behind_a_move_says_so(services, alone):
    stop = alone[1][9]
    asked = services[0].submit(PROMPTS[1], model="chat", **MOST, stop_token_ids=[stop])
    if alone[1].index(stop) > 2:
        asked = moved(services, asked, 2)
    assert asked.result(60) and finish_of(asked) == "stop"


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "seed": 3},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"min_tokens": 5},
    ],
)
def test_another_text_moves_before_its_first_token_only(services, sampling):
    whole = services[0](PROMPTS[2], model="chat", **MOST, **sampling)
    answer = services[0].submit(PROMPTS[2], model="chat", **MOST, **sampling)
    reading = iter(answer)
    next(reading)
    [name] = sampling.keys() - {"temperature"} if "seed" not in sampling else ["temperature"]
    with pytest.raises(StageFailed, match=f"stays: .*a text with {name}="):
        services[0].give(answer.id).result(60)
    assert answer.result(60).token_ids == whole.token_ids, "it went on where it is"


def test_a_text_that_waits_for_its_first_token_moves_whatever_it_is(services):
    sampling = {"temperature": 1.0, "seed": 3}
    whole = services[0](PROMPTS[2], model="chat", **MOST, **sampling)
    running = [services[0].submit(prompt, model="chat", **MOST) for prompt in PROMPTS * 4]
    answer = services[0].submit(PROMPTS[2], model="chat", **MOST, **sampling)
    left = services[0].give(answer.id).result(60)
    assert not left.outputs
    assert services[1].take(left).result(60).result(60).token_ids == whole.token_ids
    assert all(len(other.result(60).token_ids) == 40 for other in running)


def test_a_text_that_is_given_up_ends_in_vllm_too(services, rigs):
    answer = services[0].submit(PROMPTS[0], model="chat", max_tokens=400, ignore_eos=True)
    next(iter(answer))
    assert answer.cancel()
    assert len(services[0](PROMPTS[1], model="chat", **MOST).token_ids) == 40
    assert not rigs[0].scheduler.requests


def test_a_step_that_fails_takes_its_texts_along_and_no_others(services, rigs):
    run = rigs[0].core.model_executor.execute_model

    def broken(*args, **kwargs):
        rigs[0].core.model_executor.execute_model = run
        raise RuntimeError("the device fell off")

    rigs[0].core.model_executor.execute_model = broken
    answer = services[0].submit(PROMPTS[0], model="chat", **MOST)
    with pytest.raises(Exception, match="the device fell off"):
        answer.result(60)
    assert len(services[0](PROMPTS[1], model="chat", **MOST).token_ids) == 40


@pytest.mark.parametrize(
    ("prompt", "asked", "said"),
    [
        ([], {}, "the prompt is empty"),
        ([4, 512], {}, "512 is no token: the vocabulary has 512"),
        ([4] * 500, {"max_tokens": 20}, "500 tokens of prompt and max_tokens=20 make 520, but max_len is 512"),
        ([4], {"max_tokens": 0}, "max_tokens must be"),
        ([4], {"n": 2}, "n is not supported by a vLLM model of a service"),
        ([4], {"temprature": 1.0}, "vLLM's SamplingParams: TypeError"),
        ([4], {"top_p": 3.0}, "top_p must be in"),
        (7, {}, "a prompt is text or a list of token ids, got 7"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(services, prompt, asked, said):
    with pytest.raises(RequestError, match=said):
        services[0].submit(prompt, model="chat", **asked)
