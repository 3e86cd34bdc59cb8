"""ASGI middleware: checks a request's origin, size and number, and sets security headers."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

import anyio

from bridgekit.errors import BridgekitError
from bridgekit_app.limits import Limits, Refusal, answer, busy, too_large

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

#: Scripts, styles and requests to this server only; images and audio also from blobs; no frames, no plugins.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: Swagger UI's style has its icons in data URLs. An image in one can neither run anything nor call anybody.
DOCS_POLICY = POLICY.replace("img-src 'self'", "img-src 'self' data:")
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=(), payment=(), usb=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
#: A body that is too large is read and discarded up to this many times the limit: a browser still sending when the connection
#: closes would not see the response.
PATIENCE = 4
#: Seconds that a body may take to arrive before its request can lose its place to another, if there are too many.
GRACE = 2.0
#: Bytes of a response handed over at a time. More follow when these are taken: what nobody reads is not copied as a whole.
PIECE = 65_536


class Guard:
    """The middleware. `host` is the address the server listens on, which is allowed in the `Host` header."""

    def __init__(self, app: App, limits: Limits, host: str) -> None:
        self.app, self.limits = app, limits
        self.names = {"localhost", host.lower(), socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}
        self.running = 0
        self._arriving: list[_Body] = []  # of the requests that are running, the oldest first

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Check a request and pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = counted = False

        def leave() -> None:
            nonlocal counted
            self.running -= counted
            counted = False

        async def send_safely(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                leave()  # the rest is up to the client, which may never read it
                present = {name for name, _ in message["headers"]}
                extra = {"cache-control": "no-store", **HEADERS}
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in extra.items() if name.encode() not in present),
                ]
            await _send_in_pieces(send, message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_origin(scope, headers)
            body = _Body(receive, self.limits)
            length = headers.get("content-length", "")
            if length.isascii() and length.isdigit() and int(length) > self.limits.upload_bytes:
                await body.drain()
                raise too_large(self.limits.upload_bytes)
            if self.running >= self.limits.requests and not self._make_room():
                raise busy(f"{self.running} requests are being processed", 1)
            self.running += 1
            counted = True
            self._arriving.append(body)
            try:
                await self.app(scope, body.receive, send_safely)
            finally:
                self._arriving.remove(body)
                leave()
        except BridgekitError as error:
            if began:  # the response has started and can only be aborted
                raise
            await answer(error)(scope, receive, send_safely)

    def _make_room(self) -> bool:
        """Refuse the oldest request whose body has not arrived for `GRACE` seconds, if there is one."""
        return any(body.give_way() for body in self._arriving)

    def _check_origin(self, scope: Message, headers: MutableMapping[str, str]) -> None:
        """Refuse requests from other sites' pages.

        Any page can make its visitor's browser send requests to this address; browsers mark these in `Origin` and
        `Sec-Fetch-Site`. With DNS rebinding, the page's domain resolves to this address and the request looks same-origin, but
        `Host` is the page's domain. So `Host` must be one of this machine's names or an IP address, which cannot be rebound.
        """
        host = headers.get("host", "")
        name = _split("Host", f"//{host}").hostname or ""
        if not (name in self.names or name.endswith(".localhost") or _is_address(name)):
            raise Refusal(403, "unknown host name", where=f"Host: {host[:100]}", remedy="use 127.0.0.1")
        origin = headers.get("origin")
        foreign = origin is not None and _split("Origin", origin).netloc.lower() != host.lower()
        opened_by_hand = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate" and not origin
        if foreign or (headers.get("sec-fetch-site") in ("cross-site", "same-site") and not opened_by_hand):
            raise Refusal(
                403,
                "requests from other sites' pages are not allowed",
                where=f"Origin: {str(origin)[:100]}",
                remedy="send them from a program or from this server's own page",
            )


class _Body:
    """A request's body with limits on size and time."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._bytes, self._since, self._whole = 0, time.monotonic(), False
        self._waiting: anyio.CancelScope | None = None
        self._gives_way = False

    async def receive(self) -> Message:
        if self._whole:  # the only message still to come is the disconnect
            return await self._receive()
        message = await self._next()
        if self._bytes > self._limits.upload_bytes:
            await self.drain()
            raise too_large(self._limits.upload_bytes)
        return message

    async def drain(self) -> None:
        """Read and discard the rest, up to a limit."""
        while not self._whole and self._bytes <= PATIENCE * self._limits.upload_bytes:
            await self._next()

    def give_way(self) -> bool:
        """Refuse the request, if it waits for its client and has done so for `GRACE` seconds. Returns whether it is refused."""
        if self._waiting is None or self._gives_way or time.monotonic() - self._since < GRACE:
            return False
        self._gives_way = True
        self._waiting.cancel()
        return True

    async def _next(self) -> Message:
        try:
            with anyio.move_on_after(self._since + self._limits.upload_seconds - time.monotonic()) as self._waiting:
                message = await self._receive()
                self._bytes += len(message.get("body", b""))
                self._whole = message["type"] != "http.request" or not message.get("more_body", False)
                return message
        finally:
            self._waiting = None
        if self._gives_way:
            raise Refusal(408, "the request was slow to arrive and gave way to others", remedy="send it again")
        raise Refusal(
            408, f"the request took longer than {self._limits.upload_seconds:.0f} s to arrive", remedy="send it again"
        )


async def _send_in_pieces(send: Send, message: Message) -> None:
    body = memoryview(message.get("body", b""))
    while len(body) > PIECE:
        await send({**message, "body": bytes(body[:PIECE]), "more_body": True})
        body = body[PIECE:]
    await send({**message, "body": bytes(body)} if "body" in message else message)


def _split(header: str, address: str) -> SplitResult:
    """An address in parts, or a refusal: a bracket may not be closed, for example."""
    try:
        return urlsplit(address)
    except ValueError:
        where = f"{header}: {address[:100]}"
        raise Refusal(400, f"the header {header} has no valid address", where=where, remedy="use 127.0.0.1") from None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
