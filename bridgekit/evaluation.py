"""From a table and its latents to recall figures: which rows are asked, who is right, and among whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.latents import Latents, encode_items
from bridgekit.media import content_hash
from bridgekit.pairs import Pairs, SetAside, read_pairs, relation_keys, split_pairs, table_modalities
from bridgekit.progress import Report
from bridgekit.retrieval import Recall, Relevance, class_embeddings, recall, relevance, search
from bridgekit.training_rows import Contents, Ids, TrainingRows

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


def test_splits(split: Sequence[str]) -> list[str]:
    """The names of the splits that are for reporting, in the table's order."""
    return [name for name in dict.fromkeys(split) if name not in NOT_TESTS]


def leaks(split: Sequence[str], ids: Ids, contents: Contents) -> list[tuple[int, int]]:
    """Rows that hold wholly the same as a row of an earlier split: of `train`, or, in a test split, of `val`.

    Arguments:
        split: each row's split.
        ids, contents: see `bridgekit.training_rows`.

    Returns:
        (row, earlier row), counted from 0.
    """
    names = np.asarray(split)
    found: dict[int, int] = {}
    for earlier, later in ((("train",), names != "train"), (NOT_TESTS, ~np.isin(names, NOT_TESTS))):
        before = np.flatnonzero(np.isin(names, earlier))
        for row in np.flatnonzero(TrainingRows.of(ids, contents, before).whole(ids, contents) & later).tolist():
            found.setdefault(row, _same_row(row, before, ids))
    return sorted(found.items())


def _same_row(row: int, among: NDArray[np.int64], ids: Ids) -> int:
    """The first of some rows that holds all items of a row; there is one."""
    same = np.ones(len(among), bool)
    for own in ids.values():
        same &= (own[among] == own[row]) | (own[row] < 0)
    return int(among[same.argmax()])


def refuse_leaks(encoded: EncodedPairs, split: NDArray[np.str_]) -> None:
    """Raise BridgekitError where a row to validate or to test by holds wholly the same as one that training sees."""
    found = leaks(split.tolist(), encoded.ids, encoded.contents)
    if found:
        rows = encoded.pairs.rows
        told = [f"row {rows[row]} ({split[row]}) as row {rows[other]} ({split[other]})" for row, other in found[:5]]
        more = f", and {len(found) - 5:,} more" if len(found) > 5 else ""
        raise BridgekitError(
            f"{len(found):,} {'row holds' if len(found) == 1 else 'rows hold'} the same as a row of another split, "
            f"and figures would flatter: {', '.join(told)}{more}",
            where=encoded.pairs.source,
            remedy="give both the same split, or remove one; `bridgekit check` tells of all",
        )


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
    unseen: bool = False,
    outside: bool = False,
) -> tuple[list[dict[str, Any]], Sequence[SetAside]]:
    """Recall of a trained bridge on a table.

    Arguments:
        bridge: the bridge.
        pairs: a table, folder, source or `Pairs`, with two or more of the bridge's modalities; None is the tables that the
            bridge was trained on, split as they were then.
        splits: which splits to ask; by default all but `train` and `val`. A foreign table without splits is asked whole.
        report: progress.
        unseen: set aside those rows to be asked whose files training saw. Splits called `train` or `val` are asked as they are.
        outside: let a table name files outside its own folder.

    Returns:
        records as of `evaluate_splits`, and the rows set aside. Of the bridge's own tables these are also rows that were not
        in a test split when it was trained, but are now.

    Raises:
        BridgekitError: the table cannot be read, has no such split, has rows of a test split in train, or is foreign and has
            rows that training saw, which `unseen` does not set aside.
    """
    if pairs is not None:
        table = pairs if isinstance(pairs, Pairs) else read_pairs(pairs, _sides_in(bridge, pairs), outside=outside)
        return _evaluate_table(bridge, table, None, splits, report, unseen)
    records: list[dict[str, Any]] = []
    set_aside: list[SetAside] = []
    for own in bridge.tables:
        table = read_pairs(bridge.followed(own.source), own.modalities, outside=outside)
        found, left_out = _evaluate_table(bridge, table, own, splits, report, unseen)
        # The table that a modality was bound with tells of that modality; the others may have been trained on its rows.
        records += [record for record in found if not own.bound or own.bound in sides_of(record)]
        set_aside += left_out
    return records, set_aside


