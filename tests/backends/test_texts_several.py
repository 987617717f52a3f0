"""Several sequences of one prompt: what so many calls of `generate` give, the prompt computed once."""

import asyncio
import threading

import pytest
from places import DEVICE
from texts import alone, made, model_of, prompts

import neustream
from neustream import RequestError
from neustream.backends.transformers.from_config import byte_tokenizer

MAX = 8
DRAWN = {"temperature": 1.1, "top_p": 0.95}


def wanted(model, prompt, seeds):
    return [alone(model, prompt, MAX, seed=seed, eos_token_id=None, **DRAWN) for seed in seeds]


def tokens(many):
    return [list(one.token_ids) for one in many]


@pytest.mark.parametrize(
    "options", [{}, {"prefix_tokens": 0}, {"buckets": [64]}, {"slots": 2}, {"devices": [str(DEVICE)] * 2}]
)
def test_sequences_are_those_of_as_many_calls_with_seeds_of_their_own(options):
    model, given = model_of("llama"), prompts(3, seed=4, low=20)
    with neustream.serve(model, measure_s=0.1, **{"slots": 4, **options}) as service:
        asked = [
            service.submit(prompt, n=4, seed=7 * at, max_tokens=MAX, ignore_eos=True, **DRAWN)
            for at, prompt in enumerate(given)
        ]
        found = [tokens(answer.result(60)) for answer in asked]
    assert found == [wanted(model, prompt, range(7 * at, 7 * at + 4)) for at, prompt in enumerate(given)]


@pytest.mark.parametrize("kind", ["opt", "bloom"])
def test_other_kinds_of_models_have_them_too(kind):
    model, (prompt,) = made(kind, "sdpa" if kind == "opt" else "eager"), prompts(1, seed=5)
    model.requires_grad_(False)
    with neustream.serve(model, slots=4, max_len=64, measure_s=0.1) as service:
        found = tokens(service(prompt, n=3, seed=2**63 - 2, max_tokens=MAX, ignore_eos=True, **DRAWN))
        greedy = tokens(service(prompt, n=2, max_tokens=MAX, ignore_eos=True))
    assert found == wanted(model, prompt, (2**63 - 2, 2**63 - 1, 0))
    assert greedy == [alone(model, prompt, MAX, eos_token_id=None)] * 2


def test_the_prompt_is_computed_once():
    model, (prompt,) = made("llama"), prompts(1, seed=6, low=33)
    with neustream.serve(model, slots=8, measure_s=0.1) as service:
        computed = []
        hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, args: computed.append(args[0].numel()))
        many = service(prompt, n=5, seed=1, max_tokens=MAX, ignore_eos=True, **DRAWN)
        counts = list(computed)
        hook.remove()
    assert tokens(many) == wanted(model, prompt, range(1, 6))
    each = 5 * (MAX - 1)
    tried = [count for count in counts if count == 4]  # with other hooks, a text of four tokens is tried
    assert sum(counts) - sum(tried[:1]) == len(prompt) + 4 + each
    assert [one.cached_tokens for one in many] == [0] * 5


def test_outputs_come_with_the_number_of_their_sequence():
    model = made("llama", vocab_size=len(byte_tokenizer()))

    async def read(answer):
        return [pair async for pair in answer]

    with neustream.serve(model, byte_tokenizer(), slots=4, measure_s=0.1) as service:
        answer = service.submit("hello", n=3, seed=3, max_tokens=MAX, id="mine", **DRAWN)
        pairs = list(answer)
        again = asyncio.run(read(answer))
        many = answer.result(60)
        single = [list(one) for one in answer.each]
    assert [one.id for one in answer.each] == ["mine/0", "mine/1", "mine/2"]
    assert pairs == again
    for number, one in enumerate(many):
        own = [token for which, token in pairs if which == number]
        assert tuple(token.id for token in own) == one.token_ids and own == single[number]
    outcome = answer.outcome()
    assert outcome.status == "done" and outcome.latency_s == max(one.latency_s for one in many) and outcome.on_time


def test_one_that_fails_fails_all():
    (prompt,) = prompts(1, seed=7)

    def broken(ids, logits):
        if ids.shape[1] > len(prompt) + 2:
            raise OSError("broken")
        return logits

    with neustream.serve(model_of("llama"), slots=4, measure_s=0.1) as service:
        answer = service.submit(prompt, n=3, max_tokens=MAX, processors=[broken], ignore_eos=True)
        with pytest.raises(neustream.RequestFailed, match="its sampling raised OSError: broken"):
            answer.result(60)
        assert service(prompt, n=1, max_tokens=2, ignore_eos=True)[0].finish_reason == "length"


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_those_that_wait_for_the_prompt_end_too(end):
    gate, began = threading.Event(), threading.Event()

    class Waits:  # classes are not copied
        def __call__(self, ids, logits):
            began.set()
            gate.wait(60)
            return logits

    (prompt,) = prompts(1, seed=8)
    with neustream.serve(model_of("llama"), slots=4, measure_s=0.1) as service:
        answer = service.submit(prompt, n=3, max_tokens=40, processors=[Waits()], ignore_eos=True)
        assert began.wait(60) and len(service.answers) == 3
        if end == "cancel":
            assert answer.cancel()
            gate.set()
        else:
            threading.Timer(0.2, gate.set).start()
            service.close(cancel=True)
        done = [one.exception(60) if not one.cancelled() else None for one in answer.each]
        assert all(one is None or isinstance(one, RequestError) for one in done) and answer.done()
        if end == "cancel":
            assert len(service(prompt, n=2, max_tokens=2)) == 2
    assert not service.answers


def test_who_cancels_a_sequence_has_all_cancelled():
    (prompt,) = prompts(1, seed=8)
    with neustream.serve(model_of("llama"), slots=1, measure_s=0.1) as service:
        answer = service.submit(prompt, n=3, max_tokens=40, ignore_eos=True)
        assert answer.each[2].cancel()  # it waits for the only slot
        ended = answer.outcome(60)
        assert (ended.status, ended.code, ended.reason) == (
            "cancelled",
            "cancelled",
            "one of its sequences was cancelled",
        )
        assert isinstance(ended.error, neustream.RequestCancelled)
        assert len(service(prompt, n=2, max_tokens=2)) == 2
    assert not service.answers


@pytest.mark.parametrize("count", [0, -1, 129, True, "2", 1.5])
def test_a_count_that_is_none_is_refused(count):
    with neustream.serve(model_of("opt"), slots=1, measure_s=0.1) as service:
        with pytest.raises(RequestError, match="n must be a whole number from 1 to 128, got"):
            service.submit([5], n=count)
        with pytest.raises(RequestError, match="like is the id of another request, got 3"):
            service.submit([5], like=3)
        with pytest.raises(RequestError, match="seed must be"):
            service.submit([5], n=2, seed="x")
        assert not service.answers


def test_what_goes_on_from_another_prompt_shares_nothing():
    model, (one, other) = model_of("llama"), prompts(2, seed=9, low=20)
    with neustream.serve(model, slots=4, measure_s=0.1) as service:
        first = service.submit(one, id="first", max_tokens=30, ignore_eos=True)
        second = service.submit(other, like="first", max_tokens=MAX, ignore_eos=True)
        third = service.submit(other, like="third", id="third", max_tokens=MAX, ignore_eos=True)
        assert list(second.result(60).token_ids) == alone(model, other, MAX, eos_token_id=None)
        assert list(third.result(60).token_ids) == alone(model, other, MAX, eos_token_id=None)
        first.result(60)
