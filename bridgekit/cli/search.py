"""`bridgekit search`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridgekit.cli.common import (
    BridgeOption,
    Columns,
    Device,
    Json,
    Outside,
    find_bridge,
    other_modality,
    parse_columns,
    print_set_aside,
)
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.terminal import print_json, say

if TYPE_CHECKING:
    from torch import Tensor

    from bridgekit.bridge.bridge import Bridge
    from bridgekit.hookspecs import SearchIndex
    from bridgekit.progress import Report
    from bridgekit.recipes.inputs import Inputs
    from bridgekit.retrieval import Hit


def command(
    queries: Annotated[list[str], typer.Argument(help="Files or texts of one modality, or folders and tables of them.")],
    bridge: BridgeOption = None,
    among: Annotated[
        str | None, typer.Option(help="Table, folder, .txt of lines, or source. [dim]default: the bridge's own pairs[/dim]")
    ] = None,
    from_: Annotated[str | None, typer.Option("--from", help="The queries' modality, if it cannot be inferred.")] = None,
    to: Annotated[str | None, typer.Option(help="The modality to search. [dim]default: the other one, or text[/dim]")] = None,
    through: Annotated[
        str | None, typer.Option(help="Search through a third modality; better if the two had no pairs.")
    ] = None,
    index: Annotated[str | None, typer.Option(help="Folder or URL of an index, from [b]bridgekit index[/b].")] = None,
    where: Annotated[
        str | None, typer.Option(help="With --index: a filter on columns, such as [b]\"split = 'test' and year > 1990\"[/b].")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="With --index: compare with every row.")] = False,
    k: Annotated[int, typer.Option("-k", min=1, max=10_000, help="Results per query.")] = 5,
    device: Device = "auto",
    outside: Outside = False,
    column: Columns = None,
    as_json: Json = False,
) -> None:
    """Find the items of one modality that are nearest to files or texts of another.

    Example: [b]bridgekit search dog.wav rain.flac -k 3[/b]

    In an index: [b]bridgekit search dog.wav --index clips.index --to image[/b]
    """
    if index is not None and (among or through):
        raise BridgekitError("--among and --through do not apply to an index", remedy="omit them, or --index")
    if index is None and (where or exact):
        raise BridgekitError("--where and --exact apply only to an index", remedy="name one with --index")
    from bridgekit.bridge.bridge import Bridge
    from bridgekit.encoders import TEXT
    from bridgekit.hookspecs import SearchResult
    from bridgekit.plugins import open_index
    from bridgekit.progress import progress_bars
    from bridgekit.recipes.inputs import read_inputs
    from bridgekit.tables.reading import read_items

    searched = None if index is None else open_index(index)
    opened = Bridge.load(find_bridge(bridge or _bridge_of(searched)), device)
    given = read_inputs(opened, queries, from_, option="--from", columns=parse_columns(column), outside=outside)
    source = given.modality
    target = to or other_modality(searched.modalities if searched else tuple(opened.sides), source)
    if searched:
        with progress_bars() as report:
            usable, embedded = _embedded(opened, given, report)
            # Which embeds them again, from the latents that have just been stored.
            result = searched.find(opened, source, usable.items, target, k, where=where, exact=exact, report=report)
    else:
        opened.side(target)
        if through in (source, target):
            raise BridgekitError(
                f"{source} and {target} cannot be connected through {through}", remedy="name a third modality, or none"
            )
        columns = parse_columns(column)
        own = among is None
        items = (
            opened.own_items(target, outside=outside) if own else read_items(among, target, columns=columns, outside=outside)
        )
        between = None
        if through:
            opened.side(through)
            between = (through, opened.own_items(through, outside=outside))
        with progress_bars() as report:
            usable, embedded = _embedded(opened, given, report)
            hits = opened.find(source, embedded, target, items, k, through=between, report=report)
        result = SearchResult(hits, len(items), None)
    print_set_aside(usable.set_aside)
    texts = result.hits if target == TEXT else [()] * len(usable.items)
    heard = opened.heard(source, embedded, texts)
    if as_json:
        answers = [
            {"query": str(query), **asdict(known), "found": [_hit_json(hit, columns=searched is not None) for hit in found]}
            for query, known, found in zip(usable.items, heard, result.hits, strict=True)
        ]
        method = result.approximate.as_json() if result.approximate else {"exact": True}
        about = {"index": index, "to": target, "among": result.candidates, "search": method}
        print_json({**about, "answers": answers} if searched else answers)
        return
    for query, known, found in zip(usable.items, heard, result.hits, strict=True):
        say(f"{query}: not sure, the nearest are" if known.sure is False else query)
        for hit in found:
            say(f"  {hit.similarity:6.3f}  {hit.item}")
    if searched:
        passing = f" that {'passes' if result.candidates == 1 else 'pass'} the filter" if where else ""
        rows = "row" if result.candidates == 1 else "rows"
        say(f"Among {result.candidates:,} {rows} of {target}{passing}: {result.approximate or 'exact'}")


def _embedded(bridge: Bridge, given: Inputs, report: Report) -> tuple[Inputs, Tensor]:
    """The queries and their embeddings. Those in folders and tables that cannot be used are set aside.

    Raises:
        ItemError: a query that is itself an argument cannot be used, or none can.
    """
    from bridgekit.recipes.inputs import embed_inputs

    usable, vectors = embed_inputs(bridge, given, report)
    arguments = {str(item)[:200] for item, row in zip(given.items, given.rows, strict=True) if row is None}
    for row in usable.set_aside:
        if row.item in arguments or not usable.items:
            raise ItemError(row.reason, where=row.item, remedy="fix this item, or leave it out")
    return usable, vectors


def _bridge_of(index: SearchIndex | None) -> Path | None:
    """The bridge that an index was made with, if it is still there."""
    folder = Path(index.bridge_path) if index and index.bridge_path else None
    return folder if folder and folder.exists() else None


def _hit_json(hit: Hit, *, columns: bool) -> dict[str, object]:
    found: dict[str, object] = {"item": str(hit.item), "similarity": round(hit.similarity, 6)}
    return {**found, "columns": dict(hit.columns)} if columns else found
