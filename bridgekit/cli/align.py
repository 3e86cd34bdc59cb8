"""`bridgekit align`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import (
    PAIRS,
    SIDE,
    Columns,
    Device,
    Half,
    Json,
    Method,
    Outside,
    Resume,
    Seed,
    Strict,
    parse_columns,
    print_alignment,
)


def command(
    a: Annotated[str | None, typer.Option("--a", help=f"First side. {SIDE} [dim]default: the table's columns[/dim]")] = None,
    b: Annotated[str | None, typer.Option("--b", help="Second side. [dim]default: the table's columns[/dim]")] = None,
    c: Annotated[list[str] | None, typer.Option("--c", help="Further sides; may be repeated.")] = None,
    pairs: Annotated[str | None, typer.Option(help=f"{PAIRS} [dim]default: a plugin's source for these sides[/dim]")] = None,
    out: Annotated[Path | None, typer.Option(help="The bridge's folder. [dim]default: bridges/A-B[/dim]")] = None,
    preset: Annotated[str, typer.Option(help="Hyperparameters: default, or paper (as published).")] = "default",
    freeze: Annotated[str | None, typer.Option(help="Use this modality's latents as the shared space.")] = None,
    unpaired: Annotated[
        list[str] | None, typer.Option(help="A folder, table or .txt file of further items without a partner; may be repeated.")
    ] = None,
    method: Method = "auto",
    seed: Seed = 0,
    half: Half = False,
    device: Device = "auto",
    outside: Outside = False,
    column: Columns = None,
    strict: Strict = False,
    resume: Resume = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another bridge at --out.")] = False,
    write_report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html into the folder.")] = True,
    as_json: Json = False,
) -> None:
    """Train a shared space for two or more modalities and save it as a bridge.

    Example: [b]bridgekit align --a audio --b text --pairs clips.csv[/b]
    """
    from bridgekit.recipes.align import AlignOptions, run_alignment
    from bridgekit.recipes.sides import known_method

    options = AlignOptions(
        a,
        b,
        pairs,
        more=c or (),
        out=out,
        preset=preset,
        frozen=freeze,
        unpaired=unpaired or (),
        method=known_method(method),
        seed=seed,
        half=half,
        device=device,
        strict=strict,
        resume=resume,
        overwrite=overwrite,
        outside=outside,
        columns=parse_columns(column),
        write_report=write_report,
    )
    print_alignment(run_alignment(options), as_json)
