"""A queue with one worker, for work of seconds: bounded, fair among clients, telling of itself, cancelled with its client."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from bridgekit.server.limits import busy

#: Seconds between two looks whether a client is still there.
ASK_SECONDS = 0.5
#: What a job's work is given to tell how it goes on: a kind of event (an empty one is told to nobody) and what there is to say.
#: Raises `Cancelled` where the client has gone: work should call it often.
Tell = Callable[[str, Any], None]
Work = Callable[[Tell], Any]


class Cancelled(Exception):
    """Nobody waits for this work any more. Not a RuntimeError: whoever runs a pipeline catches those."""


class Job:
    """One piece of work, from the queue's end to its result.

    Made by `Queue.submit`, in the event loop that then iterates `events`.
    """

    def __init__(self, client: str, work: Work) -> None:
        self.client, self.work = client, work
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def tell(self, kind: str, what: Any) -> None:
        """Pass an event on, from whichever thread.

        Raises:
            Cancelled: nobody waits for it.
        """
        if self.cancelled.is_set():
            raise Cancelled
        if not kind:
            return
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (kind, what))
        except RuntimeError:  # the loop is closed: the server is being stopped
            raise Cancelled from None

    async def events(self, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[tuple[str, Any]]:
        """What is told of it: `queued` with how many are before it, whatever the work tells, and `done` with its result.

        Arguments:
            gone: whether the client has gone away; asked every `ASK_SECONDS`.

        Raises:
            Cancelled: it has.
            Exception: whatever the work raised.
        """
        asked = time.monotonic()
        try:
            while True:
                event = None
                with suppress(asyncio.TimeoutError):
                    event = await asyncio.wait_for(self._events.get(), ASK_SECONDS)
                if time.monotonic() - asked >= ASK_SECONDS:
                    asked = time.monotonic()
                    if self.cancelled.is_set() or await gone():
                        raise Cancelled
                if event is None:
                    continue
                kind, what = event
                if kind == "failed":
                    raise what
                yield kind, what
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
        self._seconds = 1.0  # that the last job took, for who has to come again
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=what, daemon=True)
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
            self._drop_cancelled()
            waiting = sum(map(len, self._waiting.values()))
            mine = len(self._waiting.get(client, ()))
            later = max(1, min(60, round(self._seconds * (waiting + 1) / 2)))
            if mine >= self._most_each:
                raise busy(f"{mine} {self._what} of yours are waiting already", later, yours=True)
            if self._closed or waiting >= self._most or waiting * self._seconds > patience:
                raise busy(f"{waiting} {self._what} are waiting already", later)
            self._waiting.setdefault(client, deque()).append(job)
            self._tell_places()
            self._changed.notify()
        return job

    def waiting(self) -> int:
        """How many jobs wait now."""
        with self._changed:
            return len(self._in_order())

    def busy(self) -> bool:
        """Whether a job is being done now."""
        return self._running is not None

    def close(self) -> None:
        """Cancel all there is."""
        with self._changed:
            self._closed = True
            for job in [*self._in_order(), *([self._running] if self._running else [])]:
                job.cancelled.set()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(timeout=1)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (order := self._in_order()):
                    if self._closed:
                        return
                    self._changed.wait()
                job = self._running = order[0]
                line = self._waiting.pop(job.client)
                line.popleft()
                if line:  # to the end: whoever else waits comes first
                    self._waiting[job.client] = line
                self._tell_places()
            self._do(job)
            with self._changed:
                self._running = None

    def _do(self, job: Job) -> None:
        started = time.monotonic()
        try:
            try:
                job.tell("started", None)
                job.tell("done", job.work(job.tell))
                self._seconds = time.monotonic() - started
            except Cancelled:
                pass
            except Exception as error:
                job.tell("failed", error)
        except Cancelled:
            pass  # it failed, and nobody waits to hear of it

    def _in_order(self) -> list[Job]:
        """The jobs that wait, in the order in which they will be done if nobody else comes."""
        self._drop_cancelled()
        lines = [list(line) for line in self._waiting.values()]
        return [line[turn] for turn in range(max(map(len, lines), default=0)) for line in lines if turn < len(line)]

    def _drop_cancelled(self) -> None:
        for client, line in list(self._waiting.items()):
            self._waiting[client] = deque(job for job in line if not job.cancelled.is_set())
            if not self._waiting[client]:
                del self._waiting[client]

    def _tell_places(self) -> None:
        for before, job in enumerate(self._in_order()):
            try:
                job.tell("queued", before + (self._running is not None))
            except Cancelled:
                continue
