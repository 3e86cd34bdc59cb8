"""A thread that does one piece of work after another, until it is closed: what `Batcher` and `Queue` have in common."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

Task = TypeVar("Task")


class Worker(ABC, Generic[Task]):
    """One daemon thread and what waits for it.

    A subclass keeps what waits, changes it only while it holds `changed`, and notifies that. It calls this `__init__` last,
    as the thread starts there.

    Arguments:
        name: the thread's.
    """

    def __init__(self, name: str) -> None:
        self.changed = threading.Condition()
        self.closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @abstractmethod
    def take(self) -> Task | None:
        """What to do next, or None while nothing waits. `changed` is held."""

    @abstractmethod
    def do(self, task: Task) -> None:
        """Do it. Raises nothing."""

    @abstractmethod
    def cancel(self) -> None:
        """Cancel what waits and what runs. `changed` is held."""

    def close(self) -> None:
        """Cancel everything, take nothing more, and wait a second for what still runs."""
        with self.changed:
            self.closed = True
            self.cancel()
            self.changed.notify()
        self._thread.join(timeout=1)

    def _work(self) -> None:
        while True:
            with self.changed:
                while (task := self.take()) is None:
                    if self.closed:
                        return
                    self.changed.wait()
            self.do(task)