def _evaluate_table(
    bridge: Bridge, table: Pairs, own: TrainedOn | None, splits: Sequence[str] | None, report: Report, unseen: bool
) -> tuple[list[dict[str, Any]], Sequence[SetAside]]:
    sides = [modality for modality in table.modalities if modality in bridge.sides]
    if len(sides) < 2:
        raise BridgekitError(
            f"the table has fewer than two of this bridge's modalities ({', '.join(bridge.sides)})", where=table.source
        )
    encoded = encode_pairs(table, {modality: bridge.encoder(modality) for modality in sides}, report)
    if own:
        split = list(split_pairs(encoded.pairs, own.seed, encoded.ids))
        refuse_leaks(encoded, np.asarray(split))
        seen = bridge.training_rows.whole(encoded.ids, encoded.contents)
    else:
        split = list(encoded.pairs.split or ["all"] * len(encoded.pairs))
        seen = bridge.training_rows.files(encoded.ids, encoded.contents)
    wanted = list(splits) if splits else test_splits(split)
    unknown = [name for name in wanted if name not in split]
    if unknown or not wanted:
        raise BridgekitError(
            f"the table has no split {unknown[0]!r}" if unknown else "the table has no test split",
            where=table.source,
            remedy=f"name one with --split: {', '.join(dict.fromkeys(split))}",
        )
    asked = np.isin(split, [name for name in wanted if name not in NOT_TESTS])
    left_out = _leave_out(encoded.pairs, np.flatnonzero(asked), np.flatnonzero(asked & seen), refuse=not (own or unseen))
    # To the others they are what rows of training are: distractors, and no right answers.
    split = ["train" if asked[row] and seen[row] else name for row, name in enumerate(split)]
    wanted = [name for name in wanted if name in split]
    records = evaluate_splits(encoded, split, bridge.project, "FuseMix", wanted)
    return records, (*encoded.pairs.set_aside, *left_out)


def _leave_out(table: Pairs, asked: NDArray[np.int64], seen: NDArray[np.int64], *, refuse: bool) -> list[SetAside]:
    """Set aside the rows to be asked that training saw.

    Raises:
        BridgekitError: there are some and they are to be refused, or no other is left.
    """
    told = f"training saw {len(seen):,} of these {len(asked):,} rows"
    if len(seen) and refuse:
        raise BridgekitError(
            f"{told}, or their files: their figures would flatter",
            where=f"{table.source}, first row {table.rows[seen[0]]}",
            remedy="set them aside with --unseen, or leave out --pairs to ask the test rows of the bridge's own table",
        )
    if len(seen) and len(seen) == len(asked):
        raise BridgekitError(f"{told}: none is left to ask", where=table.source, remedy="give a table of other rows")
    column = next((modality for modality in table.modalities if modality != TEXT), TEXT)
    return [
        SetAside(table.rows[row], column, str(table.columns[column][row] or "")[:200], "training saw it")
        for row in seen.tolist()
    ]


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
    unseen: bool = False,
    outside: bool = False,
) -> ZeroShot:
    """Classify the items of the side that is not text by prompts made of the texts of the table, taken as class names.

    Arguments:
        bridge: a bridge with a text side.
        pairs: a table or source; None is the one that the bridge was trained on.
        templates: prompts with `{}` for the class.
        splits: which splits to ask, where the table has them; by default all but `train` and `val`, or else every row.
        report: progress.
        unseen: set aside those rows to be asked whose item training saw, as is always done with the bridge's own table.
        outside: let the table name files outside its own folder.

    Raises:
        BridgekitError: no text side, no row left, or rows that training saw, which `unseen` does not set aside.
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
    rows, left_out = leave_out_seen(bridge, table, rows, modality, refuse=pairs is not None and not unseen)
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
    return ZeroShot(
        modality,
        len(truth),
        float(right.mean()),
        per_class,
        templates,
        (*table.set_aside, *failed, *(left_out if pairs else ())),
    )


def leave_out_seen(
    bridge: Bridge, table: Pairs, rows: Sequence[int], modality: str, *, refuse: bool
) -> tuple[list[int], list[SetAside]]:
    """Those of some rows whose item of a modality training did not see, whatever stood beside it, and the others set aside.

    Rows of splits called `train` or `val` are what they are called, and stay.

    Raises:
        BridgekitError: there are others and they are to be refused, or no row is left.
    """
    if not bridge.training_rows:
        return list(rows), []
    contents: list[bytes] = []
    ids = np.full(len(rows), -1)
    for position, row in enumerate(rows):
        item = table.columns[modality][row]
        if item is not None and not (table.split and table.split[row] in NOT_TESTS):
            with suppress(ItemError):  # what cannot be read is told of later
                contents.append(content_hash(item))
                ids[position] = len(contents) - 1
    seen = bridge.training_rows.whole({modality: ids}, {modality: contents})
    asked = np.asarray(rows)
    return asked[~seen].tolist(), _leave_out(table, asked, asked[seen], refuse=refuse)
