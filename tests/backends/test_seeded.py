"""Draws with seeds, many rows at once: the tokens of `torch.multinomial` with each row's own generator."""

from __future__ import annotations

import gc
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from texts import all_ahead

from neustream.backends.transformers import ahead, draws, seeded
from neustream.backends.transformers.ahead import Stream, draw_ahead
from neustream.backends.transformers.choosing import Chooser, choose
from neustream.backends.transformers.draws import filtered
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.seeded import uniforms_suffice, with_seeds
from neustream.backends.transformers.text import Ask, Text

FILTERS = {
    "top_k": st.one_of(st.integers(1, 60), st.just(10**5000)),
    "top_p": st.one_of(st.floats(0.01, 1), st.sampled_from([0.5, 0.9, 0.999])),
    "min_p": st.one_of(st.floats(0, 1), st.just(1.0)),
    "typical_p": st.floats(0.2, 1),
}


def streams(count, seed=0):
    return [Stream(torch.Generator().manual_seed(1000 * seed + at)) for at in range(count)]


def assert_as_far(ours, stock):
    for one, other in zip(ours, stock, strict=True):
        assert torch.equal(one.generator.get_state(), other.generator.get_state())


def alone(sampling, logits, own):
    """What the stock library draws of each row by itself."""
    rows = [filtered(sampling, row).softmax(-1) for row in logits.split(1)]
    return [int(torch.multinomial(row, 1, generator=one.generator)) for row, one in zip(rows, own, strict=True)]


def logits_of(seed, rows, size, spread, ties):
    logits = spread * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    return logits.round() if ties else logits


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 6),
    size=st.sampled_from([1, 3, 96, 257, 5003]),
    spread=st.sampled_from([0.01, 1.0, 4.0, 20.0]),
    ties=st.booleans(),
    temperature=st.sampled_from([0.3, 0.8, 1.0, 1.7]),
    filters=st.fixed_dictionaries({}, optional=FILTERS),
)
@example(24, 3, 3000, 0.01, False, 0.3, {"top_k": 10**5000, "top_p": 0.5})  # borders within rounding
@example(46, 3, 1000, 1.0, True, 1.0, {"top_k": 2, "top_p": 0.5})  # as likely as the last of top_k
@example(1, 6, 3000, 4.0, False, 1.0, {"top_p": 0.05})  # most rows draw a token that is not left
def test_tokens_and_streams_are_those_of_the_stock_draw(seed, rows, size, spread, ties, temperature, filters):
    logits, sampling = logits_of(seed, rows, size, spread, ties), Sampling(temperature=temperature, seed=1, **filters)
    ours, stock = streams(rows, seed), streams(rows, seed)
    for _ in range(3):
        assert with_seeds(sampling, logits, ours).tokens.tolist() == alone(sampling, logits, stock)
        assert all(
            torch.equal(one.generator.get_state(), other.generator.get_state())
            for one, other in zip(ours, stock, strict=True)
        )


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.9}])
@pytest.mark.parametrize("how", ["level", "other exponentials"])
def test_what_is_not_clear_is_left_to_the_stock_draw(how, filters, monkeypatch):
    if how == "level":
        monkeypatch.setattr(seeded, "NEAR", 1.0)
    else:
        monkeypatch.setattr(seeded, "uniforms_suffice", lambda: False)
    logits, sampling = logits_of(0, 5, 300, 2.0, False), Sampling(temperature=1, seed=1, **filters)
    assert with_seeds(sampling, logits, streams(5)).tokens.tolist() == alone(sampling, logits, streams(5))


def test_tokens_that_are_as_good_to_the_last_bits_are_those_of_the_stock_draw():
    """Shares in proportion to the exponentials that will be drawn: all scores are nearly the same."""
    for seed in range(20):
        drawn = torch.empty(50).exponential_(generator=torch.Generator().manual_seed(seed))
        logits, sampling = drawn.log()[None], Sampling(temperature=1, seed=seed)
        ours, stock = ([Stream(torch.Generator().manual_seed(seed))] for _ in range(2))
        assert with_seeds(sampling, logits, ours).tokens.tolist() == alone(sampling, logits, stock)


@pytest.mark.skipif(not uniforms_suffice(), reason="this torch draws exponentials in another way")
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9}])
def test_clear_rows_need_no_stock_draw(filters, monkeypatch):
    logits, sampling = logits_of(3, 20, 500, 3.0, False), Sampling(temperature=1, seed=1, **filters)
    wanted = alone(sampling, logits, streams(20))
    calls, real = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    assert with_seeds(sampling, logits, streams(20)).tokens.tolist() == wanted
    assert len(calls) <= 1


