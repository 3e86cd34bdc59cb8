"""The layer in front of every request: who may send it, how large it may be, and what browsers must not do with the answer."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import anyio

from bridgekit.errors import BridgekitError
from bridgekit_app.limits import Limits, Refusal, answer, busy

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

#: Scripts, styles and workers from this server only; pictures and clips also from the page's own memory; no frames, no plugins.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=(), payment=(), usb=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
#: A body that is too large is read and discarded up to this many times the limit: a browser that is still sending when the
#: connection closes never sees the answer.
PATIENCE = 4


class Guard:
    """An ASGI layer around the application.

    Arguments:
        app: what answers.
        limits: the server's bounds.
        host: the address that the server listens on; requests may name it.
    """

    def __init__(self, app: App, limits: Limits, host: str) -> None:
        self.app, self.limits = app, limits
        self.names = {"localhost", host.lower(), socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}
        self.running = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = False

        async def send_safely(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                present = {name for name, _ in message["headers"]}
                extra = {"cache-control": "no-store", **HEADERS}
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in extra.items() if name.encode() not in present),
                ]
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_origin(scope, headers)
            body = _Body(receive, self.limits)
            if _length(headers) > self.limits.upload_bytes:
                await body.drain()
                raise too_large(self.limits)
            if self.running >= self.limits.requests:
                raise busy(f"{self.running} requests are being answered already", 1)
            self.running += 1
            try:
                await self.app(scope, body.receive, send_safely)
            finally:
                self.running -= 1
        except BridgekitError as error:
            if began:  # the answer is under way, and can only be ended
                raise
            await answer(error)(scope, receive, send_safely)

    def _check_origin(self, scope: Message, headers: MutableMapping[str, str]) -> None:
        """Refuse other sites' pages.

        A page elsewhere may send requests to this address from its visitor's browser. Browsers say so in `Origin` and
        `Sec-Fetch-Site`. Where the page's own name was pointed at this address (DNS rebinding) they take both for one site, but
        `Host` has the page's name: so only this machine's names are answered. A bare address cannot be pointed elsewhere.
        """
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if not (name in self.names or name.endswith(".localhost") or _is_address(name)):
            raise Refusal(
                403, "this server answers only to its own names", where=f"Host: {host[:100]}", remedy="ask for 127.0.0.1"
            )
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        opened_by_hand = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate" and not origin
        if foreign or (headers.get("sec-fetch-site") in ("cross-site", "same-site") and not opened_by_hand):
            raise Refusal(
                403,
                "requests from other sites' pages are not answered",
                where=f"Origin: {str(origin)[:100]}",
                remedy="send them from a program, or from this server's own page",
            )


class _Body:
    """A request's body, counted as it arrives, and refused when it arrives too slowly."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._bytes, self._until, self._whole = 0, time.monotonic() + limits.upload_seconds, False

    async def receive(self) -> Message:
        if self._whole:  # from here on the only message to come is that the client has disconnected
            return await self._receive()
        message = await self._next()
        if self._bytes > self._limits.upload_bytes:
            await self.drain()
            raise too_large(self._limits)
        return message

    async def drain(self) -> None:
        """Read on, within reason, and discard."""
        while not self._whole and self._bytes <= PATIENCE * self._limits.upload_bytes:
            await self._next()

    async def _next(self) -> Message:
        with anyio.move_on_after(self._until - time.monotonic()):
            message = await self._receive()
            self._bytes += len(message.get("body", b""))
            self._whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message
        raise Refusal(
            408, f"the request took longer than {self._limits.upload_seconds:.0f} s to arrive", remedy="send it again"
        )


def too_large(limits: Limits) -> Refusal:
    """The answer to a body that is too large."""
    megabytes = limits.upload_bytes / 1e6
    return Refusal(
        413, f"the request is larger than {megabytes:g} MB", remedy="send a shorter clip, a smaller picture or fewer inputs"
    )


def _length(headers: MutableMapping[str, str]) -> int:
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() else 0


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
