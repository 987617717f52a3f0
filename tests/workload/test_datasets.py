"""What requests ask for and when they come: drawn, of files, of traces; the same for the same seed."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest

from neustream.errors import ConfigError
from neustream.workload.arrivals import (
    Ramp,
    conditioned_arrivals,
    constant_arrivals,
    gamma_arrivals,
)
from neustream.workload.asks import Ask, Limits
from neustream.workload.conversations import Conversations, SharedPrefix
from neustream.workload.datasets import Images, normal
from neustream.workload.lengths import Lengths
from neustream.workload.mixing import AskClass, with_arrivals, with_classes, with_limits
from neustream.workload.of_traces import TraceFile, prompt_of
from neustream.workload.prompt_files import PromptFile
from neustream.workload.sources import Asked, Prefixes, RandomTexts
from neustream.workload.texts import Texts
from neustream.workload.trace import Trace, Window

WORDS, BYTES = Texts(), Texts("bytes")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], show_progress=False, initial_alphabet=letters
    )
    made.train_from_iterator(["the house of the rising sun and the other houses"] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return Texts(str(path.parent))


@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_texts_have_the_length_that_was_asked_for(tokenizer, tokens):
    for texts in (WORDS, BYTES):
        assert texts.count(texts.text(tokens, 1, 2)) == tokens
    assert abs(tokenizer.count(tokenizer.text(tokens, 1, 2)) - tokens) <= max(1, tokens // 50)
    for texts in (WORDS, BYTES, tokenizer):
        assert texts.text(tokens, 1) == texts.text(tokens, 1)
    assert tokenizer.text(20, 1) != tokenizer.text(20, 2)


def test_random_prompts_share_what_is_asked_for():
    source = RandomTexts(Lengths.around(10, 0.5), Lengths.around(5, 0.5), (Prefixes(1, 4),))
    asks = list(source.asks(Asked(200, 3, BYTES)))
    assert {ask.prompt[:4] for ask in asks} == {asks[0].prompt[:4]} and len({ask.prompt for ask in asks}) == 200
    assert {ask.input_tokens for ask in asks} == set(range(9, 20))
    assert {ask.output_tokens for ask in asks} == set(range(2, 9))
    assert all(len(ask.prompt) == ask.input_tokens for ask in asks)
    assert asks == list(source.asks(Asked(200, 3, BYTES))) != list(source.asks(Asked(200, 4, BYTES)))
    assert asks[-3:] == source.asks(Asked(200, 3, BYTES))[-3:]


def test_prefixes_are_repeated_equally_often():
    asks = SharedPrefix(3, None, *map(Lengths.fixed, (8, 4, 5))).asks(Asked(30, 0, BYTES))
    assert set(Counter(ask.prompt[:8] for ask in asks).values()) == {10}
    assert len({ask.prompt for ask in asks}) == 30 and {ask.input_tokens for ask in asks} == {12}


def whole(asks):
    """How long the conversation before each ask is, with its own text; an answer has as many tokens as asked for."""
    of, said = {}, {}
    for ask in asks:
        said[ask.id] = said.get(ask.follows, 0) + len(ask.prompt)
        of[ask.id] = said[ask.id]
        said[ask.id] += ask.output_tokens
    return of


def test_sessions_share_system_prompts_and_follow_each_other():
    lengths = Lengths.fixed(4), Lengths.between(5, 7)
    source = RandomTexts(*lengths, (Prefixes(2, 8),), turns=3, think=Lengths.fixed(500))
    asks = {ask.id: ask for ask in source.asks(Asked(24, 0, BYTES))}
    first = [ask for ask in asks.values() if not ask.follows]
    assert len(first) == 8 and len({ask.prompt[:8] for ask in first}) == 2
    for ask in asks.values():
        if ask.follows:
            before = asks[ask.follows]
            assert before.session == ask.session and len(ask.prompt) == 4 and ask.think_s == 0.5
    assert {ask.id: ask.input_tokens for ask in asks.values()} == whole(asks.values())
    unknown = RandomTexts(Lengths.fixed(4), None, turns=2).asks(Asked(2, 0, BYTES))
    assert [ask.input_tokens for ask in unknown] == [4, None]


def test_the_prompt_of_a_turn_is_as_long_as_all_that_was_said():
    fixed = [Lengths.fixed(each) for each in (9, 4, 3)]
    again = list(SharedPrefix(2, 2, *fixed, multi_turn=True).asks(Asked(11, 0, BYTES)))
    assert {ask.id: ask.input_tokens for ask in again} == whole(again) and sum(bool(ask.follows) for ask in again) == 7
    talks = Conversations(3, 5, fixed[0], Lengths.between(1, 4), Lengths.between(2, 6), fixed[2], Lengths.fixed(0), 60)
    asks = list(talks.asks(Asked(40, 1, BYTES)))
    assert {ask.id: ask.input_tokens for ask in asks} == whole(asks) and any(ask.follows for ask in asks)


def test_images_have_mixed_sizes_and_steps():
    asks = Images(((64, 32, 3.0), (128, 128, 1.0)), ((10, 1.0), (20, 1.0))).asks(Asked(400, 0, WORDS))
    sizes = Counter((ask.image.width, ask.image.height) for ask in asks)
    assert set(sizes) == {(64, 32), (128, 128)} and 250 < sizes[64, 32] < 350
    assert {ask.image.steps for ask in asks} == {10, 20} and all(ask.prompt for ask in asks)


def test_conversations_of_sharegpt(tmp_path):
    turns = [["one two three four", "a b c d e"], ["short", "a b c d"], ["five six seven eight nine", "x " * 4]]
    rows = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in turns]
    (tmp_path / "s.json").write_text(json.dumps([*rows, {"conversations": []}]))
    asks = PromptFile.sharegpt(tmp_path / "s.json").asks(Asked(3, 0, WORDS))
    assert [(ask.input_tokens, ask.output_tokens) for ask in asks] == [(4, 5), (5, 4), (4, 5)]
    assert len(PromptFile.sharegpt(tmp_path / "s.json", 9, once=True).asks(Asked(9, 0, WORDS))) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": ""}', "line 1: no prompt"),
        ('{"prompt": "a"}\n{"x": 1}', "line 2: no prompt"),
        ('{"prompt": "a", "output_tokens": "many"}', "output_tokens 'many'"),
        ('{"prompt": "a", "output_tokens": 0}', "output_tokens 0"),
        ("{", "p.jsonl"),
        ('{"conversations": [1]}', "no prompt of a length"),
    ],
)
def test_a_file_without_prompts_is_named(tmp_path, text, says):
    (tmp_path / "p.jsonl").write_text(text + "\n")
    with pytest.raises(ConfigError, match=says):
        PromptFile(tmp_path / "p.jsonl", strict=True).asks(Asked(1, 0, WORDS))


def test_traces_become_requests(tmp_path):
    (tmp_path / "t.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens,slo_ttft_s,slo_class,session\n5,10,3,0.5,chat,x\n7,20,4,,,\n9,5,6,,,\n"
    )
    first, second = TraceFile(Trace(tmp_path / "t.csv"), Window(speed=2.0)).asks(Asked(2, 0, BYTES))
    assert (first.arrival_s, second.arrival_s) == (0.0, 1.0)
    assert len(first.prompt) == first.input_tokens == 10 and first.limits == Limits(ttft_s=0.5)
    assert (first.slo_class, first.session, second.slo_class) == ("chat", "x", "")
    (tmp_path / "i.csv").write_text("arrival_s,steps,width,height\n0,20,512,256\n")
    (image,) = TraceFile(Trace(tmp_path / "i.csv")).asks(Asked(9, 0, WORDS))
    assert (image.image.steps, image.image.width, image.image.height, image.output_tokens) == (20, 512, 256, None)


def test_prompts_with_the_same_blocks_begin_alike():
    one, other = prompt_of([1, 2, 3], 1200, BYTES, 0, 0), prompt_of([1, 2, 9, 10], 2000, BYTES, 0, 1)
    assert (len(one), len(other)) == (1200, 2000) and one[:1024] == other[:1024] and one[1024:] != other[1024:1200]
    assert len(prompt_of([1, 2], 32, BYTES, 0, 0)) == 32
    assert len({prompt_of([block], 500, BYTES, 0, 0) for block in (1, -1, -2)}) == 3  # hashes of Python are signed


# -- arrivals, promises, classes --------------------------------------------------------------------


@pytest.mark.parametrize("cv", [1.0, 0.5, 3.0])
def test_gaps_are_of_the_law_over_20_seeds(cv):
    stats = pytest.importorskip("scipy.stats")
    law = stats.gamma(1 / cv**2, scale=cv**2 / 4.0)
    found = []
    for seed in range(20):
        gaps = np.diff(gamma_arrivals(1000, rate=4.0, cv=cv, seed=seed), prepend=0.0)
        found.append(stats.kstest(gaps, law.cdf).pvalue)
        assert abs(gaps.mean() * 4.0 - 1) < 3 * cv / math.sqrt(1000)
    assert min(found) > 0.05 / 20 and stats.kstest(found, "uniform").pvalue > 0.01


def test_conditioned_arrivals_have_the_rate_exactly():
    for seed in range(20):
        arrivals = conditioned_arrivals(100, rate=5.0, cv=1.0, seed=seed)
        assert arrivals[-1] == pytest.approx(20.0) and (np.diff(arrivals) >= 0).all()
    assert len(conditioned_arrivals(0, rate=1.0, cv=1.0, seed=0)) == 0


@pytest.mark.parametrize("exponential", [False, True])
def test_a_ramp_goes_from_one_rate_to_the_other(exponential):
    arrivals = Ramp(10.0, 40.0, exponential).arrivals(40_000, cv=1.0, seed=0)
    gaps = np.diff(arrivals)
    middle = 20.0 if exponential else 25.0
    for place, rate in ((0, 10.0), (19_000, middle), (38_000, 40.0)):
        assert 1 / gaps[place : place + 1500].mean() == pytest.approx(rate, rel=0.1)


def test_lengths_that_are_drawn_normally_stay_inside():
    found = normal(100, 100, 1, 200, 5000, seed=0)
    assert len(found) == 5000 and found.min() >= 1 and found.max() <= 200 and 90 < found.mean() < 110


def test_classes_are_drawn_by_share_and_sessions_stay_in_one():
    asks = with_arrivals(
        RandomTexts(Lengths.fixed(1), Lengths.fixed(1), turns=4).asks(Asked(800, 0, WORDS)),
        list(constant_arrivals(800, rate=1.0)),
    )
    classes = [AskClass("a", 3.0, Limits(ttft_s=1.0), {"priority": 1}), AskClass("b")]
    found = with_limits(with_classes(asks, classes, 5), Limits(e2e_s=9.0))
    of_session = {}
    for ask in found:
        assert of_session.setdefault(ask.session, ask.slo_class) == ask.slo_class
        assert ask.limits == (Limits(ttft_s=1.0) if ask.slo_class == "a" else Limits(e2e_s=9.0))
        assert dict(ask.params) == ({"priority": 1} if ask.slo_class == "a" else {})
    assert 120 < sum(name == "a" for name in of_session.values()) < 180
    assert found[3].arrival_s == 4.0 and with_classes(asks, [], 0) == asks


def test_a_class_that_a_request_names_is_its_own_whatever_its_session_has():
    classes = [AskClass("a"), AskClass("b")]
    named = [Ask(str(at), slo_class=name, session="s") for at, name in enumerate(("a", "b", "", "b"))]
    for seed in range(4):
        assert [ask.slo_class for ask in with_classes(named, classes, seed)] == ["a", "b", "a", "b"]
    with pytest.raises(ConfigError, match="request 7: slo_class 'aa' is none of the classes; did you mean 'a'"):
        with_classes([Ask("7", slo_class="aa")], classes, 0)
