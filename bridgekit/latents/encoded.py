"""A table of pairs with the latents of its items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from bridgekit.encoders import Encoder
from bridgekit.errors import BridgekitError
from bridgekit.latents.batches import Run
from bridgekit.latents.encode import encode_items
from bridgekit.latents.store import Latents
from bridgekit.pairs import Pairs, SetAside
from bridgekit.progress import Report
from bridgekit.tables.seen import TrainingRows
from bridgekit.tables.splits import NOT_TESTS, relation_keys


@dataclass(frozen=True)
class EncodedPairs:
    """A table with the latents of its usable rows.

    Arguments:
        pairs: the usable rows; `set_aside` lists the others.
        latents: modality to its latents.
        ids: modality to (n,) indices into its latents' matrix; -1 if missing. Every row has at least two items.
        keys: (n, k), see `bridgekit.tables.splits.relation_keys`.
    """

    pairs: Pairs
    latents: Mapping[str, Latents]
    ids: Mapping[str, NDArray[np.int64]]
    keys: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> EncodedPairs:
        """A subset of the rows, with only the latents of their items."""
        latents, ids = {}, {}
        for modality, own in self.ids.items():
            used = np.unique(own[rows][own[rows] >= 0])
            whole = self.latents[modality]
            contents = [whole.contents[index] for index in used.tolist()]
            latents[modality] = replace(whole, matrix=whole.matrix[torch.from_numpy(used)], contents=contents)
            ids[modality] = np.where(own[rows] < 0, -1, np.searchsorted(used, own[rows]))
        return EncodedPairs(self.pairs.take(rows.tolist()), latents, ids, self.keys[rows])

    def with_set_aside(self, more: Sequence[SetAside]) -> EncodedPairs:
        """The same with more items that were set aside."""
        return replace(self, pairs=replace(self.pairs, set_aside=(*self.pairs.set_aside, *more))) if more else self

    @property
    def contents(self) -> dict[str, Sequence[bytes]]:
        """Modality to the content hashes that `ids` are indices into."""
        return {modality: latents.contents for modality, latents in self.latents.items()}

    def training_rows(self, split: NDArray[np.str_]) -> TrainingRows:
        """The rows that training sees: `train`, and `val`, which selects the epoch."""
        return TrainingRows.of(self.ids, self.contents, np.flatnonzero(np.isin(split, NOT_TESTS)))

    @property
    def group(self) -> NDArray[np.int64] | None:
        """(n,) group labels, negative for none; None if the table has no groups."""
        return self.keys[:, -1] if self.pairs.group is not None else None


def encode_pairs(
    pairs: Pairs,
    encoders: Mapping[str, Encoder],
    report: Report,
    *,
    strict: bool = False,
    runs: Mapping[str, Run] | None = None,
    half: bool = False,
) -> EncodedPairs:
    """Encode the columns, and set aside rows with a bad item or fewer than two items, or fail if `strict`.

    `runs` has functions that encode the batches of some modalities, for example on other machines. `half` keeps latents in half
    precision.

    Raises:
        BridgekitError: no row is usable, or strict and a row would be set aside.
    """
    latents = {
        modality: encode_items(encoder, pairs.columns[modality], report=report, run=(runs or {}).get(modality), half=half)
        for modality, encoder in encoders.items()
    }
    bad: dict[int, SetAside] = {}
    for modality, encoded in latents.items():
        for row, reason in encoded.failed.items():
            bad.setdefault(row, SetAside(pairs.rows[row], modality, str(pairs.columns[modality][row])[:200], reason))
    items = sum((encoded.ids >= 0).astype(int) for encoded in latents.values())
    for row in np.flatnonzero(items < 2).tolist():
        empty = next(modality for modality, encoded in latents.items() if encoded.ids[row] < 0)
        bad.setdefault(row, SetAside(pairs.rows[row], empty, "", "no item in this column, and a pair needs two"))
    set_aside = (*pairs.set_aside, *bad.values())
    kept = [row for row in range(len(pairs)) if row not in bad]
    check_usable(pairs.source, len(kept), set_aside, strict=strict)
    usable = pairs if len(kept) == len(pairs) else pairs.take(kept)
    columns = {modality: usable.columns[modality] for modality in encoders}
    usable = Pairs(columns, usable.source, usable.rows, usable.split, usable.group, set_aside)
    ids = {modality: latents[modality].ids[kept] for modality in encoders}
    return EncodedPairs(usable, latents, ids, relation_keys(usable, ids))


def check_usable(source: str, usable: int, set_aside: Sequence[SetAside], *, strict: bool) -> None:
    """Raise BridgekitError if no row is usable, or, if `strict`, if one was set aside.

    Arguments:
        source: the table.
        usable: the number of usable rows.
        set_aside: the others.
        strict: see above.
    """
    first = set_aside[0] if set_aside else None
    if strict and first:
        raise BridgekitError(
            f"{len(set_aside)} of {usable + len(set_aside)} rows cannot be used: {first.reason}",
            where=f"{source}, row {first.row}, column {first.column}: {first.item}",
            remedy="fix or remove them, or omit --strict to have them set aside",
        )
    if not usable:
        why = f" (row {first.row}: {first.reason}: {first.item})" if first else ""
        blamed = first and "the plugin " in first.reason
        remedy = "report it to the plugin's author" if blamed else "fix the files or paths"
        raise BridgekitError(f"no row of the table is usable{why}", where=source, remedy=remedy)