def test_who_drew_in_inference_mode_first_keeps_nobody_from_drawing_outside_of_it(monkeypatch):
    monkeypatch.setattr(seeded, "_room", seeded._Room())
    logits, sampling = logits_of(5, 7, 300, 2.0, False), Sampling(temperature=1, seed=1, top_p=0.8)
    with torch.inference_mode():
        inside = with_seeds(sampling, logits, streams(7)).tokens.tolist()
    assert with_seeds(sampling, logits, streams(7)).tokens.tolist() == inside


@pytest.mark.parametrize("pieces", [1, 700, 1 << 17])
def test_rows_are_drawn_in_pieces(pieces, monkeypatch):
    monkeypatch.setattr(seeded, "PIECE", pieces)
    logits, sampling = logits_of(5, 7, 300, 2.0, False), Sampling(temperature=1, seed=1, top_p=0.8)
    assert with_seeds(sampling, logits, streams(7)).tokens.tolist() == alone(sampling, logits, streams(7))


@pytest.mark.parametrize("likely", [0, 1, 30, 1000])
@pytest.mark.parametrize("size", [5, 300, 5003])
def test_how_many_blocks_are_looked_at_first_changes_no_token(likely, size, monkeypatch):
    monkeypatch.setattr(seeded, "LIKELY", likely)
    logits, sampling = logits_of(8, 40, size, 3.0, False), Sampling(temperature=1, seed=1, top_p=0.7)
    ours, stock = streams(40), streams(40)
    assert with_seeds(sampling, logits, ours).tokens.tolist() == alone(sampling, logits, stock)
    assert all(
        torch.equal(one.generator.get_state(), other.generator.get_state())
        for one, other in zip(ours, stock, strict=True)
    )


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 20}, {"typical_p": 0.9}])
def test_a_row_without_probabilities_draws_nothing_and_others_do(wrong, filters):
    logits, sampling = logits_of(6, 3, 100, 2.0, False), Sampling(temperature=1, seed=1, **filters)
    wanted = alone(sampling, logits, streams(3))
    logits[1, 7] = wrong
    own, before = streams(3), streams(3)
    found = with_seeds(sampling, logits, own)
    assert found.total.isfinite().tolist() == [True, False, True]
    assert [found.tokens.tolist()[at] for at in (0, 2)] == [wanted[0], wanted[2]]
    assert torch.equal(own[1].generator.get_state(), before[1].generator.get_state())


SOME_FILTERS = [{}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9}, {"typical_p": 0.7}]


