"""Chats with images over HTTP: a tiny LLaVA looks at data: URLs, and nothing is fetched."""

from __future__ import annotations

import base64
import copy
import io

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from pictures import picture, sighted  # noqa: E402
from PIL import Image  # noqa: E402
from serving import serving, stock, text_service  # noqa: E402
from toys import Flat  # noqa: E402

from neustream import serve  # noqa: E402
from neustream.backends.loading import load  # noqa: E402
from neustream.server.config import ModelConfig, ServerConfig  # noqa: E402
from neustream.server.loading import Loaded  # noqa: E402
from neustream.server.models import TextModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
LIMITS = {"images": 2, "pixels": 1, "image_body_kb": 64}


@pytest.fixture(scope="module")
def running():
    model, processor = sighted("llava")
    loaded = []

    def load(metrics):
        service = serve(copy.deepcopy(model), processor, profile=Flat(), slots=4, observers=[metrics])
        mount = service.models[""]
        sizes = mount.model.max_len, mount.model.vocabulary
        loaded.append(Loaded(service, [TextModel("tiny", mount.tokenizer, *sizes, see=mount.reader.chat)]))
        return loaded[0]

    with serving(load, limits=LIMITS) as (url, said, _):
        assert said.get(timeout=60) == "ready: tiny"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client, loaded[0].service


def data(image, kind="png"):
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask(*parts, **options):
    content = [
        {"type": "text", "text": part} if not part.startswith("URL ") else image_part(part.removeprefix("URL "))
        for part in parts
    ]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    return {**asked, **options}


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def test_a_chat_with_images_is_what_the_library_makes_of_them(running):
    client, service = running
    shown = [picture(1), picture(2, 16, 16)]
    content = [
        {"type": "text", "text": "look "},
        {"type": "image", "image": shown[0]},
        {"type": "text", "text": " and "},
        {"type": "image", "image": shown[1]},
    ]
    wanted = service([{"role": "user", "content": content}], max_tokens=6, ignore_eos=True)
    body = ask("look ", "URL " + data(shown[0]), " and ", "URL " + data(shown[1], "webp"), n=2)
    body["messages"][0]["content"][3] = image_part(data(shown[1]))
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert [choice["message"]["content"] for choice in told["choices"]] == [wanted.text] * 2
    assert told["usage"]["prompt_tokens"] == wanted.prompt_tokens > 32  # both images have 16 tokens
    other = ask("look ", "URL " + data(picture(3)), " and ", "URL " + data(shown[1]))
    assert client.post("/v1/chat/completions", json=other).json()["choices"][0]["message"]["content"] != wanted.text


def test_a_chat_with_images_is_streamed_and_texts_go_on_beside_it(running):
    client, service = running
    body = ask("look ", "URL " + data(picture(1)), stream=True)
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200 and "[DONE]" in answer.read().decode()
    told = client.post("/v1/chat/completions", json=ask("only text")).json()
    assert (
        told["choices"][0]["message"]["content"] == service("user:only text;model:", max_tokens=6, ignore_eos=True).text
    )


GOOD = data(picture(1, 4, 4))
REFUSED = {
    "http": ("http://127.0.0.1:1/cat.png", 400, "nothing is fetched"),
    "https": ("https://example.com/cat.png", 400, "nothing is fetched"),
    "file": ("file:///etc/passwd", 400, "nothing is fetched"),
    "a path": ("/etc/passwd", 400, "nothing is fetched"),
    "text": ("data:text/plain;base64,aGVsbG8=", 400, "nothing is fetched"),
    "no base64": ("data:image/png;base64,%%%", 400, "no base64"),
    "no image": ("data:image/png;base64,aGVsbG8=", 400, "no picture (png, jpeg, webp)"),
    "half an image": (data(picture(1, 40, 40))[:-800], 400, "cannot be decoded|no base64"),
    "pixels": (data(Image.new("1", (1100, 1000))), 413, "1100 x 1000 pixels; at most 1000000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused_by_name(running, name):
    url, status, why = REFUSED[name]
    answer = running[0].post("/v1/chat/completions", json=ask("look ", "URL " + url))
    error = answer.json()["error"]
    assert answer.status_code == status and any(each in error["message"] for each in why.split("|")), answer.text
    assert error["param"] == "messages"


def test_limits_of_images(running):
    client, _ = running
    many = client.post("/v1/chat/completions", json=ask(*["URL " + GOOD] * 3))
    assert many.status_code == 413 and "3 images; at most 2" in many.text
    large = data(Image.new("1", (800, 800)))
    together = client.post("/v1/chat/completions", json=ask(*["URL " + large] * 2))
    assert together.status_code == 413 and "800 x 800 pixels; at most 360000" in together.text
    for path in ("/v1/chat/completions", "/tokenize"):
        body = client.post(path, json={"messages": ask("a" * 70_000)["messages"]})
        assert body.status_code == 413
    long = client.post("/v1/chat/completions", json=ask("a" * 10_000, "URL " + GOOD))
    assert long.status_code == 400 and "10000 characters" in long.text


def test_a_text_that_names_a_place_for_an_image_has_none(running):
    answer = running[0].post("/v1/chat/completions", json=ask("<image>", "URL " + GOOD))
    assert answer.status_code == 400 and "2 place(s) for images" in answer.json()["error"]["message"]
    bad = running[0].post("/v1/chat/completions", json={**ask("a"), "messages": [{"role": "user", "content": [{}]}]})
    assert bad.status_code == 400


def test_a_model_without_eyes_takes_no_images():
    with serving(lambda metrics: text_service(stock(), metrics)) as (url, said, _):
        assert said.get(timeout=60) == "ready: tiny"
        answer = httpx.post(f"{url}/v1/chat/completions", json=ask("look ", "URL " + GOOD), timeout=60)
        assert answer.status_code == 400 and "model 'tiny' takes no images" in answer.text


@pytest.mark.parametrize("how", ["a folder", "a config", "a folder for texts only"])
def test_a_model_with_eyes_is_loaded_with_its_processor(tmp_path, how):
    model, processor = sighted("llava")
    options = {"profile": Flat(), "slots": 2}
    if how == "a config":
        backend = {"model_type": "llava", "config": tiny_llava()}
        config = ModelConfig(name="tiny", kind="text", backend=backend, tokenizer="bytes", options=options)
    else:
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        texts = str(tmp_path) if how.endswith("only") else None
        config = ModelConfig(name="tiny", kind="text", path=tmp_path, tokenizer=texts, options=options)
    loaded = load(ServerConfig(models=[config]), lambda record: None)
    try:
        (text,) = loaded.models
        assert not loaded.failed and (text.see is None) == how.endswith("only")
        if text.see is not None:
            part = {"type": "image", "image": picture(1)}
            made = text.see([{"role": "user", "content": [part, {"type": "text", "text": "hi"}]}], {})
            done = loaded.service(made, max_tokens=3, ignore_eos=True)
            assert done.prompt_tokens > 16 and len(done.token_ids) == 3
    finally:
        loaded.service.close()


def tiny_llava():
    text = {"model_type": "llama", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, **LAYERS}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, **LAYERS}
    return {
        "image_token_index": 257,
        "text_config": {**text, "max_position_embeddings": 128},
        "vision_config": {**vision, "image_size": 16, "patch_size": 4},
    }
