"""Prompts with images: their outputs are those of the stock `generate` alone, whatever the company."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from crossing import Crossing
from pictures import EXACT, IMAGE, MARKERS, alone, picture, sighted
from places import DEVICE
from texts import Drive, model_of
from toys import Flat

from neustream import RequestError, RequestFailed, serve
from neustream.backends.transformers.eyes import Eyes
from neustream.backends.transformers.from_config import byte_tokenizer
from neustream.backends.transformers.images import Reader
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.text import Ask
from neustream.engine.events import Finished
from neustream.errors import BackendError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2's, of how processors call it
MAX = 6


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def engine(model, processor, **options):
    return serve(model, processor, **{"profile": Flat(), "slots": 6, **options})


def asked(family):
    """Prompts of all kinds: with one image, with two of other sizes, without any."""
    mark = MARKERS.get(family, "<image>")
    return [
        (f"what is {mark}?", [picture(1)]),
        (f"{mark}and {mark} differ in", [picture(2, 32, 16), picture(3, 16, 16)]),
        ("no image at all", []),
        (f"what is {mark}?", [picture(4)]),
    ]


@pytest.fixture(scope="module")
def llava():
    model, processor = sighted("llava")
    with engine(copy.deepcopy(model), processor) as running:
        yield running


# -- results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EXACT)
def test_in_company_outputs_are_those_of_generate(family):
    model, processor = sighted(family)
    wanted = [alone(model, processor, text, images, MAX) for text, images in asked(family)]
    seeded = alone(model, processor, *asked(family)[0], MAX, seed=3, temperature=1.5)
    assert len({*map(tuple, wanted)}) > 2
    with engine(model, processor) as running:
        answers = [running.submit(text, images=images, max_tokens=MAX) for text, images in asked(family)]
        drawn = running.submit(asked(family)[0][0], images=[picture(1)], max_tokens=MAX, temperature=1.5, seed=3)
        assert [list(answer.result(60).token_ids) for answer in answers] == wanted
        assert list(drawn.result(60).token_ids) == seeded
        assert sorted(running.profiles) == ["llm.decode", "llm.prefill", "llm.see"]


@pytest.mark.parametrize("family", EXACT)
def test_several_sequences_of_a_prompt_with_images_are_those_of_as_many_calls(family):
    model, processor = sighted(family)
    mark = MARKERS.get(family, "<image>")
    for text, images in ((f"what is {mark}?", [picture(1)]), (f"{mark}and {mark}", [picture(2), picture(3)])):
        wanted = [alone(model, processor, text, images, MAX, seed=seed, temperature=1.5) for seed in range(3)]
        with engine(model, processor, slots=2) as running:
            many = running(text, images=images, n=3, seed=0, max_tokens=MAX, temperature=1.5)
            short = running(text, images=images, n=3, seed=0, max_tokens=1, temperature=1.5)
        assert [list(one.token_ids) for one in many] == wanted
        assert [list(one.token_ids) for one in short] == [tokens[:1] for tokens in wanted]


@pytest.mark.parametrize(
    ("family", "attention"), [("llava", "sdpa"), ("qwen2_vl", "eager"), ("gemma3", "eager"), ("gemma3", "sdpa")]
)
def test_in_parts_and_after_preemptions_outputs_are_those_of_generate(family, attention):
    model, processor = sighted(family, attention)
    wanted = [alone(model, processor, text, images, MAX) for text, images in asked(family)]
    drive = Drive(model, slots=3)
    eyes = Eyes(model)
    reader = Reader(drive.texts.model, eyes, processor)
    jobs = []
    for text, images in asked(family):
        ids, sight = reader.read(text, images)
        job = drive.job(ids, MAX)
        if sight is not None:
            (seen,) = eyes.look([sight])
            job.params["ask"] = Ask(ids, Sampling(), sight=sight.with_(seen))
        jobs.append(job)
    assert drive.shuffle(jobs, seed=7, chunk=9, evict=0.1) == wanted


def test_with_buckets_images_change_nothing_to_the_last_bit():
    model, processor = sighted("llava")
    with engine(model, processor, buckets=[64], max_len=96, slots=3) as running:
        first = [running(text, images=images, max_tokens=MAX, logprobs=1) for text, images in asked("llava")]
        again = [running.submit(text, images=images, max_tokens=MAX, logprobs=1) for text, images in asked("llava")]
        assert [one.result(60).likelihoods for one in again] == [one.likelihoods for one in first]


@pytest.mark.parametrize("cached", [True, False], ids=["keys and values", "tokens"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_prompt_with_an_image_moves_at_any_step(family, cached):
    model, processor = sighted(family)
    text, images = asked(family)[1]
    wanted = alone(model, processor, text, images, 4)
    with engine(model, processor) as source, engine(copy.deepcopy(model), processor) as target:
        for step in range(1, 4):
            crossing = Crossing(source, f"r{step}", step, cached=cached)
            source.submit(text, images=images, max_tokens=4, id=f"r{step}")
            assert list(crossing.to(target).result(60).token_ids) == wanted


# -- ways to give them --------------------------------------------------------------------------------


def test_messages_text_arrays_and_what_the_processor_made_are_the_same(llava):
    _, processor = sighted("llava")
    shown = picture(1)
    wanted = llava("user:look <image>;model:", images=[shown], max_tokens=MAX).token_ids
    bare = [{"role": "user", "content": [{"type": "text", "text": "look "}, {"type": "image"}]}]
    own = [{"role": "user", "content": [{"type": "text", "text": "look "}, {"type": "image", "image": shown}]}]
    made = processor(text="user:look <image>;model:", images=[shown], return_tensors="pt")
    assert llava(bare, images=[shown], max_tokens=MAX).token_ids == wanted
    assert llava(own, max_tokens=MAX).token_ids == wanted
    assert llava(bare, images=[np.asarray(shown)], max_tokens=MAX).token_ids == wanted
    assert llava(made, max_tokens=MAX).token_ids == wanted
    assert llava(made, max_tokens=MAX).prompt_tokens == made["input_ids"].shape[1]


def test_messages_without_images_are_those_of_the_chat_template(llava):
    asked = [{"role": "user", "content": "just text"}]
    assert llava(asked, max_tokens=MAX).token_ids == llava("user:just text;model:", max_tokens=MAX).token_ids


def test_requests_are_looked_at_together():
    model, processor = sighted("llava")
    steps = []
    with engine(model, processor, observers=[steps.append]) as running:
        running("hold <image>", images=[picture(0)], max_tokens=20, ignore_eos=True)
        open = [running.submit(f"{n} <image>", images=[picture(n)], max_tokens=1) for n in range(5)]
        [answer.result(60) for answer in open]
    looks = [one.step for one in steps if isinstance(one, Finished) and one.step.stage == "llm.see"]
    assert sum(len(step) for step in looks) == 6 and len(looks) < 6
    assert {size for step in looks for size in step.sizes} == {1.0}  # images like the one that profiles are of


def test_tokens_of_other_images_have_other_names_and_those_of_the_same_have_the_same():
    model, processor = sighted("llava")
    with engine(model, processor) as running:
        calls = [running.models[""].request("a <image> b", images=[picture(n)]) for n in (1, 1, 2)]
        one, same, other = [call.params["ask"].names for call in calls]
        prompt = calls[0].params["ask"].prompt
    assert one == same != other
    assert [a == b for a, b in zip(one, other, strict=True)] == [token != IMAGE for token in prompt]


# -- what is refused ----------------------------------------------------------------------------------


def message(**part):
    return [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]


REFUSED = {
    "too few": (("a <image> <image>", [picture(1)]), "2 place(s) for images ('<image>'), and there are 1 image(s)"),
    "too many": (("a <image>", [picture(1), picture(2)]), "1 place(s) for images"),
    "none": (("a <image>", []), "1 place(s) for images ('<image>'), and there are 0 image(s)"),
    "no place": (("a", [picture(1)]), "0 place(s) for images"),
    "a path": (("a <image>", ["cat.png"]), "image 0 must be a PIL image or an array [height, width, 3], got str"),
    "no list": (("a <image>", picture(1)), "images must be a list of PIL images or arrays, got Image"),
    "a list of numbers": (("a <image>", [[1, 2]]), "image 0 must be a PIL image"),
    "floats": (("a <image>", [np.zeros((4, 4, 3))]), "image 0 must have values from 0 to 255 as uint8, got float64"),
    "no colours": (("a <image>", [np.zeros((4, 4), np.uint8)]), "array [height, width, 3], got [4, 4]"),
    "empty": (("a <image>", [np.zeros((0, 4, 3), np.uint8)]), "array [height, width, 3], got [0, 4, 3]"),
    "token ids": (([5, 6], [picture(1)]), "images go with a prompt of text or messages, got list"),
    "a url": ((message(type="image", url="http://x/cat.png"), None), "a message has an image by url"),
    "a name": ((message(type="image", image="/etc/passwd"), None), "must be a PIL image"),
    "a part without": ((message(type="image"), None), "1 part(s) for images without one, and images= has 0"),
    "both": ((message(type="image", image=picture(1)), [picture(2)]), "in the messages or as images=, not both"),
    "a video": ((message(type="video", video="x"), None), "a part of type 'video'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused_by_name(llava, name):
    (prompt, images), why = REFUSED[name]
    with pytest.raises(RequestError) as error:
        llava.submit(prompt, images=images, max_tokens=2)
    assert why in str(error.value)


def test_images_are_refused_by_a_model_without_eyes_and_without_a_processor():
    with serve(model_of("llama"), byte_tokenizer(), profile=Flat(), slots=2) as running:
        with pytest.raises(RequestError, match="LlamaForCausalLM has no eyes"):
            running.submit("a", images=[picture(1)])
        with pytest.raises(RequestError, match="LlamaForCausalLM has no eyes"):
            running.submit(message(type="image", image=picture(1)))
    model, processor = sighted("llava")
    with serve(model, processor.tokenizer, profile=Flat(), slots=2) as running:
        with pytest.raises(RequestError, match=r"need its processor: serve\(model, processor\)"):
            running.submit("a <image>", images=[picture(1)])
        assert sorted(running.profiles) == ["llm.decode", "llm.prefill"]


def test_a_broken_image_is_the_request_s_own_fault(llava):
    broken = picture(1)
    broken.close()
    with pytest.raises(RequestError, match="the processor cannot take this prompt with its images"):
        llava.submit("a <image>", images=[broken])
    with pytest.raises(RequestError, match="prompt_logprobs is for prompts without images"):
        llava.submit("a <image>", images=[picture(1)], prompt_logprobs=1)
    with pytest.raises(RequestError, match="has 256 positions"):
        llava.submit("<image>" * 20, images=[picture(1)] * 20)


def test_images_that_do_not_make_the_prompt_s_tokens_fail_alone(llava):
    _, processor = sighted("llava")
    made = dict(processor(text="a <image>", images=[picture(1)], return_tensors="pt"))
    wrong = {**made, "pixel_values": torch.cat([made["pixel_values"]] * 2)}
    answers = [llava.submit(one, max_tokens=2) for one in (made, wrong, made)]
    assert len(answers[0].result(60).token_ids) == len(answers[2].result(60).token_ids) == 2
    with pytest.raises(RequestFailed, match="its images make 32 tokens, and 16 places are in the prompt"):
        answers[1].result(60)
    with pytest.raises(RequestError, match="no image token"):
        llava.submit({**made, "input_ids": [[9, 9]], "attention_mask": None})
    with pytest.raises(RequestError, match="a prompt has no padding"):
        llava.submit({**made, "attention_mask": made["attention_mask"] * 0})


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("qwen3_vl", "what it sees goes into inner layers too"),
        ("paligemma", "images are for models in slots, and requests of Pali.* have their own caches"),
    ],
)
def test_what_is_not_exact_is_refused_with_its_reason(family, why):
    with pytest.raises(BackendError, match=why):
        engine(*sighted(family))


def test_a_processor_of_another_model_is_refused():
    with pytest.raises(BackendError, match="LlamaForCausalLM has no eyes: give its tokenizer"):
        engine(model_of("llama"), sighted("llava")[1])
    with pytest.raises(BackendError, match="LlavaForConditionalGeneration"):
        engine(sighted("llava")[0], sighted("qwen2_vl")[1])


def test_a_template_that_raises_and_a_tokenizer_without_eos_or_pad():
    model, processor = map(copy.deepcopy, sighted("llava"))
    processor.chat_template = "{{ raise_exception('no images on Sundays') }}"
    processor.tokenizer.eos_token = processor.tokenizer.pad_token = None
    for config in (model.generation_config, model.config, model.config.text_config):
        config.eos_token_id = config.pad_token_id = None
    with engine(model, processor, max_len=40) as running:
        with pytest.raises(RequestError, match=r"the chat template cannot take these messages: .*Sundays"):
            running.submit(message(type="image", image=picture(1)))
        done = running("a <image>", images=[picture(1)])
        assert (done.prompt_tokens, len(done.token_ids), done.finish_reason) == (18, 22, "length")
        with pytest.raises(RequestError, match="18 tokens of prompt and max_tokens=23 make 41, but max_len is 40"):
            running.submit("a <image>", images=[picture(1)], max_tokens=23)


def test_copies_of_a_model_look_too():
    model, processor = sighted("llava")
    wanted = [alone(model, processor, text, images, MAX) for text, images in asked("llava")]
    with engine(copy.deepcopy(model), processor, devices=[str(DEVICE)] * 2) as running:
        answers = [running.submit(text, images=images, max_tokens=MAX) for text, images in asked("llava")]
        assert [list(answer.result(60).token_ids) for answer in answers] == wanted


def test_a_tower_is_measured_and_kept(tmp_path):
    model, processor = sighted("llava")
    how = {"slots": 2, "measure_s": 20, "cache": tmp_path, "progress": False}  # a quarter is enough for two looks
    with serve(model, processor, **how) as running:
        seconds = running.profiles["llm.see"].latency(1, 1.0)
    (file,) = tmp_path.rglob("see-*.json")
    before = file.read_bytes()
    assert seconds > 0 and b'"batch"' in before
    with serve(model, processor, **how):
        assert file.read_bytes() == before


def test_a_tower_that_lacks_memory_looks_at_fewer_images_at_once(monkeypatch):
    model, processor = sighted("llava")
    eyes = Eyes(model)
    call, seen = eyes._call, []

    def lacking(sights):
        seen.append(len(sights))
        if len(sights) > 1 or sights[0] is large:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(sights)

    reader = Reader(LanguageModel(model, slots=1), eyes, processor)
    sights = [reader.read("a <image>", [picture(n)], None, None)[1] for n in range(5)]
    large, wanted = sights[3], eyes.look(sights)
    monkeypatch.setattr(eyes, "_call", lacking)
    found = eyes.look(sights)
    assert seen == [5, 2, 1, 1, 3, 1, 2, 1, 1]
    assert str(found[3]) == "the tower has images of 16 tokens, out of memory: OutOfMemoryError: CUDA out of memory"
    for one, other in zip(found[:3] + found[4:], wanted[:3] + wanted[4:], strict=True):
        torch.testing.assert_close(one, other)