@pytest.mark.parametrize("filters", SOME_FILTERS)
@pytest.mark.parametrize("near", [seeded.NEAR, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_numbers_drawn_ahead_are_those_that_would_be_drawn(seed, near, filters, monkeypatch):
    """In random company: rows stay away, others come, some vocabularies are of another size; `near`: many rows are
    left to the stock draw."""
    all_ahead(monkeypatch)
    monkeypatch.setattr(seeded, "NEAR", near)
    draw, sampling = random.Random(seed), Sampling(temperature=1, seed=1, **filters)
    ours, stock = streams(9, seed), streams(9, seed)
    for step in range(12):
        rows = draw.sample(range(9), draw.randint(1, 9))
        logits = logits_of(100 * seed + step, len(rows), draw.choice([300, 300, 300, 301]), 3.0, False)
        found = with_seeds(sampling, logits, [ours[row] for row in rows])
        assert found.tokens.tolist() == alone(sampling, logits, [stock[row] for row in rows])
        assert_as_far(ours, stock)
        draw_ahead([ours[row] for row in draw.sample(rows, draw.randint(1, len(rows)))], 300)


@pytest.mark.skipif(not uniforms_suffice(), reason="this torch draws exponentials in another way")
def test_what_was_drawn_ahead_is_not_drawn_again(monkeypatch):
    all_ahead(monkeypatch)
    logits, sampling, own = logits_of(4, 5, 300, 3.0, False), Sampling(temperature=1, seed=1), streams(5)
    wanted = alone(sampling, logits, streams(5))
    draw_ahead(own, 300)
    monkeypatch.setattr(seeded, "_room", None)  # where numbers of others go
    assert with_seeds(sampling, logits, own).tokens.tolist() == wanted


def test_numbers_drawn_ahead_are_bounded_and_thrown_away(monkeypatch):
    all_ahead(monkeypatch)
    monkeypatch.setattr(ahead, "FEWEST", 600)
    monkeypatch.setattr(ahead, "MOST", sum(batch.numbers.numel() for batch in ahead._kept) + 2000)
    first, second, third = streams(4), streams(4), streams(4)
    has = lambda some: [stream.batch(300) is not None for stream in some]  # noqa: E731
    draw_ahead(first[:1], 300)
    assert has(first) == [False] * 4  # too few to be worth it
    draw_ahead(first, 300)
    draw_ahead(second, 300)
    assert has(first) == [True] * 4 and has(second) == [True, True, False, False]
    draw_ahead(third, 300)
    assert has(third) == [False] * 4
    for stream in first:
        stream.own()
    gc.collect()
    draw_ahead(third, 300)
    assert has(third) == [True] * 4


def test_models_on_several_threads_draw_ahead_at_once(monkeypatch):
    all_ahead(monkeypatch)

    def run(seed):
        own, wanted = streams(2, seed), streams(2, seed)
        sampling = Sampling(temperature=1, seed=1)
        for step in range(60):
            draw_ahead(own, 300)
            logits = logits_of(step, 2, 300, 3.0, False)
            assert with_seeds(sampling, logits, own).tokens.tolist() == alone(sampling, logits, wanted)

    with ThreadPoolExecutor(4) as models:
        list(models.map(run, range(4)))


@pytest.mark.parametrize(("threads", "cores"), [(1, 1), (1, 2), (2, 2), (3, 8), (8, 2)])
def test_numbers_are_drawn_where_there_are_threads_for_it(threads, cores, monkeypatch):
    """Ahead, where torch leaves a core; at once, where it has several threads. Tokens are the same."""
    all_ahead(monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(ahead, "cores", lambda: cores)
    begun, real = [], ahead._Batch
    counted = lambda own, columns, threads: (begun.append((len(own), threads)), real(own, columns, threads))[1]  # noqa: E731
    monkeypatch.setattr(ahead, "_Batch", counted)
    wish, stock = Sampling(temperature=1, top_p=0.9, seed=3), streams(5)
    own = [(Chooser(replace(wish, seed=seed)), Text(Ask([1]))) for seed in range(5)]
    for step in range(3):
        logits = logits_of(step, 5, 300, 3.0, False)
        assert choose(logits, own) == alone(wish, logits, stock)
    at_once = [(5, threads)] * (threads > 1)
    beside = [(5, cores - threads)] * (cores > threads)
    assert begun == (at_once + beside * 3 if beside else at_once * 3)


def test_a_text_that_goes_on_elsewhere_draws_what_it_would_have_drawn(monkeypatch):
    """While its next numbers are drawn, its stream is told as it is without them."""
    all_ahead(monkeypatch)
    wish, text = Sampling(temperature=1, top_p=0.9, seed=3), Text(Ask([1]))
    logits = logits_of(9, 4, 200, 3.0, False)
    one = Chooser(wish)
    found = [choose(logits[:1], [(one, text)])]
    for step in range(1, 4):
        one = Chooser(wish, one.stream)
        found.append(choose(logits[step : step + 1], [(one, text)]))
    own = streams(1, 0)
    own[0].generator.manual_seed(3)
    assert found == [alone(wish, logits[step : step + 1], own) for step in range(4)]


@pytest.mark.parametrize("size", [1, 128, 300, 5003])
@pytest.mark.parametrize("wrong", [None, float("nan"), float("inf"), -float("inf")])
def test_the_first_of_the_largest_is_that_of_argmax(size, wrong):
    for seed in range(20):
        logits = logits_of(seed, 5, size, 1.0, True)  # whole numbers: many are equal
        if wrong is not None:
            logits[0, seed % size] = logits[1, -1] = wrong
            logits[2] = wrong
        columns, most = draws.first_of_largest(logits)
        assert torch.equal(columns, logits.argmax(-1))
        assert torch.equal(most.nan_to_num(7.5), logits.amax(-1).nan_to_num(7.5))


@pytest.mark.parametrize("top_p", [0.5, 0.75, 0.95, 1.0])
def test_without_a_seed_draws_of_all_tokens_follow_what_top_p_leaves(top_p, monkeypatch):
    """Some tokens are equal, at the border of `top_p` too: which of these are left, only the stock sort knows."""
    logits = torch.tensor([3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.5, -1.0, -torch.inf]).repeat(20_000, 1)
    sampling = Sampling(temperature=1.5, top_p=top_p)
    monkeypatch.setattr(draws, "TOGETHER", 9 * 7000)
    found = draws.at_random(sampling, logits).tokens.bincount(minlength=9) / len(logits)
    wanted = filtered(sampling, logits[:1]).softmax(-1)[0]
    assert (found > 0).sum() == (wanted > 0).sum()
    assert torch.allclose(found.sort().values, wanted.sort().values, atol=0.015)


def test_without_a_seed_equal_tokens_at_the_end_of_top_k_are_drawn_too():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]]).repeat(500, 1)
    sampling = Sampling(temperature=2, top_k=2)
    assert filtered(sampling, logits[:1]).isfinite().tolist() == [[True, True, True, True, False]]
    assert set(draws.at_random(sampling, logits).tokens.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("size", [3, 500, 5003])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 3, 60])
def test_the_largest_are_those_of_topk(size, ties, count):
    logits = logits_of(7, 4, size, 2.0, ties)
    values, columns = draws.largest(logits, min(count, size))
    assert torch.equal(values, logits.topk(min(count, size), -1).values)
    assert torch.equal(logits.gather(1, columns), values)
    assert all(len(set(row)) == len(row) for row in columns.tolist())
