"""What requests want of their tokens: as the stock `generate` does it alone, in any company."""

import random

import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from texts import CONFIGS, VOCABULARY, Drive, all_ahead, alone, made, model_of, prompts  # noqa: E402

import neustream  # noqa: E402
from neustream import BackendError, RequestError  # noqa: E402
from neustream.backends.transformers import choosing, draws  # noqa: E402
from neustream.backends.transformers.choosing import Chooser, choose  # noqa: E402
from neustream.backends.transformers.defaults import defaults_of  # noqa: E402
from neustream.backends.transformers.from_config import byte_tokenizer  # noqa: E402
from neustream.backends.transformers.said import Place  # noqa: E402
from neustream.backends.transformers.sampling import Sampling  # noqa: E402
from neustream.backends.transformers.stops import Told, Watch  # noqa: E402
from neustream.backends.transformers.text import Ask, Text  # noqa: E402

MAX = 12


def wishes(draw):
    """A random set of parameters, as a request gives them."""
    some = draw.sample(range(3, VOCABULARY), 12)
    every = {
        "top_k": draw.randint(1, 40),
        "top_p": draw.uniform(0.1, 1),
        "min_p": draw.uniform(0, 0.3),
        "typical_p": draw.uniform(0.2, 1),
        "repetition_penalty": draw.uniform(0.7, 1.8),
        "no_repeat_ngram_size": draw.randint(1, 3),
        "logit_bias": {token: draw.uniform(-9, 9) for token in some[:4]},
        "suppress_tokens": some[4:8],
        "begin_suppress_tokens": some[8:],
        "bad_words_ids": [some[:1], some[2:4]],
        "min_tokens": draw.randint(1, MAX),
    }
    chosen = {name: every[name] for name in draw.sample(list(every), draw.randint(1, 6))}
    if draw.random() < 0.7:
        chosen |= {"temperature": draw.choice([0.5, 1.0, 1.7]), "seed": draw.randrange(100)}
    return chosen


def stock(asked):
    """The same, as `generate` is told it."""
    names = {"logit_bias": "sequence_bias", "min_tokens": "min_new_tokens"}
    told = {names.get(name, name): value for name, value in asked.items()}
    if "sequence_bias" in told:
        told["sequence_bias"] = {(token,): bias for token, bias in told["sequence_bias"].items()}
    if "seed" not in told:
        for name in ("top_k", "top_p", "min_p", "typical_p"):
            told.pop(name, None)
    return told


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_any_parameters_give_what_generate_gives_alone(kind, seed, monkeypatch):
    if seed:
        all_ahead(monkeypatch)
    draw = random.Random(seed)
    asked = [wishes(draw) for _ in range(6)]
    drive = Drive(model_of(kind), slots=4)
    given = prompts(len(asked), seed=seed)
    jobs = [drive.job(prompt, MAX, **each) for prompt, each in zip(given, asked, strict=True)]
    found = drive.shuffle(jobs, seed, chunk=7, evict=0.1)
    for prompt, each, tokens in zip(given, asked, found, strict=True):
        assert tokens == alone(model_of(kind), prompt, MAX, **stock(each)), each
    assert not len(drive.texts._streams)


def test_penalties_count_outputs_alone():
    logits = torch.zeros(1, 6)
    text = Text(Ask([1, 2, 2]), outputs=(3, 3, 4))
    chooser = Chooser(Sampling(presence_penalty=0.5, frequency_penalty=0.25), place=Place(begin=3))
    assert chooser.edited(logits, text).tolist() == [[0, 0, 0, -1.0, -0.75, 0]]
    assert logits.eq(0).all()  # the model's own are not touched


