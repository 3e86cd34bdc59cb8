"""`bridgekit embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import (
    BridgeOption,
    Columns,
    Device,
    Outside,
    find_bridge,
    parse_columns,
    print_set_aside,
)
from bridgekit.errors import BridgekitError
from bridgekit.terminal import print_json, say


def command(
    items: Annotated[list[str], typer.Argument(help="Files or texts of one modality, or folders and tables of them.")],
    bridge: BridgeOption = None,
    out: Annotated[Path, typer.Option(help="Output file: .safetensors, .npy or .parquet.")] = Path("embeddings.safetensors"),
    modality: Annotated[str | None, typer.Option(help="The items' modality, if it is ambiguous.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if an item would be set aside.")] = False,
    device: Device = "auto",
    outside: Outside = False,
    column: Columns = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the embeddings as JSON instead of writing a file.")] = False,
) -> None:
    """Write the embeddings of files or texts in the shared space.

    Example: [b]bridgekit embed clips --out clips.safetensors[/b]
    """
    from bridgekit.bridge.bridge import Bridge
    from bridgekit.progress import progress_bars
    from bridgekit.recipes.embed import check_format, write_embeddings
    from bridgekit.recipes.inputs import embed_inputs, read_inputs

    if not as_json:
        check_format(out)
    opened = Bridge.load(find_bridge(bridge), device)
    given = read_inputs(opened, items, modality, option="--modality", columns=parse_columns(column), outside=outside)
    with progress_bars() as report:
        usable, vectors = embed_inputs(opened, given, report)
    set_aside = usable.set_aside
    if set_aside and (strict or not usable.items):
        first, number = set_aside[0], len(usable.items) + len(set_aside)
        raise BridgekitError(f"{len(set_aside)} of {number} items cannot be used: {first.reason}", where=first.item)
    names = [str(item) for item in usable.items]
    if as_json:
        records = [{"item": name, "embedding": vector} for name, vector in zip(names, vectors.tolist(), strict=True)]
        print_json({"modality": usable.modality, "embeddings": records, "set_aside": [vars(row) for row in set_aside]})
        return
    write_embeddings(out, names, vectors)
    print_set_aside(set_aside)
    say(f"{len(names)} {'embedding' if len(names) == 1 else 'embeddings'} of {opened.dim} dimensions: {out}")
