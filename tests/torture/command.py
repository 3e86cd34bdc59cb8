"""Calls the real command line in this process on malicious input and checks how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import resource
import signal
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bridgekit import cli

#: Limits on a command's CPU time and wall-clock time, in seconds. The machine may be busy, so the latter is larger.
SECONDS, PATIENCE = 20, 120
#: Characters that a command may show people, whatever is in its files.
SHOWN = 100_000
#: Control characters that terminals interpret, and surrogates.
_OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHAPES = (
    (re.compile(r"(?:/|\b[\w.-]+/)[^\s,:;)`']*"), "PATH"),
    (re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`"), "'…'"),
    (re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{12,}\b"), "HEX"),
    (re.compile(r"-?\d[\d,.]*"), "N"),
)


class Hang(BaseException):
    """A command took too long. Not an Exception, so that the command cannot catch it."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Arguments:
        code: exit status.
        out, err: its output.
        seconds: CPU time.
        crash: an exception that the command line did not handle, or "".
    """

    code: int
    out: str
    err: str
    seconds: float
    crash: str = ""

    @property
    def error(self) -> dict[str, str | None]:
        """The error that a command with `--json` printed: what, where, fix."""
        error: dict[str, str | None] = json.loads(self.out)["error"]
        return error


@contextlib.contextmanager
def inside(folder: Path, **environment: str) -> Iterator[None]:
    """Change to a folder and set environment variables."""
    before, old = Path.cwd(), {name: os.environ.get(name) for name in environment}
    os.chdir(folder)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.chdir(before)
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def call(arguments: Sequence[object]) -> Ended:
    """Run `bridgekit ARGUMENTS` in this process, with limits on time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code, seconds, crash = _run(arguments)
    return Ended(code, out.getvalue(), err.getvalue(), seconds, crash)


def call_on_terminal(arguments: Sequence[object]) -> Ended:
    """`call` on a pseudo-terminal without colours or a cursor, so that every escape sequence is a stranger's."""
    shown = bytearray()
    with (
        inside(Path(), TERM="dumb", NO_COLOR="1"),
        _terminal(shown) as screen,
        contextlib.redirect_stdout(screen),
        contextlib.redirect_stderr(screen),
    ):
        code, seconds, crash = _run(arguments)
    return Ended(code, shown.decode("utf-8", "surrogateescape"), "", seconds, crash)


@contextlib.contextmanager
def _terminal(shown: bytearray) -> Iterator[io.TextIOWrapper]:
    """A file that is a terminal. What is written to it is in `shown` at the end."""
    controller, terminal = pty.openpty()
    attributes = termios.tcgetattr(terminal)
    attributes[1] &= ~termios.OPOST  # no carriage returns that nobody wrote
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(controller, 1 << 16):
                shown.extend(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with os.fdopen(terminal, "w", encoding="utf-8", errors="backslashreplace") as screen:
        yield screen
    reader.join()
    os.close(controller)


def _run(arguments: Sequence[object]) -> tuple[int, float, str]:
    """Run the command line; gives its exit status, CPU time, and the exception that it did not handle."""
    started = time.process_time()
    code, crash = 0, ""
    argv, sys.argv = sys.argv, ["bridgekit", *map(str, arguments)]
    handlers = {number: signal.signal(number, _stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.alarm(PATIENCE)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Hang:
        crash = f"it took over {SECONDS} s of CPU time or {PATIENCE} s in total"
    except Exception as error:
        crash = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.argv = argv
    return code, time.process_time() - started, crash


def _stop(*_: object) -> None:
    raise Hang


def fault(ended: Ended, codes: Sequence[int] = (0, 2)) -> str:
    """What is wrong with how a command with `--json` ended, or "": it must print a result, or an error with all three parts."""
    if ended.crash:
        return ended.crash
    if ended.code not in codes:
        return f"exit status {ended.code}: {ended.err[-200:]}"
    if "Traceback" in ended.err or "Traceback" in ended.out:
        return f"a traceback: {ended.err[-200:]}"
    if obeyed := _OBEYED.search(ended.out + ended.err):
        return f"it prints the control character {obeyed[0]!a}"
    try:
        printed = json.loads(ended.out)
    except ValueError:
        return f"it prints no JSON: {ended.out[:200]}"
    if ended.code < 2:  # `check` ends with 1 if it finds errors
        return ""
    error = printed.get("error", {})
    missing = [part for part in ("what", "where", "fix") if not error.get(part)]
    if missing:
        return f"its message does not say {' and '.join(missing)}: {ended.err[:200]}"
    lines = ended.err[ended.err.find("bridgekit: ") :].splitlines()  # after any progress output
    if not 1 <= len(lines) <= 3 or max(map(len, lines)) > 1_500:
        return f"its message has {len(lines)} lines of up to {max(map(len, lines))} characters"
    return ""


def fault_for_people(ended: Ended, codes: Sequence[int] = (0, 2)) -> str:
    """What is wrong with what a command without `--json` showed on a terminal, or ""."""
    if ended.crash:
        return ended.crash
    if ended.code not in codes:
        return f"exit status {ended.code}: {ended.out[-200:]}"
    if "Traceback" in ended.out:
        return f"a traceback: {ended.out[-200:]}"
    if obeyed := _OBEYED.search(ended.out):
        return f"it shows the control character {obeyed[0]!a}: {ended.out[max(0, obeyed.start() - 60) : obeyed.end() + 60]!a}"
    if len(ended.out) > SHOWN:
        return f"it shows {len(ended.out):,} characters"
    return ""


def shape(ended: Ended) -> str:
    """An error message without numbers, names and paths."""
    return short(" | ".join(str(ended.error[part]) for part in ("what", "fix")))


def short(text: str) -> str:
    """A text without its numbers, names and paths."""
    for pattern, name in _SHAPES:
        text = pattern.sub(name, text)
    return text


def reasons(ended: Ended) -> list[str]:
    """The reasons for setting rows aside, if the result lists them."""
    result = json.loads(ended.out)
    return [row["reason"] for row in result.get("set_aside", [])] if isinstance(result, dict) else []


def peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
