"""A queue with one worker, for work that takes seconds: bounded, fair among clients, and cancelled when its client leaves."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from bridgekit_app.limits import busy

#: Seconds between two checks whether a client is still connected.
CHECK_SECONDS = 0.5
#: How work reports its progress: the kind of event (an empty one reaches nobody) and its data. Raises `Cancelled` where the
#: client has gone, so work should call it often.
Emit = Callable[[str, Any], None]
Work = Callable[[Emit], Any]


class Cancelled(Exception):
    """Nobody waits for this work any more. Not a RuntimeError: code around pipelines catches those."""


class Job:
    """One piece of work, from the end of the queue to its result.

    Made by `Queue.submit`, in the event loop that then iterates `events`.
    """

    def __init__(self, client: str, work: Work) -> None:
        self.client, self.work = client, work
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def emit(self, kind: str, data: Any) -> None:
        """Pass an event on, from any thread.

        Raises:
            Cancelled: nobody waits for it.
        """
        if self.cancelled.is_set():
            raise Cancelled
        if not kind:
            return
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (kind, data))
        except RuntimeError:  # the loop is closed: the server is being stopped
            raise Cancelled from None

    async def events(self, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[tuple[str, Any]]:
        """The job's events: `queued` with how many are before it, whatever the work emits, and `done` with its result.

        Arguments:
            gone: whether the client has disconnected; called every `CHECK_SECONDS`.

        Raises:
            Cancelled: it has.
            Exception: whatever the work raised.
        """
        checked = time.monotonic()
        try:
            while True:
                event = None
                with suppress(asyncio.TimeoutError):
                    event = await asyncio.wait_for(self._events.get(), CHECK_SECONDS)
                if time.monotonic() - checked >= CHECK_SECONDS:
                    checked = time.monotonic()
                    if self.cancelled.is_set() or await gone():
                        raise Cancelled
                if event is None:
                    continue
                kind, data = event
                if kind == "failed":
                    raise data
                yield kind, data
                if kind == "done":
                    return
        finally:
            self.cancelled.set()


class Queue:
    """Jobs and the one thread that does them. Clients take turns, however many jobs one of them has.

    Arguments:
        what: what the jobs make, for messages: `pictures`.
        most: jobs that may wait.
        most_each: of these, how many one client may have.
    """

    def __init__(self, what: str, most: int, most_each: int) -> None:
        self._what, self._most, self._most_each = what, most, most_each
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._running: Job | None = None
        self._seconds = 1.0  # that the last job took: an estimate for clients that have to come back
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._do_all, name=what, daemon=True)
        self._thread.start()

    def submit(self, client: str, work: Work, patience: float = math.inf) -> Job:
        """Put work at the end of a client's own line.

        Arguments:
            client: whose it is.
            work: what to do.
            patience: seconds that it may wait behind what waits already, if each takes as long as the last one did.

        Raises:
            Refusal: too much is waiting, of all clients (503) or of this one (429).
        """
        job = Job(client, work)
        with self._changed:
            waiting = len(self._in_order())
            mine = len(self._waiting.get(client, ()))
            later = max(1, min(60, round(self._seconds * (waiting + 1) / 2)))
            if mine >= self._most_each:
                raise busy(f"{mine} {self._what} of yours are waiting already", later, yours=True)
            if self._closed or waiting >= self._most or waiting * self._seconds > patience:
                raise busy(f"{waiting} {self._what} are waiting already", later)
            self._waiting.setdefault(client, deque()).append(job)
            self._emit_places()
            self._changed.notify()
        return job

    def waiting(self) -> int:
        """How many jobs wait now."""
        with self._changed:
            return len(self._in_order())

    def busy(self) -> bool:
        """Whether a job is running now."""
        return self._running is not None

    def close(self) -> None:
        """Cancel every job, take none any more, and wait a second for the one that runs."""
        with self._changed:
            self._closed = True
            for job in [*self._in_order(), *([self._running] if self._running else [])]:
                job.cancelled.set()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(timeout=1)

    def _do_all(self) -> None:
        while job := self._next():
            self._do(job)
            with self._changed:
                self._running = None

    def _next(self) -> Job | None:
        """Wait for a job, the first one of the client whose turn it is; None when the queue is closed."""
        with self._changed:
            while not (order := self._in_order()):
                if self._closed:
                    return None
                self._changed.wait()
            job = self._running = order[0]
            line = self._waiting.pop(job.client)
            line.popleft()
            if line:  # to the end: everybody else comes first
                self._waiting[job.client] = line
            self._emit_places()
            return job

    def _do(self, job: Job) -> None:
        """Run a job. Its listeners receive `started`, what the work emits, and `done` or `failed`."""
        started = time.monotonic()
        with suppress(Cancelled):  # it may also fail while nobody waits for it any more
            try:
                job.emit("started", None)
                job.emit("done", job.work(job.emit))
                self._seconds = time.monotonic() - started
            except Cancelled:
                pass
            except Exception as error:
                job.emit("failed", error)

    def _in_order(self) -> list[Job]:
        """The jobs that wait, in the order in which they run if nobody else comes. Cancelled ones are dropped."""
        for client, line in list(self._waiting.items()):
            self._waiting[client] = deque(job for job in line if not job.cancelled.is_set())
            if not self._waiting[client]:
                del self._waiting[client]
        lines = [list(line) for line in self._waiting.values()]
        return [line[turn] for turn in range(max(map(len, lines), default=0)) for line in lines if turn < len(line)]

    def _emit_places(self) -> None:
        for before, job in enumerate(self._in_order()):
            with suppress(Cancelled):
                job.emit("queued", before + (self._running is not None))
