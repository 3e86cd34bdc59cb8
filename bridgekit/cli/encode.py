"""`bridgekit encode`."""

from __future__ import annotations

from typing import Annotated

import typer

from bridgekit.cli.common import OUTSIDE, print_json, print_set_aside, say


def command(
    pairs: Annotated[
        str | None,
        typer.Option(
            help="CSV, TSV, JSON Lines, Parquet, a folder of class folders, or a source's name. [dim]default: as align[/dim]"
        ),
    ] = None,
    a: Annotated[
        str | None, typer.Option("--a", help="A modality, or an encoder as [b]provider:model[/b]. [dim]default: as align[/dim]")
    ] = None,
    b: Annotated[str | None, typer.Option("--b", help="Another.")] = None,
    c: Annotated[list[str] | None, typer.Option("--c", help="Further ones: may be given several times.")] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="On the Ray cluster that $RAY_ADDRESS names, or Ray's processes on this machine.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a row would be set aside.")] = False,
    device: Annotated[str, typer.Option(help="A torch device, or auto.")] = "auto",
    outside: Annotated[bool, typer.Option("--outside", help=OUTSIDE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Encode a table's items now, to align them later. Each item is encoded once, ever.

    Example: [b]bridgekit encode --pairs clips.csv[/b]
    """
    from bridgekit.recipes.encode import encode_table

    done = encode_table(a, b, pairs, more=c or (), device=device, strict=strict, ray=ray, outside=outside)
    if as_json:
        sides = {
            modality: {
                "encoder": done.encoders[modality],
                "items": len(latents.matrix),
                "encoded_now": latents.encoded,
                "failed": len(latents.failed),
                "seconds": round(latents.seconds, 3),
                "products": latents.precision.products,
                "agreement": latents.precision.agreement,
                "folder": str(latents.folder),
            }
            for modality, latents in done.latents.items()
        }
        set_aside = [vars(row) for row in done.set_aside]
        print_json({"pairs": done.source, "rows": done.rows, "sides": sides, "set_aside": set_aside})
        return
    print_set_aside(done.set_aside)
    for modality, latents in done.latents.items():
        told = f"{modality}: {len(latents.matrix):,} different items by {done.encoders[modality]}"
        if not latents.encoded:
            say(f"{told}, all encoded before")
        else:
            rate = f"{latents.encoded / max(latents.seconds, 1e-9):,.1f} items/s"
            found = latents.precision.agreement
            checked = "" if found is None else f" (least cosine of bfloat16 to float32: {found:.5f})"
            say(f"{told}, {latents.encoded:,} of them now: {rate}, products in {latents.precision.products}{checked}")
        say(f"  kept in {latents.folder}")
    print(f"{done.rows:,} rows can be used. Next: bridgekit align with the same --pairs, --a and --b")
