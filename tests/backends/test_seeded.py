"""Draws with seeds, many rows at once: the tokens of `torch.multinomial` with each row's own generator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neustream.backends.transformers import draws, seeded
from neustream.backends.transformers.draws import filtered
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.seeded import uniforms_suffice, with_seeds

FILTERS = {
    "top_k": st.one_of(st.integers(1, 60), st.just(10**5000)),
    "top_p": st.one_of(st.floats(0.01, 1), st.sampled_from([0.5, 0.9, 0.999])),
    "min_p": st.one_of(st.floats(0, 1), st.just(1.0)),
    "typical_p": st.floats(0.2, 1),
}


def generators(count, seed=0):
    return [torch.Generator().manual_seed(1000 * seed + at) for at in range(count)]


def alone(sampling, logits, own):
    """What the stock library draws of each row by itself."""
    rows = [filtered(sampling, row).softmax(-1) for row in logits.split(1)]
    return [int(torch.multinomial(row, 1, generator=one)) for row, one in zip(rows, own, strict=True)]


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
    ours, stock = generators(rows, seed), generators(rows, seed)
    for _ in range(3):
        assert with_seeds(sampling, logits, ours).tokens.tolist() == alone(sampling, logits, stock)
        assert all(torch.equal(one.get_state(), other.get_state()) for one, other in zip(ours, stock, strict=True))


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.9}])
@pytest.mark.parametrize("how", ["level", "other exponentials"])
def test_what_is_not_clear_is_left_to_the_stock_draw(how, filters, monkeypatch):
    if how == "level":
        monkeypatch.setattr(seeded, "NEAR", 1.0)
    else:
        monkeypatch.setattr(seeded, "uniforms_suffice", lambda: False)
    logits, sampling = logits_of(0, 5, 300, 2.0, False), Sampling(temperature=1, seed=1, **filters)
    assert with_seeds(sampling, logits, generators(5)).tokens.tolist() == alone(sampling, logits, generators(5))


def test_tokens_that_are_as_good_to_the_last_bits_are_those_of_the_stock_draw():
    """Shares in proportion to the exponentials that will be drawn: all scores are nearly the same."""
    for seed in range(20):
        drawn = torch.empty(50).exponential_(generator=torch.Generator().manual_seed(seed))
        logits, sampling = drawn.log()[None], Sampling(temperature=1, seed=seed)
        ours, stock = ([torch.Generator().manual_seed(seed)] for _ in range(2))
        assert with_seeds(sampling, logits, ours).tokens.tolist() == alone(sampling, logits, stock)


@pytest.mark.skipif(not uniforms_suffice(), reason="this torch draws exponentials in another way")
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9}])
def test_clear_rows_need_no_stock_draw(filters, monkeypatch):
    logits, sampling = logits_of(3, 20, 500, 3.0, False), Sampling(temperature=1, seed=1, **filters)
    wanted = alone(sampling, logits, generators(20))
    calls, real = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    assert with_seeds(sampling, logits, generators(20)).tokens.tolist() == wanted
    assert len(calls) <= 1


def test_who_drew_in_inference_mode_first_keeps_nobody_from_drawing_outside_of_it(monkeypatch):
    monkeypatch.setattr(seeded, "_room", seeded._Room())
    logits, sampling = logits_of(5, 7, 300, 2.0, False), Sampling(temperature=1, seed=1, top_p=0.8)
    with torch.inference_mode():
        inside = with_seeds(sampling, logits, generators(7)).tokens.tolist()
    assert with_seeds(sampling, logits, generators(7)).tokens.tolist() == inside


@pytest.mark.parametrize("pieces", [1, 700, 1 << 17])
def test_rows_are_drawn_in_pieces(pieces, monkeypatch):
    monkeypatch.setattr(seeded, "PIECE", pieces)
    logits, sampling = logits_of(5, 7, 300, 2.0, False), Sampling(temperature=1, seed=1, top_p=0.8)
    assert with_seeds(sampling, logits, generators(7)).tokens.tolist() == alone(sampling, logits, generators(7))


@pytest.mark.parametrize("likely", [0, 1, 30, 1000])
@pytest.mark.parametrize("size", [5, 300, 5003])
def test_how_many_blocks_are_looked_at_first_changes_no_token(likely, size, monkeypatch):
    monkeypatch.setattr(seeded, "LIKELY", likely)
    logits, sampling = logits_of(8, 40, size, 3.0, False), Sampling(temperature=1, seed=1, top_p=0.7)
    ours, stock = generators(40), generators(40)
    assert with_seeds(sampling, logits, ours).tokens.tolist() == alone(sampling, logits, stock)
    assert all(torch.equal(one.get_state(), other.get_state()) for one, other in zip(ours, stock, strict=True))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 20}, {"typical_p": 0.9}])
def test_a_row_without_probabilities_draws_nothing_and_others_do(wrong, filters):
    logits, sampling = logits_of(6, 3, 100, 2.0, False), Sampling(temperature=1, seed=1, **filters)
    wanted = alone(sampling, logits, generators(3))
    logits[1, 7] = wrong
    own, before = generators(3), generators(3)
    found = with_seeds(sampling, logits, own)
    assert found.total.isfinite().tolist() == [True, False, True]
    assert [found.tokens.tolist()[at] for at in (0, 2)] == [wanted[0], wanted[2]]
    assert torch.equal(own[1].get_state(), before[1].get_state())


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
