"""The page of `bridgekit app` in a real browser: recording, searching, drawing and errors, on a desktop and on a phone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bridgekit_app.jobs import Emit
from bridgekit_app.limits import Limits
from bridgekit_app.state import AppState
from served import Served, served

from bridgekit.diffusion.models import DrawOptions
from tests.browser import PHONE, browser_page, one_browser, screenshot
from tests.shared import wait_until
from tests.spoken_words import WORDS, SpokenWords, say

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

#: Chromium listens to a file in place of a microphone, and asks nobody whether it may.
FAKE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
WAIT = 600_000  # milliseconds: the first picture waits for the model, on a machine that may be busy


@pytest.fixture(scope="module", autouse=True)
def chromium() -> Iterator[None]:
    """Show all pages in one browser."""
    with one_browser():
        yield


@pytest.fixture(scope="module")
def server(spoken_words: SpokenWords) -> Iterator[Served]:
    with served(spoken_words, Limits(), warm=True) as running:
        yield running


def until(page: Page, expression: str) -> None:
    """Wait for a JavaScript expression to hold. Playwright's own waiting needs `eval`, which the page forbids."""
    end = time.monotonic() + WAIT / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)


def opened(page: Page, server: Served) -> Page:
    page.set_default_timeout(WAIT)
    page.goto(server.address)
    until(page, "document.querySelector('#bridge').options.length > 0")
    return page


def drawn(page: Page) -> None:
    """Wait for the picture to be finished."""
    page.wait_for_selector("#actions:not([hidden])", timeout=WAIT)
    until(page, "document.querySelector('#work').hidden")


def nearest_words(page: Page) -> list[str]:
    return page.locator("#first .name").all_inner_texts()


def colours(page: Page) -> int:
    """How many different colours the picture has: a blank one has one."""
    script = """async () => {
        const shown = document.querySelector("#picture"); await shown.decode();
        const canvas = new OffscreenCanvas(64, 64), pen = canvas.getContext("2d"); pen.drawImage(shown, 0, 0, 64, 64);
        const data = pen.getImageData(0, 0, 64, 64).data; const seen = new Set();
        for (let at = 0; at < data.length; at += 4) seen.add(data[at] + "," + data[at + 1] + "," + data[at + 2]);
        return seen.size; }"""
    count: int = page.evaluate(script)
    return count


def no_wider_than_its_window(page: Page) -> bool:
    fits: bool = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    return fits


