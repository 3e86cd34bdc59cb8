"""Progress bars on standard error, for anything that takes longer than a moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

#: Seconds that work may take before a bar is worth showing.
PATIENCE = 1.0
#: Seconds between two lines about one kind of work, where there is no terminal to draw a bar on.
LINE_SECONDS = 30.0

#: Called with what is going on, how much is done, and of how much.
Report = Callable[[str, int, int], object]


def silent(what: str, done: int, total: int) -> None:
    """A report to nobody."""


def say(line: str) -> None:
    """One line on standard error that is no error: what went otherwise than expected, and what is done about it."""
    print(f"bridgekit: {line}", file=sys.stderr, flush=True)


def _lines() -> Report:
    """A report that prints a line when work goes on for longer than a moment, and again every half minute."""
    told: dict[str, float] = {}
    began: dict[str, tuple[float, int]] = {}

    def report(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        start, before = began[what] = began.get(what, (now, done)) if done else (now, 0)
        if now - told.setdefault(what, now - LINE_SECONDS + PATIENCE) >= LINE_SECONDS:
            told[what] = now
            print(
                f"{what}: {done:,} of {total:,}{_pace(done - before, now - start, total - done)}", file=sys.stderr, flush=True
            )

    return report


def _pace(done: int, seconds: float, left: int) -> str:
    """How many a second, and how long the rest takes at that: `, 35.2/s, 0:08:54 left`. Nothing where nothing is done yet."""
    if done <= 0 or seconds <= 0:
        return ""
    return f", {done / seconds:,.1f}/s, {timedelta(seconds=round(left * seconds / done))} left"


@contextmanager
def progress_bars(show: bool = True) -> Iterator[Report]:
    """A report that shows one bar per kind of work, with rate and time left. Quick work shows none.

    Where standard error is no terminal, a line now and then takes the bars' place: a log should tell that work goes on.
    """
    if not show:
        yield silent
        return
    if not sys.stderr.isatty():
        yield _lines()
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
