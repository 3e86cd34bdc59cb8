"""`bridgekit encode`."""

from __future__ import annotations

from typing import Annotated

import typer

from bridgekit.cli.common import (
    PAIRS,
    SIDE,
    Columns,
    Device,
    Json,
    Outside,
    Strict,
    parse_columns,
    print_set_aside,
)
from bridgekit.terminal import print_json, say


def command(
    pairs: Annotated[str | None, typer.Option(help=f"{PAIRS} [dim]default: as for align[/dim]")] = None,
    a: Annotated[str | None, typer.Option("--a", help=f"{SIDE} [dim]default: as for align[/dim]")] = None,
    b: Annotated[str | None, typer.Option("--b", help="Second modality or encoder.")] = None,
    c: Annotated[list[str] | None, typer.Option("--c", help="Further ones; may be repeated.")] = None,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Encode with Ray, on the cluster at $RAY_ADDRESS or locally. Workers read Parquet and WebDataset themselves, "
            "also from URLs such as s3://bucket/pairs/.",
        ),
    ] = False,
    strict: Strict = False,
    device: Device = "auto",
    outside: Outside = False,
    column: Columns = None,
    as_json: Json = False,
) -> None:
    """Encode a table into the latent store, for a later align. Items are encoded only once.

    Example: [b]bridgekit encode --pairs clips.csv[/b]
    """
    from bridgekit.recipes.encode import encode_table

    done = encode_table(
        a, b, pairs, more=c or (), device=device, strict=strict, ray=ray, outside=outside, columns=parse_columns(column)
    )
    if as_json:
        sides = {
            modality: {
                "encoder": side.encoder,
                "items": side.items,
                "encoded_now": side.encoded,
                "failed": side.failed,
                "seconds": round(side.seconds, 3),
                "products": side.precision.products,
                "agreement": side.precision.agreement,
                "folder": side.folder,
            }
            for modality, side in done.sides.items()
        }
        set_aside = [vars(row) for row in done.set_aside]
        print_json({"pairs": done.source, "rows": done.rows, "sides": sides, "set_aside": set_aside})
        return
    print_set_aside(done.set_aside)
    for modality, side in done.sides.items():
        line = f"{modality}: {side.items:,} distinct items by {side.encoder}"
        if not side.encoded:
            say(f"{line}, all encoded before")
        else:
            rate = f"{side.encoded / max(side.seconds, 1e-9):,.1f} items/s"
            found = side.precision.agreement
            checked = "" if found is None else f" (minimum cosine to float32: {found:.5f})"
            say(f"{line}, {side.encoded:,} encoded now: {rate}, in {side.precision.products}{checked}")
        say(f"  stored in {side.folder}")
    say(f"{done.rows:,} usable rows. Next: bridgekit align with the same --pairs, --a and --b")
