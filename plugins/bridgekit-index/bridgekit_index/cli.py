"""`bridgekit index`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import Columns, Outside, find_bridge, parse_columns, print_set_aside
from bridgekit.terminal import print_json, say


def command(
    items: Annotated[
        str, typer.Argument(help="A table, a folder of files, a .txt file with one text per line, or a plugin's source.")
    ],
    bridge: Annotated[Path | None, typer.Option(help="Bridge folder. [dim]default: the newest in ./bridges[/dim]")] = None,
    modality: Annotated[
        str | None, typer.Option(help="Index only this modality. [dim]default: all of the bridge's found in ITEMS[/dim]")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="A folder, or an s3://, gs:// or az:// URL. [dim]default: BRIDGE.index, next to the bridge[/dim]"),
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove rows that are no longer in ITEMS.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if an item would be set aside.")] = False,
    device: Annotated[str, typer.Option(help="A torch device, or auto.")] = "auto",
    outside: Outside = False,
    column: Columns = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Embed items and store them in an index for bridgekit search --index. Run it again to add new items.

    Example: [b]bridgekit index photos --bridge bridges/image-text[/b]
    """
    from bridgekit.bridge.bridge import Bridge
    from bridgekit.progress import progress_bars
    from bridgekit_index.index import Index
    from bridgekit_index.listing import list_items, listed_modalities, open_listed

    folder = find_bridge(bridge)
    opened = Bridge.load(folder, device)
    if modality is not None:
        opened.side(modality)
    table = open_listed(items, outside=outside, columns=parse_columns(column))
    wanted = [modality] if modality else listed_modalities(table, tuple(opened.sides))
    listings = [list_items(table, name, outside=outside, columns=parse_columns(column)) for name in wanted]
    index = Index.create(out or folder.absolute().with_name(f"{folder.absolute().name}.index"), folder)
    with progress_bars() as report:
        done = [index.add(opened, listing, prune=prune, strict=strict, report=report) for listing in listings]
        index.finish(report)
    set_aside = [row for added in done for row in added.set_aside]
    methods = [index.approximate(added.modality) for added in done]
    if as_json:
        counts = ("new", "changed", "unchanged", "gone", "removed")
        tables = {
            added.modality: {
                "rows": index.rows(added.modality),
                **{name: getattr(added, name) for name in counts},
                "seconds": round(added.seconds, 3),
                "search": method.as_json() if method else {"exact": True},
            }
            for added, method in zip(done, methods, strict=True)
        }
        print_json({"index": index.path, "tables": tables, "set_aside": [vars(row) for row in set_aside]})
        return
    print_set_aside(set_aside)
    for added, method in zip(done, methods, strict=True):
        parts = [f"{added.new:,} new", f"{added.unchanged:,} unchanged"]
        parts += [f"{count:,} {what}" for what, count in (("changed", added.changed), ("removed", added.removed)) if count]
        say(f"{added.modality}: {index.rows(added.modality):,} rows, {', '.join(parts)}; {added.seconds:,.1f} s")
        if added.gone:
            say(f"  {added.gone:,} rows of {items} are no longer in it; --prune removes them")
        say(f"  search: {method or 'exact'}")
    shown = out or str(folder.with_name(f"{folder.name}.index"))
    say(f"Index: {shown}")
    unusable = {row.item for row in done[0].set_aside}
    example = next((item for item in map(str, listings[0].items) if item not in unusable), None)
    if example:
        say(f"Next:  bridgekit search {shlex.quote(example)[:100]} --index {shlex.quote(shown)}")
