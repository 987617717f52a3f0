"""What a profile makes of its loads: arrivals, lengths, prefixes, sessions, sweeps."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
from profile_files import GUIDE, PERF, VLLM, changed, read

from neustream.bench import Record, Run
from neustream.bench.profiles.arrivals import LAWS, arrivals, arrivals_until
from neustream.bench.profiles.profile import Load, Sweep
from neustream.bench.profiles.telling import lines
from neustream.bench.profiles.words import Words, tokenizer_of
from neustream.errors import BackendError, ConfigError
from neustream.workload.lengths import Lengths
from neustream.workload.texts import Texts

TEXTS = Texts()


def plan_of(profile, number=0, texts=TEXTS):
    return profile.plan(profile.loads[number], number, texts)


# -- arrivals and lengths ----------------------------------------------------------------------------


@pytest.mark.parametrize("law", [law for law in LAWS if law != "closed"])
def test_arrivals_are_drawn_from_their_seed_and_go_on(law):
    found = arrivals(law, 200, 10.0, 1.0, 7)
    assert len(found) == 200 and np.all(np.diff(found) >= 0) and found[0] >= 0
    assert np.array_equal(found, arrivals(law, 200, 10.0, 1.0, 7))


def test_arrivals_of_each_law():
    assert arrivals("closed", 5, 1.0, 1.0, 0) is None
    assert arrivals("even", 3, 2.0, 1.0, 0).tolist() == [0.0, 0.5, 1.0]
    assert arrivals("rescaled", 50, 5.0, 1.0, 0)[-1] == pytest.approx(10.0)
    assert arrivals("rescaled", 4, 2.0, 0.0, 0).tolist() == [0.5, 1.0, 1.5, 2.0]
    seconds = arrivals("rescaled by second", 4000, 8.0, 1.0, 3)
    counts = np.bincount(np.ceil(seconds).astype(int) - 1)[:-1]
    assert counts.mean() == pytest.approx(8, rel=0.1) and counts.var() == pytest.approx(8, rel=0.3)
    gaps = np.diff(arrivals("poisson", 20_000, 4.0, 2.0, 1))
    assert gaps.mean() == pytest.approx(0.25, rel=0.1) and gaps.std() / gaps.mean() == pytest.approx(2, rel=0.1)
    until = arrivals_until("poisson", 30.0, 10.0, 1.0, 0)
    assert until[-1] < 30 and len(until) == pytest.approx(300, rel=0.2)
    assert len(arrivals_until("even", 3.0, 2.0, 1.0, 0)) == 6


@pytest.mark.parametrize(
    ("lengths", "mean", "std"),
    [
        (Lengths.fixed(7), 7, 0),
        (Lengths("normal", 500, 50, 1, 1000), 500, 50),
        (Lengths("lognormal", 500, 100, 1, 10_000), 500, 100),
        (Lengths("lognormal above min", 500, 100, 200, 10_000), 500, 100),
        (Lengths("uniform", 15, 0, 10, 20), 15, math.sqrt(10)),
        (Lengths("poisson", 50, 0, 1, 1000), 50, math.sqrt(50)),
        (Lengths("skew_normal", 500, 50, 1, 1000, skew=0.0), 500, 50),
    ],
    ids=lambda each: each.kind if isinstance(each, Lengths) else "",
)
def test_lengths_have_their_mean_and_deviation(lengths, mean, std):
    drawn = lengths.draw(np.random.default_rng(0), 20_000)
    assert drawn.dtype == np.int64 and drawn.min() >= lengths.least and drawn.max() <= lengths.most
    assert drawn.mean() == pytest.approx(mean, rel=0.02) and drawn.std() == pytest.approx(std, rel=0.05, abs=0.01)


def test_lengths_stay_between_their_ends():
    drawn = Lengths("normal", 5, 100, 2, 8).draw(np.random.default_rng(0), 1000)
    assert set(drawn.tolist()) == set(range(2, 9))


def test_a_rate_may_grow_from_nothing_as_guidellms_does(tmp_path):
    loads = {"kind": "constant", "rate": 4, "rampup_duration": 8}
    grown = changed(GUIDE, spec__profile=loads, spec__constraints=[{"kind": "max_requests", "count": 40}])
    profile = read(tmp_path, grown)
    when = np.array([ask.arrival_s for ask in plan_of(profile).asks])
    # 16 of them come in the first 8 seconds: the k-th when 4 t**2 / 16 is k; then one each 0.25 s
    assert when[0] == 0 and when[1:16] == pytest.approx(np.sqrt(4 * np.arange(2, 17)))
    assert when[16:] == pytest.approx(8 + np.arange(1, 25) / 4) and profile.loads[0].seconds == when[-1]
    assert "growing from nothing in 8 s" in "\n".join(lines(profile, TEXTS))
    timed = changed(grown, spec__constraints=[{"kind": "max_duration", "seconds": 10}])
    found = [ask.arrival_s for ask in plan_of(read(tmp_path, timed)).asks]
    assert found == when[when < 10].tolist() and len(found) == 23
    poisson = read(tmp_path, changed(grown, spec__profile__kind="poisson"))
    assert {each.key for each in poisson.left} == {"spec.profile.rampup_duration"}


def test_adapters_are_asked_by_their_shares(tmp_path):
    split = [{"name": "a", "split": 0.8}, {"name": "b", "split": 0.2}]
    stages = [{"rate": 100, "duration": 10}]
    profile = read(tmp_path, changed(PERF, load={"type": "constant", "stages": stages, "lora_traffic_split": split}))
    models = [ask.model for ask in plan_of(profile).asks]
    assert set(models) == {"a", "b"} and 760 < models.count("a") < 840
    assert models == [ask.model for ask in plan_of(profile).asks]
    assert "models, drawn: a 80%, b 20%" in "\n".join(lines(profile, TEXTS))


def test_some_prompts_have_no_prefix_if_a_bucket_says_so(tmp_path):
    buckets = [{"prefix_tokens": 7, "bucket_weight": 75}, {"prefix_tokens": 0, "bucket_weight": 25}]
    counts = [{"kind": "max_requests", "count": 400}]
    scenario = changed(GUIDE, spec__data__0__prefix_buckets=buckets, spec__constraints=counts)
    profile = read(tmp_path, scenario)
    lengths = [ask.input_tokens for ask in plan_of(profile).asks]
    assert set(lengths) == {8, 15} and 265 < lengths.count(15) < 335
    assert "1 shared prefixes of 7 (75%), no prefix (25%)" in str(profile.source)
    told = profile.source.scenario["prefix"]["prefix_len"]
    assert told == {"distribution": "other", "value": 5.25, "min": 0, "max": 7}


# -- prompts -----------------------------------------------------------------------------------------


def test_a_load_has_its_requests_when_they_are_due_each_with_another_text(tmp_path):
    profile = read(tmp_path, PERF)
    first, second = (plan_of(profile, number) for number in (0, 1))
    assert [len(plan.asks) for plan in (first, second)] == [20, 40] and first.rate == 20
    assert first.asks[-1].arrival_s == pytest.approx(1.0)
    prompts = [ask.prompt for plan in (first, second) for ask in plan.asks]
    assert len(set(prompts)) == 60
    assert all(4 <= len(prompt.split()) <= 12 for prompt in prompts)
    assert all(2 <= ask.output_tokens <= 6 for ask in first.asks)
    assert len({ask.id for plan in (first, second) for ask in plan.asks}) == 60
    assert plan_of(profile).asks == first.asks


def test_a_closed_loop_has_no_schedule_and_may_only_be_ended_by_time(tmp_path):
    profile = read(tmp_path, changed(GUIDE, spec__constraints=[{"kind": "max_duration", "seconds": 60}]))
    plan = plan_of(profile)
    assert (plan.concurrency, plan.duration_s, plan.asks[0].arrival_s) == (2, 60, None)
    assert len(plan.asks) == 12_000
    assert plan.asks[11_999].prompt == plan.asks[11_999].prompt != plan.asks[11_999 - 4096].prompt
    assert plan.asks[-1] == plan.asks[11_999] and len(plan.asks[3:5]) == 2
    with pytest.raises(IndexError):
        plan.asks[12_000]


def test_prompts_of_a_group_begin_alike(tmp_path):
    shared = {"num_groups": 3, "num_prompts_per_group": 2, "system_prompt_len": 20, "question_len": 5, "output_len": 4}
    data = {"type": "shared_prefix", "shared_prefix": shared}
    profile = read(tmp_path, changed(PERF, data=data))
    asks = plan_of(profile).asks
    words = [tuple(ask.prompt.split()) for ask in asks]
    assert len(set(words)) == 6 and {len(each) for each in words} == {25}
    assert len({each[:20] for each in words}) == 3
    assert words[:6] == words[6:12]  # over and over
    assert [ask.prompt for ask in plan_of(profile, 1).asks[:6]] == [ask.prompt for ask in asks[:6]]
    assert all(ask.session == "" and ask.input_tokens == 25 for ask in asks)
    assert "3 shared prefixes of 20 tokens" in str(profile.source)


def test_sessions_of_a_shared_prefix_ask_again_behind_what_was_said(tmp_path):
    shared = {"num_groups": 1, "num_prompts_per_group": 4, "system_prompt_len": 20, "question_len": 5}
    shared |= {"enable_multi_turn_chat": True, "output_len": {"min": 2, "max": 4, "mean": 3, "std_dev": 1}}
    asks = plan_of(read(tmp_path, changed(PERF, data={"type": "shared_prefix", "shared_prefix": shared}))).asks
    assert [ask.follows for ask in asks[:4]] == [""] * 4 and len({ask.session for ask in asks}) == 4
    for at in range(4, 20):
        assert asks[at].follows == asks[at - 4].id and asks[at].session == asks[at - 4].session
        assert len(asks[at].prompt.split()) == 5 and asks[at].prompt.startswith(" ")


def test_conversations_begin_anew_when_they_are_over_or_too_long(tmp_path):
    fixed = {"type": "fixed", "min": 1, "max": 50}
    replay = {
        "num_conversations": 2,
        "shared_system_prompt_len": 10,
        "dynamic_system_prompt_len": {**fixed, "mean": 5},
        "turns_per_conversation": {**fixed, "mean": 3},
        "input_tokens_per_turn": {**fixed, "mean": 4},
        "output_tokens_per_turn": {**fixed, "mean": 2},
        "tool_call_latency_sec": {**fixed, "mean": 7},
    }
    data = {"type": "conversation_replay", "conversation_replay": replay}
    stages = [{"num_requests": 12, "concurrency_level": 2}]
    closed = changed(PERF, data=data, load={"type": "concurrent", "stages": stages})
    asks = plan_of(read(tmp_path, closed)).asks
    lengths = [len(ask.prompt.split()) for ask in asks]
    assert lengths == [19, 19, 4, 4, 4, 4, 19, 19, 4, 4, 4, 4]
    assert [ask.follows != "" for ask in asks] == [length == 4 for length in lengths]
    assert {ask.think_s for ask in asks if ask.follows} == {7.0}
    assert len({ask.session for ask in asks}) == 4
    one, other = (asks[at].prompt.split() for at in (0, 1))
    assert one[:10] == other[:10] and one[10:15] != other[10:15]
    short = changed(closed, data__conversation_replay__max_model_len=28)  # 15 + 2 * 6 fit, 3 do not
    lengths = [len(ask.prompt.split()) for ask in plan_of(read(tmp_path, short)).asks]
    assert lengths == [19, 19, 4, 4, 19, 19, 4, 4, 19, 19, 4, 4]
    over = changed(closed, data__conversation_replay__max_model_len=50)
    with pytest.raises(ConfigError, match=r"output_tokens_per_turn.max: 50 leaves no room"):
        read(tmp_path, changed(over, data__conversation_replay__output_tokens_per_turn={"mean": 9, "max": 50}))


def test_turns_of_guidellm_go_on_in_as_many_sessions_as_there_are_streams(tmp_path):
    turns = {"turns": 3, "delay": 0.25, "prefix_tokens": 10, "prefix_count": 1}
    data = [{"kind": "synthetic_text", "prompt_tokens": 4, "output_tokens": 2, "first_prompt_tokens": 6, **turns}]
    asks = plan_of(read(tmp_path, changed(GUIDE, spec__data=data, spec__constraints__0__count=9))).asks
    assert [ask.session[2:] for ask in asks] == ["s0", "s1"] * 3 + ["s2", "s3"] + ["s2"]
    assert [len(ask.prompt.split()) for ask in asks] == [16, 16, 4, 4, 4, 4, 16, 16, 4]
    assert [ask.follows for ask in asks[:4]] == ["", "", "0-0", "0-1"]
    assert {ask.think_s for ask in asks if ask.follows} == {0.25}


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_ramps_of_vllm_go_from_one_rate_to_another(tmp_path, strategy):
    flags = {"ramp-up-strategy": strategy, "ramp-up-start-rps": 2, "ramp-up-end-rps": 8, "burstiness": "inf"}
    profile = read(tmp_path, changed(VLLM, **flags, **{"num-prompts": 100}))
    plan = plan_of(profile)
    gaps = np.diff([0.0, *(ask.arrival_s for ask in plan.asks)])
    middle = 5.0 if strategy == "linear" else 4.0
    assert gaps[0] == pytest.approx(1 / 2) and gaps[50] == pytest.approx(1 / middle) and np.all(np.diff(gaps) < 0)
    assert gaps[-1] == pytest.approx(1 / 8, rel=0.03) and (plan.rate, plan.name) == (None, "ramp 2 to 8")
    assert f"{strategy} ramp from 2 to 8 requests/s" in "\n".join(lines(profile, TEXTS))
    with pytest.raises(ConfigError, match="needs ramp-up-start-rps and ramp-up-end-rps"):
        read(tmp_path, changed(VLLM, **{"ramp-up-strategy": strategy, "ramp-up-start-rps": 2}))
    with pytest.raises(ConfigError, match="takes the place of request-rate"):
        read(tmp_path, changed(VLLM, **flags, **{"request-rate": 3}))
    alone = read(tmp_path, changed(VLLM, **{"ramp-up-start-rps": 2}))
    assert "ramp-up-start-rps" in {left.key for left in alone.left}


@pytest.mark.parametrize("assignment", ["random", "round-robin"])
def test_adapters_of_vllm_are_models_that_requests_ask_for(tmp_path, assignment):
    flags = {"lora-modules": "one two", "lora-assignment": assignment, "num-prompts": 200}
    profile = read(tmp_path, changed(VLLM, **flags))
    asked = [ask.model for ask in plan_of(profile).asks]
    assert set(asked) == {"one", "two"} and 70 < asked.count("one") < 130
    assert (asked == ["one", "two"] * 100) == (assignment == "round-robin")
    assert "one, two" in "\n".join(lines(profile, TEXTS))


def test_prefixes_of_vllm_are_shared(tmp_path):
    flags = {"dataset-name": "prefix_repetition", "prefix-repetition-num-prefixes": 2, "num-prompts": 7}
    flags |= {"prefix-repetition-prefix-len": 9, "prefix-repetition-suffix-len": 3}
    asks = plan_of(read(tmp_path, changed(VLLM, **flags))).asks
    assert len(asks) == 6 and len({tuple(ask.prompt.split()[:9]) for ask in asks}) == 2


# -- files -------------------------------------------------------------------------------------------


def talk(*texts):
    return {"conversations": [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]}


def test_conversations_of_a_local_file_are_asked_over_and_over(tmp_path):
    path = tmp_path / "talks.json"
    talks = [talk("a b c d e", "x y z"), talk("too short", "y"), talk("alone"), talk("f g h i j", "u v"), {"x": 1}]
    path.write_text(json.dumps(talks))
    data = {
        "type": "shareGPT",
        "path": str(path),
        "input_distribution": {"min": 5, "max": 6},
        "output_distribution": {"min": 1, "max": 9},
    }
    asks = plan_of(read(tmp_path, changed(PERF, data=data))).asks
    assert [(ask.prompt, ask.output_tokens) for ask in asks[:3]] == [
        ("a b c d e", 3),
        ("f g h i j", 2),
        ("a b c d e", 3),
    ]
    flags = {"dataset-name": "sharegpt", "dataset-path": str(path), "sharegpt-output-len": 9}
    asks = plan_of(read(tmp_path, changed(VLLM, **flags))).asks
    assert {(ask.prompt, ask.output_tokens) for ask in asks} == {("a b c d e", 9), ("f g h i j", 9)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n'),
        ("a.csv", "question\none\ntwo\n"),
        ("a.txt", "one\n\ntwo\n"),
        ("a.json", '[{"text": "one"}, {"x": 1}, {"text": "two"}]'),
    ],
)
def test_prompts_of_a_local_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    data = [{"kind": "json_file", "path": str(tmp_path / name)}]
    asks = plan_of(read(tmp_path, changed(GUIDE, spec__data=data))).asks
    assert [ask.prompt for ask in asks] == ["one", "two"] * 3


@pytest.mark.parametrize("text", ["{", '{"prompt": ""}', "[" * 9000, '"\\ud800'])
def test_a_file_without_prompts_is_an_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    profile = read(tmp_path, changed(GUIDE, spec__data=[{"kind": "json_file", "path": str(tmp_path / "a.json")}]))
    with pytest.raises(ConfigError, match=r"a.json"):
        plan_of(profile)


# -- texts -------------------------------------------------------------------------------------------


def test_texts_have_as_many_words_as_the_server_counts():
    few = Words(0.25)
    assert len(few.text(40, 1).split()) == 10 and len(few.text(1, 1).split()) == 1 and few.count("a b") == 8
    assert few.text(40, 1) == pickle.loads(pickle.dumps(few)).text(40, 1) != few.text(40, 2)
    assert few.text(0, 1) == ""


def test_a_tokenizer_is_a_local_file(tmp_path):
    assert tokenizer_of(str(tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_of(str(tmp_path)) == str(tmp_path)
    assert tokenizer_of(str(tmp_path / "tokenizer.json")) == str(tmp_path / "tokenizer.json")
    assert tokenizer_of("bytes") == "bytes"
    assert tokenizer_of("meta-llama/Nothing") is tokenizer_of("x" * 5000) is tokenizer_of("") is None


def test_prompts_are_cut_to_their_length_by_a_tokenizer(tmp_path):
    asks = plan_of(read(tmp_path, PERF), texts=Texts("bytes")).asks
    assert all(len(ask.prompt.encode()) == ask.input_tokens for ask in asks)


# -- sweeps ------------------------------------------------------------------------------------------


def ended(ends, sent=0.0):
    records = [Record(str(at), sent_s=sent, end_s=end) for at, end in enumerate(ends)]
    return Run("", records, duration_s=max(ends))


def test_a_sweep_goes_up_to_the_rate_at_which_a_burst_was_served():
    pytest.importorskip("httptools", reason="needs the extra 'bench'")
    from neustream.bench.profiles.running import loads_after, saturation

    burst = ended([0.05 + at / 20 for at in range(200)])  # 20 a second
    assert saturation(burst, 95) == pytest.approx(20)
    sweep = Sweep("saturation", (), 3, Load("rescaled", None, 1.0, None, 10.0))
    assert [(load.rate, load.requests) for load in loads_after(sweep, [burst])] == [(1, 10), (10.5, 105), (20, 200)]
    geometric = Sweep("saturation", (), 3, Load("rescaled", None, 1.0, None, 10.0), "geometric")
    assert [load.rate for load in loads_after(geometric, [burst])] == [1, 16.53, 20]
    with pytest.raises(BackendError, match="of the burst, 2 of 2 requests ended"):
        saturation(ended([0.1, 0.2]), 95)


def test_a_sweep_goes_from_one_at_a_time_to_as_many_as_possible():
    pytest.importorskip("httptools", reason="needs the extra 'bench'")
    from neustream.bench.profiles.running import loads_after

    slow, fast = ended([at + 1.0 for at in range(10)]), ended([10.0] * 50)
    sweep = Sweep("between", (), 2, Load("even", None, 1.0, 8, 10.0))
    assert [(load.rate, load.concurrency) for load in loads_after(sweep, [slow, fast])] == [(3, 8), (5, 8)]
    failed = Run("", [Record("0", outcome="status", end_s=1.0)], duration_s=1.0)
    with pytest.raises(BackendError, match="no request of a load was done"):
        loads_after(sweep, [failed, fast])


@pytest.mark.parametrize(("seconds", "count"), [(10.0, 16.0), (4.0, 4.0), (2.0, 1.0)])
def test_a_rate_that_grows_sends_fewer(seconds, count):
    load = Load("even", rate=2.0, duration_s=seconds, rampup_s=4.0)
    assert load.expected == count
