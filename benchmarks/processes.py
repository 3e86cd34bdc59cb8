"""Runs of parts of a benchmark in processes of their own, with the most memory that each held."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Linux's own record of the most memory that this process has held. `getrusage` starts with what the parent had held.
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def can_measure_memory() -> bool:
    """Whether the system keeps such a record."""
    return CLEAR.exists()


def peak_memory() -> int:
    """The most bytes that this process has held since the record was cleared."""
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert found
    return 1024 * int(found.group(1))


def report(work: Callable[[], dict[str, Any]]) -> None:
    """Do some work and print, for `in_process`, what it gave, the seconds that it took and the bytes it held beyond before."""
    CLEAR.write_text("5")
    before, started = peak_memory(), time.perf_counter()
    figures = work()
    seconds = time.perf_counter() - started
    print("\n" + json.dumps({"seconds": seconds, "bytes": peak_memory() - before, **figures}))


def in_process(file: str, *arguments: object) -> dict[str, Any]:
    """What `report` prints in a process that runs a file with arguments."""
    command = [sys.executable, file, *map(str, arguments)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return figures
