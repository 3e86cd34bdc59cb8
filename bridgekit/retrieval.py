"""Recall@k and median rank, search, and zero-shot classification, all in tiles: 100,000 by 100,000 fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bridgekit.encoders import Item

#: A tile of similarities holds about this many numbers (64 MiB in float32).
TILE_NUMBERS = 16_777_216

#: Sentences for zero-shot classification; `{}` is the class. The mean of their embeddings stands for the class.
TEMPLATES = ("{}", "a {}", "the sound of a {}", "this is a {}")


@dataclass(frozen=True)
class Recall:
    """How well queries find their right candidates.

    Arguments:
        queries: how many queries were asked.
        candidates: among how many distinct candidates.
        at: k to the share of queries that have a right candidate among their first k.
        median_rank: the median over queries of the best right candidate's rank, from 1.
    """

    queries: int
    candidates: int
    at: dict[int, float]
    median_rank: float

    @property
    def mean(self) -> float:
        """The mean of the recalls, by which training chooses its best epoch."""
        return sum(self.at.values()) / len(self.at)

    def as_json(self) -> dict[str, float]:
        """Flat, for `bridge.json` and `--json`."""
        recalls = {f"recall@{k}": round(value, 6) for k, value in self.at.items()}
        return {"queries": self.queries, "candidates": self.candidates, **recalls, "median_rank": self.median_rank}


@dataclass(frozen=True)
class Hit:
    """One search result.

    Arguments:
        item: a path or text.
        similarity: its cosine similarity to the query.
        columns: column to cell of its row in an indexed table; empty where no index was searched.
    """

    item: Item
    similarity: float
    columns: Mapping[str, str | int | float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Relevance:
    """Which candidates are right for which query, as sorted index pairs without repeats.

    Arguments:
        query: (m,) indices of queries.
        candidate: (m,) indices of candidates; candidate[i] is right for query[i].
    """

    query: NDArray[np.int64]
    candidate: NDArray[np.int64]

    def cells(self, queries: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and columns of these links in a similarity matrix whose rows are `queries`, sorted and without repeats."""
        starts = np.searchsorted(self.query, queries)
        counts = np.searchsorted(self.query, queries, side="right") - starts
        rows = np.repeat(np.arange(len(queries)), counts)
        links = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(starts, counts)
        return torch.from_numpy(rows).to(device), torch.from_numpy(self.candidate[links]).to(device)


def relevance(query: NDArray[np.int64], candidate: NDArray[np.int64], group: NDArray[np.int64] | None = None) -> Relevance:
    """From rows to right answers.

    Arguments:
        query: (n,) the query item of each row, negative for a hole.
        candidate: (n,) the candidate item of each row. An item may stand in several rows: all its partners are right.
        group: (n,) labels, negative for none: every candidate of a group is right for every query of it.
    """
    both = (query >= 0) & (candidate >= 0)
    links = [np.stack([query[both], candidate[both]], 1)]
    if group is not None:
        for label in np.unique(group[group >= 0]):
            members = np.flatnonzero(group == label)
            queries, candidates = (np.unique(ids[members][ids[members] >= 0]) for ids in (query, candidate))
            links.append(np.stack([np.repeat(queries, len(candidates)), np.tile(candidates, len(queries))], 1))
    unique = np.unique(np.concatenate(links), axis=0)
    return Relevance(unique[:, 0], unique[:, 1])


def recall(
    queries: Tensor, candidates: Tensor, right: Relevance, *, skip: Relevance | None = None, ks: Sequence[int] = (1, 5, 10)
) -> Recall:
    """Recall@k and median rank of each query's best right candidate.

    Arguments:
        queries: (n, d) embeddings of unit length. Those without a right candidate are not asked.
        candidates: (m, d) embeddings of unit length.
        right: who is right for whom.
        skip: pairs to leave out of a query's ranking, for example right answers that training has seen.
        ks: the k of recall@k.

    Other right candidates never push a right one down. A wrong candidate that ties with the right one counts as before
    it, so embeddings that have collapsed into one point score nothing.
    """
    ranks = best_ranks(queries, candidates, right, skip)
    at = {k: float((ranks <= k).float().mean()) for k in ks}
    return Recall(len(ranks), len(candidates), at, float(ranks.double().quantile(0.5)))


