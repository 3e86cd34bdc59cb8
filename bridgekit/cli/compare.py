"""`bridgekit compare`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import TYPE_CHECKING, Annotated

import typer

from bridgekit.cli.common import (
    PAIRS,
    Columns,
    Device,
    Json,
    Outside,
    Seed,
    Strict,
    parse_columns,
    print_set_aside,
)
from bridgekit.terminal import print_json, print_table, say, say_lines

if TYPE_CHECKING:
    from bridgekit.recipes.compare import Comparison


def command(
    a: Annotated[list[str], typer.Option("--a", help="An encoder as [b]provider:model[/b], or a modality. Repeatable.")],
    b: Annotated[list[str], typer.Option("--b", help="An encoder of the other modality. Repeatable.")],
    pairs: Annotated[str | None, typer.Option(help=f"{PAIRS} [dim]default: a plugin's source for these sides[/dim]")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    outside: Outside = False,
    column: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Compare encoders on a table: probe every combination of them, and fit the best three.

    Example: [b]bridgekit compare --a image --a timm:resnet50 --b text --pairs clips.csv[/b]
    """
    from bridgekit.recipes.compare import CompareOptions, run_comparison

    options = CompareOptions(
        a, b, pairs, seed=seed, device=device, strict=strict, outside=outside, columns=parse_columns(column)
    )
    found = run_comparison(options)
    if as_json:
        print_json(asdict(found))
        return
    print_set_aside(found.set_aside)
    print_comparison(found)
    say(f"Next: {found.command}")


def print_comparison(found: Comparison) -> None:
    """Print the table of combinations, best first."""
    a, b = found.encoders
    columns = (a, b, "probe", "fit, val", "fit, test", "method", "ms/pair", "width")
    rows: list[tuple[Sequence[object], bool]] = []
    number_of = {name: label for names in found.encoders.values() for name, label in _labels(names)}
    for number, row in enumerate(found.combinations):
        fit = row.fitted
        measured = (
            _with_interval(row.probe, row.interval),
            f"{100 * fit.validation:.1f}" if fit else "–",
            _with_interval(fit.recall, fit.interval) if fit and fit.recall is not None and fit.interval else "–",
            fit.method if fit else "–",
            f"{1_000 * sum(row.seconds):.3g}",
            "+".join(map(str, row.widths)),
        )
        rows.append(((number_of[row.a], number_of[row.b], *measured), number == 0))
    print_table("Recall in %, best first", columns, rows, text={"method"})
    for modality, names in found.encoders.items():
        for number, name in enumerate(names, 1):
            say(f"{modality} {number}: {name}")
    counts = ", ".join(f"{count:,} {split}" for split, count in found.rows.items())
    say_lines(
        f"Rows: {counts}.\n"
        "Recall: the mean of recall@1, @5 and @10 in both directions, and its 95 % interval, by a bootstrap over queries.\n"
        f"probe: the closed form of up to {found.probed:,} training rows, on other rows, none of them of a test split.\n"
        "fit: what align saves, for the combinations with the best probes. The validation rows decide their order."
    )


def _labels(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The name of each encoder, and of each two concatenated, with its number or numbers."""
    numbered = [(name, str(number)) for number, name in enumerate(names, 1)]
    yield from numbered
    for (one, first), (other, second) in combinations(numbered, 2):
        yield f"concat:{one}+{other}", f"{first}+{second}"


def _with_interval(recall: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * recall:.1f} ({100 * low:.0f}–{100 * high:.0f})"