@pytest.mark.parametrize("seed", range(5))
def test_penalties_of_many_rows_are_those_of_each_alone(seed):
    """Of texts that grow, of one whose outputs are others each time, and of tokens that have no logit."""
    draw = random.Random(seed)
    costs = [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "presence_penalty": 0.4},
        {"presence_penalty": -0.3, "frequency_penalty": 0.7},
    ]
    begin = [draw.choices(range(40 + 5 * (seed % 2)), k=draw.randint(1, 30)) for _ in range(8)]
    rows = [Chooser(Sampling(**draw.choice(costs)), place=Place(begin=len(prompt))) for prompt in begin]
    texts = [Text(Ask(prompt)) for prompt in begin]
    assert all(row.costs is not None for row in rows)
    for step in range(6):
        logits = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * seed + step))
        logits[3, 5] = -torch.inf
        before, asked = logits.clone(), list(zip(rows, texts, strict=True))
        changed = choosing._edited(logits, asked, {})
        alone = [row.edited(logits[at : at + 1], text) for at, (row, text) in enumerate(asked)]
        assert torch.equal(changed, torch.cat(alone)) and torch.equal(logits, before)
        texts = [text.add(draw.randrange(40), b"") for text in texts]
        texts[0] = Text(texts[0].ask, tuple(draw.choices(range(40), k=step)))


def test_processors_are_of_their_request_alone():
    seen = []

    def only_nine(ids, scores):
        seen.append(ids.shape[1])
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([9], device=scores.device), 0.0)

    model, (one, two) = model_of("llama"), prompts(2)
    drive = Drive(model)
    jobs = [drive.job(one, 4, processors=[only_nine]), drive.job(two, 4)]
    first, second = drive.finish(jobs)
    assert first == [9, 9, 9, 9] and second == alone(model, two, 4)
    assert seen == [len(one) + at for at in range(4)]


def raises(ids, scores):
    raise ValueError("not today")


@pytest.mark.parametrize(
    ("processor", "why"),
    [
        (raises, "its sampling raised ValueError: not today"),
        (lambda ids, scores: None, "gave NoneType"),
        (lambda ids, scores: scores[:, :3], r"gave \(1, 3\), not logits of shape"),
        (lambda ids, scores: scores * torch.nan, "NaN"),
    ],
)
def test_a_processor_that_is_at_fault_fails_its_request_alone(processor, why):
    model, given = model_of("opt"), prompts(2)
    with neustream.serve(model, slots=2, measure_s=0.1) as service:
        bad = service.submit(given[0], max_tokens=4, processors=[processor])
        good = service.submit(given[1], max_tokens=4)
        with pytest.raises(neustream.RequestFailed, match=why):
            bad.result(60)
        assert list(good.result(60).token_ids) == alone(model, given[1], 4)


def test_rows_of_the_same_filters_share_their_calls(monkeypatch):
    calls = []
    real = choosing.with_seeds
    counted = lambda sampling, logits, own: (calls.append(len(logits)), real(sampling, logits, own))[1]  # noqa: E731
    monkeypatch.setattr(choosing, "with_seeds", counted)
    asked = [(Chooser(Sampling(temperature=1, top_p=0.9, seed=at)), Text(Ask([1]))) for at in range(5)]
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    together = choose(logits, asked)
    assert calls == [5]
    again = [Chooser(Sampling(temperature=1, top_p=0.9, seed=at)) for at in range(5)]
    apart = [choose(logits[at : at + 1], [(one, Text(Ask([1])))])[0] for at, one in enumerate(again)]
    assert together == apart


