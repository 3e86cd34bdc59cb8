"""`bridgekit search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import OUTSIDE, find_bridge, other_modality, print_json, query_modality, say
from bridgekit.cli.index import search_json, told
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
    index: Annotated[
        str | None, typer.Option(help="Search this index, made by [b]bridgekit index[/b]: a folder or URL.")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="With --index: a filter on columns, as [b]\"split = 'test' and year > 1990\"[/b].")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="With --index: compare every row, however many there are.")] = False,
    k: Annotated[int, typer.Option("-k", min=1, max=10_000, help="How many to show for each query.")] = 5,
    device: Annotated[str, typer.Option(help="A torch device, or auto.")] = "auto",
    outside: Annotated[bool, typer.Option("--outside", help=OUTSIDE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """The nearest items of one modality to files or words of another.

    Example: [b]bridgekit search dog.wav rain.flac -k 3[/b]

    In an index: [b]bridgekit search dog.wav --index clips.index --to image[/b]
    """
    if index is not None:
        if among or through:
            raise BridgekitError("an index is searched as it is", remedy="leave out --among and --through, or --index")
        _search_index(index, queries, bridge, from_, to, where, exact, k, device, as_json)
        return
    if where or exact:
        raise BridgekitError("--where and --exact are for a search in an index", remedy="name one with --index")
    from bridgekit.bridge.bridge import Bridge
    from bridgekit.progress import progress_bars
    from bridgekit.tables.reading import read_items

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


def _search_index(
    path: str,
    queries: list[str],
    bridge: Path | None,
    from_: str | None,
    to: str | None,
    where: str | None,
    exact: bool,
    k: int,
    device: str,
    as_json: bool,
) -> None:
    from bridgekit.bridge.bridge import Bridge
    from bridgekit.index import Index
    from bridgekit.progress import progress_bars

    opened = Index.open(path)
    known = Path(opened.bridge_path) if opened.bridge_path else None
    model = Bridge.load(bridge or (known if known and known.exists() else find_bridge(None)), device)
    source = query_modality(model, queries, from_)
    target = to or _what_to_search(opened.modalities, source)
    with progress_bars() as report:
        found = opened.find(model, source, queries, target, k, where=where, exact=exact, report=report)
    if as_json:
        answers = [
            {
                "query": query,
                "found": [
                    {"item": hit.item, "similarity": round(hit.similarity, 6), "columns": dict(hit.cells)} for hit in hits
                ],
            }
            for query, hits in zip(queries, found.hits, strict=True)
        ]
        search = search_json(found.approximate)
        print_json({"index": path, "to": target, "among": found.candidates, "search": search, "answers": answers})
        return
    for query, hits in zip(queries, found.hits, strict=True):
        say(query)
        for hit in hits:
            say(f"  {hit.similarity:6.3f}  {hit.item}")
    passing = f" that {'passes' if found.candidates == 1 else 'pass'} the filter" if where else ""
    rows = "row" if found.candidates == 1 else "rows"
    print(f"Among {found.candidates:,} {rows} of {target}{passing}: {told(found.approximate)}")


def _what_to_search(held: tuple[str, ...], source: str) -> str:
    """Where the user does not say: the only modality that the index holds, or the only other one, or text."""
    others = [modality for modality in held if modality != source]
    if len(held) == 1 or len(others) == 1:
        return (others or held)[0]
    if "text" in others:
        return "text"
    raise BridgekitError(f"search {' or '.join(others)}?", remedy=f"say so, for example --to {others[0]}")
