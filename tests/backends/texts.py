"""Tiny language models, and a driver that takes their jobs through steps in any order."""

from __future__ import annotations

import random
from functools import cache

import torch
import transformers
from places import DEVICE

from neustream import Graph, Request
from neustream.backends.transformers import ahead
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.modules import Texts, modules_of
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.text import Ask
from neustream.core.batch import input_of
from neustream.core.work import Walk
from neustream.errors import StageFailed
from neustream.graphs import llm

VOCABULARY = 96
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96}
CONFIGS = {
    "opt": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "llama": {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2},
}
IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


@cache
def model_of(kind, attention="sdpa", **changes):
    """A model of a real architecture, made once; for tests that leave it as it is."""
    return made(kind, attention, **changes)


def made(kind, attention="sdpa", **changes):
    """A model of a real architecture with random weights, large enough for its tokens to vary."""
    known = {"vocab_size": VOCABULARY, **IDS, **CONFIGS.get(kind, SIZES)}
    config = transformers.AutoConfig.for_model(kind, **{**known, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model.to(DEVICE)


def all_ahead(patch):
    """Let seeded rows on a CPU draw their numbers ahead, however few they are, as if torch left two cores for it."""
    patch.setattr(ahead, "FEWEST", 1)
    patch.setattr(ahead, "cores", lambda: torch.get_num_threads() + 2)


def prompts(count, seed=0, low=1, high=40):
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(low, high))] for _ in range(count)]


def alone(model, prompt, max_tokens, **options):
    """What the stock `generate` makes of a prompt on its own: the new tokens."""
    seed = options.pop("seed", None)
    if seed is None:
        options["do_sample"] = False
    else:
        torch.manual_seed(seed)
        options = {"do_sample": True, "top_k": 0, **options}
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, **options)
    return out[0, len(prompt) :].tolist()


class Drive:
    """Jobs of one model, moved by hand: prefills in parts, decodes, both at once, evictions."""

    def __init__(self, model, slots=8, **options):
        self.node = Graph("chat", llm("llm"))
        self.texts = Texts(LanguageModel(model, slots=slots, **options), lambda given: given.params["ask"])
        self.modules = modules_of(self.texts)
        self.walks = {}
        self.count = 0

    def job(self, prompt, max_tokens=8, **sampling):
        params = {
            "prompt_tokens": len(prompt),
            "max_tokens": max_tokens,
            "ask": Ask(prompt, Sampling(**sampling)),
            "tokens": [],
            "updates": [],
        }
        self.count += 1
        walk = Walk(Request(f"r{self.count}", self.node, params=params))
        self.walks[walk.job] = walk
        return walk.job

    def step(self, shares):
        """One step for the jobs of `shares`, each with its part of a prefill (None: all of it)."""
        jobs = list(shares)
        sizes = [
            job.size if share is None or job.stage.phase == "decode" else min(share, job.size)
            for job, share in shares.items()
        ]
        names = {job.stage.name for job in jobs}
        inputs = [input_of(job, size) for job, size in zip(jobs, sizes, strict=True)]
        updates = self.modules[names.pop() if len(names) == 1 else "llm"].step(inputs)
        assert len(updates) == len(jobs)
        for job, size, update in zip(jobs, sizes, updates, strict=True):
            if isinstance(update, StageFailed):
                raise update
            assert ("token" in update) == (size == job.size)
            if "token" in update:
                job.params["tokens"].append(update["token"])
                job.params["updates"].append(update)
            if self.walks[job].advance(update, size) is None:
                self.texts.release(job.id)

    def evict(self, job):
        """Take its blocks, as a scheduler does: it goes back to its prefill."""
        self.texts.release(job.id)
        self.texts.release(job.id)  # twice changes nothing
        self.walks[job].preempt()

    def finish(self, jobs):
        while open := [job for job in jobs if job.stage is not None]:
            self.step(dict.fromkeys(open))
        return [job.params["tokens"] for job in jobs]

    def shuffle(self, jobs, seed, chunk=None, evict=0.0):
        """Run `jobs` in steps of random members, prefills in random parts, with random evictions."""
        draw = random.Random(seed)
        while open := [job for job in jobs if job.stage is not None]:
            some = draw.sample(open, draw.randint(1, len(open)))
            self.step({job: draw.randint(1, chunk) if chunk else None for job in some})
            for job in open:
                if job.stage is not None and draw.random() < evict:
                    self.evict(job)
        return [job.params["tokens"] for job in jobs]