def test_draws_without_a_seed_follow_the_shares_and_move_nobody_elses():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]]).repeat(4000, 1)
    asked = [(Chooser(Sampling(temperature=1)), Text(Ask([1])))] * len(logits)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = choose(logits, asked)
    assert set(found) == {0, 2}
    assert 0.68 < found.count(2) / len(found) < 0.78  # e / (1 + e) is 0.731
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("seed", range(6))
def test_draws_from_the_likeliest_tokens_are_those_of_the_stock_filters(seed, monkeypatch):
    draw = random.Random(seed)
    options = {"top_k": draw.randint(1, 60), "top_p": draw.uniform(0.1, 1), "min_p": draw.uniform(0, 0.3)}
    some = draw.sample(sorted(options), draw.randint(1, 3))
    sampling = Sampling(temperature=draw.uniform(0.3, 2), **{name: options[name] for name in some})
    logits = 3 * torch.randn(5, 500, generator=torch.Generator().manual_seed(seed))
    shares = []
    monkeypatch.setattr(draws, "LIKELIEST", (400,))
    real = draws._drawn
    monkeypatch.setattr(draws, "_drawn", lambda found: (shares.append(found), real(found))[1])
    found = draws.at_random(sampling, logits)
    stock = draws.filtered(sampling, logits).softmax(-1)
    assert stock.gather(1, found.tokens[:, None]).gt(0).all()
    mine = shares[0] / shares[0].sum(-1, keepdim=True)
    width = mine.shape[1]
    stock = stock.sort(descending=True)[0]
    assert torch.allclose(mine.sort(descending=True)[0], stock[:, :width], atol=1e-6)
    assert stock[:, width:].eq(0).all()


def test_filters_that_leave_many_tokens_are_computed_of_all(monkeypatch):
    monkeypatch.setattr(draws, "LIKELIEST", (3,))
    found = draws.at_random(Sampling(temperature=1, top_p=0.99), torch.zeros(400, 8))
    assert set(found.tokens.tolist()) == set(range(8))


# -- stop strings -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service():
    model = made("llama", vocab_size=len(byte_tokenizer()))
    with neustream.serve(model, byte_tokenizer(), slots=4, measure_s=0.1) as running:
        yield running


def ascii_only(service):
    """Bars all tokens that are no letters, so that the text is readable."""
    size = len(byte_tokenizer())
    return [token for token in range(size) if not 97 <= token <= 110]


def test_a_stop_string_ends_a_text_over_the_borders_of_tokens(service):
    bars = ascii_only(service)
    whole = service("go", max_tokens=40, suppress_tokens=bars, temperature=1, seed=3, ignore_eos=True).text
    stop = whole[11:14]
    cut = whole.index(stop)
    answer = service.submit(
        "go", max_tokens=40, suppress_tokens=bars, temperature=1, seed=3, ignore_eos=True, stop=["zzz", stop]
    )
    tokens = list(answer)
    done = answer.result(60)
    assert done.text == whole[:cut] and done.finish_reason == "stop"
    assert "".join(token.text for token in tokens) == whole[:cut]
    assert len(done.token_ids) == cut + 3 and tokens[-1].finish_reason == "stop"


def test_a_stop_string_waits_for_min_tokens(service):
    asked = {"max_tokens": 40, "suppress_tokens": ascii_only(service), "temperature": 1, "seed": 3, "ignore_eos": True}
    whole = service("go", **asked).text
    stop = whole[4]
    later = whole.index(stop, 9)  # it comes again
    done = service("go", stop=stop, min_tokens=10, **asked)
    assert done.text == whole[:later]


def test_stops_are_held_back_and_found():
    told = Told(byte_tokenizer(), ["abc"])
    assert [told.add(token, last=False, stopped=False) for token in b"xabab"] == ["x", "", "", "ab", ""]
    assert told.add(b"c"[0], last=True, stopped=True) == ""
    told = Told(byte_tokenizer(), ["abc"])
    assert "".join(told.add(token, last=at == 2, stopped=False) for at, token in enumerate(b"xab")) == "xab"
    watch = Watch(byte_tokenizer(), ["abc", "q"])
    assert [watch.add(token) for token in b"ababcq"] == [False, False, False, False, True, True]


# -- chats and defaults -------------------------------------------------------------------------------


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if tools %}[{{ tools | length }}]{% endif %}{% if add_generation_prompt %}a:{% endif %}"
)


