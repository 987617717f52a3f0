"""The dashboard in a real browser: what people see, by keyboard, without a colour."""

from __future__ import annotations

import os
import shutil
from functools import partial

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser'")

from serving import serving, stock, text_service  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
expect = playwright.expect
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ASK = {"prompt": "Once upon", "max_tokens": 12, "ignore_eos": True, "slo": {"ttft_ms": 60_000, "tpot_ms": 60_000}}


@pytest.fixture(scope="module")
def model():
    return stock()


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("NEUSTREAM_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium here; NEUSTREAM_BROWSER names one")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page; what it complains of fails the test."""
    page = browser.new_page(reduced_motion="reduce")
    page.complaints = []
    page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    yield page
    page.close()


@pytest.fixture
def url(model):
    with serving(partial(text_service, model)) as (url, said, _):
        assert said.get(timeout=60) == "ready: tiny"
        yield url


def ask(url, **more):
    return httpx.post(f"{url}/v1/completions", json={**ASK, **more}, timeout=60)


def test_figures_are_there(page, url):
    statuses = [ask(url).status_code for _ in range(3)] + [ask(url, slo={"e2e_ms": 0.001}).status_code]
    assert statuses == [200, 200, 200, 400]
    page.goto(f"{url}/ui")
    expect(page.locator("#feed")).to_have_text("live")
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#attained")).to_have_text("75 % of 4")
    expect(page.locator("#classes tr")).to_contain_text(["(none)"])
    expect(page.get_by_role("img", name="3 on time, 0 late, 1 dropped, 0 failed")).to_be_visible()
    expect(page.locator("#modules tr").first).to_contain_text("tiny")
    assert page.complaints == []


@pytest.mark.parametrize("width", [1080, 1010, 600])
def test_no_figure_is_cut_off(page, url, width):
    assert ask(url).status_code == 200
    with httpx.stream("GET", f"{url}/ui/events", timeout=60) as feed:
        shot = next(line for line in feed.iter_lines() if line)
    shot = shot.replace('"module": "decode"', '"module": "prefill+decode"').replace('"tiny"', '"tiny-image"')
    page.route("**/ui/events", lambda route: route.fulfill(body=f"{shot}\n\n", content_type="text/event-stream"))
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"{url}/ui")
    expect(page.locator("#modules tr").first).to_contain_text("tiny-image")
    wider = "nodes => nodes.filter(node => node.scrollWidth > node.clientWidth).map(node => node.innerText)"
    assert page.locator(".scroll").evaluate_all(wider) == []


def test_outcomes_differ_in_shape_and_are_named(page, url):
    page.goto(f"{url}/ui")
    expect(page.locator("#legend li")).to_have_text(["on time: 0", "late: 0", "dropped: 0", "failed: 0"])
    shapes = [mark.get_attribute("d") for mark in page.locator("#legend .mark").all()]
    assert len(set(shapes)) == 4


def test_all_of_it_goes_by_keyboard(page, url):
    page.goto(f"{url}/ui")
    expect(page.locator("#model option")).to_have_count(1)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    seen = []
    for _ in range(20):
        page.keyboard.press("Tab")
        seen.append(
            page.locator(":focus").evaluate("node => node.id || node.getAttribute('aria-labelledby') || node.name")
        )
        if seen[-1] == "prompt":
            break
    assert seen == ["h-classes", "h-modules", "kind", "model", "prompt"]
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("60000")
    page.keyboard.press("Enter")
    expect(page.locator("#verdict")).to_contain_text("on time; first token after")
    expect(page.locator("#answer")).not_to_be_empty()
    page.locator("#e2e").fill("1")
    page.locator("#most").fill("200")
    page.locator("#most").press("Enter")
    expect(page.locator("#verdict")).to_contain_text("400: ")
    assert [text for text in page.complaints if "400" not in text] == []


def test_it_asks_for_a_key_and_keeps_it_to_itself(page, model):
    with serving(partial(text_service, model), keys=["secret"]) as (url, said, _):
        said.get(timeout=60)
        page.goto(f"{url}/ui")
        key = page.locator("#key")
        expect(key).to_be_focused()
        key.fill("wrong")
        key.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("That key was not taken.")
        key.fill("secret")
        key.press("Enter")
        expect(page.locator("#feed")).to_have_text("live")
        expect(key).to_be_hidden()
        kept = page.evaluate("() => localStorage.length + sessionStorage.length + document.cookie.length")
        assert kept == 0 and "secret" not in page.url


def test_a_lost_feed_is_told_and_found_again(page, model):
    with serving(partial(text_service, model)) as (url, said, _):
        said.get(timeout=60)
        page.goto(f"{url}/ui")
        expect(page.locator("#feed")).to_have_text("live")
    expect(page.locator("#feed")).to_contain_text("disconnected")
    with serving(partial(text_service, model), http={"port": int(url.rpartition(":")[2])}) as (_, said, _):
        said.get(timeout=60)
        expect(page.locator("#feed")).to_have_text("live", timeout=20_000)
