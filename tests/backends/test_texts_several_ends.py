"""Several sequences of one prompt where the first of them ends at once, or in a bad way."""

import functools
import gc
import threading
import weakref

import pytest
import torch
from places import DEVICE
from texts import alone, made, model_of, prompts

import neustream
from neustream import SLO, KVCache, RequestDropped, RequestError, RequestFailed
from neustream.backends.transformers.from_config import byte_tokenizer

DRAWN = {"temperature": 1.1, "top_p": 0.95}
(PROMPT,) = prompts(1, seed=3, low=33)
ROUGH = {"prefix_tokens": 0, "slots": 3, "kv_cache": KVCache(13, 8), "policy": "fcfs"}


@functools.cache
def wanted(model, seeds, most):
    return [alone(model, PROMPT, most, seed=seed, eos_token_id=None, **DRAWN) for seed in seeds]


def tokens(many):
    return [list(one.token_ids) for one in many]


class Gate:
    """A processor that lets nothing go on until it is opened; it cannot be copied."""

    def __init__(self):
        self.began, self.open = threading.Event(), threading.Event()

    def __call__(self, ids, logits):
        self.began.set()
        self.open.wait(60)
        return logits


@pytest.mark.parametrize("most", [1, 2, 8])
@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize("prefix_tokens", [0, None])
def test_the_prompt_is_computed_once_also_where_the_first_is_over_at_once(slots, prefix_tokens, most):
    model, computed = model_of("llama"), []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, args: computed.append(args[0].numel()))
    with hook, neustream.serve(model, slots=slots, prefix_tokens=prefix_tokens, measure_s=0.1) as service:
        computed.clear()
        many = service(PROMPT, n=6, seed=5, max_tokens=most, ignore_eos=True, **DRAWN)
        found = sum(computed)
    assert tokens(many) == wanted(model, range(5, 11), most)
    assert found == len(PROMPT) + 5 + 6 * (most - 1)


@pytest.mark.parametrize("options", [{}, {"prefix_tokens": 0}, {"buckets": [64]}, ROUGH, {**ROUGH, "buckets": [64]}])
@pytest.mark.parametrize("promise", [None, SLO(first=60.0, step=60.0, total=60.0)])
def test_sequences_that_lose_their_slots_are_those_of_as_many_calls(options, promise):
    model = model_of("llama")
    with neustream.serve(model, measure_s=0.1, **{"slots": 4, **options}) as service:
        asked = [
            service.submit(PROMPT, n=5, seed=seed, max_tokens=20, ignore_eos=True, slo=promise, **DRAWN)
            for seed in (5, 10)
        ]
        found = [one for answer in asked for one in tokens(answer.result(60))]
        assert (service.report.preemptions > 0) == ("kv_cache" in options)
    assert found == wanted(model, range(5, 15), 20)


@pytest.mark.parametrize("end", ["token", "text"])
def test_a_first_one_that_stops_with_its_first_token_leaves_the_others_theirs(end):
    tokenizer = byte_tokenizer()
    model = model_of("llama", vocab_size=len(tokenizer))
    first = alone(model, PROMPT, 1, seed=0, eos_token_id=None, **DRAWN)[0]
    stop = {"stop_token_ids": [first]} if end == "token" else {"stop": tokenizer.decode([first])}
    with neustream.serve(model, tokenizer, slots=4, measure_s=0.1) as service:
        ask = {"max_tokens": 6, "ignore_eos": True, **stop, **DRAWN}
        many = service(PROMPT, n=4, seed=0, **ask)
        single = [service(PROMPT, seed=seed, **ask) for seed in range(4)]
    assert many[0].finish_reason == "stop" and len(many[0].token_ids) == 1
    assert [(one.token_ids, one.text, one.finish_reason) for one in many] == [
        (one.token_ids, one.text, one.finish_reason) for one in single
    ]


def test_what_a_changed_model_left_in_a_slot_is_nobodys():
    model, free = made("llama"), threading.Event()
    with neustream.serve(model, slots=4, prefix_tokens=0, measure_s=0.1) as service:

        def change(module, args):
            if not free.is_set():
                free.set()
                model.model.norm.weight.data.mul_(3)

        model.model.embed_tokens.register_forward_pre_hook(change)
        first = service.submit(PROMPT, id="first", max_tokens=6, ignore_eos=True)
        second = service.submit(PROMPT, like="first", max_tokens=6, ignore_eos=True)
        for answer in (first, second):
            with pytest.raises(RequestFailed, match="was changed while it is served"):
                answer.result(60)
        model.model.norm.weight.data.div_(3)
        third = service.submit(PROMPT, like="first", max_tokens=6, ignore_eos=True).result(60)
        assert list(third.token_ids) == alone(model, PROMPT, 6, eos_token_id=None)


