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
    """A table with the latents of every row that could be used.

    Arguments:
        pairs: the usable rows; its `set_aside` tells of the others.
        latents: modality to its latents.
        ids: modality to (n,) indices into its latents' matrix; -1 for a hole. A row has two items at least.
        keys: (n, k), see `bridgekit.tables.splits.relation_keys`.
    """

    pairs: Pairs
    latents: Mapping[str, Latents]
    ids: Mapping[str, NDArray[np.int64]]
    keys: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> EncodedPairs:
        """Some rows, with the latents of their items alone."""
        latents, ids = {}, {}
        for modality, own in self.ids.items():
            used = np.unique(own[rows][own[rows] >= 0])
            whole = self.latents[modality]
            contents = [whole.contents[index] for index in used.tolist()]
            latents[modality] = replace(whole, matrix=whole.matrix[torch.from_numpy(used)], contents=contents)
            ids[modality] = np.where(own[rows] < 0, -1, np.searchsorted(used, own[rows]))
        return EncodedPairs(self.pairs.take(rows.tolist()), latents, ids, self.keys[rows])

    @property
    def contents(self) -> dict[str, Sequence[bytes]]:
        """Modality to the content hashes that `ids` are indices into."""
        return {modality: latents.contents for modality, latents in self.latents.items()}

    def training_rows(self, split: NDArray[np.str_]) -> TrainingRows:
        """What training sees of the table, in a split: the rows of `train`, and those of `val`, which choose the epoch."""
        return TrainingRows.of(self.ids, self.contents, np.flatnonzero(np.isin(split, NOT_TESTS)))

    @property
    def group(self) -> NDArray[np.int64] | None:
        """(n,) group labels, negative for none, or None where the table has no groups."""
        return self.keys[:, -1] if self.pairs.group is not None else None


def encode_pairs(
    pairs: Pairs,
    encoders: Mapping[str, Encoder],
    report: Report,
    *,
    strict: bool = False,
    elsewhere: Mapping[str, Run] | None = None,
) -> EncodedPairs:
    """Encode the columns, and set aside the rows that have a bad item, or fewer than two.

    Arguments:
        pairs: the table.
        encoders: modality to its encoder.
        report: progress.
        strict: whether one bad row is fatal.
        elsewhere: modality to what encodes its batches, where that is not to be done here.

    Raises:
        BridgekitError: strict, and a row was set aside.
    """
    latents = {
        modality: encode_items(
            encoder,
            pairs.columns[modality],
            progress=lambda done, total, modality=modality: report(f"encoding {modality}", done, total),  # type: ignore[misc]
            elsewhere=(elsewhere or {}).get(modality),
        )
        for modality, encoder in encoders.items()
    }
    bad: dict[int, SetAside] = {}
    for modality, encoded in latents.items():
        for row, reason in encoded.failed.items():
            bad.setdefault(row, SetAside(pairs.rows[row], modality, str(pairs.columns[modality][row])[:200], reason))
    items = sum((encoded.ids >= 0).astype(int) for encoded in latents.values())
    for row in np.flatnonzero(items < 2).tolist():
        hole = next(modality for modality, encoded in latents.items() if encoded.ids[row] < 0)
        bad.setdefault(row, SetAside(pairs.rows[row], hole, "", "no item in this column, and a pair needs two"))
    set_aside = (*pairs.set_aside, *bad.values())
    if strict and set_aside:
        first = set_aside[0]
        raise BridgekitError(
            f"{len(set_aside)} of {len(pairs) + len(pairs.set_aside)} rows cannot be used: {first.reason}",
            where=f"{pairs.source}, row {first.row}, column {first.column}: {first.item}",
            remedy="mend or remove them, or leave out --strict to have them set aside",
        )
    kept = [row for row in range(len(pairs)) if row not in bad]
    if not kept:
        why = f" (row {set_aside[0].row}: {set_aside[0].reason}: {set_aside[0].item})" if set_aside else ""
        blamed = set_aside and "the plugin " in set_aside[0].reason
        remedy = "report it to the plugin's author" if blamed else "mend the files or the paths"
        raise BridgekitError(f"no row of the table can be used{why}", where=pairs.source, remedy=remedy)
    usable = pairs.take(kept)
    columns = {modality: usable.columns[modality] for modality in encoders}
    usable = Pairs(columns, usable.source, usable.rows, usable.split, usable.group, set_aside)
    ids = {modality: latents[modality].ids[kept] for modality in encoders}
    return EncodedPairs(usable, latents, ids, relation_keys(usable, ids))
