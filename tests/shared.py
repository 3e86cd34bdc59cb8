"""What several test files need: things made once a run, however many processes run the tests, and waiting, and forks."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

#: Seconds after which a test gives up waiting. So many that only what never comes takes them, on however busy a machine.
PATIENCE = 600.0


def wait_until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for a condition to hold.

    Raises:
        AssertionError: it does not within `PATIENCE` seconds.
    """
    end = time.perf_counter() + PATIENCE  # not monotonic(), which some tests replace
    while not condition():
        assert time.perf_counter() < end, f"waited {PATIENCE:.0f} s in vain {what}"
        time.sleep(0.01)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker of pytest-xdist to ask for it fills, while the others wait.

    Arguments:
        factory: of this process's temporary folders.
        name: of the folder, the same in all processes.
        make: fills the empty folder; if it fails, the next to ask tries again.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    done = folder.with_suffix(".made")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


class Fork:
    """A process of its own that starts at once: a fork of this one, which has imported everything already.

    Arguments:
        work: what it does. It exits with 0, or as `sys.exit` tells it to, or with 70 after another exception.
        log: the file that its standard output and error are appended to.
    """

    def __init__(self, work: Callable[[], object], log: Path) -> None:
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                work()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self) -> int:
        """Its exit code; negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