def test_a_word_spoken_into_the_microphone_is_heard_and_becomes_a_picture(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The starter's model draws in two steps, too few to be seen as they form.
    monkeypatch.setattr("bridgekit_app.app.DrawOptions", lambda **options: DrawOptions(**options | {"steps": 10}))
    sound = say("penguin", tmp_path / "microphone.wav", silence=0.8)
    listening = (*FAKE, f"--use-file-for-fake-audio-capture={sound}%noloop")
    with browser_page(arguments=listening, permissions=["microphone"]) as page:
        opened(page, server)
        screenshot(page, "app-before")
        # Each unfinished picture that is shown has an address of its own.
        page.evaluate("""() => { window.looks = 0; new MutationObserver(() => {
            if (document.querySelector("#frame").className === "forming") window.looks += 1;
        }).observe(document.querySelector("#picture"), { attributeFilter: ["alt", "src"] }); }""")
        page.get_by_role("button", name="Record").click()
        until(page, "parseFloat(document.querySelector('#record-text').textContent.slice(6)) > 2.3")
        screenshot(page, "app-recording")
        page.get_by_role("button", name="Stop").click()
        drawn(page)
        assert page.evaluate("looks") >= 2
        assert "penguin" in nearest_words(page)[:3]
        assert "confidence among 24 texts" in page.inner_text("#sure-text")
        assert colours(page) > 20
        assert page.locator("#picture").get_attribute("alt") == "Image generated from recording 1.wav"
        assert page.locator(".tiles img").count() == 5
        until(page, "[...document.querySelectorAll('.tiles img')].every((image) => image.naturalWidth > 0)")
        assert page.inner_text("#problem") == ""
        screenshot(page, "app-desktop", full=True)
        with page.expect_download() as waiting:
            page.get_by_role("link", name="Save image").click()
        assert Path(waiting.value.path()).read_bytes().startswith(b"\x89PNG")


def test_the_page_says_that_it_prepares_images_and_counts_that_as_nobody_ahead(
    spoken_words: SpokenWords, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def warm_up(_: AppState, emit: Emit) -> None:
        emit("progress", {"what": "fitting conditioner", "done": 40, "of": 200})
        gate.wait()

    monkeypatch.setattr(AppState, "warm_up", warm_up)
    says, status = "Preparing images: fitting conditioner 40 of 200", "document.querySelector('#status').textContent"
    with served(spoken_words, Limits(), warm=True) as preparing, browser_page() as page:
        opened(page, preparing)
        until(page, f"{status} === '{says}'")
        screenshot(page, "app-preparing")
        page.evaluate(f"""() => {{ window.said = []; new MutationObserver(() => window.said.push({status}))
            .observe(document.querySelector("#status"), {{ childList: true }}); }}""")
        page.fill("#words", "a cat")
        page.keyboard.press("Enter")
        until(page, f"said.at(-1) === '{says}' && !document.querySelector('#work').hidden")
        gate.set()
        drawn(page)
        assert not [line for line in page.evaluate("said") if "ahead" in line]
        assert preparing.client.get("/healthz").json()["preparing"] is None


def test_record_says_why_it_cannot_be_used(server: Served) -> None:
    def without_audio(route: Route) -> None:
        found = route.fetch().json()
        for bridge in found["bridges"]:
            bridge["modalities"].pop("audio", None)
        route.fulfill(json=found)

    host = socket.gethostname().lower()
    here, elsewhere = server.address, server.address.replace("127.0.0.1", host)
    for name, arguments, address, why in [
        ("works", FAKE, here, ""),
        ("no-audio", FAKE, here, "This bridge has no audio"),
        ("no-microphone", (), here, "This browser has no microphone."),
        (
            "insecure",
            (*FAKE, f"--host-resolver-rules=MAP {host} 127.0.0.1"),
            elsewhere,
            "Browsers record only on pages at http",
        ),
    ]:
        with browser_page(arguments=arguments) as page:
            if name == "no-audio":
                page.route("**/bridge", without_audio)
            opened(page, replace(server, address=address))
            record, reason = page.locator("#record"), page.locator("#record-why")
            shown = str(bool(why)).lower()
            until(page, "document.querySelector('#record').hasAttribute('title')")  # the page has decided
            until(page, f"document.querySelector('#record').disabled === {shown}")
            until(page, f"(document.querySelector('#record-why').offsetParent !== null) === {shown}")
            assert record.is_disabled() == reason.is_visible() == bool(why), name
            assert reason.inner_text().startswith(why)
            assert record.get_attribute("title") == reason.text_content()
            screenshot(page, f"app-record-{name}")


def test_the_page_fits_a_phone_and_has_a_dark_mode(server: Served, tmp_path: Path) -> None:
    for name, options in {
        "phone": {"width": PHONE[0], "height": PHONE[1], "touch": True},
        "phone-dark": {"width": PHONE[0], "height": PHONE[1], "touch": True, "dark": True},
        "desktop-dark": {"dark": True},
    }.items():
        with browser_page(**options) as page:  # type: ignore[arg-type]
            opened(page, server)
            assert no_wider_than_its_window(page)
            page.set_input_files("#file", say("fire engine", tmp_path / "fire engine.wav"))
            drawn(page)
            page.wait_for_selector(".plays li")
            assert no_wider_than_its_window(page)
            if "phone" in name:  # the picture has come to the eye
                top: float = page.evaluate("document.querySelector('#frame').getBoundingClientRect().top")
                assert -50 < top < PHONE[1] / 2
            screenshot(page, f"app-{name}", full=True)
            page.goto(f"{server.address}/docs")
            page.wait_for_selector(".opblock")
            assert no_wider_than_its_window(page)
            screenshot(page, f"app-docs-{name}")


def test_a_broken_file_is_reported_clearly_and_the_page_keeps_working(server: Served, tmp_path: Path) -> None:
    broken = tmp_path / "holiday.wav"
    broken.write_bytes(b"RIFF\0\0\0\0this was a sound once")
    with browser_page() as page:
        opened(page, server)
        page.set_input_files("#file", broken)
        page.wait_for_selector("#problem strong")
        told = page.get_by_role("alert").inner_text()
        assert "not audio that can be read" in told
        assert "holiday.wav" in told
        assert "fix: convert it to WAV" in told
        assert "Traceback" not in told
        screenshot(page, "app-broken")
        large = tmp_path / "large.wav"
        large.write_bytes(b"\0" * 21_000_000)
        page.set_input_files("#file", large)
        until(page, "document.querySelector('#problem').textContent.includes('larger than 20 MB')")
        page.fill("#words", "a cat")
        page.keyboard.press("Enter")
        drawn(page)
        assert page.inner_text("#problem") == ""


def test_words_find_clips_and_a_clip_plays(server: Served) -> None:
    with browser_page(arguments=["--autoplay-policy=no-user-gesture-required"]) as page:
        opened(page, server)
        page.fill("#words", "guitar")
        page.get_by_role("button", name="Go").click()
        play = page.get_by_role("button", name="Play guitar").first
        play.click()
        assert play.get_attribute("aria-pressed") == "true"
        until(page, "document.querySelector('.play[aria-pressed=true]') === null")  # it has played to its end
        assert page.inner_text("#problem") == ""


def test_a_picture_found_shows_its_caption_and_the_tables_other_columns(server: Served) -> None:
    with browser_page() as page:
        opened(page, server)
        page.fill("#words", "fire engine")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.tiles li').length === 5")
        first = page.locator(".tiles li").first
        assert first.inner_text().split("\n")[0] == "fire engine"
        assert {"fire-engine.png", "split: train"} <= set(first.inner_text().split("\n"))
        assert first.locator("img").get_attribute("alt") == "fire engine"


def test_two_inputs_are_mixed_with_the_slider(server: Served, tmp_path: Path) -> None:
    with browser_page() as page:
        opened(page, server)
        page.set_input_files("#file", say("snail", tmp_path / "snail.wav"))
        drawn(page)
        page.get_by_role("button", name="Add a second input").click()
        page.fill("#words", "violin")
        page.get_by_role("button", name="Go").click()
        page.wait_for_selector("#mixing:not([hidden])")
        slider = page.get_by_role("slider", name="Mix ratio")
        for key, word in (("Home", "snail"), ("End", "violin")):
            slider.focus()
            page.keyboard.press(key)
            until(page, f"document.querySelector('#best').textContent === '{word}'")
            share = "snail.wav 95 %, violin 5 %" if key == "Home" else "snail.wav 5 %, violin 95 %"
            assert slider.get_attribute("aria-valuetext") == share
        drawn(page)
        screenshot(page, "app-mixed", full=True)
        page.get_by_role("button", name="Remove violin").click()
        until(page, "document.querySelector('#mixing').hidden")


def test_the_page_can_be_used_by_keyboard_alone_and_work_can_be_cancelled(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[str] = []
    draw = server.state.draw

    def slowly(opened: Any, model: str, inputs: Any, vectors: Any, options: Any, **others: Any) -> Any:
        try:
            return draw(opened, model, inputs, vectors, replace(options, steps=100), **others)
        except Exception as error:
            ends.append(type(error).__name__)
            raise

    monkeypatch.setattr(server.state, "draw", slowly)
    with browser_page() as page:
        opened(page, server)
        for _ in range(12):
            if page.evaluate("document.activeElement.id") == "words":
                break
            page.keyboard.press("Tab")
            ring = page.evaluate(
                "getComputedStyle(document.activeElement.closest('label.file') || document.activeElement).outlineStyle"
            )
            assert ring == "solid", page.evaluate("document.activeElement.outerHTML")
        page.keyboard.type("a rocket")
        page.keyboard.press("Enter")
        page.wait_for_selector("#frame.forming img")
        screenshot(page, "app-forming")
        assert "Drawing" in page.get_by_role("status").inner_text()
        page.get_by_role("button", name="Cancel").focus()
        page.keyboard.press("Enter")
        assert page.get_by_role("status").inner_text() == "Cancelled."
        while not ends:
            page.wait_for_timeout(50)
        assert ends == ["Cancelled"]


def test_the_reference_calls_the_api_with_try_it_out_and_nothing_else(server: Served, tmp_path: Path) -> None:
    asked: list[str] = []
    clip = say("penguin", tmp_path / "spoken penguin.wav")
    with browser_page() as page:
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(f"{request.method} {request.url}"))
        page.goto(f"{server.address}/docs")
        search = page.locator("[id$=search_search_post]")
        search.locator(".opblock-summary-control").click()
        wait_until(lambda: "curl -F audio=@dog.wav" in search.inner_text(), "for the description, which unfolds")
        answers = search.locator(".live-responses-table")
        search.locator(".execute").click()  # the example, as JSON
        answers.get_by_text("a dog barks").first.wait_for()
        assert answers.locator("tbody .response-col_status").inner_text().startswith("200")
        search.locator("select.content-type").first.select_option("multipart/form-data")
        audio = search.locator("[data-property-name=audio]")
        audio.locator(".json-schema-form-item-add").click()
        audio.locator("input[type=file]").set_input_files(clip)
        search.locator(".execute").click()
        answers.get_by_text("spoken penguin.wav").first.wait_for()
        assert answers.locator("tbody .response-col_status").inner_text().startswith("200")
        screenshot(page, "app-docs-tried")
    assert asked.count(f"POST {server.address}/search") == 2
    assert {address for address in asked if server.address not in address and "data:" not in address} == set()


def test_every_control_has_an_accessible_name(server: Served, tmp_path: Path) -> None:
    with browser_page() as page:
        opened(page, server)
        page.set_input_files("#file", say(WORDS[0], tmp_path / "clip.wav"))
        drawn(page)
        page.wait_for_selector(".plays li")
        nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, a, img, audio, progress")]
            .filter((part) => part.checkVisibility())
            .filter((part) => !(part.textContent.trim() || part.ariaLabel || part.labels?.length || part.hasAttribute("alt")
                || part.tagName === "AUDIO"))
            .map((part) => part.outerHTML)""")
        assert nameless == []
        assert page.locator("h1").count() == 1
        assert page.locator("html").get_attribute("lang") == "en"
        assert page.locator("[role=status]").get_attribute("aria-live") == "polite"
