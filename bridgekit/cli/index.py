"""`bridgekit index`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridgekit.cli.common import OUTSIDE, find_bridge, print_json, print_set_aside

if TYPE_CHECKING:
    from bridgekit.index import Approximate


def command(
    items: Annotated[str, typer.Argument(help="A table, a folder of files, a .txt of lines, or a source.")],
    bridge: Annotated[
        Path | None, typer.Option(help="The bridge's folder. [dim]default: the newest in ./bridges[/dim]")
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="Index only this one. [dim]default: all of the bridge's that are there[/dim]")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="A folder, or an s3://, gs:// or az:// URL. [dim]default: beside the bridge, BRIDGE.index[/dim]"),
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove what these ITEMS no longer have.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where an item would be set aside.")] = False,
    device: Annotated[str, typer.Option(help="A torch device, or auto.")] = "auto",
    outside: Annotated[bool, typer.Option("--outside", help=OUTSIDE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Embed items once and keep them in an index, to be searched with search --index. Again: adds what is new.

    Example: [b]bridgekit index photos --bridge bridges/image-text[/b]
    """
    from bridgekit.bridge.bridge import Bridge
    from bridgekit.index import Index
    from bridgekit.progress import progress_bars
    from bridgekit.tables.listing import list_items, listed_modalities, open_listed

    folder = find_bridge(bridge)
    opened = Bridge.load(folder, device)
    if modality is not None:
        opened.side(modality)
    table = open_listed(items, outside=outside)
    wanted = [modality] if modality else listed_modalities(table, tuple(opened.sides))
    listings = [list_items(table, name, outside=outside) for name in wanted]
    index = Index.create(out or folder.absolute().with_name(f"{folder.absolute().name}.index"), folder)
    with progress_bars() as report:
        done = [index.add(opened, listing, prune=prune, strict=strict, report=report) for listing in listings]
        index.finish(report)
    if as_json:
        tables = {
            added.modality: {
                "rows": index.rows(added.modality),
                "new": added.new,
                "changed": added.changed,
                "unchanged": added.unchanged,
                "gone": added.gone,
                "removed": added.removed,
                "seconds": round(added.seconds, 3),
                "search": search_json(index.approximate(added.modality)),
            }
            for added in done
        }
        print_json(
            {"index": index.path, "tables": tables, "set_aside": [vars(row) for added in done for row in added.set_aside]}
        )
        return
    print_set_aside([row for added in done for row in added.set_aside])
    for added in done:
        parts = [f"{added.new:,} new", f"{added.unchanged:,} unchanged"]
        parts += [f"{count:,} {what}" for what, count in (("changed", added.changed), ("removed", added.removed)) if count]
        print(f"{added.modality}: {index.rows(added.modality):,} rows, {', '.join(parts)}; {added.seconds:,.1f} s")
        if added.gone:
            print(f"  {added.gone:,} rows of {items} are no longer in it; --prune removes them")
        print(f"  search: {told(index.approximate(added.modality))}")
    shown = out or str(folder.with_name(f"{folder.name}.index"))
    print(f"Index: {shown}")
    unusable = {row.item for row in done[0].set_aside}
    asked = next((item for item in map(str, listings[0].items) if item not in unusable), None)
    if asked:
        print(f"Next:  bridgekit search {shlex.quote(asked)[:100]} --index {shlex.quote(shown)}")


def told(approximate: Approximate | None) -> str:
    """How a search goes, in words."""
    if approximate is None:
        return "exact"
    recalls = ", ".join(f"{value:.3f} for {query} queries" for query, value in approximate.recall.items())
    return f"approximate ({approximate.kind}), recall@10 against exact: {recalls or 'not measured yet'}"


def search_json(approximate: Approximate | None) -> dict[str, object]:
    """The same for programs."""
    if approximate is None:
        return {"exact": True}
    return {"exact": False, "kind": approximate.kind, "recall@10": dict(approximate.recall)}
