"""Images over HTTP, of a tiny real pipeline; and texts beside them behind one front."""

from __future__ import annotations

import base64
import io
import json

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")
openai = pytest.importorskip("openai", reason="needs the extra 'dev'")

from PIL import Image  # noqa: E402
from serving import serving  # noqa: E402
from toys import Flat, command  # noqa: E402

from neustream.backends.demo import IMAGE, TEXT  # noqa: E402
from neustream.backends.loading import load  # noqa: E402
from neustream.server.config import ServerConfig  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    images = {"measure_s": 0.0, "cache": cache, "max_batch": 4}
    texts = {"profile": Flat(), "slots": 4}
    config = ServerConfig.model_validate(
        {
            "models": [
                {"name": "sd", "kind": "image", "backend": IMAGE, "sizes": ["64x64", "64x96"], "options": images},
                {"name": "chat", "kind": "text", "backend": TEXT, "tokenizer": "bytes", "options": texts},
            ]
        }
    )
    with serving(lambda metrics: load(config, metrics)) as (url, said, _):
        assert said.get(timeout=120) == "ready: sd, chat"
        yield url


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


ASK = {"prompt": "a lighthouse", "num_inference_steps": 3, "seed": 5}


def picture(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_images_by_the_openai_client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as theirs:
        extra = {"num_inference_steps": 3, "seed": 5}
        made = theirs.images.generate(prompt="a lighthouse", model="sd", size="64x96", n=2, extra_body=extra)
    first, second = (picture(image.b64_json) for image in made.data)
    assert first.size == second.size == (64, 96) and first.format == "PNG"
    assert first.tobytes() != second.tobytes()  # seeds 5 and 6


def test_a_seed_gives_the_same_image_alone_and_in_company(client):
    one = client.post("/v1/images/generations", json=ASK).json()["data"][0]["b64_json"]
    many = client.post("/v1/images/generations", json={**ASK, "n": 3}).json()["data"]
    ours, theirs = picture(one).tobytes(), picture(many[0]["b64_json"]).tobytes()
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= len(ours) // 100  # a rounding, now and then


def test_formats_streams_and_promises(client):
    for kind in ("jpeg", "webp"):
        made = client.post("/v1/images/generations", json={**ASK, "output_format": kind, "slo": {"e2e_ms": 60000}})
        assert picture(made.json()["data"][0]["b64_json"]).format == kind.upper()
        assert made.headers["x-neustream-slo"] == "ttft=inf;tpot=inf;e2e=60000"
        assert made.headers["x-neustream-outcome"] == "on_time"
    lines = client.post("/v1/images/generations", json={**ASK, "stream": True}).text.splitlines()
    assert lines[0] == "event: image_generation.completed"
    event = json.loads(lines[1].removeprefix("data: "))
    assert event["type"] == "image_generation.completed" and picture(event["b64_json"]).size == (64, 64)


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ({"size": "512x512"}, 400, "size '512x512': allowed: 64x64, 64x96"),
        ({"size": "big"}, 400, "size"),
        ({"n": 11}, 400, "less than or equal to 10"),
        ({"response_format": "url"}, 400, "use b64_json"),
        ({"partial_images": 4}, 400, "less than or equal to 3"),
        ({"slo": {"ttft_ms": 5}}, 400, "an image has no tokens"),
        ({"slo": {"e2e_ms": 0.001}}, 400, "hopeless"),
        ({"num_inference_steps": 0}, 400, "greater than or equal to 1"),
        ({"model": "chat"}, 404, "no model 'chat' for images"),
        ({"prompt": 5}, 400, "prompt"),
    ],
)
def test_bad_requests_name_what_is_wrong(client, more, status, message):
    answer = client.post("/v1/images/generations", json={**ASK, **more})
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_texts_beside_images(client):
    done = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4, "ignore_eos": True}).json()
    assert done["model"] == "chat" and done["usage"]["completion_tokens"] == 4
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert models["sd"]["neustream"] == {"kind": "image", "sizes": ["64x64", "64x96"], "slo": {}, "classes": []}
    assert models["chat"]["max_model_len"] == 512


