"""A table of pairs as the report shows it: recall beside the baselines and chance, and the retrievals worth looking at."""

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
from bridgekit.evaluation.recall import chance, correct_items
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.pairs import Pairs
from bridgekit.retrieval import Relevance
from bridgekit.tables.splits import test_splits

#: The k of recall@k.
KS = (1, 5, 10)
#: What a bridge is compared with, then the bridge itself, in the order shown. Bridges of older versions have `untrained`.
METHODS = ("random", "untrained", "closed-form start", "linear", "FuseMix")
#: At most this many queries are searched for retrievals to show; of more, a random sample.
MAX_QUERIES = 2_000
_TILE = 256


@dataclass(frozen=True)
class Direction:
    """Recall in one direction of retrieval.

    Arguments:
        split: the split whose rows the queries come from.
        query, answer: modalities.
        among: which gallery: `split`, that split's own items, or `all`, the whole table's.
        records: method to its record, as of `evaluation.evaluate_splits`, in the order of `METHODS`.
        chance: k to the expected recall@k of a random ranking.
    """

    split: str
    query: str
    answer: str
    among: str
    records: Mapping[str, Mapping[str, Any]]
    chance: Mapping[int, float]

    @property
    def telling_k(self) -> int:
        """The k whose recall says most: 1 in a small gallery, where five random results often hold a correct one."""
        return 5 if self.chance[5] < 0.1 else 1


@dataclass(frozen=True)
class TableResults:
    """A table and how a bridge does on it.

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
        """Directions that the bridge was evaluated in, within their own split."""
        return [each for each in self.directions if each.among == "split" and "FuseMix" in each.records]


def table_results(
    bridge: Bridge, encoded: EncodedPairs, split: Sequence[str], records: Sequence[Mapping[str, Any]], *, own: bool = True
) -> TableResults:
    """What the report shows of a table: rows of its first test split, or of `val`, or of all where there is neither.

    Arguments:
        bridge: the bridge.
        encoded: the table.
        split: each row's split.
        records: recall on this table, as of `evaluation.evaluate_splits`.
        own: whether the bridge was trained on this table.
    """
    names = np.asarray(split)
    shown = next(iter([*test_splits(split), *(name for name in ("val",) if name in split), split[0]]))
    held_out = encoded.take(np.flatnonzero(names == shown))
    groups: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda each: METHODS.index(each["method"]) if each["method"] in METHODS else -1):
        groups.setdefault((record["split"], record["direction"], record["among"]), {})[record["method"]] = record
    directions = []
    for (name, direction, among), methods in groups.items():
        query, answer = direction.split(" → ")
        by_chance = chance(encoded, np.flatnonzero(names == name), query, answer, among, KS)
        directions.append(Direction(name, query, answer, among, methods, by_chance))
    embedded = {modality: bridge.project(modality, latents.matrix).cpu() for modality, latents in held_out.latents.items()}
    return TableResults(replace(encoded.pairs, split=tuple(split)), shown, held_out, embedded, directions, own)


@dataclass(frozen=True)
class Case:
    """One query, its top result, and the correct item.

    Arguments:
        query: the query.
        found: the top result.
        correct: the best-ranked correct item: `found` itself where that is correct.
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
    """The retrievals with the smallest and the largest margin: the correct item's cosine minus the best wrong one's.

    No correct item is in a list twice, so that one bad caption does not fill it.

    Arguments:
        encoded: the rows; at least one has both modalities.
        embedded: modality to the embeddings of its distinct items, (m, dim) at unit length.
        query, answer: modalities.
        count: how many of each.
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
