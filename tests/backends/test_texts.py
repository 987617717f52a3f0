"""What callers see of a served language model."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import threading

import numpy as np
import pytest
import torch
from texts import VOCABULARY, alone, model_of, prompts
from toys import Flat

from neustream import SLO, Decision, RequestError, serve
from neustream.backends.copies import twin
from neustream.backends.transformers.from_config import byte_tokenizer
from neustream.core.kv_cache import KVCache
from neustream.errors import BackendError, ConfigError, NeustreamError

MAX = 10


def engine(model, *args, **options):
    return serve(model, *args, **{"profile": Flat(), "slots": 8, **options})


@pytest.fixture(scope="module")
def shared():
    with engine(twin(model_of("opt"))) as running:
        yield running


# -- results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["priced", "fcfs", "edf"])
def test_results_are_those_of_generate(policy):
    model = model_of("llama")
    wanted = [tuple(alone(model, prompt, MAX)) for prompt in prompts(20)]
    with engine(model, policy=policy) as running:
        answers = [running.submit(prompt, max_tokens=MAX) for prompt in prompts(20)]
        assert [answer.result(60).token_ids for answer in answers] == wanted
        assert running.models[""].used == 0
    assert running.report.submitted == running.report.counts["on_time"] == 20


@pytest.mark.parametrize("blocks", [9, 30])
def test_memory_in_blocks_takes_slots_away_and_changes_no_token(blocks):
    model = model_of("opt")
    wanted = [tuple(alone(model, prompt, 40)) for prompt in prompts(10, high=20)]
    with engine(model, policy="fcfs", slots=10, kv_cache=KVCache(blocks, 8)) as running:
        answers = [running.submit(prompt, max_tokens=40) for prompt in prompts(10, high=20)]
        assert [answer.result(60).token_ids for answer in answers] == wanted
    assert running.report.preemptions > 0 and running.models[""].used == 0


def test_a_completion_tells_all(shared):
    prompt = prompts(1)[0]
    done = shared.submit(prompt, max_tokens=MAX, id="mine", slo=SLO(first=30, step=30)).result(60)
    assert done.id == "mine" and done.prompt_tokens == len(prompt) and done.text is None
    assert done.finish_reason == "length" and done.on_time
    assert len(done.at_s) == MAX == len(done.itl_s) + 1
    assert 0 < done.ttft_s == done.at_s[0] and done.latency_s == done.at_s[-1]
    assert all(gap > 0 for gap in done.itl_s) and math.isclose(done.tpot_s, sum(done.itl_s) / (MAX - 1))
    stop = done.token_ids[3]
    short = shared(prompt, max_tokens=MAX, stop_token_ids=[stop])
    assert short.token_ids == done.token_ids[: done.token_ids.index(stop) + 1] and short.finish_reason == "stop"
    one = shared(prompt, max_tokens=1)
    assert one.token_ids == done.token_ids[:1] and one.tpot_s == 0 and one.itl_s == ()


def test_sampling_with_a_seed_is_repeatable_in_any_company(shared):
    prompt = prompts(1)[0]
    options = {"max_tokens": MAX, "temperature": 0.9, "top_p": 0.9, "seed": 4}
    wanted = tuple(alone(model_of("opt"), prompt, MAX, temperature=0.9, top_p=0.9, seed=4))
    crowd = [shared.submit(other, max_tokens=MAX, temperature=2.0) for other in prompts(6)]
    assert shared(prompt, **options).token_ids == wanted == shared(prompt, **options).token_ids
    concurrent.futures.wait(crowd)


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 4}], ids=["greedy", "drawn"])
def test_a_least_length_is_that_of_generate(shared, drawn):
    model, prompt = model_of("opt"), prompts(1)[0]
    free = shared(prompt, max_tokens=MAX, ignore_eos=True, **drawn).token_ids
    ends = [free[1], 2]  # it would end after two tokens at most
    wanted = tuple(alone(model, prompt, MAX, min_new_tokens=5, eos_token_id=ends, **drawn))
    crowd = [shared.submit(other, max_tokens=MAX, stop_token_ids=ends) for other in prompts(6)]
    done = shared(prompt, max_tokens=MAX, min_tokens=5, stop_token_ids=ends, logprobs=1, **drawn)
    assert done.token_ids == wanted and len(wanted) >= 5
    assert len(shared(prompt, max_tokens=MAX, stop_token_ids=ends, **drawn).token_ids) <= 2
    # what is told is how likely the model itself found them
    ((token, logprob),) = shared(prompt, max_tokens=1, logprobs=1, **drawn).likelihoods[0].top
    assert done.likelihoods[0].top == ((token, pytest.approx(logprob, abs=1e-4)),)
    concurrent.futures.wait(crowd)


def test_prompts_are_text_ids_or_arrays(shared):
    prompt = prompts(1)[0]
    for same in (tuple(prompt), np.array(prompt), torch.tensor(prompt)):
        assert shared(same, max_tokens=3).token_ids == shared(prompt, max_tokens=3).token_ids


def test_text_in_text_out_and_pieces_add_up():
    model = model_of("gpt2", vocab_size=257, eos_token_id=256)
    tokenizer = byte_tokenizer()
    with engine(model, tokenizer) as running:
        answers = [running.submit("a tale — of €", max_tokens=24, temperature=3.0, seed=seed) for seed in range(4)]
        for answer in answers:
            tokens = list(answer)
            done = answer.result()
            assert done.text == tokenizer.decode(list(done.token_ids), skip_special_tokens=True)
            assert "".join(token.text for token in tokens) == done.text
        # bytes of characters that never get complete
        assert any("\ufffd" in answer.result().text for answer in answers)


def test_a_character_of_several_tokens_comes_at_once():
    from neustream.backends.transformers.stops import Pieces

    pieces, ids = Pieces(byte_tokenizer()), list("a€b".encode())
    assert [pieces.add(id, last=False) for id in ids] == ["a", "", "", "€", "b"]
    assert Pieces(None).add(3, last=True) == ""


# -- streams ------------------------------------------------------------------------------------------


def test_tokens_are_there_before_the_end(shared):
    answer = shared.submit(prompts(1)[0], max_tokens=60, ignore_eos=True)
    tokens, early = [], False
    for token in answer:
        early = early or not answer.done()
        tokens.append(token)
    assert early
    done = answer.result()
    assert [token.id for token in tokens] == list(done.token_ids) == [o.update["token"] for o in answer.outputs]
    assert [token.index for token in tokens] == list(range(60)) and tuple(t.at_s for t in tokens) == done.at_s
    assert [token.id for token in answer] == list(done.token_ids)  # another reader, later


def test_async_readers(shared):
    async def read(answer):
        return [token.id async for token in answer]

    async def main():
        answers = [shared.submit(prompt, max_tokens=MAX) for prompt in prompts(6)]
        streams = await asyncio.gather(*(read(answer) for answer in answers), read(answers[0]))
        results = [await answer for answer in answers]
        assert streams == [list(done.token_ids) for done in [*results, results[0]]]

    asyncio.run(main())


def test_a_reader_that_leaves_loses_nothing_for_others(shared):
    wanted = [tuple(alone(model_of("opt"), prompt, MAX)) for prompt in prompts(4)]
    answers = [shared.submit(prompt, max_tokens=MAX) for prompt in prompts(4)]

    async def leave():
        async for _ in answers[0]:
            break

    asyncio.run(leave())  # its event loop is closed while tokens still come
    next(iter(answers[1]))
    assert [answer.result(60).token_ids for answer in answers] == wanted


# -- cancelled, dropped, failed -----------------------------------------------------------------------


def test_cancel_frees_the_slot_and_ends_readers(shared):
    answer = shared.submit(prompts(1)[0], max_tokens=50, ignore_eos=True)
    reader = iter(answer)
    next(reader)
    assert answer.cancel() and answer.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        list(reader)
    assert len(answer.outputs) < 50
    other = shared(prompts(2)[1], max_tokens=MAX)
    assert list(other.token_ids) == alone(model_of("opt"), prompts(2)[1], MAX)
    assert shared.models[""].used == 0


def test_a_task_that_is_cancelled_gives_its_request_up(shared):
    async def main():
        answer = shared.submit(prompts(1)[0], max_tokens=60, ignore_eos=True)
        task = asyncio.ensure_future(asyncio.wait_for(answer, 60))
        async for _ in answer:
            break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return answer

    assert asyncio.run(main()).cancelled()


class Refuse:
    """Drops everything."""

    def decide(self, view):
        return Decision([], drop=dict.fromkeys(view.jobs, "no room today"))


def test_who_is_dropped_learns_why():
    with engine(model_of("opt"), policy=Refuse()) as running:
        answer = running.submit(prompts(1)[0], max_tokens=MAX)
        with pytest.raises(RequestError, match="was dropped: no room today"):
            answer.result(60)
        with pytest.raises(RequestError, match="was dropped: no room today"):
            list(answer)
        assert answer.ended.status == "dropped" and running.report.counts["dropped"] == 1


def test_a_step_that_fails_fails_its_batch_and_the_engine_goes_on():
    model = model_of("llama", num_hidden_layers=1)
    with engine(model) as running:
        broken = threading.Event()

        def hook(module, inputs):
            if broken.is_set():
                broken.clear()
                raise RuntimeError("the device is on fire")

        handle = model.register_forward_pre_hook(hook)
        broken.set()
        with pytest.raises(RequestError, match="the device is on fire"):
            running.submit(prompts(1)[0], max_tokens=MAX).result(60)
        handle.remove()
        assert list(running(prompts(1)[0], max_tokens=MAX).token_ids) == alone(model, prompts(1)[0], MAX)
        assert running.models[""].used == 0


def test_many_random_requests_with_random_cancels_add_up():
    draw = np.random.default_rng(0)
    model = model_of("llama")
    with engine(model, slots=4) as running:
        answers = []
        for at in range(120):
            prompt = draw.integers(3, VOCABULARY, draw.integers(1, 40)).tolist()
            options = {"temperature": 1.0, "seed": at} if at % 3 else {}
            answers.append((prompt, options, running.submit(prompt, max_tokens=int(draw.integers(1, 12)), **options)))
            if draw.random() < 0.3:
                answers[draw.integers(len(answers))][2].cancel()
        for _, _, answer in answers:
            assert answer.cancelled() or answer.result(60).token_ids
    counts = running.report.counts
    assert running.report.submitted == 120 == counts["on_time"] + counts["cancelled"] and counts["cancelled"] > 5
    assert running.models[""].used == 0
    for prompt, options, answer in answers[::10]:
        if not answer.cancelled():
            done = answer.result()
            assert list(done.token_ids) == alone(model, prompt, len(done.token_ids), **options)


# -- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ("words", {}, r"a prompt of text needs a tokenizer: serve\(model, tokenizer\)"),
        (b"bytes", {}, "a prompt must be text, messages or a list of token ids, got bytes"),
        (7, {}, "a prompt must be text, messages or a list of token ids, got int"),
        ([[3, 4]], {}, "a flat list of token ids, got list in it"),
        ([3, 4.0], {}, "got float in it"),
        ([3, True], {}, "got bool in it"),
        ([3, VOCABULARY], {}, "96 is no token: the vocabulary of OPTForCausalLM has 96"),
        ([3, -1], {}, "-1 is no token"),
        ([3] * 96, {}, "the prompt has 96 tokens, but OPTForCausalLM has 96 positions: at most 95"),
        ([3] * 90, {}, "90 tokens of prompt and max_tokens=10 make 100, but .* 96 positions: at most max_tokens=6"),
        ([3], {"max_tokens": 0}, "max_tokens must be a whole number of 1 or more, got 0"),
        ([3], {"max_tokens": -4}, "got -4"),
        ([3], {"max_tokens": 2.5}, r"got 2\.5"),
        ([3], {"max_tokens": True}, "got True"),
        ([3], {"max_tokens": "many"}, "got 'many'"),
        ([3], {"temperature": -0.1}, r"temperature must be a finite number >= 0, got -0\.1"),
        ([3], {"temperature": math.nan}, "got nan"),
        ([3], {"temperature": math.inf}, "got inf"),
        ([3], {"temperature": "hot"}, "got 'hot'"),
        ([3], {"top_p": 0}, "top_p must be a number above 0 and up to 1, got 0"),
        ([3], {"top_p": 1.1}, r"got 1\.1"),
        ([3], {"top_k": -1}, "top_k must be a whole number from 0 on, got -1"),
        ([3], {"seed": -1}, "seed must be a whole number from 0 to"),
        ([3], {"seed": 2**63}, "seed must be"),
        ([3], {"stop_token_ids": "no"}, "stop_token_ids must be a list of token ids, got 'no'"),
        ([3], {"stop_token_ids": 5}, "stop_token_ids must be a list"),
        ([3], {"stop_token_ids": [-5]}, "a token id must be a whole number from 0 on, got -5"),
        ([3], {"stop_token_ids": [VOCABULARY]}, "96 is no token"),
        ([3], {"ignore_eos": "yes"}, "ignore_eos must be True or False, got 'yes'"),
        ([3], {"slo": -1.0}, "SLO: total must be greater than 0"),
        ([3], {"slo": "soon"}, "slo must be an SLO or seconds, got 'soon'"),
    ],
)
def test_bad_requests_are_refused_before_they_are_queued(shared, prompt, options, message):
    before = shared.report.submitted
    with pytest.raises(RequestError, match=message):
        shared.submit(prompt, **{"max_tokens": 10, **options})
    assert shared.report.submitted == before


def test_unknown_arguments_and_duplicate_ids_are_refused(shared):
    with pytest.raises(TypeError, match="temperatur"):
        shared.submit([3], max_tokens=2, temperatur=1.0)
    with pytest.raises(TypeError, match="prompt"):
        shared.submit(max_tokens=2)
    first = shared.submit([3, 4, 5], max_tokens=80, ignore_eos=True, id="twin")
    with pytest.raises(RequestError, match="'twin' is already being served"):
        shared.submit([3], max_tokens=2, id="twin")
    assert len(first.result(60).token_ids) == 80
    assert shared([3], max_tokens=2, id="twin").id == "twin"


def test_an_engine_that_is_closed_says_so():
    running = engine(model_of("opt"))
    running.close()
    with pytest.raises(RequestError, match="not serving"):
        running.submit([3], max_tokens=1)


def test_closing_serves_what_is_open_and_an_error_cancels_it():
    with engine(model_of("opt")) as running:
        answer = running.submit([3, 4], max_tokens=30, ignore_eos=True)
    assert len(answer.result(0).token_ids) == 30

    def leave():
        with engine(model_of("opt")) as running:
            leave.answer = running.submit([3, 4], max_tokens=90, ignore_eos=True)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        leave()
    with pytest.raises(RequestError, match="was cancelled"):
        leave.answer.result(10)


def test_the_worker_keeps_to_the_threads_that_were_set():
    model = model_of("llama", num_hidden_layers=1)
    seen = set()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with engine(model) as running:
            handle = model.register_forward_pre_hook(lambda module, inputs: seen.add(torch.get_num_threads()))
            running([3, 4], max_tokens=3)
            handle.remove()
    finally:
        torch.set_num_threads(before)
    assert seen == {2}


def test_wrong_options_are_refused():
    with pytest.raises(ConfigError, match="unknown policy 'fcsf'; did you mean 'fcfs'"):
        engine(model_of("opt"), policy="fcsf")
    with pytest.raises(BackendError, match="serve takes a diffusers pipeline"):
        engine("facebook/opt-125m")
    with pytest.raises(NeustreamError, match="no step profile at"):
        engine(model_of("opt"), profile="/nowhere/steps.json")


def test_importing_is_light_and_the_log_is_quiet(caplog, shared):
    with caplog.at_level(logging.WARNING):
        shared([3, 4], max_tokens=2)
    assert not caplog.records
