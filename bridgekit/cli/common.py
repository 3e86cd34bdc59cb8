"""What several verbs share: finding the bridge, telling modalities apart, printing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridgekit.errors import BridgekitError

if TYPE_CHECKING:
    from bridgekit.bridge import Bridge
    from bridgekit.pairs import SetAside

#: Where `align` puts bridges that are given no place.
BRIDGES = Path("bridges")
#: Rows set aside that are told one by one; `--json` and the count have all.
SHOWN = 10


def find_bridge(path: Path | None) -> Path:
    """The bridge that the user names, or else the newest in `bridges/` here."""
    if path is not None:
        return path
    found = sorted(BRIDGES.glob("*/bridge.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise BridgekitError(
            "there is no bridge in ./bridges", remedy="train one (bridgekit align --a audio --b text) or name its folder"
        )
    return found[-1].parent


def query_modality(bridge: Bridge, queries: Sequence[str], named: str | None) -> str:
    """The modality of queries: the named one, or else by whether they are files."""
    if named is not None:
        bridge.side(named)
        return named
    others = [modality for modality in bridge.sides if modality != "text"]
    if "text" in bridge.sides and not any(Path(query).suffix and Path(query).exists() for query in queries):
        looks_like_files = [query for query in queries if len(query) < 256 and _looks_like_a_file(query)]
        if not looks_like_files:
            return "text"
        raise BridgekitError(
            "there is no such file", where=looks_like_files[0], remedy="give a path, or add --from text to search by words"
        )
    if len(others) == 1:
        return others[0]
    raise BridgekitError("are these queries " + " or ".join(others) + "?", remedy="say so with --from")


def _looks_like_a_file(query: str) -> bool:
    known = {".wav", ".flac", ".ogg", ".mp3", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    return Path(query).suffix.lower() in known


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_set_aside(rows: Sequence[SetAside]) -> None:
    """Tell which rows were left out, the first ones singly, and how many there were."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False)
    if rows:
        console.print(f"{len(rows)} {'row was' if len(rows) == 1 else 'rows were'} set aside:")
    for row in rows[:SHOWN]:
        console.print(f"  row {row.row}, {row.column}: {row.item}: {row.reason}", soft_wrap=True)
    if len(rows) > SHOWN:
        console.print(f"  ... and {len(rows) - SHOWN} more")


def print_metrics(metrics: Sequence[Mapping[str, Any]]) -> None:
    """Recall figures, one line per split, direction and set of candidates; the methods side by side."""
    from rich.console import Console
    from rich.table import Table

    methods = list(dict.fromkeys(record["method"] for record in metrics))
    lines: dict[tuple[str, str, int], dict[str, Mapping[str, Any]]] = {}
    for record in metrics:
        key = (record["split"], record["direction"], record["candidates"])
        lines.setdefault(key, {})[record["method"]] = record
    table = Table(title="Recall on rows that training never saw, in %", title_justify="left")
    table.add_column("split")
    table.add_column("query → answer")
    table.add_column("among", justify="right")
    for method in methods[:-1]:
        table.add_column(f"{method}\n@1 / @10", justify="right")
    for k in (1, 5, 10):
        table.add_column(f"{methods[-1]}\n@{k}", justify="right", style="bold")
    table.add_column("median\nrank", justify="right")
    for (split, direction, candidates), by_method in lines.items():
        cells = [
            f"{100 * by_method[method]['recall@1']:.1f} / {100 * by_method[method]['recall@10']:.1f}" for method in methods[:-1]
        ]
        last = by_method[methods[-1]]
        cells += [f"{100 * last[f'recall@{k}']:.1f}" for k in (1, 5, 10)] + [f"{last['median_rank']:g}"]
        table.add_row(split, direction, f"{candidates:,}", *cells)
    Console().print(table)
