"""Progress bars on standard error, for anything that takes longer than a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Seconds that work may take before a bar is worth showing.
PATIENCE = 1.0

#: Called with what is going on, how much is done, and of how much.
Report = Callable[[str, int, int], object]


def silent(what: str, done: int, total: int) -> None:
    """A report to nobody."""


@contextmanager
def progress_bars(show: bool = True) -> Iterator[Report]:
    """A report that shows one bar per kind of work, with rate and time left. Quick work shows none."""
    if not show:
        yield silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bars = Progress(
        TextColumn("{task.description:16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    began: dict[str, float] = {}
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if time.monotonic() - began.setdefault(what, time.monotonic()) < PATIENCE and what not in tasks:
            return
        if what not in tasks:
            bars.start()
            tasks[what] = bars.add_task(what, total=total, rate="")
        task = tasks[what]
        speed = bars.tasks[bars.task_ids.index(task)].speed
        bars.update(task, completed=done, total=total, rate=f"{speed:,.1f}/s" if speed else "")

    try:
        yield report
    finally:
        if tasks:
            bars.stop()
