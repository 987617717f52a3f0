"""What callers' own processors keep, and stop strings that begin in prompts: as in `generate`, in any company."""

import pickle
import threading

import pytest
import torch
import transformers
from texts import alone, made, prompts

import neustream
from neustream import RequestError
from neustream.backends.transformers.apart import copied
from neustream.backends.transformers.from_config import byte_tokenizer

MAX = 10


class Turns(transformers.LogitsProcessor):
    """Bars what it chose before, and moves on by its own count."""

    def __init__(self):
        self.calls, self.seen = 0, []

    def __call__(self, ids, logits):
        self.calls += 1
        logits = logits.roll(self.calls, -1)
        logits[:, self.seen] = -1e9
        self.seen.append(int(logits.argmax()))
        return logits


def enclosing():
    """A function that keeps the same."""
    keeps, calls = Turns(), 0

    def turn(ids, logits):
        nonlocal calls
        calls += 1
        return keeps(ids, logits.roll(calls, -1))

    return turn


class Locked(Turns):
    """One that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


@pytest.fixture(scope="module")
def service():
    model = made("llama", vocab_size=len(byte_tokenizer()), max_position_embeddings=128)
    with neustream.serve(model, byte_tokenizer(), slots=4, measure_s=0.1) as running:
        running.stock = model
        yield running


def by_generate(model, prompt, processor):
    with_it = transformers.LogitsProcessorList([processor])
    return alone(model, prompt, MAX, logits_processor=with_it, eos_token_id=None)


@pytest.mark.parametrize("make", [Turns, enclosing])
def test_a_processor_of_several_open_requests_keeps_their_texts_apart(service, make):
    given = prompts(6, seed=1)
    wanted = [by_generate(service.stock, prompt, make()) for prompt in given]
    one = make()
    answers = [service.submit(prompt, max_tokens=MAX, processors=[one], ignore_eos=True) for prompt in given]
    assert [list(answer.result(60).token_ids) for answer in answers] == wanted
    assert by_generate(service.stock, given[0], one) == wanted[0]  # the caller's own is as it was


def test_one_that_cannot_be_copied_is_of_one_open_request(service):
    first, other = prompts(2, seed=2)
    gate = threading.Event()

    class Gated(Locked):
        def __call__(self, ids, logits):
            gate.wait(60)
            return super().__call__(ids, logits)

    one = Gated()
    answer = service.submit(first, max_tokens=MAX, processors=[one], ignore_eos=True)
    try:
        with pytest.raises(RequestError, match="processors: a Gated cannot be copied, and another open request has it"):
            service.submit(other, max_tokens=MAX, processors=[Turns(), one])
    finally:
        gate.set()
    assert list(answer.result(60).token_ids) == by_generate(service.stock, first, Turns())
    assert one.calls == MAX  # it is the caller's own, and free again
    service(other, max_tokens=1, processors=[one])


def test_copies_share_models_and_nothing_that_changes():
    one = Turns()
    one.model, one.values, one.random = torch.nn.Linear(2, 2), torch.ones(2), torch.Generator().manual_seed(5)
    one.again, one.called = one, enclosing()
    (other,) = copied((one,))
    assert other.model is one.model and other.again is other
    other(None, torch.zeros(1, 3))
    other.called(None, torch.zeros(1, 3))
    other.values += 1
    assert (one.calls, one.seen, one.values.tolist()) == (0, [], [1, 1])
    assert one.called.__closure__[0].cell_contents == 0 and other.called.__closure__[0].cell_contents == 1
    assert torch.equal(torch.rand(3, generator=one.random), torch.rand(3, generator=other.random))


# -- stop strings that begin in the prompt ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "outputs", "stop", "text"),
    [
        ("xxab", "cdefgh", ["abc"], ""),
        ("xxab", "cdefgh", ["bcd"], ""),
        ("xxab", "cdefgh", ["zz", "xabcde"], ""),
        ("xxab", "cdefgh", ["ab"], "cdefghcdef"),  # it is in the prompt, and does not come again
        ("abab", "ababcd", ["abab"], ""),  # the first output ends no stop string, the second does
        ("xxab", "cdefgh", ["abce", "cd"], ""),
        ("xxab", "cdefgh", ["abce", "ef"], "cd"),
        ("é", "abcdef", ["éab"], ""),
        ("x", "cdefgh", ["abxcd", "xce"], "cdefghcdef"),
    ],
)
def test_stop_strings_may_begin_in_the_prompt(service, prompt, outputs, stop, text):
    tokenizer = byte_tokenizer()
    begins = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    letters = tokenizer(outputs, add_special_tokens=False)["input_ids"]

    def write(ids, logits):
        found = torch.full_like(logits, -1e9)
        found[:, letters[(ids.shape[1] - begins) % len(letters)]] = 0
        return found

    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    how = {"max_new_tokens": MAX, "do_sample": False, "eos_token_id": None, "tokenizer": tokenizer}
    with_it = transformers.LogitsProcessorList([write])
    out = service.stock.generate(**ids, **how, stop_strings=stop, logits_processor=with_it)
    answer = service.submit(
        ids["input_ids"][0].tolist(), max_tokens=MAX, stop=stop, processors=[write], ignore_eos=True
    )
    pieces = [token.text for token in answer]
    done = answer.result(60)
    assert list(done.token_ids) == out[0, begins:].tolist()
    assert done.text == text == "".join(pieces)
    assert pickle.loads(pickle.dumps(done)).text == text
