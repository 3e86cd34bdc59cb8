"""Galleries: a bridge's own items of each modality, embedded in the background for searches."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.encoders import TEXT, Encoder, Item
from bridgekit.errors import BridgekitError
from bridgekit.items import EXTENSIONS
from bridgekit.progress import Report
from bridgekit.retrieval import Hit, nearest
from bridgekit.tables.reading import Table

#: Captions and other columns sent with a result, and characters of each cell.
MOST_CAPTIONS, MOST_COLUMNS, MOST_CHARACTERS = 5, 8, 240
#: Held while an encoder or a model is opened: transformers' lazy imports fail if two threads run them at once.
OPENING = threading.RLock()


@dataclass(frozen=True)
class Gallery:
    """Items of one modality in a bridge's space.

    Arguments:
        modality: what the items are.
        items: n files or texts.
        vectors: (n, dim), unit length.
        about: their captions and the table's other columns.
    """

    modality: str
    items: Sequence[Item]
    vectors: Tensor = field(repr=False)
    about: About = field(default_factory=lambda: About(), repr=False)
    _penalties: dict[str, Tensor | None] = field(default_factory=dict, repr=False, compare=False)

    def penalty(self, bridge: Bridge, query: str) -> Tensor | None:
        """What the items lose in a search by queries of a modality: see `Bridge.hub_penalty`. Computed once."""
        if query not in self._penalties:
            self._penalties[query] = bridge.hub_penalty(query, self.modality, self.vectors)
        return self._penalties[query]

    def search(self, query: Tensor, k: int, temperature: float, penalty: Tensor | None) -> list[tuple[Hit, float]]:
        """The k best items for a query, (1, dim), each with its softmax over all items at this temperature."""
        [hits] = nearest(query, self.vectors, self.items, k, penalty)
        total = float((query @ self.vectors.T / temperature).logsumexp(-1))
        return [
            (replace(hit, columns=self.about.columns(hit.item)), math.exp(hit.similarity / temperature - total)) for hit in hits
        ]


@dataclass(frozen=True)
class About:
    """What a table says of a modality's items.

    Arguments:
        captions: item to its texts, if it is not a text itself.
        rows: item to the number of its first row.
        cells: column to row number to cell, without the columns of items.
    """

    captions: Mapping[Item, Sequence[str]] = field(default_factory=dict)
    rows: Mapping[Item, int] = field(default_factory=dict)
    cells: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def columns(self, item: Item) -> dict[str, str]:
        """The other columns of an item's first row, at most `MOST_COLUMNS`, without empty cells."""
        row = self.rows.get(item, -1)
        return {name: _shown(column[row]) for name, column in self.cells.items() if row in column}


class Galleries:
    """A bridge's galleries, filled in the background: without cached latents, everything has to be encoded again."""

    def __init__(self, bridge: Bridge) -> None:
        self._progress: dict[str, tuple[int, int]] = {}
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, "galleries")
        order = sorted(bridge.sides, key=lambda modality: modality != TEXT)  # text is fastest
        self._filled = {name: self._pool.submit(read_gallery, bridge, name, self._report(name)) for name in order}

    def find(self, modality: str, patience: float) -> Gallery:
        """The gallery of a modality. Blocks for up to `patience` seconds.

        Raises:
            TimeoutError: it is not filled yet.
            Exception: the error from reading the bridge's own items.
        """
        return self._filled[modality].result(patience)

    def state(self, modality: str) -> dict[str, object]:
        """The number of items, the progress of encoding them, or why the gallery cannot be filled."""
        filled = self._filled[modality]
        done, total = self._progress.get(modality, (0, 0))
        error = filled.exception() if filled.done() else None
        if filled.done() and not error:
            return {"items": len(filled.result().items), "ready": True, "problem": None}
        problem = str(getattr(error, "what", error)) if error else None
        return {"items": total, "encoded": done, "ready": False, "problem": problem}

    def close(self) -> None:
        """Stop filling."""
        self._stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _report(self, modality: str) -> Report:
        def report(what: str, done: int, total: int) -> None:
            if self._stopped.is_set():
                raise CancelledError
            self._progress[modality] = (done, total)

        return report


def read_gallery(bridge: Bridge, modality: str, report: Report) -> Gallery:
    """The items of a modality in the first of the bridge's training tables that has it, embedded via the latent store.

    Raises:
        BridgekitError: the table is missing, or none of its items can be used.
    """
    items = bridge.own_items(modality)
    about = _read_about(bridge.open_own(bridge.trained_with(modality)), modality, list(bridge.sides))
    open_encoder(bridge, modality)
    embedded = bridge.embed_usable(modality, items, report=report)
    usable = [item for position, item in enumerate(items) if position not in embedded.failed]
    if not usable:
        raise BridgekitError(f"none of the bridge's own {modality} can be used", where=bridge.table_of(modality))
    return Gallery(modality, usable, embedded.vectors, about)


def _read_about(table: Table, modality: str, sides: Sequence[str]) -> About:
    captions: dict[Item, dict[str, None]] = {}
    rows: dict[Item, int] = {}
    if modality != TEXT and TEXT in table.modalities:
        with suppress(BridgekitError):  # no row has both
            columns = table.pairs((modality, TEXT)).columns
            for item, text in zip(columns[modality], columns[TEXT], strict=True):
                if item is not None and isinstance(text, str) and len(known := captions.setdefault(item, {})) < MOST_CAPTIONS:
                    known[_short(text)] = None
    if table.files is None:  # class folders have no other columns
        items, numbers, _ = table.items(modality)
        rows = dict(zip(items, numbers, strict=True))
    used = {table.name_of(side) for side in (*sides, TEXT, *EXTENSIONS)}
    others = {name: cells for name, cells in table.cells().items() if cells and name not in used}
    cells = {_shown(name): others[name] for name in list(others)[:MOST_COLUMNS]}
    return About({item: list(texts) for item, texts in captions.items()}, rows, cells)


def _shown(cell: str) -> str:
    """A cell for clients, who must not see where files are on this machine."""
    place = Path(cell.removeprefix("file://"))
    return _short(place.name if place.is_absolute() or cell.startswith("~") else cell)


def _short(cell: str) -> str:
    return cell if len(cell) <= MOST_CHARACTERS else f"{cell[: MOST_CHARACTERS - 1]}…"


def open_encoder(bridge: Bridge, modality: str) -> Encoder:
    """The encoder of one side, opened once."""
    with OPENING:
        return bridge.encoder(modality)