def test_if_the_first_is_dropped_all_are_and_nothing_stays():
    with neustream.serve(model_of("llama"), slots=4, measure_s=0.1) as service:
        gate = Gate()
        other = service.submit([5], max_tokens=4, processors=[gate], ignore_eos=True)
        assert gate.began.wait(60)
        answer = service.submit(PROMPT, n=3, max_tokens=20, slo=SLO(first=1e-6), ignore_eos=True, id="late")
        gate.open.set()
        with pytest.raises(RequestDropped):
            answer.result(60)
        assert answer.outcome().status == "dropped" and all(one.done() for one in answer.each)
        other.result(60)
        again = service(PROMPT, n=3, max_tokens=2, ignore_eos=True)
        assert len(again) == 3
        assert service.submit([5], max_tokens=1, id="late/2").result(60)
        assert service.models[""].used == 0
    assert not service.answers


def test_who_waits_for_another_and_is_cancelled_gives_its_name_back_at_once():
    gate = Gate()
    model = model_of("llama")
    with neustream.serve(model, slots=4, measure_s=0.1) as service:
        first = service.submit(PROMPT, id="first", max_tokens=4, processors=[gate], ignore_eos=True)
        assert gate.began.wait(60)
        waits = [service.submit(PROMPT, like="first", id=f"w{at}", max_tokens=4, ignore_eos=True) for at in range(3)]
        assert waits[1].cancel() and "w1" not in service.answers
        assert not waits[1].cancel() or waits[1].cancelled()
        again = service.submit(PROMPT, like="first", id="w1", max_tokens=4, ignore_eos=True)
        assert service.cancel("w2") and set(service.answers) == {"first", "w0", "w1"}
        gate.open.set()
        greedy = alone(model, PROMPT, 4, eos_token_id=None)
        assert [list(one.result(60).token_ids) for one in (first, waits[0], again)] == [greedy] * 3
        assert waits[1].cancelled() and waits[2].outcome().status == "cancelled"
    assert not service.answers


@pytest.mark.parametrize("cancel", [False, True])
def test_a_service_that_is_closed_ends_sequences_that_wait(cancel):
    gate, model = Gate(), model_of("llama")
    service = neustream.serve(model, slots=2, measure_s=0.1)
    first = service.submit(PROMPT, id="first", max_tokens=4, processors=[gate], ignore_eos=True)
    assert gate.began.wait(60)
    others = [service.submit(PROMPT, like="first", max_tokens=4, ignore_eos=True) for _ in range(3)]
    many = service.submit(PROMPT, n=3, max_tokens=4, ignore_eos=True)
    closing = threading.Thread(target=service.close, kwargs={"cancel": cancel})
    closing.start()
    gate.open.set()
    closing.join(60)
    greedy = alone(model, PROMPT, 4, eos_token_id=None)
    for answer in (first, *others):
        if not cancel:
            assert list(answer.result(0).token_ids) == greedy
        elif not answer.cancelled():
            assert isinstance(answer.exception(0), RequestError)
    if not cancel:
        assert tokens(many.result(0)) == [greedy] * 3
    assert many.done() and not service.answers


def test_a_processor_that_cannot_be_copied_is_refused_with_what_its_caller_can_do():
    with neustream.serve(model_of("llama"), slots=2, measure_s=0.1) as service:
        gate = Gate()
        gate.open.set()
        with pytest.raises(RequestError, match="sequences of one prompt need copies: let copy it"):
            service.submit(PROMPT, n=3, max_tokens=2, processors=[gate])
        each = [service.submit(PROMPT, seed=at, max_tokens=2, processors=[_open_gate()]) for at in range(3)]
        assert all(answer.result(60) for answer in each)
        assert service.submit(PROMPT, n=1, max_tokens=2, processors=[gate]).result(60)
    assert not service.answers


def _open_gate():
    gate = Gate()
    gate.open.set()
    return gate


def test_more_sequences_than_may_be_open_are_refused_as_a_whole():
    with neustream.serve(model_of("llama"), slots=2, max_open=2, measure_s=0.1) as service:
        with pytest.raises(RequestError, match="3 requests at once, and max_open is 2"):
            service.submit(PROMPT, n=3, max_tokens=2)
        assert not service.answers
        first = service.submit(PROMPT, n=1, max_tokens=90 - len(PROMPT), ignore_eos=True)
        with pytest.raises(RequestError, match="1 requests are open, 2 more are asked for, and max_open is 2") as told:
            service.submit(PROMPT, n=2, max_tokens=2)
        assert told.value.code == "too_many" and len(service.answers) == 1
        first.result(60)
        assert len(service.submit(PROMPT, n=2, max_tokens=2).result(60)) == 2


def test_who_holds_what_is_closed_keeps_no_slots():
    service = neustream.serve(made("llama"), slots=4, devices=[str(DEVICE)] * 2, measure_s=0.1)
    service([5, 6], max_tokens=2)
    caches = [weakref.ref(layer.keys) for _, texts in service.models[""]._devices for layer in texts.model.cache.used]
    assert len(caches) == 4 and all(isinstance(one(), torch.Tensor) for one in caches)
    service.close()
    gc.collect()
    assert service.models[""].used == 0
    assert [one() for one in caches] == [None] * 4
