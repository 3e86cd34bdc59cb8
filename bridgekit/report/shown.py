"""What a report shows of a bridge's tables: held-out rows, their embeddings, and their figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.recall import evaluate_splits, sides_of
from bridgekit.latents.encoded import EncodedPairs, encode_pairs
from bridgekit.pairs import Pairs
from bridgekit.progress import Report, silent
from bridgekit.report.cases import chance
from bridgekit.tables.reading import read_pairs, table_modalities
from bridgekit.tables.splits import split_pairs, test_splits

#: recall@k is told for these.
KS = (1, 5, 10)


@dataclass(frozen=True)
class Shown:
    """A table of pairs as the report shows it.

    Arguments:
        held_out: the rows of one split that training never saw, with their latents.
        split: that split's name.
        embedded: modality to the embeddings of those rows' distinct items.
        records: recall, as of `evaluation.evaluate_splits`.
        by_chance: split, direction and `among` of a record to what a ranking at random has: k to recall@k.
        source: the table.
        rows: split to how many rows it has.
        pairs: all of its usable rows, with their splits.
        own: whether the bridge was trained on it.
    """

    held_out: EncodedPairs
    split: str
    embedded: Mapping[str, Tensor]
    records: Sequence[Mapping[str, Any]]
    by_chance: Mapping[tuple[str, str, str], Mapping[int, float]]
    source: str
    rows: Mapping[str, int]
    pairs: Pairs
    own: bool = True

    @property
    def directions(self) -> list[tuple[str, str]]:
        """(query, answer) modalities that the shown split's records are about, the one with the lowest recall first."""
        told = [record for record in self.records if record["split"] == self.split and record["among"] == "split"]
        told = [record for record in told if record["method"] == "FuseMix"]
        pairs = [tuple(record["direction"].split(" → ")) for record in sorted(told, key=lambda each: each["recall@5"])]
        return [(query, answer) for query, answer in pairs]


def show_table(bridge: Bridge, encoded: EncodedPairs, split: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Shown:
    """What the report shows of a table: the rows of its first test split; of `val`, or of all, where there is none.

    Arguments:
        bridge: the bridge.
        encoded: the table.
        split: each row's split.
        records: recall on this table, as of `evaluation.evaluate_splits`.
    """
    names = np.asarray(split)
    name = next(iter([*test_splits(names.tolist()), *(each for each in ("val",) if each in names), names[0]]))
    held_out = encoded.take(np.flatnonzero(names == name))
    by_chance = {}
    for key in dict.fromkeys((record["split"], record["direction"], record["among"]) for record in records):
        query, answer = key[1].split(" → ")
        by_chance[key] = chance(encoded, np.flatnonzero(names == key[0]), query, answer, key[2], KS)
    return Shown(
        held_out,
        str(name),
        {modality: bridge.project(modality, latents.matrix).cpu() for modality, latents in held_out.latents.items()},
        records,
        by_chance,
        encoded.pairs.source,
        {each: int((names == each).sum()) for each in dict.fromkeys(names.tolist())},
        replace(encoded.pairs, split=tuple(names.tolist())),
    )


def show_bridge(
    bridge: Bridge, pairs: str | Path | None = None, *, outside: bool = False, report: Report = silent
) -> list[Shown]:
    """What the report shows of each table that a bridge was trained on, or of another one.

    Arguments:
        bridge: the bridge.
        pairs: another table, or the bridge's own one where that has moved: it is known by its numbers of rows.
        outside: let a table name files outside its own folder.
        report: progress.

    Raises:
        BridgekitError: the table is gone, cannot be read, or lies where a bridge's word alone is not followed.
    """
    if pairs is None:
        shown = []
        for own in bridge.tables:
            encoded = _encode(bridge, bridge.followed(own.source), own.modalities, outside, report)
            names = np.asarray(split_pairs(encoded.pairs, own.seed, encoded.ids))
            if own.bound:  # its other rows had nothing to teach
                rows = np.flatnonzero(encoded.ids[own.bound] >= 0)
                encoded, names = encoded.take(rows), names[rows]
            shown.append(show_table(bridge, encoded, names.tolist(), _records_of(bridge, own.bound)))
        return shown
    sides = [modality for modality in table_modalities(pairs) if modality in bridge.sides]
    encoded = _encode(bridge, str(pairs), sides if len(sides) > 1 else list(bridge.sides), outside, report)
    with suppress(BridgekitError):  # too few rows, or none to train on: it is not the bridge's own
        split = split_pairs(encoded.pairs, bridge.tables[0].seed, encoded.ids)
        if Counter(split) == bridge.provenance.get("rows"):
            return [show_table(bridge, encoded, split, _records_of(bridge, None))]
    split = encoded.pairs.split or ("all",) * len(encoded.pairs)
    foreign = show_table(bridge, encoded, split, evaluate_splits(encoded, split, bridge.project, "FuseMix"))
    return [replace(foreign, own=False)]


def _encode(bridge: Bridge, source: str, modalities: Sequence[str], outside: bool, report: Report) -> EncodedPairs:
    try:
        table = read_pairs(source, modalities, outside=outside)
    except BridgekitError as error:
        remedy = "if it has moved, name its new place with --pairs"
        raise BridgekitError(
            error.what, where=error.where, remedy=remedy if not Path(source).exists() else error.remedy
        ) from None
    return encode_pairs(table, {modality: bridge.encoder(modality) for modality in modalities}, report)


def _records_of(bridge: Bridge, bound: str | None) -> list[Mapping[str, Any]]:
    """The bridge's figures on its first table, or on the one that a modality was bound with."""
    later = {own.bound for own in bridge.tables if own.bound}
    return [record for record in bridge.metrics if (bound in sides_of(record) if bound else not later & sides_of(record))]
