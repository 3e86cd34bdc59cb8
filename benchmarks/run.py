"""Run every benchmark and write benchmarks/RESULTS.md: python benchmarks/run.py [NAME ...]

Each section has the command, machine and versions. Sections of benchmarks that are not run are kept.
"""

from __future__ import annotations

import importlib
import re
import sys
import time
from pathlib import Path

from common import where

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = "# Measurements\n\nWritten by `make bench`. [Results in brief](../docs/numbers.md) summarises them.\n"
BENCHMARKS = (
    "small",
    "openmoji",
    "speech",
    "esc10",
    "presets",
    "tried",
    "unpaired",
    "studies",
    "generation",
    "binding",
    "loss",
    "training",
    "half",
    "encoding",
    "subsets",
    "evaluation",
    "compare",
    "index",
    "server",
    "peak",
    "tables",
)


def write_section(name: str, body: str, seconds: float) -> None:
    """Replace one benchmark's section of RESULTS.md."""
    title = str(importlib.import_module(name).__doc__).splitlines()[0]
    section = f"## {name}\n\n{title}\n\n{body}\n\n`python benchmarks/{name}.py`, {seconds:.0f} s. {where()}.\n"
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    old = re.search(rf"^## {name}\n.*?(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    text = text.replace(old.group(0), section + "\n") if old else text.rstrip() + "\n\n" + section
    RESULTS.write_text(text.rstrip() + "\n", encoding="utf-8")


def main(names: list[str]) -> None:
    """Run the named benchmarks, or all."""
    for name in names or BENCHMARKS:
        started = time.monotonic()
        body = importlib.import_module(name).main()
        print(body)
        write_section(name, body, time.monotonic() - started)


if __name__ == "__main__":
    main(sys.argv[1:])
