"""A log shows how fast work goes and how long it will take; short tasks show nothing."""

from __future__ import annotations

import io
import sys

import pytest

from bridgekit import progress
from bridgekit.progress import LINE_SECONDS, PATIENCE, progress_bars
from tests.shared import wait_until


class Clock:
    now = 1_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


def test_lines_in_a_log_show_the_rate_and_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as report:
        report("encoding audio", 0, 20_000)
        clock.now += 10
        report("encoding audio", 500, 20_000)
        clock.now += LINE_SECONDS / 2
        report("encoding audio", 1_000, 20_000)
        clock.now += LINE_SECONDS / 2
        report("encoding audio", 2_000, 20_000)
    assert capsys.readouterr().err.splitlines() == [
        "encoding audio: 500 of 20,000, 50.0/s, 0:06:30 left",
        "encoding audio: 2,000 of 20,000, 50.0/s, 0:06:00 left",
    ]


def test_what_was_done_before_does_not_count_as_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as report:
        report("training", 900, 1_000)
        clock.now += 50
        report("training", 950, 1_000)
    assert capsys.readouterr().err == "training: 950 of 1,000, 1.0/s, 0:00:50 left\n"


def test_a_task_that_restarts_is_timed_from_its_restart(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as report:
        for rate in (10, 2):
            report("encoding text", 0, 1_000)
            clock.now += 2 * LINE_SECONDS
            report("encoding text", int(rate * 2 * LINE_SECONDS), 1_000)
    assert [line.split(", ")[1] for line in capsys.readouterr().err.splitlines()] == ["10.0/s", "2.0/s"]


def test_short_tasks_and_tasks_without_progress_show_no_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as report:
        report("opening encoders", 0, 2)
        clock.now += PATIENCE / 2
        report("opening encoders", 1, 2)
        assert capsys.readouterr().err == ""
        clock.now += PATIENCE
        report("drawing", 0, 5)
        clock.now += 2 * PATIENCE
        report("drawing", 0, 5)
    assert capsys.readouterr().err == "drawing: 0 of 5\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def wait_for(self, text: str) -> None:
        """Wait until that is printed."""
        wait_until(lambda: text in self.getvalue(), f"for {text}")


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in place of standard error. No fixture, since pytest puts a file of its own there before the test begins."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    return terminal


def test_on_a_terminal_a_slow_first_step_shows_a_bar_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with progress_bars() as report:
        report("opening encoders", 0, 2)
        terminal.wait_for("0/2")


def test_on_a_terminal_quick_work_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", 60)
    with progress_bars() as report:
        report("opening encoders", 0, 2)
        report("opening encoders", 2, 2)
    assert "opening" not in terminal.getvalue()
    assert "\n" not in terminal.getvalue()


def test_on_a_terminal_nested_work_shares_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with progress_bars() as outer:
        with progress_bars() as inner:
            assert inner is outer
        outer("speaking", 1, 9)
        terminal.wait_for("1/9")
    with progress_bars() as after:
        assert after is not outer
