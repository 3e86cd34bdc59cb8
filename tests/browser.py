"""A real browser for tests of pages: Chromium, driven by Playwright, and a reason to skip where there is none.

Taken is Debian's package (`apt-get install chromium`), or whatever Chromium is on the path, or named by `BRIDGEKIT_CHROMIUM`.
Where `BRIDGEKIT_SHOTS` names a folder, the screenshots that tests make are kept there, to be looked at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.shared import PATIENCE

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright

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


class _Kept:
    """Playwright and a Chromium, started when first needed."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self._playwright: Playwright | None = None
        self._browser: Browser | None = None

    def launch(self, *arguments: str) -> Browser:
        path = _chromium()
        if self._playwright is None:
            sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
            self._playwright = self.stack.enter_context(sync_api.sync_playwright())
        chromium = self._playwright.chromium
        return chromium.launch(executable_path=path, args=[*_QUIET, *arguments], timeout=1000 * PATIENCE)

    @property
    def browser(self) -> Browser:
        if self._browser is None:
            self._browser = self.launch()
            self.stack.callback(self._browser.close)
        return self._browser


_kept: _Kept | None = None


@contextmanager
def one_browser() -> Iterator[None]:
    """Pages in this `with` block share one Chromium, which takes longer to start than to show most pages."""
    global _kept
    if _kept is not None:
        yield
        return
    with ExitStack() as stack:
        _kept = _Kept(stack)
        try:
            yield
        finally:
            _kept = None


@contextmanager
def _opened(arguments: Sequence[str]) -> Iterator[Browser]:
    """The Chromium that is kept open, or one with arguments of its own."""
    assert _kept is not None
    if not arguments:
        yield _kept.browser
        return
    browser = _kept.launch(*arguments)
    try:
        yield browser
    finally:
        browser.close()


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
    """An empty page with a profile of its own, of a new Chromium or of the one that `one_browser` keeps open.

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
    troubles: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        if message.type == "error" and "Content Security Policy" in message.text:
            troubles.append(message.text)

    with one_browser(), _opened(arguments) as browser:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            has_touch=touch,
            device_scale_factor=2 if touch else 1,
            java_script_enabled=javascript,
            permissions=list(permissions),
        )
        try:
            context.set_default_timeout(1000 * PATIENCE)
            page = context.new_page()
            page.on("pageerror", lambda error: troubles.append(str(error)))
            page.on("console", heard)
            yield page
        finally:
            context.close()
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
