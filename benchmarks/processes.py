"""Run parts of a benchmark in separate processes, and measure their peak memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Linux's peak memory of this process. `getrusage` would start with the parent's peak.
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def can_measure_memory() -> bool:
    """Whether the system reports peak memory."""
    return CLEAR.exists()


def peak_memory() -> int:
    """Peak memory in bytes since it was last reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert found
    return 1024 * int(found.group(1))


def report(work: Callable[[], dict[str, Any]]) -> None:
    """Run a function and print its result, seconds and increase of peak memory for `in_process`."""
    CLEAR.write_text("5")
    before, started = peak_memory(), time.perf_counter()
    figures = work()
    seconds = time.perf_counter() - started
    print("\n" + json.dumps({"seconds": seconds, "bytes": peak_memory() - before, **figures}))


def in_process(file: str, *arguments: object) -> dict[str, Any]:
    """Run a file with arguments in a new process; return what it printed with `report`."""
    command = [sys.executable, file, *map(str, arguments)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return figures
