"""Images made of pictures, and pictures of images under way, over HTTP and of tiny real pipelines."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")
openai = pytest.importorskip("openai", reason="needs the extra 'dev'")

from PIL import Image, ImageDraw  # noqa: E402
from serving import serving  # noqa: E402

from neustream.backends.demo import IMAGE  # noqa: E402
from neustream.backends.loading import load  # noqa: E402
from neustream.server.config import ServerConfig  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ASK = {"prompt": "a lighthouse", "num_inference_steps": 6, "seed": 5}


def config(folder, *models):
    known = {"kind": "image"}
    sizes = {"edit": ["64x64", "64x96"]}
    options = {"measure_s": 0.0, "cache": str(folder), "max_batch": 4}
    return ServerConfig.model_validate(
        {
            "models": [
                {
                    **known,
                    "name": name,
                    "sizes": sizes.get(name, ["64x64"]),
                    "backend": {**IMAGE, "pipeline": kind},
                    "options": options,
                }
                for name, kind in models
            ],
            "limits": {"pixels": 1, "image_body_kb": 512},
        }
    )


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    settings = config(
        tmp_path_factory.mktemp("cache"),
        ("make", "StableDiffusionPipeline"),
        ("edit", "StableDiffusionImg2ImgPipeline"),
        ("paint", "StableDiffusionInpaintPipeline"),
    )
    with serving(lambda metrics: load(settings, metrics), limits=settings.limits) as (url, said, _):
        assert said.get(timeout=240) == "ready: make, edit, paint"
        yield url


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.fixture
def theirs(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=120) as client:
        yield client


def picture(width=64, height=64, mode="RGB"):
    found = Image.new(mode, (width, height), "navy")
    ImageDraw.Draw(found).ellipse((8, 8, width - 9, height - 9), fill="orange")
    return found


def hole(width=64, height=64):
    """All is to stay but a square, which is transparent."""
    found = Image.new("RGBA", (width, height), (0, 0, 0, 255))
    ImageDraw.Draw(found).rectangle((16, 16, 47, 47), fill=(0, 0, 0, 0))
    return found


def png(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def data(raw, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def shown(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


# -- edits --------------------------------------------------------------------------------------------


def test_edits_by_the_openai_client(theirs):
    extra = {"num_inference_steps": 6, "seed": 5, "strength": 0.5}
    made = theirs.images.edit(model="edit", image=("x.png", png(picture())), prompt="a boat", n=2, extra_body=extra)
    first, second = (shown(one.b64_json) for one in made.data)
    assert first.size == second.size == (64, 64) and first.tobytes() != second.tobytes()
    again = theirs.images.edit(model="edit", image=[("x.png", png(picture()))], prompt="a boat", extra_body=extra)
    assert shown(again.data[0].b64_json).size == (64, 64)


def test_forms_and_json_say_the_same(client):
    files = {"image": ("x.webp", png(picture(), "WEBP"))}
    fields = {**{name: str(value) for name, value in ASK.items()}, "model": "edit", "strength": "0.5"}
    of_form = client.post("/v1/images/edits", data=fields, files=files)
    bodies = [
        {**ASK, "model": "edit", "strength": 0.5, "image": data(png(picture(), "WEBP"), "webp")},
        {**ASK, "model": "edit", "strength": 0.5, "images": [{"image_url": data(png(picture(), "WEBP"), "webp")}]},
    ]
    for body in bodies:
        answer = client.post("/v1/images/edits", json=body)
        assert answer.status_code == of_form.status_code == 200, answer.text
        assert answer.json()["data"] == of_form.json()["data"]


def test_the_size_is_that_of_the_picture_if_it_is_served(client):
    for size, given, wanted in (("64x96", (64, 64), (64, 96)), (None, (64, 96), (64, 96)), (None, (50, 40), (64, 64))):
        body = {**ASK, "model": "edit", "image": data(png(picture(*given)))}
        answer = client.post("/v1/images/edits", json={**body, "size": size} if size else body)
        assert shown(answer.json()["data"][0]["b64_json"]).size == wanted


def test_masks_say_what_is_edited(client):
    body = {**ASK, "model": "paint", "strength": 1.0}
    one = client.post("/v1/images/edits", json={**body, "image": data(png(picture())), "mask": data(png(hole()))})
    white = Image.new("L", (64, 64))
    ImageDraw.Draw(white).rectangle((16, 16, 47, 47), fill=255)
    two = client.post("/v1/images/edits", json={**body, "image": data(png(picture())), "mask": data(png(white))})
    own = picture(mode="RGBA")
    own.putalpha(hole().getchannel("A"))
    three = client.post("/v1/images/edits", json={**body, "image": data(png(own))})
    pictures = [answer.json()["data"][0]["b64_json"] for answer in (one, two, three)]
    assert pictures[0] == pictures[1] == pictures[2]
    other = {**body, "image": data(png(picture())), "mask": data(png(Image.new("L", (64, 64), 255)))}
    assert client.post("/v1/images/edits", json=other).json()["data"][0]["b64_json"] != pictures[0]


GOOD = data(png(picture()))


def bomb(width, height):
    """A PNG that says it is so large, and is a few bytes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"x")), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ({"image": "https://example.com/x.png"}, 400, "nothing is fetched"),
        ({"image": "file:///etc/passwd"}, 400, "nothing is fetched"),
        ({"image": "data:text/html;base64,AA=="}, 400, "nothing is fetched"),
        ({"image": "data:image/png;base64,!!"}, 400, "no base64"),
        ({"image": data(b"GIF89a")}, 400, "no picture (png, jpeg, webp)"),
        ({"image": data(png(picture(), "GIF"))}, 400, "no picture"),
        ({"image": data(png(picture())[:90])}, 400, "cannot be decoded"),
        ({"image": data(bomb(1001, 1000))}, 413, "1001 x 1000 pixels; at most 1000000"),
        ({"image": data(bomb(20_000, 20_000))}, 413, "pixels; at most 1000000"),
        ({"image": data(bomb(2**31 - 1, 2**31 - 1))}, 413, "pixels"),
        ({"image": [GOOD, GOOD]}, 400, "one is taken, got 2"),
        ({"image": None}, 400, "image: it is needed"),
        ({"image": GOOD, "mask": GOOD}, 400, "mask is not supported by model 'edit'"),
        ({"model": "paint", "image": GOOD}, 400, "mask: it is needed"),
        ({"model": "paint", "image": GOOD, "mask": data(png(hole(64, 96)))}, 400, "64 x 96 pixels, but image has"),
        ({"image": GOOD, "strength": 0}, 400, "greater than 0"),
        ({"image": GOOD, "size": "512x512"}, 400, "allowed: 64x64, 64x96"),
        ({"image": GOOD, "model": "make"}, 404, "no model 'make' for edits"),
        ({"image": GOOD, "model": None}, 404, "allowed: edit, paint"),
        ({"image": GOOD, "slo": {"e2e_ms": 0.001}}, 400, "hopeless"),
        ({"image": "x" * 600_000}, 413, "larger than 524288 bytes"),
    ],
)
def test_bad_pictures_name_what_is_wrong(client, more, status, message):
    answer = client.post("/v1/images/edits", json={**ASK, "model": "edit", **more})
    assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text


