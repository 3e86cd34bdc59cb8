"""Data sets that the `datasets` library opens: saved ones as they lie on disk, all others as streams."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from bridgekit.encoders import split_options
from bridgekit.errors import BridgekitError, ItemError, one_line
from bridgekit.items import Blob

OPTIONS = ("name", "split", "revision")
#: Bytes of rows that a stream keeps in memory: twice the window that encoding takes items from.
KEPT_BYTES = 512 << 20


def open_dataset(name: str) -> Any:
    """A data set: `datasets.Dataset`, a dictionary of these, or columns whose files are read from a stream.

    Arguments:
        name: a folder that `save_to_disk` wrote, another folder, or the id of a data set on the hub, with the options `name=`
            (its configuration), `split=` and `revision=`. Without a split, the data set's own splits are used.

    Raises:
        BridgekitError: it cannot be opened, or has no such split.
    """
    path, options = split_options(name, OPTIONS)
    folder = Path(path)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(path)
            if not isinstance(saved, datasets.DatasetDict) or "split" not in options:
                return saved
            if options["split"] not in saved:
                raise BridgekitError(
                    f"it has no split {options['split']!r}", where=path, remedy=f"choose one of {', '.join(map(str, saved))}"
                )
            return saved[options["split"]]
        opened = datasets.load_dataset(
            path, options.get("name"), split=options.get("split"), revision=options.get("revision"), streaming=True
        )
    except BridgekitError:
        raise
    except Exception as error:  # the library raises errors of many kinds
        remedy = "give a folder, or the id of a data set on the hub, as in datasets:org/name,split=train"
        raise BridgekitError(f"`datasets` cannot open it: {one_line(error)}", where=path, remedy=remedy) from None
    parts = opened if isinstance(opened, Mapping) else {options.get("split"): opened}
    streams = [(split, _Stream(part, path)) for split, part in parts.items()]
    return _columns(streams, by_split=len(parts) > 1, home=folder if folder.is_dir() else None)


def _columns(streams: list[tuple[Any, _Stream]], *, by_split: bool, home: Path | None) -> dict[str, list[Any]]:
    """All rows, once: texts and numbers, and where files are."""
    columns: dict[str, list[Any]] = {}
    count = 0
    for split, stream in streams:
        for number, row in enumerate(stream.rows()):
            cells = {name: stream.cell(name, value, number, home) for name, value in row.items()}
            if by_split:
                cells.setdefault("split", str(split))
            for name in cells.keys() - columns.keys():
                columns[name] = [None] * count
            for name, column in columns.items():
                column.append(cells.get(name))
            count += 1
    return columns


class _Stream:
    """A data set that is read forwards. The rows read last are kept in memory; for an earlier one it is read again."""

    def __init__(self, dataset: Any, name: str) -> None:
        features = dict(dataset.features or {})
        self.files = {column for column, feature in features.items() if isinstance(feature, datasets.Image | datasets.Audio)}
        for column in self.files:
            dataset = dataset.cast_column(column, type(features[column])(decode=False))
        self.labels = {column: each.names for column, each in features.items() if isinstance(each, datasets.ClassLabel)}
        self._dataset, self._name = dataset, name
        self._lock = threading.Lock()
        self._coming: Iterator[tuple[int, dict[str, Any]]] = iter(())
        self._next = -1
        self._kept: OrderedDict[int, dict[str, bytes]] = OrderedDict()
        self._size = 0

    def rows(self) -> Iterable[dict[str, Any]]:
        """The rows, from the beginning."""
        try:
            yield from self._dataset
        except Exception as error:  # reading goes on: a damaged part, or the network
            remedy = "run the command again, or give a folder without `datasets:`"
            raise BridgekitError(f"`datasets` cannot read on: {one_line(error)}", where=self._name, remedy=remedy) from None

    def cell(self, column: str, value: Any, number: int, home: Path | None) -> Any:
        """A cell of a table: a text, a number, a list of texts, or an item."""
        if column in self.labels and isinstance(value, int) and 0 <= value < len(self.labels[column]):
            return self.labels[column][value]
        if isinstance(value, bytes):
            value = {"bytes": value}
        if not isinstance(value, dict) or "bytes" not in value:
            plain = isinstance(value, str | int | float) or (
                isinstance(value, list) and all(isinstance(each, str) for each in value)
            )
            return value if plain else None
        content, path = value["bytes"], value.get("path")
        if content is None:
            return _local(path, home)
        known = hashlib.sha256(b"file\0" + content).digest(), len(content)
        shown = f" ({path})" if path else ""
        return Blob(f"{self._name}, row {number + 1}, column {column}{shown}", partial(self.read, number, column), known)

    def read(self, number: int, column: str) -> bytes:
        """The bytes of a cell.

        Raises:
            ItemError: the data set has changed, or can no longer be read.
        """
        with self._lock:
            if number not in self._kept and number < self._next:
                self._next = -1
            if self._next < 0:
                self._coming, self._next, self._size = enumerate(self.rows()), 0, 0
                self._kept.clear()
            while number not in self._kept:
                self._advance(column)
            try:
                return self._kept[number][column]
            except KeyError:
                raise ItemError("the data set has changed", where=self._name, remedy="run the command again") from None

    def _advance(self, column: str) -> None:
        try:
            at, row = next(self._coming)
        except (StopIteration, BridgekitError):
            self._next = -1
            raise ItemError(
                "the data set has changed, or ends early", where=self._name, remedy="run the command again"
            ) from None
        self._kept[at] = {
            name: value if isinstance(value, bytes) else value["bytes"] for name, value in row.items() if _has_bytes(value)
        }
        self._next = at + 1
        self._size += sum(map(len, self._kept[at].values()))
        while self._size > KEPT_BYTES and len(self._kept) > 1:
            self._size -= sum(map(len, self._kept.popitem(last=False)[1].values()))


def _has_bytes(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _local(path: Any, home: Path | None) -> Path | None:
    """A file that a data set in the user's folder names there; a data set from elsewhere may not name files on this machine."""
    if home is None or not isinstance(path, str):
        return None
    found = Path(path).absolute()
    return found if found.is_relative_to(home.absolute()) else None
