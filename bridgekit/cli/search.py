"""`bridgekit search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import OUTSIDE, find_bridge, other_modality, print_json, query_modality, say
from bridgekit.errors import BridgekitError


def command(
    queries: Annotated[list[str], typer.Argument(help="Files, or words.")],
    bridge: Annotated[
        Path | None, typer.Option(help="The bridge's folder. [dim]default: the newest in ./bridges[/dim]")
    ] = None,
    among: Annotated[
        str | None,
        typer.Option(
            help="A table, a folder of files, a .txt of lines, or a source. [dim]default: the bridge's own pairs[/dim]"
        ),
    ] = None,
    from_: Annotated[str | None, typer.Option("--from", help="The queries' modality, where it cannot be told.")] = None,
    to: Annotated[
        str | None, typer.Option(help="The modality to search. [dim]default: the other one; of several, text[/dim]")
    ] = None,
    through: Annotated[
        str | None,
        typer.Option(
            help="A third modality, whose items in the bridge's own pairs stand between: better where the two had no pairs."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many to show for each query.")] = 5,
    device: Annotated[str, typer.Option(help="A torch device, or auto.")] = "auto",
    outside: Annotated[bool, typer.Option("--outside", help=OUTSIDE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """The nearest items of one modality to files or words of another.

    Example: [b]bridgekit search dog.wav rain.flac -k 3[/b]
    """
    from bridgekit.bridge import Bridge
    from bridgekit.pairs import read_items
    from bridgekit.progress import progress_bars

    opened = Bridge.load(find_bridge(bridge), device)
    source = query_modality(opened, queries, from_)
    target = to or other_modality(opened, source)
    opened.side(target)
    if through in (source, target):
        raise BridgekitError(f"{source} and {target} cannot meet through {through}", remedy="name a third modality, or none")
    items = read_items(among or opened.followed(opened.table_of(target)), target, outside=outside)
    between = None
    if through:
        opened.side(through)
        between = (through, read_items(opened.followed(opened.table_of(through)), through, outside=outside))
    with progress_bars() as report:
        found = opened.search(source, queries, target, items, k, through=between, report=report)
    if as_json:
        print_json(
            [
                {"query": query, "found": [{"item": str(hit.item), "similarity": round(hit.similarity, 6)} for hit in hits]}
                for query, hits in zip(queries, found, strict=True)
            ]
        )
        return
    for query, hits in zip(queries, found, strict=True):
        say(query)
        for hit in hits:
            say(f"  {hit.similarity:6.3f}  {hit.item}")
