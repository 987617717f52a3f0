"""Fixed shapes: keys, values and tokens of a text are the same to the last bit, whatever its company."""

from __future__ import annotations

import random

import pytest
import torch
from test_texts import engine
from texts import Drive, alone, made, prompts

from neustream import BackendError
from neustream.backends.transformers import LanguageModel
from neustream.backends.transformers.fixed import BLOCK, Fixed, fixed_of, floor, pieces, rows_of
from neustream.backends.transformers.slots import Row
from neustream.core.batch import input_of

MAX = 14
LLAMA = {"intermediate_size": 128, "num_key_value_heads": 2}
KINDS = {
    "llama": LLAMA,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "gpt_neox": LLAMA,
    "qwen3": LLAMA,
}


def bits(drive, job):
    """All that a slot holds of a job, as bytes."""
    piece = drive.texts.export(input_of(job))
    return piece.last, [layer.tobytes() for layer in piece.layers]


def until_the_last(drive, jobs, seed=None, chunk=None, evict=0.0):
    """Run jobs, in steps of random members if there is a seed, until each lacks one token; what they hold then."""
    draw = random.Random(seed)
    held = {}
    while open := [job for job in jobs if job not in held]:
        some = open if seed is None else draw.sample(open, draw.randint(1, len(open)))
        drive.step({job: draw.randint(1, chunk) if chunk else None for job in some})
        for job in some:
            if len(job.params["tokens"]) == MAX - 1:
                held[job] = bits(drive, job)
            elif draw.random() < evict:
                drive.evict(job)
    return [held[job] for job in jobs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_company_to_the_last_bit(kind, dtype):
    model = made(kind, **KINDS[kind]).to(dtype)
    asked = prompts(8, seed=3, high=80)
    lonely = Drive(model, buckets=[32, 64])
    wanted, tokens = [], []
    for prompt in asked:
        job = lonely.job(prompt, MAX, ignore_eos=True)
        wanted += until_the_last(lonely, [job])
        tokens += lonely.finish([job])
    assert len({tuple(some) for some in tokens}) > 4
    drive = Drive(model, buckets=[32, 64])
    for how in ({}, {"seed": 1}, {"seed": 2, "chunk": 9}, {"seed": 3, "chunk": 40, "evict": 0.1}):
        jobs = [drive.job(prompt, MAX, ignore_eos=True) for prompt in asked]
        assert until_the_last(drive, jobs, **how) == wanted
        assert drive.finish(jobs) == tokens


def test_tokens_in_float32_are_those_of_generate():
    model = made("llama", **LLAMA)
    asked = prompts(9, high=80)
    wanted = [alone(model, prompt, MAX, eos_token_id=-1) for prompt in asked]
    with engine(model, slots=4, buckets=[40]) as running:
        answers = [running.submit(prompt, max_tokens=MAX, ignore_eos=True) for prompt in asked]
        assert [list(answer.result(60).token_ids) for answer in answers] == wanted


def test_half_precision_is_served_the_same_alone_and_in_company():
    model = made("gpt2", **KINDS["gpt2"]).to(torch.bfloat16)
    asked = prompts(10, high=70)
    how = {"max_tokens": MAX, "temperature": 0.8, "seed": 5, "ignore_eos": True}
    with engine(model, buckets=[48]) as running:
        single = [running(prompt, **how).token_ids for prompt in asked]
        answers = [running.submit(prompt, **how) for prompt in asked]
        assert [answer.result(60).token_ids for answer in answers] == single


def test_a_model_whose_kernels_round_by_company_is_refused_with_buckets():
    model = made("llama", **LLAMA)

    def rounding(module, inputs, output):
        return output + 1e-6 * output.mean(0, keepdim=True)

    model.model.layers[0].mlp.register_forward_hook(rounding)
    LanguageModel(model)
    with pytest.raises(BackendError, match="cannot be served with buckets here: the same token in another company"):
        LanguageModel(model, buckets=[32])


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ("32", "buckets must be a list of lengths"),
        (32, "buckets must be a list of lengths"),
        ([0], "buckets: a length must be a whole number from 1 to 96, got 0"),
        ([97], "got 97"),
        ([True], "got True"),
        ([3.5], r"got 3\.5"),
    ],
)
def test_wrong_buckets_are_refused(buckets, message):
    with pytest.raises(BackendError, match=message):
        LanguageModel(made("llama", **LLAMA), buckets=buckets)


def test_shapes_depend_on_a_row_alone():
    fixed = fixed_of([64, 32, 32], 4, 96)
    assert fixed == Fixed(4, (32, 64, 96)) and fixed_of([], 4, 96) is None
    assert [fixed.context(end) for end in (1, 32, 33, 64, 96)] == [32, 32, 64, 64, 96]
    rows = [Row(0, 40, [7]), Row(1, 0, list(range(70))), Row(2, 41, [8]), Row(3, 10, [9])]
    shapes = [(fixed.shape(call), [row.slot for row in call]) for call in fixed.calls(rows)]
    blocks = [((1, BLOCK, 32), [1]), ((1, BLOCK, 64), [1]), ((1, BLOCK, 96), [1])]
    assert shapes == [*blocks, ((4, 1, 64), [0, 2]), ((4, 1, 32), [3])]


def test_texts_are_cut_at_the_same_places_wherever_they_begin():
    assert [(row.start, row.end) for row in pieces(Row(0, 40, list(range(60))))] == [(40, 64), (64, 96), (96, 100)]
    assert [(row.start, row.end) for row in rows_of(Row(0, 30, list(range(6))), 33)] == [
        (30, 33),
        (33, 34),
        (34, 35),
        (35, 36),
    ]
    assert [floor(end, 40) for end in (5, 32, 39, 40, 41)] == [0, 32, 32, 40, 41]