def test_the_client_writes_an_image_and_tells_what_became_of_its_promise(url, tmp_path):
    path = tmp_path / "one.webp"
    arguments = ["--steps", 3, "--seed", 5, "--e2e-ms", 60_000, "--url", url, "--out", path]
    done = command("client", "a lighthouse", *arguments)
    assert done.status == 0 and done.err.startswith("on time\n") and "wrote" in done.out
    with Image.open(path) as image:
        assert image.size == (64, 64) and image.format == "WEBP"
    assert command("client", "x", "--url", url, "--out", tmp_path / "one.gif").status == 2
    assert command("client", "x", "--url", url, "--out", path, "--chat").status == 2


def test_an_image_tells_how_its_promise_was_kept(client):
    told = client.post("/v1/images/generations", json={**ASK, "model": "sd", "slo": {"e2e_ms": 60_000, "report": True}})
    kept = told.json()["neustream"]
    assert kept["on_time"] and 0 <= kept["queue_ms"] < kept["e2e_ms"] < 60_000
    assert kept["slack_ms"] == pytest.approx(60_000 - kept["e2e_ms"])
    assert "neustream" not in client.post("/v1/images/generations", json={**ASK, "model": "sd"}).json()


def test_sizes_that_were_not_measured_are_made_where_that_is_allowed(tmp_path):
    images = {"measure_s": 0.0, "cache": str(tmp_path), "max_batch": 4}
    limits = {"allow_new_sizes": True, "pixels": 1}
    model = {"name": "sd", "kind": "image", "backend": IMAGE, "options": images}
    config = ServerConfig.model_validate({"models": [model], "limits": limits})
    with serving(lambda metrics: load(config, metrics), limits=limits) as (url, said, _):
        said.get(timeout=120)
        with httpx.Client(base_url=url, timeout=120) as client:
            for size, pixels in (("96x64", (96, 64)), ("64x64", (64, 64))):
                done = client.post("/v1/images/generations", json={**ASK, "size": size})
                assert done.status_code == 200 and picture(done.json()["data"][0]["b64_json"]).size == pixels
            for size in ("65x64", "8x1", "99999x99999"):  # the pipeline, and the limit
                refused = client.post("/v1/images/generations", json={**ASK, "size": size})
                assert refused.status_code == 400, refused.text


@pytest.mark.parametrize(("sizes", "found"), [((), {None}), (("--image-sizes", "64x64,64x96"), {64, 96})])
def test_the_bench_asks_the_first_model_of_images(url, tmp_path, sizes, found):
    """Where none is named, and of the server's size where none is named either."""
    pytest.importorskip("httptools", reason="needs the extra 'bench'")
    asked = ["--dataset-name", "images", "--num-prompts", 6, "--image-steps", "1,2", "--request-rate", 50, *sizes]
    done = command("bench", "serve", "--base-url", url, *asked, "--goodput", "e2el:60000", "--out", tmp_path)
    assert done.status in (0, 3), done.err  # 3: a busy machine kept the client from its schedule
    assert "images" in done.out and "tokens" not in done.out
    records = [json.loads(line) for line in (tmp_path / "stage_0.records.jsonl").read_text().splitlines()]
    assert [(each["outcome"], each["images"]) for each in records] == [("done", 1)] * 6
    assert {each["image"]["steps"] for each in records} == {1, 2}
    assert {each["image"].get("height") for each in records} == found
    search = ["--num-prompts", 1, "--goodput", "e2el:60000", "--point-s", 0.1, "--max-point-s", 0.1]
    bounds = ["--min-requests", 2, "--max-points", 1, "--confirm", 0, "--start-rate", 20, "--image-steps", 1]
    done = command("bench", "search", "--base-url", url, "--dataset-name", "images", *search, *bounds)
    assert done.status == 5 and "above 20/s" in done.out, done.err
