"""From a table and its latents to recall figures: which rows are asked, who is right, and among whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridgekit.batches import Run
from bridgekit.encoders import TEXT, Encoder
from bridgekit.errors import BridgekitError
from bridgekit.latents import Latents, encode_items
from bridgekit.pairs import Pairs, SetAside, read_pairs, relation_keys, split_pairs, table_modalities
from bridgekit.progress import Report
from bridgekit.retrieval import Recall, Relevance, class_embeddings, recall, relevance, search

if TYPE_CHECKING:
    from bridgekit.bridge import Bridge, TrainedOn

#: Splits that are not for reporting.
NOT_TESTS = ("train", "val")
Embed = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class EncodedPairs:
    """A table with the latents of every row that could be used.

    Arguments:
        pairs: the usable rows; its `set_aside` tells of the others.
        latents: modality to its latents.
        ids: modality to (n,) indices into its latents' matrix; -1 for a hole. A row has two items at least.
        keys: (n, k), see `bridgekit.pairs.relation_keys`.
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
            latents[modality] = replace(self.latents[modality], matrix=self.latents[modality].matrix[torch.from_numpy(used)])
            ids[modality] = np.where(own[rows] < 0, -1, np.searchsorted(used, own[rows]))
        return EncodedPairs(self.pairs.take(rows.tolist()), latents, ids, self.keys[rows])

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


def test_splits(split: Sequence[str]) -> list[str]:
    """The names of the splits that are for reporting, in the table's order."""
    return [name for name in dict.fromkeys(split) if name not in NOT_TESTS]


def evaluate_splits(
    encoded: EncodedPairs, split: Sequence[str], embed: Embed, method: str, splits: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Recall of every test split in each direction that it has rows for.

    Arguments:
        encoded: the table.
        split: each row's split.
        embed: from a modality and its latents (m, d) to embeddings (m, shared) of unit length.
        method: a name for the records.
        splits: which splits; the default is every one but `train` and `val`.

    Returns:
        flat records: split, direction, among (`split`, or `all` where the rest of the table adds distractors), method,
        queries, candidates, recall@1, recall@5, recall@10, median_rank.
    """
    names = np.asarray(split)
    wanted = splits if splits is not None else test_splits(split)
    embedded = {modality: embed(modality, latents.matrix) for modality, latents in encoded.latents.items()}
    records: list[dict[str, Any]] = []
    for name in wanted:
        rows = np.flatnonzero(names == name)
        for query, candidate in directions(encoded, rows):
            for among in ("split", "all"):
                result = split_recall(encoded, embedded, rows, query, candidate, among)
                if among == "all" and result.candidates == records[-1]["candidates"]:
                    continue
                records.append(
                    {
                        "split": name,
                        "direction": f"{query} → {candidate}",
                        "among": among,
                        "method": method,
                        **result.as_json(),
                    }
                )
    return records


def sides_of(record: Mapping[str, Any]) -> frozenset[str]:
    """The two modalities that a record of `evaluate_splits` is about."""
    return frozenset(record["direction"].split(" → "))


def directions(encoded: EncodedPairs, rows: NDArray[np.int64]) -> list[tuple[str, str]]:
    """(query, candidate) modalities for which some rows say who is right: a row that has both, or a group that does."""
    found = []
    for a, b in combinations(encoded.ids, 2):
        together = ((encoded.ids[a][rows] >= 0) & (encoded.ids[b][rows] >= 0)).any()
        if together or len(_relevance(encoded, rows, a, b).query):
            found += [(a, b), (b, a)]
    return found


def split_recall(
    encoded: EncodedPairs,
    embedded: Mapping[str, Tensor],
    rows: NDArray[np.int64],
    query: str,
    candidate: str,
    among: str = "split",
) -> Recall:
    """Recall of the items in some rows, in one direction.

    Arguments:
        encoded: the table.
        embedded: modality to the embeddings of its distinct items.
        rows: indices of the rows to ask, one of which at least says who is right (see `directions`).
        query, candidate: modalities.
        among: `split`: candidates are the rows' own items. `all`: the rest of the table's items are distractors too; right
            answers from other splits (which training may have seen) neither count nor stand in the way.
    """
    right = _relevance(encoded, rows, query, candidate)
    if among == "all":
        everywhere = _relevance(encoded, np.arange(len(encoded.pairs)), query, candidate)
        used = np.unique(encoded.ids[candidate][encoded.ids[candidate] >= 0])
        return _recall_among(embedded, right, query, candidate, used, everywhere)
    return _recall_among(embedded, right, query, candidate, np.unique(right.candidate), None)


def _relevance(encoded: EncodedPairs, rows: NDArray[np.int64], query: str, candidate: str) -> Relevance:
    group = encoded.group
    return relevance(encoded.ids[query][rows], encoded.ids[candidate][rows], None if group is None else group[rows])


def _recall_among(
    embedded: Mapping[str, Tensor],
    right: Relevance,
    query: str,
    candidate: str,
    used: NDArray[np.int64],
    skip: Relevance | None,
) -> Recall:
    """Recall with candidates renumbered to those in use."""
    renumbered = Relevance(right.query, np.searchsorted(used, right.candidate))
    left_out = None if skip is None else Relevance(skip.query, np.searchsorted(used, skip.candidate))
    return recall(embedded[query], embedded[candidate][torch.from_numpy(used)], renumbered, skip=left_out)


def evaluate_bridge(
    bridge: Bridge,
    pairs: str | Path | Pairs | None,
    splits: Sequence[str] | None,
    report: Report,
    *,
    outside: bool = False,
) -> tuple[list[dict[str, Any]], Sequence[SetAside]]:
    """Recall of a trained bridge on a table.

    Arguments:
        bridge: the bridge.
        pairs: a table, folder, source or `Pairs`, with two or more of the bridge's modalities; None is the tables that the
            bridge was trained on, split as they were then.
        splits: which splits to ask; by default all but `train` and `val`. A foreign table without splits is asked whole.
        report: progress.
        outside: let a table name files outside its own folder.

    Returns:
        records as of `evaluate_splits`, and the rows set aside.

    Raises:
        BridgekitError: the table cannot be read or has no such split.
    """
    if pairs is not None:
        table = pairs if isinstance(pairs, Pairs) else read_pairs(pairs, _sides_in(bridge, pairs), outside=outside)
        return _evaluate_table(bridge, table, None, splits, report)
    records: list[dict[str, Any]] = []
    set_aside: list[SetAside] = []
    for own in bridge.tables:
        table = read_pairs(bridge.followed(own.source), own.modalities, outside=outside)
        found, left_out = _evaluate_table(bridge, table, own, splits, report)
        # The table that a modality was bound with tells of that modality; the others may have been trained on its rows.
        records += [record for record in found if not own.bound or own.bound in sides_of(record)]
        set_aside += left_out
    return records, set_aside


def _evaluate_table(
    bridge: Bridge, table: Pairs, own: TrainedOn | None, splits: Sequence[str] | None, report: Report
) -> tuple[list[dict[str, Any]], Sequence[SetAside]]:
    sides = [modality for modality in table.modalities if modality in bridge.sides]
    if len(sides) < 2:
        raise BridgekitError(
            f"the table has fewer than two of this bridge's modalities ({', '.join(bridge.sides)})", where=table.source
        )
    encoded = encode_pairs(table, {modality: bridge.encoder(modality) for modality in sides}, report)
    if own:
        split = list(split_pairs(encoded.pairs, own.seed, encoded.ids))
    else:
        split = list(encoded.pairs.split or ["all"] * len(encoded.pairs))
    wanted = list(splits) if splits else test_splits(split)
    unknown = [name for name in wanted if name not in split]
    if unknown or not wanted:
        raise BridgekitError(
            f"the table has no split {unknown[0]!r}" if unknown else "the table has no test split",
            where=table.source,
            remedy=f"name one with --split: {', '.join(dict.fromkeys(split))}",
        )
    return evaluate_splits(encoded, split, bridge.project, "FuseMix", wanted), encoded.pairs.set_aside


def _sides_in(bridge: Bridge, source: str | Path) -> tuple[str, ...]:
    """Those of a bridge's modalities that a table has a column for; all of them where that leaves no pair."""
    there = [modality for modality in table_modalities(source) if modality in bridge.sides]
    return tuple(there if len(there) > 1 else bridge.sides)


@dataclass(frozen=True)
class ZeroShot:
    """Classification by text prompts alone.

    Arguments:
        modality: what was classified.
        items: how many.
        accuracy: the share whose class was the most similar one.
        per_class: class to its items' accuracy.
        templates: the prompts.
        set_aside: rows that could not be used.
    """

    modality: str
    items: int
    accuracy: float
    per_class: Mapping[str, float]
    templates: Sequence[str]
    set_aside: Sequence[SetAside]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "modality": self.modality,
            "items": self.items,
            "accuracy": self.accuracy,
            "per_class": dict(self.per_class),
            "templates": list(self.templates),
            "set_aside": [vars(row) for row in self.set_aside],
        }


