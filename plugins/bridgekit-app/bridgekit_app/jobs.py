"""A job queue with one worker thread: bounded, fair among addresses and their clients, cancelling for clients that disconnect.

Before the first job, the thread prepares for all of them. That is no job: nobody counts it as one ahead.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from bridgekit_app.limits import busy

#: Seconds between checks whether a client is still connected.
CHECK_SECONDS = 0.5
#: Reports progress: kind of event and data. An empty kind sends nothing and only checks for cancellation. Raises `Cancelled`
#: once the client has disconnected, so work should call it often.
Emit = Callable[[str, Any], None]
Work = Callable[[Emit], Any]


class Cancelled(Exception):
    """The client has disconnected. Not a RuntimeError: code around pipelines catches those."""


class Job:
    """A job, created by `Queue.submit` in the event loop that iterates `events`."""

    def __init__(self, client: str, work: Work, address: str = "") -> None:
        self.client, self.work, self.address = client, work, address
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def emit(self, kind: str, data: Any) -> None:
        """Send an event, from any thread.

        Raises:
            Cancelled: the client has disconnected.
        """
        if self.cancelled.is_set():
            raise Cancelled
        if not kind:
            return
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (kind, data))
        except RuntimeError:  # the loop is closed: the server is shutting down
            raise Cancelled from None

    async def events(self, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[tuple[str, Any]]:
        """The job's events: `queued` with the number of jobs ahead, `preparing` with the progress of what comes before the
        first job, `started`, the work's own, and `done` with its result.

        Arguments:
            gone: whether the client has disconnected; called every `CHECK_SECONDS`.

        Raises:
            Cancelled: the client has disconnected.
            Exception: the work's own error.
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
    """At most `most` jobs, `most_address` per address, `most_each` per client, and the thread that runs them.

    Addresses take turns, and so do the clients of one address. A client is the name that a request gives itself, so that names
    can divide what an address has, and get it no more.

    `what` names the jobs' products in messages. `first` prepares for all jobs; if it fails, each job meets the reason itself.
    """

    def __init__(
        self,
        what: str,
        most: int,
        most_each: int,
        first: Callable[[Emit], None] | None = None,
        most_address: int | None = None,
    ) -> None:
        self._what, self._most, self._most_each, self._most_address = what, most, most_each, most_address or most
        #: The progress of `first`; None once it has ended.
        self.preparing: Any = None if first is None else {"what": "opening", "done": 0, "of": 1}
        self._waiting: OrderedDict[str, OrderedDict[str, deque[Job]]] = OrderedDict()  # by address and client
        self._running: Job | None = None
        self._seconds = 1.0  # duration of the last job, to estimate waiting times
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._do_all, args=[first], name=what, daemon=True)
        self._thread.start()

    def submit(self, client: str, work: Work, patience: float = math.inf, *, address: str = "") -> Job:
        """Append a job to its client's queue. `patience` limits its estimated waiting time, in seconds.

        Raises:
            Refusal: too many jobs are queued, of all clients (503) or of this one or its address (429).
        """
        job = Job(client, work, address)
        with self._changed:
            waiting = len(self._in_order())
            near = self._waiting.get(address, OrderedDict())
            mine, ours = len(near.get(client, ())), sum(map(len, near.values()))
            later = max(1, min(60, round(self._seconds * (waiting + 1) / 2)))
            if mine >= self._most_each:
                raise busy(f"{mine} of your {self._what} are already queued", later, yours=True)
            if ours >= self._most_address:
                raise busy(f"{ours} {self._what} of your address are already queued", later, yours=True)
            if self._closed or waiting >= self._most or waiting * self._seconds > patience:
                raise busy(f"{waiting} {self._what} are already queued", later)
            self._waiting.setdefault(address, OrderedDict()).setdefault(client, deque()).append(job)
            self._emit_places()
            if self.preparing:
                job.emit("preparing", self.preparing)
            self._changed.notify()
        return job

    def waiting(self) -> int:
        """The number of queued jobs."""
        with self._changed:
            return len(self._in_order())

    def busy(self) -> bool:
        """Whether a job is running."""
        return self._running is not None

    def close(self) -> None:
        """Cancel all jobs, accept no more, and wait up to a second for the running one."""
        with self._changed:
            self._closed = True
            for job in [*self._in_order(), *([self._running] if self._running else [])]:
                job.cancelled.set()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(timeout=1)

    def _do_all(self, first: Callable[[Emit], None] | None) -> None:
        if first:
            with suppress(Exception):
                first(self._emit_preparing)
            self.preparing = None
        while job := self._next():
            self._do(job)
            with self._changed:
                self._running = None

    def _emit_preparing(self, _: str, data: Any) -> None:
        with self._changed:
            if self._closed:
                raise Cancelled
            if data is not None:
                self.preparing = data
                for job in self._in_order():
                    with suppress(Cancelled):
                        job.emit("preparing", data)

    def _next(self) -> Job | None:
        """Wait for the next job; None when the queue is closed."""
        with self._changed:
            while not (order := self._in_order()):
                if self._closed:
                    return None
                self._changed.wait()
            job = self._running = order[0]
            near = self._waiting[job.address]
            near[job.client].popleft()
            near.move_to_end(job.client)  # round-robin: this client goes last at its address, and its address last of all
            self._waiting.move_to_end(job.address)
            self._emit_places()
            return job

    def _do(self, job: Job) -> None:
        """Run a job and emit `started`, the work's own events, and `done` or `failed`."""
        started = time.monotonic()
        with suppress(Cancelled):  # `failed` raises it too if the client has disconnected
            try:
                job.emit("started", None)
                job.emit("done", job.work(job.emit))
                self._seconds = time.monotonic() - started
            except Cancelled:
                pass
            except Exception as error:
                job.emit("failed", error)

    def _in_order(self) -> list[Job]:
        """The queued jobs in the order in which they would run. Drops cancelled ones."""
        for address, near in list(self._waiting.items()):
            left = {client: deque(job for job in line if not job.cancelled.is_set()) for client, line in near.items()}
            self._waiting[address] = OrderedDict((client, line) for client, line in left.items() if line)
            if not self._waiting[address]:
                del self._waiting[address]
        return _in_turns([_in_turns(list(near.values())) for near in self._waiting.values()])

    def _emit_places(self) -> None:
        for before, job in enumerate(self._in_order()):
            with suppress(Cancelled):
                job.emit("queued", before + (self._running is not None))


def _in_turns(lines: Sequence[Sequence[Job]]) -> list[Job]:
    """The first of each line, then the second of each, and so on."""
    return [line[turn] for turn in range(max(map(len, lines), default=0)) for line in lines if turn < len(line)]
