"""What the report shows of a table: recall beside baselines and chance, and the worst and best retrievals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.encoders import Item
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.recall import chance, correct_items
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.pairs import Pairs
from bridgekit.retrieval import Relevance
from bridgekit.tables.splits import test_splits

#: The k of recall@k.
KS = (1, 5, 10)
#: The methods in the order shown. Older bridges have `untrained`, `closed-form start` and `linear`.
METHODS = ("random", "untrained", "closed-form start", "linear", "ridge", "closed form", "self-training", "FuseMix")
#: Maximum number of queries searched for retrievals to show; a random sample of more.
MAX_QUERIES = 2_000
_TILE = 256


@dataclass(frozen=True)
class Direction:
    """Recall in one direction of retrieval.

    Arguments:
        split, query, answer, among: see `evaluate_splits`; query and answer are modalities.
        records: method to its record of `evaluate_splits`, in the order of `METHODS`.
        chance: k to the expected recall@k of a random ranking.
        method: the one that the bridge is from.
    """

    split: str
    query: str
    answer: str
    among: str
    records: Mapping[str, Mapping[str, Any]]
    chance: Mapping[int, float]
    method: str

    @property
    def own(self) -> Mapping[str, Any]:
        """The record of the bridge itself."""
        return self.records[self.method]

    @property
    def ridge(self) -> Mapping[str, Any] | None:
        """The record of ridge regression, unless the bridge is from it."""
        return None if self.method == "ridge" else self.records.get("ridge", self.records.get("linear"))

    @property
    def telling_k(self) -> int:
        """The most informative k: 1 in a small gallery, where five random results often include a correct one."""
        return 5 if self.chance[5] < 0.1 else 1


@dataclass(frozen=True)
class TableResults:
    """A table and a bridge's results on it.

    Arguments:
        pairs: its usable rows, with their splits.
        split: the split that retrievals, map and similarities are taken from.
        held_out: the rows of that split, with their latents.
        embedded: modality to the embeddings of those rows' distinct items, (m, dim).
        directions: recall in every direction, split and gallery.
        own: whether the bridge was trained on this table.
    """

    pairs: Pairs
    split: str
    held_out: EncodedPairs
    embedded: Mapping[str, Tensor]
    directions: Sequence[Direction]
    own: bool = True

    @property
    def measured(self) -> list[Direction]:
        """Directions in which the bridge was evaluated within one split."""
        return [each for each in self.directions if each.among == "split" and each.method in each.records]


def table_results(
    bridge: Bridge, encoded: EncodedPairs, split: Sequence[str], records: Sequence[Mapping[str, Any]], *, own: bool = True
) -> TableResults:
    """What the report shows of a table: rows of its first test split, or else of `val`, or else all.

    Arguments:
        bridge, encoded: the bridge and the table.
        split: each row's split.
        records: recall on this table, from `evaluate_splits`.
        own: whether the bridge was trained on this table.

    Raises:
        BridgekitError: a record is about a split or modalities that the table does not have.
    """
    names = np.asarray(split)
    shown = next(name for name in (*test_splits(split), "val", split[0]) if name in split)
    held_out = encoded.take(np.flatnonzero(names == shown))
    groups: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda each: METHODS.index(each["method"]) if each["method"] in METHODS else -1):
        groups.setdefault((record["split"], record["direction"], record["among"]), {})[record["method"]] = record
    directions = []
    for (name, direction, among), methods in groups.items():
        rows, (query, answer) = np.flatnonzero(names == name), direction.split(" → ")
        if not {query, answer} <= encoded.ids.keys() or not len(correct_items(encoded, rows, query, answer).query):
            raise BridgekitError(
                f"the bridge's metrics are not about this table: no row of its split {name!r} pairs {query} with {answer}",
                where=encoded.pairs.source,
                remedy="report on the table that the bridge was trained on, or train it again",
            )
        by_chance = chance(encoded, rows, query, answer, among, KS)
        directions.append(Direction(name, query, answer, among, methods, by_chance, bridge.method(query, answer)))
    embedded = {modality: bridge.project(modality, latents.matrix).cpu() for modality, latents in held_out.latents.items()}
    return TableResults(replace(encoded.pairs, split=tuple(split)), shown, held_out, embedded, directions, own)


@dataclass(frozen=True)
class Case:
    """One retrieval.

    Arguments:
        query, found: the query and its top result.
        correct: the best-ranked correct item: `found` itself if that is correct.
        found_cosine, correct_cosine: their similarity to the query.
        rank: of the correct item, from 1. Other correct items do not count; ties count against it.
    """

    query: Item
    found: Item
    correct: Item
    found_cosine: float
    correct_cosine: float
    rank: int


def worst_and_best(
    encoded: EncodedPairs, embedded: Mapping[str, Tensor], query: str, answer: str, count: int
) -> tuple[list[Case], list[Case]]:
    """The retrievals with the smallest and the largest margin: the correct item's cosine minus that of the best wrong one.

    A list has no correct item twice, so that one bad caption does not fill it.

    Arguments:
        encoded: the rows; at least one has both modalities.
        embedded: modality to the embeddings of its distinct items, (m, dim) at unit length.
        query, answer: modalities.
        count: length of each list.
    """
    correct = correct_items(encoded, np.arange(len(encoded.pairs)), query, answer)
    queries = np.unique(correct.query)
    if len(queries) > MAX_QUERIES:
        queries = np.sort(np.random.default_rng(0).choice(queries, MAX_QUERIES, replace=False))
    gallery = np.unique(correct.candidate)
    renumbered = Relevance(correct.query, np.searchsorted(gallery, correct.candidate))
    candidates = embedded[answer][torch.from_numpy(gallery)]
    measured = []
    for tile in np.split(queries, range(_TILE, len(queries), _TILE)):
        scores = embedded[query][torch.from_numpy(tile)] @ candidates.T
        cells = renumbered.cells(tile, scores.device)
        own = torch.full_like(scores, -torch.inf)
        own[cells] = scores[cells]
        scores[cells] = -torch.inf
        best, wrong = own.max(1), scores.max(1)
        rank = 1 + (scores >= best.values[:, None]).sum(1)
        measured.append(torch.stack([each.double() for each in (*best, *wrong, rank)], 1))  # values, then indices
    table = torch.cat(measured).numpy()

    def item(modality: str, number: int) -> Item:
        found = encoded.pairs.columns[modality][int((encoded.ids[modality] == number).argmax())]
        assert found is not None
        return found

    def case(at: int) -> Case:
        cosine, place, wrong_cosine, wrong_place, rank = table[at].tolist()
        found_cosine, found_place = (cosine, place) if rank == 1 else (wrong_cosine, wrong_place)
        found, right = (item(answer, gallery[int(each)]) for each in (found_place, place))
        return Case(item(query, queries[at]), found, right, found_cosine, cosine, int(rank))

    def distinct(ordered: NDArray[np.int64]) -> list[Case]:
        first = np.sort(np.unique(table[ordered, 1], return_index=True)[1])
        return [case(at) for at in ordered[first[:count]].tolist()]

    order = np.argsort(table[:, 0] - table[:, 2], kind="stable")
    return distinct(order), distinct(order[::-1])
