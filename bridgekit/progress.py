"""Progress on standard error: bars on a terminal, occasional lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from bridgekit import interrupts, terminal
from bridgekit.plain import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Seconds before work is worth a progress bar.
PATIENCE = 0.5
#: Seconds between two lines about the same task, without a terminal.
LINE_SECONDS = 30.0

#: Progress callback: task name, units done, units in total.
Report = Callable[[str, int, int], object]

#: The report of the progress bars that are currently shown.
_on_terminal: Report | None = None


def silent(what: str, done: int, total: int) -> None:
    """A `Report` that does nothing."""


def say(line: str) -> None:
    """Print a notice on standard error: something unexpected, and how it was handled."""
    terminal.say(f"bridgekit: {line}", sys.stderr)


def _lines() -> Report:
    """A `Report` that prints a line once a task has taken `PATIENCE` seconds, then every `LINE_SECONDS`."""
    printed: dict[str, float] = {}
    began: dict[str, tuple[float, int]] = {}

    def report(what: str, done: int, total: int) -> None:
        interrupts.raise_again()
        now = time.monotonic()
        start, before = began[what] = began.get(what, (now, done)) if done else (now, 0)
        if now - printed.setdefault(what, now - LINE_SECONDS + PATIENCE) >= LINE_SECONDS:
            printed[what] = now
            rate = (done - before) / (now - start) if done > before and now > start else 0
            left = f", {rate:,.1f}/s, {timedelta(seconds=round((total - done) / rate))} left" if rate else ""
            terminal.say(f"{what}: {done:,} of {total:,}{left}", sys.stderr)

    return report


@contextmanager
def progress_bars(show: bool = True) -> Iterator[Report]:
    """A `Report` that draws a bar for each task longer than `PATIENCE`, or prints lines if standard error is no terminal."""
    if not show:
        yield silent
        return
    if not sys.stderr.isatty():
        yield _lines()
        return
    global _on_terminal
    if _on_terminal is not None:  # nested call: reuse the bars that are already shown
        yield _on_terminal
        return
    from rich import progress

    class Bars(progress.Progress):
        """Hides tasks shorter than `PATIENCE`. A thread draws the bars, so that a slow first step is shown too."""

        def get_renderables(self) -> Iterator[RenderableType]:
            slow = [task for task in self.tasks if (task.finished_time or task.elapsed or 0) >= PATIENCE]
            yield self.make_tasks_table(slow)

    columns = (
        progress.TextColumn("{task.description:16}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}", markup=False),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    tasks: dict[str, progress.TaskID] = {}
    with Bars(*columns, console=terminal.error_console()) as bars:

        def report(what: str, done: int, total: int) -> None:
            interrupts.raise_again()
            if what not in tasks:
                tasks[what] = bars.add_task(plain(what), total=total, rate="")
            task = tasks[what]
            speed = bars.tasks[bars.task_ids.index(task)].speed
            bars.update(task, completed=done, total=total, rate=f"{speed:,.1f}/s" if speed else "")

        _on_terminal = report
        try:
            yield report
        finally:
            _on_terminal = None