def chatting():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_messages_are_a_prompt():
    messages = [{"role": "user", "content": "hi"}]
    model = made("llama", vocab_size=len(byte_tokenizer()))
    with neustream.serve(model, chatting(), slots=2, measure_s=0.1) as service:
        done = service(messages, max_tokens=3, tools=[{"name": "clock"}])
        assert done.prompt_tokens == len("u:hi;[1]a:")
        assert done.token_ids == service(list(b"u:hi;[1]a:"), max_tokens=3).token_ids
        bare = service(messages, max_tokens=3, chat_template_kwargs={"add_generation_prompt": False})
        assert bare.prompt_tokens == len("u:hi;")
        for prompt, options, why in [
            ([{"content": "hi"}], {}, "each message is a dict with a role"),
            ([{"role": "user"}, 3], {}, "each message is a dict with a role"),
            ("hi", {"tools": []}, "tools is for a prompt of messages, got str"),
            ([{"role": "user", "content": "x" * 200}], {}, "the prompt has 205 tokens, but"),
        ]:
            with pytest.raises(RequestError, match=why):
                service.submit(prompt, max_tokens=3, **options)
    with (
        neustream.serve(model, byte_tokenizer(), slots=2, measure_s=0.1) as service,
        pytest.raises(RequestError, match="a tokenizer with a chat template"),
    ):
        service.submit(messages, max_tokens=3)


def test_a_chat_template_that_raises_is_the_requests_fault():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    model = made("llama", vocab_size=len(byte_tokenizer()))
    with (
        neustream.serve(model, tokenizer, slots=2, measure_s=0.1) as service,
        pytest.raises(RequestError, match=r"the chat template cannot take these messages: .*no system message"),
    ):
        service.submit([{"role": "system", "content": "x"}], max_tokens=3)


def test_what_the_generation_config_says_is_what_requests_get():
    model, (prompt,) = made("opt"), prompts(1, low=5)
    said = {"do_sample": True, "temperature": 1.3, "top_k": 7, "repetition_penalty": 1.2, "max_new_tokens": 9}
    for name, value in said.items():
        setattr(model.generation_config, name, value)
    with neustream.serve(model, slots=2, measure_s=0.1) as service:
        found = list(service(prompt, seed=5, ignore_eos=True).token_ids)
        greedy = list(service(prompt, temperature=0, repetition_penalty=1.0, max_tokens=4).token_ids)
    torch.manual_seed(5)
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None)
    assert found == out[0, len(prompt) :].tolist() and len(found) == 9
    assert greedy == alone(model, prompt, 4, repetition_penalty=1.0)


def test_a_prompt_as_long_as_max_length_is_refused():
    model = made("opt")
    model.generation_config.max_length = 4
    with neustream.serve(model, slots=1, measure_s=0.1) as service:
        assert len(service([5, 6, 7], ignore_eos=True).token_ids) == 1
        with pytest.raises(RequestError, match="the prompt has 4 tokens, and generation_config says max_length=4: at"):
            service.submit([5, 6, 7, 8])
        assert len(service([5, 6, 7, 8], max_tokens=2, ignore_eos=True).token_ids) == 2


def test_a_stop_string_may_be_a_special_token():
    tokenizer = byte_tokenizer()
    model = made("opt", vocab_size=len(tokenizer), eos_token_id=None)
    told = {"stop": tokenizer.eos_token, "logit_bias": {tokenizer.eos_token_id: 1e4}, "max_tokens": 4}
    with neustream.serve(model, tokenizer, slots=1, measure_s=0.1) as service:
        done = service("ab", **told)
        pieces = list(service.submit("ab", **told))
    assert done.token_ids == (tokenizer.eos_token_id,) and done.finish_reason == "stop" and done.text == ""
    assert [(piece.text, piece.finish_reason) for piece in pieces] == [("", "stop")]


