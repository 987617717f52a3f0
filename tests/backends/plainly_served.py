"""Pipelines as tests serve them: without a measurement, under a plain policy, and calls for them."""

from __future__ import annotations

import threading
import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports

import neustream as ns


class Flat(dict):
    """A profile for every stage, by which sharing pays."""

    def __contains__(self, stage):
        return True

    def __missing__(self, stage):
        return ns.TableProfile(stage, [1, 64], [0.001, 0.002])


def serve(pipe, **options):
    options = {"profiles": Flat(), "samples": [], "policy": ns.FCFS(drop_hopeless=False), "progress": False, **options}
    return ns.serve(pipe, **options)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def words(at=0, steps=3, **more):
    """Arguments of a Stable Diffusion call."""
    common = {"num_inference_steps": steps, "output_type": "pt", "height": 16, "width": 16}
    return {"prompt": f"a cat {at}", "generator": seeded(at), **common, **more}


def together(service, calls):
    """The images of calls that begin at once."""
    service(**calls[0])  # the shape is known from now on
    gate = threading.Event()
    service._devices[0].executor.call(gate.wait)
    answers = [service.submit(**{**one, "generator": seeded(at)}) for at, one in enumerate(calls)]
    gate.set()
    return [answer.result(60).images for answer in answers]


def close_to(ours, stock):
    return float((ours - stock).abs().max() / stock.abs().max()) < 1e-5


class Plain:
    """Attention as it is defined, row by row."""

    def attend(self, attn, hidden, given):
        query, key, value = (attn.head_to_batch_dim(f) for f in (attn.to_q(hidden), attn.to_k(given), attn.to_v(given)))
        mixed = torch.bmm(attn.get_attention_scores(query, key), value)
        return attn.to_out[0](attn.batch_to_head_dim(mixed))

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        return self.attend(attn, hidden_states, self.given(hidden_states, encoder_hidden_states))

    def given(self, hidden, encoded):
        return hidden if encoded is None else encoded
