"""A real browser for tests of pages: Chromium, driven by Playwright, and a reason to skip where there is none.

Taken is Debian's package (`apt-get install chromium`), or whatever Chromium is on the path, or named by `BRIDGEKIT_CHROMIUM`.
Where `BRIDGEKIT_SHOTS` names a folder, the screenshots that tests make are kept there, to be looked at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page

DESKTOP = (1280, 900)
PHONE = (375, 740)
# It makes no calls of its own, and needs no GPU and no sandbox (there is none for root).
_QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def browser_page(
    width: int = DESKTOP[0],
    height: int = DESKTOP[1],
    dark: bool = False,
    *,
    touch: bool = False,
    javascript: bool = True,
    arguments: Sequence[str] = (),
    permissions: Sequence[str] = (),
) -> Iterator[Page]:
    """An empty page of a new Chromium with a profile of its own.

    Arguments:
        width, height: of the page, in CSS pixels.
        dark: whether the user prefers dark pages.
        touch: whether it is a phone: touch instead of a mouse, and two device pixels a CSS pixel.
        javascript: whether scripts run.
        arguments: more of Chromium's own, as `--use-file-for-fake-audio-capture=...`.
        permissions: granted to every page, as `microphone`.

    Raises:
        AssertionError: when it is left, if a script of the page failed, or the page's own policy forbade something.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    troubles: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        if message.type == "error" and "Content Security Policy" in message.text:
            troubles.append(message.text)

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_chromium(), args=[*_QUIET, *arguments])
        try:
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                has_touch=touch,
                device_scale_factor=2 if touch else 1,
                java_script_enabled=javascript,
                permissions=list(permissions),
            )
            page = context.new_page()
            page.on("pageerror", lambda error: troubles.append(str(error)))
            page.on("console", heard)
            yield page
        finally:
            browser.close()
    assert not troubles, troubles


def screenshot(page: Page, name: str, *, full: bool = False) -> bytes:
    """A PNG of what the page shows, or of all of it; kept as `NAME.png` where somebody wants to look at it."""
    data = page.screenshot(full_page=full, animations="disabled")
    if folder := os.environ.get("BRIDGEKIT_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(data)
    return data


def _chromium() -> str:
    named = os.environ.get("BRIDGEKIT_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium here: apt-get install chromium, or name one in BRIDGEKIT_CHROMIUM")
    return found