def evaluate_zero_shot(
    bridge: Bridge,
    pairs: str | Path | None,
    templates: Sequence[str],
    splits: Sequence[str] | None,
    report: Report,
    *,
    outside: bool = False,
) -> ZeroShot:
    """Classify the items of the side that is not text by prompts made of the texts of the table, taken as class names.

    Arguments:
        bridge: a bridge with a text side.
        pairs: a table or source; None is the one that the bridge was trained on.
        templates: prompts with `{}` for the class.
        splits: which splits to ask, where the table has them; by default all but `train` and `val`, or else every row.
        report: progress.
        outside: let the table name files outside its own folder.

    Raises:
        BridgekitError: no text side, or no row left.
    """
    bridge.side(TEXT)
    source = pairs or bridge.followed(bridge.tables[0].source)
    modality = next(name for name in (*_sides_in(bridge, source), *bridge.sides) if name != TEXT)
    table = read_pairs(source, (modality, TEXT), outside=outside)
    names = table.columns[TEXT]
    wanted = list(splits or (test_splits(table.split) if table.split else ())) or None
    rows = [row for row in range(len(table)) if names[row] and (not wanted or not table.split or table.split[row] in wanted)]
    if not rows:
        raise BridgekitError("there is no row to classify", where=table.source, remedy="look at --split")
    embedded = bridge.embed_usable(modality, [table.columns[modality][row] or "" for row in rows], report=report)
    failed = [
        SetAside(table.rows[rows[at]], modality, str(table.columns[modality][rows[at]]), why)
        for at, why in embedded.failed.items()
    ]
    truth = [str(names[row]) for position, row in enumerate(rows) if position not in embedded.failed]
    classes = sorted(set(truth))
    prompts = class_embeddings(lambda texts: bridge.embed(TEXT, texts), classes, templates)
    predicted = search(embedded.vectors, prompts, 1)[1][:, 0].tolist()
    right = np.array([classes[index] == true for index, true in zip(predicted, truth, strict=True)])
    per_class = {name: float(right[[true == name for true in truth]].mean()) for name in classes}
    return ZeroShot(modality, len(truth), float(right.mean()), per_class, templates, (*table.set_aside, *failed))
