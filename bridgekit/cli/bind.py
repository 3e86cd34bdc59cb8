"""`bridgekit bind`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import (
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
    bridge: Annotated[Path, typer.Argument(help="The bridge's folder.")],
    add: Annotated[str, typer.Option("--add", help=f"What to add. {SIDE}")],
    pairs: Annotated[str, typer.Option(help="A table or source that pairs it with one or more of the bridge's modalities.")],
    out: Annotated[Path | None, typer.Option(help="The larger bridge's folder. [dim]default: replace the bridge[/dim]")] = None,
    method: Method = "auto",
    seed: Seed = 0,
    half: Half = False,
    device: Device = "auto",
    outside: Outside = False,
    column: Columns = None,
    strict: Strict = False,
    resume: Resume = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Bind a modality again with other pairs, or replace another bridge at --out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add a modality to a trained bridge without changing its other sides.

    Example: [b]bridgekit bind bridges/audio-text --add image --pairs photos.csv[/b]
    """
    from bridgekit.recipes.bind import BindOptions, run_binding
    from bridgekit.recipes.sides import known_method

    options = BindOptions(
        bridge,
        add,
        pairs,
        out=out,
        method=known_method(method),
        seed=seed,
        half=half,
        device=device,
        strict=strict,
        resume=resume,
        overwrite=overwrite,
        outside=outside,
        columns=parse_columns(column),
    )
    print_alignment(run_binding(options), as_json, bound=True)
