"""Texts that move between two models with the same weights: each gets the tokens that it would have got."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import pytest
import torch
from moving import Host
from texts import model_of, prompts

from neustream import FCFS, Graph, StageFailed
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.modules import Texts, modules_of
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.text import Ask
from neustream.core.batch import StepInput
from neustream.core.kv_cache import KVCache
from neustream.core.learnt_steps import LearntSteps
from neustream.graphs import llm, llm_profiles

MAX = 6
SAMPLINGS = {
    "greedy": Sampling(ignore_eos=True),
    "sampled": Sampling(temperature=1.2, top_p=0.9, seed=11, ignore_eos=True),
    "of a stop token": Sampling(temperature=1.0, seed=3, stop_token_ids=tuple(range(3, 20))),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Chat(Host):
    """A host of one language model, whose weights are its own."""

    def __init__(self, kind="llama", *, slots=4, step_tokens=2048, kv_cache=None, **changes):
        graph = Graph("chat", llm("llm"))
        model = LanguageModel(copy.deepcopy(model_of(kind, **changes)), slots=slots)
        self.texts = Texts(model, lambda given: given.params["ask"])
        super().__init__(
            graph,
            modules_of(self.texts),
            profiles=llm_profiles("llm", LearntSteps()),
            policy=FCFS(drop_hopeless=False),
            kv_caches={"llm": kv_cache or KVCache(32)},
            step_tokens=step_tokens,
        )

    def ask(self, id, prompt, sampling):
        ask = Ask(prompt, sampling)
        self.submit(id, {"prompt_tokens": len(prompt), "max_tokens": MAX, "ask": ask})

    @property
    def used(self):
        """Slots in use."""
        return self.executor.call(lambda: len(self.texts)).result()

    def tokens(self, id):
        return [update["token"] for update in self.outputs.get(id, [])]


@cache
def unmoved(kind, name, at):
    with Chat(kind) as host:
        host.ask("a", prompts(4)[at], SAMPLINGS[name])
        host.finish()
        return host.tokens("a")


@pytest.mark.parametrize("cached", [True, False], ids=["keys and values", "tokens"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_text_that_moves_at_any_step_is_the_unmoved_one(name, cached):
    wanted = unmoved("llama", name, 0)
    assert len(wanted) > 2
    with Chat() as source, Chat() as target:
        for at in range(len(wanted)):
            source.ask(f"r{at}", prompts(4)[0], SAMPLINGS[name])
            source.steps(at)
            pieces = target.arrive(source.leave(f"r{at}", keep=cached))
            assert bool(pieces) == (cached and at > 0)
            assert source.used == 0 and target.used == (1 if pieces else 0)
            target.finish()
            assert source.tokens(f"r{at}") + target.tokens(f"r{at}") == wanted, at


@pytest.mark.parametrize("cached", [True, False], ids=["keys and values", "tokens"])
def test_in_the_middle_of_a_prefill(cached):
    prompt = prompts(1, seed=4, low=30, high=30)[0]
    with Chat() as host:
        host.ask("a", prompt, SAMPLINGS["sampled"])
        host.finish()
        wanted = host.tokens("a")
    with Chat(step_tokens=7) as source, Chat(step_tokens=5) as target:
        source.ask("a", prompt, SAMPLINGS["sampled"])
        source.steps(2)
        computed = source.scheduler.jobs["a"].computed
        assert 0 < computed < 30
        target.arrive(source.leave("a", keep=cached))
        assert target.scheduler.jobs["a"].computed == (computed if cached else 0)
        target.finish()
        assert source.tokens("a") == [] and target.tokens("a") == wanted


def test_keys_and_values_that_moved_are_those_that_are_read():
    """The control of the test above: without its own ones, a text goes elsewhere."""
    wanted = unmoved("llama", "greedy", 2)
    with Chat() as source, Chat() as target:
        source.ask("a", prompts(4)[2], SAMPLINGS["greedy"])
        source.steps(2)
        carry, pieces = pickle.loads(source.leave("a"))
        for layer in pieces["llm.decode"].layers:
            layer.setflags(write=True)
            layer[:] = 0
        target.arrive(pickle.dumps((carry, pieces)))
        target.finish()
        assert source.tokens("a") + target.tokens("a") != wanted


def test_it_may_move_on_and_come_back():
    wanted = unmoved("opt", "sampled", 1)
    with Chat("opt") as one, Chat("opt") as other:
        one.ask("a", prompts(4)[1], SAMPLINGS["sampled"])
        here, there = one, other
        while here.scheduler.jobs:
            here.steps(1)
            if here.scheduler.jobs:
                there.arrive(here.leave("a"))
                here, there = there, here
        got = sorted((update["llm"].outputs for host in (one, other) for update in host.outputs["a"]), key=len)
        assert list(got[-1]) == wanted and [len(some) for some in got] == list(range(1, len(wanted) + 1))


@pytest.mark.parametrize("cached", [True, False], ids=["keys and values", "tokens"])
def test_others_on_both_sides_get_what_they_get_anyway(cached):
    names = ("greedy", "sampled", "sampled", "greedy")
    wanted = [unmoved("gpt2", name, at) for at, name in enumerate(names)]
    with Chat("gpt2", slots=2) as source, Chat("gpt2", slots=2) as target:
        for at, host in enumerate((source, source, target, target)):
            host.ask(str(at), prompts(4)[at], SAMPLINGS[names[at]])
        source.steps(3)
        target.steps(2)
        target.arrive(source.leave("1", keep=cached))  # where two slots are in use already
        source.finish()
        target.finish()
        got = [source.tokens(str(at)) + target.tokens(str(at)) for at in range(4)]
        assert got == wanted
        assert source.used == target.used == 0


def test_a_preempted_text_moves_without_keys_and_values():
    with Chat(kv_cache=KVCache(44, block_size=1)) as source, Chat() as target:
        for at in range(2):
            source.ask(str(at), prompts(4, low=20, high=20)[at], SAMPLINGS["sampled"])
        while source.scheduler.jobs["1"].num_blocks or not source.tokens("1"):
            source.steps(1)
        assert target.arrive(source.leave("1")) == {}
        target.finish()
        got = source.tokens("1") + target.tokens("1")
    with Chat() as host:
        host.ask("1", prompts(4, low=20, high=20)[1], SAMPLINGS["sampled"])
        host.finish()
        assert got == host.tokens("1")


def test_keys_and_values_are_copied_while_the_text_goes_on():
    wanted = unmoved("llama", "greedy", 2)
    with Chat() as source, Chat() as target:
        source.ask("a", prompts(4)[2], SAMPLINGS["greedy"])
        pieces, last = [], 0
        for _ in range(3):
            source.steps(1)
            pieces.append(source.texts.export(StepInput("a", {}, {}, "llm.decode"), last))
            last = pieces[-1].last
        assert [piece.first for piece in pieces] == [0, *[piece.last for piece in pieces[:-1]]]
        carry, _ = pickle.loads(source.leave("a", keep=False))
        for piece in pieces:
            target.texts.adopt(carry.input(), piece)
        target.scheduler.take(carry, target.graph, 3.0, cached=True)
        target.finish()
        assert source.tokens("a") + target.tokens("a") == wanted


# -- what is refused ------------------------------------------------------------------------------------


def left_after_two_steps(**options):
    with Chat(**options) as source:
        source.ask("a", prompts(4)[0], SAMPLINGS["sampled"])
        source.steps(2)
        return pickle.loads(source.leave("a"))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_hidden_layers": 1}, r"of 2 layer\(s\) in torch.float32, LlamaForCausalLM here has 1"),
        ({"num_key_value_heads": 4}, "or other heads"),
    ],
)
def test_another_models_keys_and_values_are_refused(options, why):
    carry, pieces = left_after_two_steps()
    with Chat(**options) as target:
        with pytest.raises(StageFailed, match=f"stage 'llm.decode': keys and values .* {why}"):
            target.executor.adopt(carry.input(), pieces).result()
        assert target.used == 0


def test_what_does_not_follow_on_is_refused():
    carry, pieces = left_after_two_steps()
    [piece] = pieces.values()
    given = carry.input()
    with Chat() as target:
        older = StepInput(given.id, given.params, {}, given.stage)
        with pytest.raises(StageFailed, match="its state is of 0 computed tokens"):
            target.texts.adopt(older, piece)
        target.executor.adopt(given, pieces).result()
        with pytest.raises(StageFailed, match="request 'a' is here already"):
            target.executor.adopt(given, pieces).result()
        with pytest.raises(StageFailed, match=rf"{piece.last} tokens are there"):
            target.texts.adopt(given, piece)


def test_a_text_in_the_state_is_plain_and_never_changes():
    with Chat() as host:
        host.ask("a", prompts(4)[0], SAMPLINGS["sampled"])
        host.steps(2)
        text = host.scheduler.jobs["a"].state["llm"]
        before = pickle.dumps(text)
        host.steps(2)
        assert pickle.dumps(text) == before and pickle.loads(before) == text
        assert host.scheduler.jobs["a"].state["llm"] != text
