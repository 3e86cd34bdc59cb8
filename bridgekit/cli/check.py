"""`bridgekit check`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from bridgekit.cli.common import PAIRS, SIDE, Columns, Device, Json, Outside, parse_columns
from bridgekit.terminal import print_json, print_table, say, say_styled

if TYPE_CHECKING:
    from bridgekit.checks.findings import TableReport

#: Items shown per finding; `--json` has all.
SHOWN = 3


def command(
    pairs: Annotated[str, typer.Argument(help=PAIRS)],
    a: Annotated[str | None, typer.Option("--a", help=f"{SIDE} [dim]default: all modality columns[/dim]")] = None,
    b: Annotated[str | None, typer.Option("--b", help="Second modality or encoder.")] = None,
    c: Annotated[list[str] | None, typer.Option("--c", help="Further ones; may be repeated.")] = None,
    latents: Annotated[bool, typer.Option(help="Encode the items and check their latents, which align will reuse.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Also exit with 1 if there are warnings.")] = False,
    device: Device = "auto",
    outside: Outside = False,
    column: Columns = None,
    as_json: Json = False,
) -> None:
    """Check a table before training: leaks between splits, duplicates, silence, extreme lengths, near-duplicate latents.

    Exits with 1 if there are errors, for which align would reject the table, and with 0 if there are only warnings or notes.

    Example: [b]bridgekit check clips.csv[/b]
    """
    from dataclasses import asdict

    from bridgekit.recipes.check import check_pairs

    found = check_pairs(
        pairs, a, b, more=c or (), latents=latents, device=device, outside=outside, columns=parse_columns(column)
    )
    if as_json:
        print_json(asdict(found))
    else:
        options = [*(["--outside"] if outside else []), *(f"--column {shlex.quote(each)}" for each in column or ())]
        _print(found, " ".join(options))
    if found.count("error") or (strict and found.count("warning")):
        raise typer.Exit(1)


def _print(found: TableReport, options: str) -> None:
    """Print the findings, worst first, the split sizes, and the next command with the options that it needs too."""
    styles = {"error": "bold red", "warning": "bold yellow", "note": "bold"}
    for finding in found.findings:
        say_styled((finding.grade, styles[finding.grade]), (f" {finding.what}", ""))
        for item in finding.items[:SHOWN]:
            say_styled((f"    {item}", "dim"))
        if len(finding.items) > SHOWN:
            say_styled((f"    ... and {len(finding.items) - SHOWN:,} more", "dim"))
        if finding.remedy:
            say(f"  fix: {finding.remedy}")
    if found.findings:
        say()
    _print_splits(found)
    for modality, figures in found.figures.items():
        if figures:
            say(f"{modality}: {', '.join(f'{name} {value:g}' for name, value in figures.items())}")
    counts = f"{found.source}: {found.rows:,} usable rows, {len(found.set_aside):,} set aside."
    if found.count("error"):
        say(f"{counts} Fix the errors before training.")
        return
    warnings = found.count("warning")
    say(f"{counts} {'No problems found' if not warnings else '1 warning' if warnings == 1 else f'{warnings} warnings'}.")
    say(f"Next:   bridgekit align --pairs {shlex.quote(found.source)} {options}".rstrip())


def _print_splits(found: TableReport) -> None:
    title = "The table's splits" if found.own_splits else "Splits that align will create (with seed 0)"
    first = next(iter(found.splits.values()))
    sizes = ["rows", *([] if first.groups is None else ["groups"]), *(f"distinct\n{modality}" for modality in first.distinct)]
    rows: list[tuple[Sequence[object], bool]] = []
    for name, split in found.splits.items():
        counts = [split.rows, *([] if split.groups is None else [split.groups]), *split.distinct.values()]
        label = [name, *(f"{count:,}" for count in counts)]
        for direction, recall in (split.chance or {"": {}}).items():
            rows.append(((*label, direction, *(f"{100 * value:.1f}" for value in recall.values())), False))
            label = [""] * len(label)
    print_table(title, ("split", *sizes, "by chance", "@1", "@5", "@10"), rows, text={"split", "by chance"})
