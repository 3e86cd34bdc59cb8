"""`bridgekit embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import BridgeOption, Device, find_bridge, print_json, print_set_aside, query_modality, say
from bridgekit.errors import BridgekitError


def command(
    items: Annotated[list[str], typer.Argument(help="Files or texts.")],
    bridge: BridgeOption = None,
    out: Annotated[Path, typer.Option(help="Output file: .safetensors, .npy or .parquet.")] = Path("embeddings.safetensors"),
    modality: Annotated[str | None, typer.Option(help="The items' modality, if it is ambiguous.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if an item would be set aside.")] = False,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the embeddings as JSON instead of writing a file.")] = False,
) -> None:
    """Write the embeddings of files or texts in the shared space.

    Example: [b]bridgekit embed clips/*.wav --out clips.safetensors[/b]
    """
    from bridgekit.bridge.bridge import Bridge
    from bridgekit.pairs import SetAside
    from bridgekit.progress import progress_bars
    from bridgekit.recipes.embed import check_format, write_embeddings

    if not as_json:
        check_format(out)
    opened = Bridge.load(find_bridge(bridge), device)
    kind = query_modality(opened, items, modality)
    with progress_bars() as report:
        embedded = opened.embed_usable(kind, items, report=report)
    set_aside = [SetAside(position + 1, kind, items[position], reason) for position, reason in embedded.failed.items()]
    if set_aside and (strict or len(set_aside) == len(items)):
        first = set_aside[0]
        raise BridgekitError(f"{len(set_aside)} of {len(items)} items cannot be used: {first.reason}", where=first.item)
    names = [item for position, item in enumerate(items) if position not in embedded.failed]
    if as_json:
        vectors = [{"item": name, "embedding": vector} for name, vector in zip(names, embedded.vectors.tolist(), strict=True)]
        print_json({"modality": kind, "embeddings": vectors, "set_aside": [vars(row) for row in set_aside]})
        return
    write_embeddings(out, names, embedded.vectors)
    print_set_aside(set_aside)
    say(f"{len(names)} embeddings of {opened.dim} dimensions: {out}")