def test_generations_are_not_asked_of_editors(client):
    answer = client.post("/v1/images/generations", json={**ASK, "model": "edit"})
    assert answer.status_code == 404 and "no model 'edit' for images" in answer.json()["error"]["message"]
    assert client.post("/v1/images/generations", json=ASK).status_code == 200  # the only one


@pytest.mark.parametrize(
    ("content", "boundary", "message"),
    [
        (b"", "x", "the form has no end"),
        (b"--x\r\nnonsense", "x", "the form has no end"),
        (b"--x--\r\n", "x", "prompt"),
        (b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n\r\n--x--\r\n', "x", ""),
        (b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\nmany\r\n--x--\r\n', "x", "n:"),
        (b'--x\r\nContent-Disposition: form-data; name="slo"\r\n\r\n{"ttft":\r\n--x--\r\n', "x", "slo"),
        (b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\nNaN\r\n--x--\r\n', "x", "n:"),
        (b'--x\r\nContent-Disposition: form-data; name="doc"; filename="a"\r\n\r\nz\r\n--x--\r\n', "x", "only image"),
        (b"--x\r\n\r\n\r\n--x--\r\n", None, ""),
        (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n' * 100 + b"--x--\r\n", "x", ""),
    ],
)
def test_bad_forms_are_400(client, content, boundary, message):
    media = "multipart/form-data" + (f"; boundary={boundary}" if boundary else "")
    answer = client.post("/v1/images/edits", content=content, headers={"content-type": media})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


def test_large_forms_are_413_and_others_415(client):
    files = {"image": ("x.png", b"x" * 600_000)}
    assert client.post("/v1/images/edits", data=ASK, files=files).status_code == 413
    headers = {"content-type": "text/plain"}
    assert client.post("/v1/images/edits", content=b"x", headers=headers).status_code == 415


def test_where_nothing_edits_it_is_404(tmp_path):
    settings = config(tmp_path, ("make", "StableDiffusionPipeline"))
    with serving(lambda metrics: load(settings, metrics)) as (url, said, _):
        said.get(timeout=120)
        answer = httpx.post(f"{url}/v1/images/edits", json={**ASK, "image": GOOD}, timeout=60)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


# -- under way ----------------------------------------------------------------------------------------


def events(text):
    found = []
    for block in text.strip().split("\n\n"):
        name, line = block.split("\n")
        event = json.loads(line.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


@pytest.mark.parametrize("count", [0, 1, 3])
def test_images_are_shown_under_way(client, count):
    body = {**ASK, "num_inference_steps": 30, "stream": True, "partial_images": count}
    whole = client.post("/v1/images/generations", json={**ASK, "num_inference_steps": 30}).json()["data"][0]["b64_json"]
    *partials, last = events(client.post("/v1/images/generations", json=body).text)
    assert last["type"] == "image_generation.completed" and last["b64_json"] == whole
    assert len(partials) <= count and (not count or partials)
    for at, event in enumerate(partials):
        assert event["type"] == "image_generation.partial_image" and event["partial_image_index"] == at
        assert shown(event["b64_json"]).size == (64, 64) and event["b64_json"] != whole


def test_edits_are_shown_under_way_by_the_openai_client(theirs):
    stream = theirs.images.edit(
        model="edit",
        image=("x.png", png(picture())),
        prompt="a boat",
        stream=True,
        partial_images=2,
        extra_body={"num_inference_steps": 40, "seed": 5},
    )
    found = list(stream)
    assert [event.type for event in found][-1] == "image_edit.completed"
    assert {event.type for event in found[:-1]} == {"image_edit.partial_image"} and len(found) <= 3
    assert [event.partial_image_index for event in found[:-1]] == list(range(len(found) - 1))


def test_previews_are_steps_and_no_requests(client, url):
    before = counted(client)
    body = {**ASK, "num_inference_steps": 30, "stream": True, "partial_images": 3}
    events(client.post("/v1/images/generations", json=body).text)
    after = counted(client)
    assert after["images_total"] - before["images_total"] == 1
    assert after["requests_total"] - before["requests_total"] == 1
    text = client.get("/metrics").text
    assert 'preview"' in text  # the module of their steps


def counted(client):
    found = {"images_total": 0.0, "requests_total": 0.0}
    for line in client.get("/metrics").text.splitlines():
        name = line.partition("{")[0].removeprefix("neustream:")
        if name in found:
            found[name] += float(line.rpartition(" ")[2])
    return found


def test_partial_images_need_a_stream(client):
    answer = client.post("/v1/images/generations", json={**ASK, "partial_images": 2})
    assert answer.status_code == 400 and "needs stream: true" in answer.json()["error"]["message"]
