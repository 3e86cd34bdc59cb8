"""Connections: how many, how long a client may keep one waiting, and a log that says a thing once.

uvicorn has a timeout between requests and none within one: a client that never ends its header, or never reads its responses,
keeps its connection for ever. Here each connection is looked at every second. When there are too many, the one that has kept
the server waiting for longest gives way to a new one, so that stalled connections cannot lock anyone out.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Any, ClassVar, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bridgekit_app.guard import Guard
from bridgekit_app.limits import Limits

#: Seconds between two looks at a connection.
LOOK_SECONDS = 1.0
#: Connections accepted at a time. Until they are counted, they are open beyond the limits.
BACKLOG = 100
#: Seconds in which the same message is logged once, and kinds of messages that are remembered.
ONCE_SECONDS, MOST_MESSAGES = 60.0, 1_000

HEADER, BODY, RESPONSE, IDLE = "header", "body", "response", "idle"


class Connection(H11Protocol):
    """uvicorn's connection with limits. What it waits for is looked up in uvicorn's and h11's own states."""

    limits: ClassVar[Limits]
    most: ClassVar[int]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, and end another if there are too many; this one only if all others are being worked for."""
        super().connection_made(transport)
        self.ended = False
        self._waits, self._since = (self.waits_for(), self.cycle), self.loop.time()
        self._look = self.loop.call_later(LOOK_SECONDS, self._check)
        others = [other for other in cast("set[Connection]", self.connections) if other is not self and not other.ended]
        near = [other for other in others if self.client and other.client and other.client[0] == self.client[0]]
        crowd = near if len(near) >= self.limits.connections_each else others if len(others) >= self.most else None
        if crowd is not None:
            waiting = [other for other in crowd if other.waits_for() is not None]
            # Idle ones go last: a client that comes back to one would see an error.
            max(waiting, key=lambda other: (other.waits_for() != IDLE, other.waiting()), default=self).end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._look.cancel()
        super().connection_lost(exc)

    def waits_for(self) -> str | None:
        """What the server waits for the client to do; None if the server has to work for it."""
        if self.transport.is_closing() or self.flow.write_paused:
            return RESPONSE
        if self.cycle is not None and not self.cycle.response_complete:
            return BODY if self.cycle.more_body and not self.flow.read_paused else None
        if self.transport.get_write_buffer_size():
            return RESPONSE
        return HEADER if self.cycle is None or self.conn.trailing_data[0] else IDLE

    def waiting(self) -> float:
        """For how many seconds it has waited for that. Bytes that trickle in or out do not count as an end of waiting."""
        now = (self.waits_for(), self.cycle)
        if now != self._waits:
            self._waits, self._since = now, self.loop.time()
        return self.loop.time() - self._since

    def end(self) -> None:
        """End it at once, whatever is still to be sent."""
        self.ended = True
        self.transport.abort()

    def _check(self) -> None:
        # Bodies have a time limit of their own (`Guard`), and idle connections uvicorn's.
        limits = {HEADER: self.limits.header_seconds, RESPONSE: self.limits.response_seconds}
        waited = self.waiting()
        if waited > limits.get(self._waits[0] or "", float("inf")):
            self.end()
        else:
            self._look = self.loop.call_later(LOOK_SECONDS, self._check)


class Once(logging.Filter):
    """Lets a message pass once in `ONCE_SECONDS`: strangers' requests must not be able to fill a disk."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[tuple[object, ...], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new. Of an exception its type counts, and where it was raised."""
        kind, _, trace = record.exc_info or (None, None, None)
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace is not None else None
        key = (record.name, str(record.msg).partition("\n")[0][:200], kind, place)
        now = time.monotonic()
        if now - self.last.get(key, -ONCE_SECONDS) < ONCE_SECONDS:
            return False
        if len(self.last) >= MOST_MESSAGES:
            self.last.clear()
        self.last[key] = now
        return True


def configure(app: Guard, **options: Any) -> uvicorn.Config:
    """uvicorn's configuration with these limits. Takes further options of `uvicorn.Config`."""
    # Half of the files that this process may open: decoders, bridges and uploads need some too.
    most = min(app.limits.connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    protocol = type("Connection", (Connection,), {"limits": app.limits, "most": most})
    config = uvicorn.Config(
        app,
        http=protocol,
        access_log=False,
        lifespan="on",
        ws="none",
        proxy_headers=False,  # no trusted proxy in front of this server sets them
        server_header=False,
        backlog=BACKLOG,
        # An image in progress is cancelled at its next step; open streams are cut off after this.
        timeout_graceful_shutdown=1,
        # Longer than clients idle between requests: one sent just as the connection closes would be lost.
        timeout_keep_alive=75,
        **options,
    )
    for name in ("uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, Once) for each in logger.filters):
            logger.addFilter(Once())
    return config
