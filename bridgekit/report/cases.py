"""Retrievals worth looking at: where a bridge is most wrong, and where it is most right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridgekit.encoders import Item
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.retrieval import Relevance, random_recall, relevance

#: Queries that are looked at, at most; of more, so many are drawn.
MAX_QUERIES = 2_000
_TILE = 256


@dataclass(frozen=True)
class Case:
    """One query, what was found for it, and what would have been right.

    Arguments:
        query: the item asked with.
        found: the first of the candidates.
        right: the best placed right one: the same as `found` where that is right.
        found_cosine, right_cosine: their similarities to the query.
        rank: of the right one, from 1; other right ones do not count, and a tie counts against it.
    """

    query: Item
    found: Item
    right: Item
    found_cosine: float
    right_cosine: float
    rank: int


def right_answers(encoded: EncodedPairs, rows: NDArray[np.int64], query: str, candidate: str) -> Relevance:
    """Who is right for whom among some rows, by ids of items."""
    group = encoded.group
    return relevance(encoded.ids[query][rows], encoded.ids[candidate][rows], None if group is None else group[rows])


def chance(
    encoded: EncodedPairs, rows: NDArray[np.int64], query: str, candidate: str, among: str, ks: Sequence[int]
) -> dict[int, float]:
    """The recall@k that a ranking at random has. Arguments are those of `evaluation.split_recall`.

    It is k over the number of candidates where each query has one right answer, and more where it has several.
    """
    right = right_answers(encoded, rows, query, candidate)
    asked, answers = np.unique(right.query, return_counts=True)
    candidates = np.full(len(asked), len(np.unique(right.candidate)))
    if among == "all":  # right answers outside these rows are left out of the ranking
        everywhere = right_answers(encoded, np.arange(len(encoded.pairs)), query, candidate)
        ids, known = np.unique(everywhere.query, return_counts=True)
        candidates[:] = len(np.unique(encoded.ids[candidate][encoded.ids[candidate] >= 0]))
        candidates -= known[np.searchsorted(ids, asked)] - answers
    return random_recall(answers, candidates, ks) if len(asked) else dict.fromkeys(ks, 0.0)


def worst_and_best(
    encoded: EncodedPairs, embedded: Mapping[str, Tensor], query: str, candidate: str, count: int
) -> tuple[Sequence[Case], Sequence[Case]]:
    """The retrievals with the smallest and the largest margin: by how much the right answer beats the best wrong one.

    No right answer stands in a list twice, so that one bad caption does not fill it.

    Arguments:
        encoded: the rows to ask, one of which at least has both modalities.
        embedded: modality to (m, dim), the embeddings of its distinct items, at unit length.
        query, candidate: modalities.
        count: how many of each.
    """
    right = right_answers(encoded, np.arange(len(encoded.pairs)), query, candidate)
    asked = np.unique(right.query)
    if len(asked) > MAX_QUERIES:
        asked = np.sort(np.random.default_rng(0).choice(asked, MAX_QUERIES, replace=False))
    used = np.unique(right.candidate)
    renumbered = Relevance(right.query, np.searchsorted(used, right.candidate))
    candidates = embedded[candidate][torch.from_numpy(used)]
    measured = []
    for start in range(0, len(asked), _TILE):
        tile = asked[start : start + _TILE]
        scores = embedded[query][torch.from_numpy(tile)].to(candidates.device) @ candidates.T
        cells = renumbered.cells(tile, scores.device)
        ours = torch.full_like(scores, -torch.inf)
        ours[cells] = scores[cells]
        scores[cells] = -torch.inf
        best, wrong = ours.max(1), scores.max(1)
        rank = 1 + (scores >= best.values[:, None]).sum(1)
        measured.append(
            np.stack([each.double().cpu().numpy() for each in (*best, *wrong, rank)], axis=1)  # values, then indices
        )
    table = np.concatenate(measured)
    order = np.argsort(table[:, 0] - table[:, 2], kind="stable")
    first = _first_rows(encoded, query), _first_rows(encoded, candidate)

    def case(at: int) -> Case:
        ours, ours_at, wrong, wrong_at, rank = table[at].tolist()
        found, cosine = (ours_at, ours) if rank == 1 else (wrong_at, wrong)
        items = encoded.pairs.columns[candidate]
        query_item = encoded.pairs.columns[query][first[0][int(asked[at])]]
        found_item, right_item = (items[first[1][int(used[int(each)])]] for each in (found, ours_at))
        assert query_item is not None
        assert found_item is not None
        assert right_item is not None
        return Case(query_item, found_item, right_item, cosine, ours, int(rank))

    def distinct(ordered: Sequence[int]) -> list[Case]:
        chosen: dict[int, int] = {}
        for at in ordered:
            chosen.setdefault(int(table[at, 1]), at)
            if len(chosen) == count:
                break
        return [case(at) for at in chosen.values()]

    return distinct(order.tolist()), distinct(order[::-1].tolist())


def _first_rows(encoded: EncodedPairs, modality: str) -> dict[int, int]:
    """Id of an item to the first row that has it."""
    ids, rows = np.unique(encoded.ids[modality], return_index=True)
    return dict(zip(ids.tolist(), rows.tolist(), strict=True))
