"""Attack every promise of docs/PROMISES.md in full: make torture, or python -m tests.torture [PART ...]

Prints the number of attempts and of promises held, and exits with 1 if any was broken. All distinct error messages are written
to torture-messages.txt for review, and a plot of memory in the long runs to torture-long-runs.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.torture import attacks, kills, long_runs, media, tables
from tests.torture.outcome import Outcome

MESSAGES = Path("torture-messages.txt")
#: Each part with the numbers that docs/PROMISES.md names.
PARTS: dict[str, Callable[[int], Outcome]] = {
    "attacks": lambda seed: attacks.run(),
    "media": lambda seed: media.run(2_400, seed),
    "tables": lambda seed: tables.run(600, seed),
    "long runs": lambda seed: long_runs.run(100_000, 10_000, long_runs.PICTURE),
    "kills": lambda seed: kills.run(510, seed, slots=2),
}


def main() -> int:
    """Run the named parts, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000, help="random seed")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: use {', '.join(PARTS)}")
    console = Console(width=120)
    console.print(f"seed {options.seed}")
    table = Table("attack", "tried", "held", "minutes", "details")
    failures: list[str] = []
    messages: list[str] = []
    for name in options.parts or PARTS:
        console.print(f"{name} ...")
        started = time.monotonic()
        outcome = PARTS[name](options.seed)
        minutes = (time.monotonic() - started) / 60
        figures = "\n".join(f"{figure}: {value}" for figure, value in outcome.figures.items())
        table.add_row(outcome.name, f"{outcome.tried:,}", f"{outcome.held:,}", f"{minutes:.1f}", figures)
        failures += [f"{outcome.name}: {failure}" for failure in outcome.failures]
        if outcome.held < outcome.tried and not outcome.failures:
            failures.append(f"{outcome.name}: {outcome.tried - outcome.held} did not hold")
        messages += [f"## {outcome.name}", *(f"{shape}\n    {example!r}" for shape, example in outcome.messages.items()), ""]
    console.print(table)
    if messages:
        MESSAGES.write_text("\n".join(messages), encoding="utf-8")
        console.print(f"{sum(not line.startswith('#') for line in messages)} messages, each with an example: {MESSAGES}")
    for failure in failures:
        console.print(f"FAILED {failure}", markup=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