def test_without_max_tokens_a_text_goes_on_to_the_end_of_the_context():
    with neustream.serve(model_of("opt"), slots=1, measure_s=0.1) as service:
        done = service(prompts(1)[0], ignore_eos=True)
    assert done.prompt_tokens + len(done.token_ids) == 96 and done.finish_reason == "length"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported; set model.generation_config.num_beams = None"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized' is not supported"),
        ({"forced_eos_token_id": -2}, "generation_config of M: forced_eos_token_id=-2: ValueError: "),
        ({"top_h": 2.0}, "generation_config of M: top_h=2.0: ValueError: "),
        ({"sequence_bias": [[["x"], 1.0]]}, "generation_config of M: sequence_bias="),
        ({"sequence_bias": [[[], 1.0]]}, r"sequence_bias=\[\[\[\], 1.0\]\] is nothing that it can say"),
        ({"sequence_bias": [[[5], float("nan")]]}, r"sequence_bias=\[\[\[5\], nan\]\] is nothing that it can say"),
        ({"sequence_bias": {(5, 6): float("inf")}}, "sequence_bias=.*inf.* is nothing that it can say"),
        ({"exponential_decay_length_penalty": (5, "x")}, r"exponential_decay_length_penalty=\(5, 'x'\): TypeError"),
        ({"exponential_decay_length_penalty": (5, float("nan"))}, r"\(5, nan\) is nothing that it can say"),
        ({"exponential_decay_length_penalty": (5,)}, r"exponential_decay_length_penalty=\(5,\): "),
        ({"do_sample": True, "temperature": -1.0}, "generation_config of M: temperature must be a finite number"),
        ({"suppress_tokens": "x"}, "generation_config of M: suppress_tokens must be a list"),
    ],
)
def test_a_generation_config_that_cannot_be_served_is_refused(said, why):
    config = transformers.GenerationConfig()
    for name, value in said.items():
        setattr(config, name, value)
    with pytest.raises(BackendError, match=why):
        defaults_of("M", config)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"min_p": 1.5}, "min_p must be a number from 0 to 1, got 1.5"),
        ({"typical_p": 0}, "typical_p must be a number above 0 and up to 1, got 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number above 0, got 0"),
        ({"presence_penalty": 3}, "presence_penalty must be a number from -2 to 2, got 3"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be a number from -2 to 2, got nan"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be a whole number from 0 on, got -1"),
        ({"logit_bias": [1]}, r"logit_bias must be a dict of token ids and numbers, got \[1\]"),
        ({"logit_bias": {"a": 1}}, "logit_bias: a token id must be a whole number from 0 on, got 'a'"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias of 3 must be a number from -10000 to 10000, got inf"),
        ({"logit_bias": {VOCABULARY: 1.0}}, f"logit_bias: {VOCABULARY} is no token: the vocabulary has"),
        ({"suppress_tokens": 3}, "suppress_tokens must be a list of token ids, got 3"),
        ({"bad_words_ids": [[]]}, "bad_words_ids: a sequence has no token"),
        ({"bad_words_ids": [3]}, "bad_words_ids must be a list of token ids, got 3"),
        ({"stop": ["x"] * 1000}, "stop may have 64 texts, got 1000"),
        ({"stop": ""}, "stop: each is a text of 1 to 1024 characters, got ''"),
        ({"stop": [3]}, "stop: each is a text of 1 to 1024 characters, got 3"),
        ({"stop": "x"}, "stop needs a tokenizer"),
        ({"processors": [3]}, "processors: each is called with token ids and logits, got 3"),
        ({"processors": 3}, "processors must be a list of logits processors, got 3"),
        ({"logprobs": 10**9}, "logprobs must be a whole number from 0 to 20, got"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens=9 is more than max_tokens=4"),
    ],
)
def test_wrong_wishes_are_refused_by_name(plain, asked, why):
    with pytest.raises(RequestError, match=why):
        plain.submit([3, 4], **{"max_tokens": 20, **asked})


@pytest.fixture(scope="module")
def plain():
    with neustream.serve(model_of("opt"), slots=2, measure_s=0.1) as running:
        yield running