def chance_recall(right: Relevance, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """The recall@k that a random order of the candidates is expected to have.

    Arguments:
        right: who is right for whom, one at least; the candidates are those that are right for anybody.
        ks: the k of recall@k.
    """
    rights = np.unique(right.query, return_counts=True)[1]
    return random_recall(rights, np.full(len(rights), len(np.unique(right.candidate))), ks)


def random_recall(rights: NDArray[np.int64], candidates: NDArray[np.int64], ks: Sequence[int]) -> dict[int, float]:
    """The recall@k that a random order is expected to have, where each query has so many right answers among so many.

    Arguments:
        rights, candidates: (n,) one a query, of one query at least.
        ks: the k of recall@k.
    """
    # A query misses where its first k candidates are all wrong: draws without replacement.
    draws = np.arange(max(ks))
    among = candidates[:, None]
    left = np.clip(among - rights[:, None] - draws, 0, None) / np.maximum(among - draws, 1)
    missed = np.cumprod(left, axis=1).mean(0)
    return {k: float(1 - missed[k - 1]) for k in ks}


def alike(vectors: Tensor, least: float, most: int) -> list[tuple[int, int, float]]:
    """Pairs of rows whose cosine similarity is above some value: both indices, the first below the second, and the cosine.

    Arguments:
        vectors: (n, d); a zero vector is like none.
        least: the cosine.
        most: stop at so many pairs: among n rows that are all alike there are n squared.
    """
    found: list[tuple[int, int, float]] = []
    unit = nn.functional.normalize(vectors, dim=-1)
    for tile in _tiles(len(unit), len(unit)):
        scores = unit[tile] @ unit[tile.start :].T
        for row, column in (scores.triu(1) > least).nonzero()[: most - len(found)].tolist():
            found.append((tile.start + row, tile.start + column, float(scores[row, column])))
        if len(found) == most:
            break
    return found


def best_ranks(queries: Tensor, candidates: Tensor, right: Relevance, skip: Relevance | None = None) -> Tensor:
    """The rank, from 1, of the best right candidate of each query that has one. In tiles: memory does not grow with n m.

    Raises:
        ValueError: no query has a right candidate.
    """
    asked = np.unique(right.query)
    if not len(asked):
        raise ValueError("no query has a right candidate")
    ranks = []
    for tile in _tiles(len(asked), len(candidates)):
        scores = queries[torch.from_numpy(asked[tile]).to(queries.device)] @ candidates.T
        cells = right.cells(asked[tile], scores.device)
        best = torch.full((len(scores),), -torch.inf, dtype=scores.dtype, device=scores.device)
        best.scatter_reduce_(0, cells[0], scores[cells], "amax")
        scores[cells] = -torch.inf
        if skip is not None:
            scores[skip.cells(asked[tile], scores.device)] = -torch.inf
        # `~(scores < best)` rather than `>=`: a NaN counts against the query, never for it.
        ranks.append(1 + (~(scores < best[:, None])).sum(1))
    return torch.cat(ranks).cpu()


def search(queries: Tensor, candidates: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
    """The k most similar candidates of each query, best first.

    Arguments:
        queries: (n, d) embeddings of unit length.
        candidates: (m, d) embeddings of unit length.
        k: how many; at most m.

    Returns:
        cosine similarities and indices, both (n, min(k, m)).
    """
    found = [
        (queries[tile] @ candidates.T).topk(min(k, len(candidates)), dim=1) for tile in _tiles(len(queries), len(candidates))
    ]
    return torch.cat([scores for scores, _ in found]), torch.cat([indices for _, indices in found])


def nearest(queries: Tensor, candidates: Tensor, items: Sequence[Item], k: int = 10) -> list[list[Hit]]:
    """`search`, with each candidate's item: for each query its k hits, best first.

    Arguments:
        queries, candidates, k: as for `search`.
        items: m items, one a candidate.
    """
    scores, indices = search(queries, candidates, k)
    return [
        [Hit(items[index], score) for score, index in zip(*row, strict=True)]
        for row in zip(scores.tolist(), indices.tolist(), strict=True)
    ]


def class_embeddings(
    embed_texts: Callable[[list[str]], Tensor], classes: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """One embedding per class: the mean over templates of the embedded sentences, at unit length again.

    Arguments:
        embed_texts: a function from a list of texts to (n, d) embeddings of unit length.
        classes: class names.
        templates: sentences with `{}` where the class goes, as in CLIP's zero-shot evaluation.
    """
    sentences = [template.format(name) for name in classes for template in templates]
    embedded = embed_texts(sentences)
    means = embedded.view(len(classes), len(templates), -1).mean(1)
    return nn.functional.normalize(means, dim=-1)


def _tiles(n: int, m: int) -> Iterator[slice]:
    rows = max(1, TILE_NUMBERS // max(1, m))
    return (slice(start, start + rows) for start in range(0, n, rows))
