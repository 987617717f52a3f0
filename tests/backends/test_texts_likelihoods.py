"""Log-probabilities are those of the stock model's own logits, and cost nobody who did not ask."""

from __future__ import annotations

import math

import pytest
import torch
from test_texts import engine
from texts import VOCABULARY, Drive, model_of, prompts

from neustream import RequestError
from neustream.backends.copies import twin
from neustream.backends.transformers import likelihoods as module

MAX = 6


@torch.inference_mode()
def stock(model, ids):
    """Log-probabilities [tokens, vocabulary] behind each token, of one stock call."""
    return model(torch.tensor([ids], device=model.device)).logits[0].float().log_softmax(-1)


def stock_scores(model, prompt, tokens):
    """Those behind which `generate` chose each of its new tokens."""
    out = model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        max_new_tokens=tokens,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return [one[0].log_softmax(-1) for one in out.scores]


def check(one, logs, count):
    assert one.logprob == pytest.approx(float(logs[one.token]), abs=2e-4)
    best = logs.topk(count)
    assert [logprob for _, logprob in one.top] == pytest.approx(best.values.tolist(), abs=2e-4)
    assert all(math.isclose(float(logs[id]), logprob, abs_tol=2e-4) for id, logprob in one.top)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_likelihoods_are_those_of_the_stock_scores(kind):
    model = model_of(kind)
    with engine(twin(model)) as running:
        answers = [running.submit(prompt, max_tokens=MAX, logprobs=5) for prompt in prompts(6)]
        for prompt, answer in zip(prompts(6), answers, strict=True):
            done, came = answer.result(60), list(answer)
            assert done.likelihoods == tuple(token.likelihood for token in came) and done.scores is None
            wanted = stock_scores(model, prompt, MAX)
            assert [one.token for one in done.likelihoods] == list(done.token_ids)
            for one, logs in zip(done.likelihoods, wanted, strict=True):
                check(one, logs, 5)


def test_temperature_and_filters_do_not_count():
    model = model_of("llama")
    with engine(twin(model)) as running:
        (prompt,) = prompts(1)
        done = running(prompt, max_tokens=MAX, temperature=3.0, top_k=2, seed=7, logprobs=3)
    logs = stock(model, [*prompt, *done.token_ids])
    for at, one in enumerate(done.likelihoods):
        check(one, logs[len(prompt) - 1 + at], 3)


@pytest.mark.parametrize("buckets", [(), (32,)])
def test_prompts_are_scored_in_any_parts_and_company(buckets):
    model = model_of("llama")
    drive = Drive(model, slots=3, buckets=buckets)
    given = prompts(8, low=1)
    jobs = [drive.job(prompt, MAX, prompt_logprobs=at % 4 if at % 2 else None) for at, prompt in enumerate(given)]
    drive.shuffle(jobs, seed=3, chunk=7, evict=0.2)
    for at, (prompt, job) in enumerate(zip(given, jobs, strict=True)):
        first, *others = job.params["updates"]
        assert ("scores" in first) == bool(at % 2) and not any("scores" in update for update in others)
        if at % 2:
            logs = stock(model, prompt)
            assert [one.token for one in first["scores"]] == prompt[1:]
            for place, one in enumerate(first["scores"]):
                check(one, logs[place], at % 4)


def test_who_did_not_ask_is_not_computed_for(monkeypatch):
    rows = []
    of = module._of
    monkeypatch.setattr(module, "_of", lambda logits, *more: rows.append(len(logits)) or of(logits, *more))
    drive = Drive(model_of("opt"))
    asks = [None, 2, None, 0]
    jobs = [drive.job(prompt, MAX, logprobs=count) for prompt, count in zip(prompts(4), asks, strict=True)]
    plain = Drive(model_of("opt"))
    alike = [plain.job(prompt, MAX) for prompt in prompts(4)]
    assert drive.finish(jobs) == plain.finish(alike)
    assert rows and max(rows) <= 2
    for job, count in zip(jobs, asks, strict=True):
        told = [update.get("likelihood") for update in job.params["updates"]]
        assert all(one is None for one in told) if count is None else all(len(one.top) == count for one in told)


def test_a_token_without_a_chance_has_none():
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    found = module.likelihoods(logits, [1], [3])[0]
    assert found.logprob == -math.inf and found.top[0][1] == pytest.approx(math.log(0.5))
    assert module.likelihoods(logits, ["why not"], [3]) == {} == module.likelihoods(logits, [1], [None])


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, 21, 1.5, True, "3"])
def test_wrong_counts_are_named(name, value):
    with engine(twin(model_of("opt"))) as running, pytest.raises(RequestError, match=f"{name} must be .* from 0 to 20"):
        running.submit([5], max_tokens=1, **{name: value})


def test_more_are_asked_than_there_are():
    logits = torch.zeros(1, 4)
    assert len(module.likelihoods(logits, [1], [20])[0].top) == 4 < VOCABULARY
