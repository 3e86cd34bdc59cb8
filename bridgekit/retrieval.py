"""Recall@k and median rank, search, and zero-shot classifiers, tiled: 100,000 by 100,000 fits in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bridgekit.encoders import Item

#: About how many similarities a tile has (64 MiB in float32).
TILE_NUMBERS = 16_777_216

#: With fewer queries, the 95 % confidence interval of a recall is over 30 points wide, so that its digits mean little.
FEW = 30

#: How much of its hubness a candidate loses, and the number of bank queries that hubness is measured by.
HUB_SHARE, HUB_NEIGHBOURS = 0.5, 8
#: Training rows whose embeddings are kept with a bridge for each pair of modalities, at most.
BANK_ROWS = 1_024
#: Embeddings with at least this cosine are of the same item: they differ by rounding.
SAME = 0.999

#: Prompt templates for zero-shot classification; `{}` is the class name. A class is the mean of its prompts' embeddings.
TEMPLATES = ("{}", "a {}", "the sound of a {}", "this is a {}")


@dataclass(frozen=True)
class Recall:
    """Retrieval metrics.

    Arguments:
        queries: number of queries.
        candidates: number of distinct candidates.
        at: k to recall@k, the share of queries with a relevant candidate in their top k.
        median_rank: median over queries of the rank, from 1, of the best relevant candidate.
    """

    queries: int
    candidates: int
    at: dict[int, float]
    median_rank: float

    @property
    def mean(self) -> float:
        """Mean over k of recall@k, by which training selects the best epoch."""
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
        columns: column to cell of its row in an indexed table; empty unless an index was searched.
    """

    item: Item
    similarity: float
    columns: Mapping[str, str | int | float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Relevance:
    """Which candidates are relevant to which query, as sorted, distinct index pairs.

    Arguments:
        query: (m,) indices of queries.
        candidate: (m,) indices of candidates; candidate[i] is relevant to query[i].
    """

    query: NDArray[np.int64]
    candidate: NDArray[np.int64]

    def cells(self, queries: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and columns of the relevant pairs in a similarity matrix with rows `queries`, sorted and distinct."""
        starts = np.searchsorted(self.query, queries)
        counts = np.searchsorted(self.query, queries, side="right") - starts
        rows = np.repeat(np.arange(len(queries)), counts)
        links = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(starts, counts)
        return torch.from_numpy(rows).to(device), torch.from_numpy(self.candidate[links]).to(device)


def relevance(query: NDArray[np.int64], candidate: NDArray[np.int64], group: NDArray[np.int64] | None = None) -> Relevance:
    """Relevance from the rows of a table.

    Arguments:
        query: (n,) the query item of each row, negative if missing.
        candidate: (n,) the candidate item of each row. If an item is in several rows, all its partners are relevant.
        group: (n,) labels, negative for none: all candidates of a group are relevant to all its queries.
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


def hub_penalty(candidates: Tensor, bank: Tensor, partners: Tensor) -> Tensor:
    """What to take off the similarities of each candidate, because some candidates (hubs) are near to all queries.

    Arguments:
        candidates: (m, d) embeddings of unit length.
        bank: (b, d) embeddings of known queries of the same modality as the ones to come.
        partners: (b, d) embeddings of what they are paired with. A candidate's own queries do not count: otherwise candidates
            that were trained on would lose more than new ones.

    Returns:
        (m,) `HUB_SHARE` times the mean similarity to the `HUB_NEIGHBOURS` nearest of the bank.

    Source: Chowdhury et al., Nearest Neighbor Normalization Improves Multimodal Retrieval, EMNLP 2024 (arXiv 2410.24114), with
    fewer neighbours, since the bank is small. That own queries do not count is ours.
    """
    means = []
    for tile in _tiles(len(candidates), len(bank)):
        own = candidates[tile] @ partners.T > SAME
        others = (candidates[tile] @ bank.T).masked_fill(own, -torch.inf)
        best = others.topk(min(HUB_NEIGHBOURS, len(bank)), dim=1).values
        there = best.isfinite()
        means.append(best.where(there, 0).sum(1) / there.sum(1).clamp_min(1))
    return HUB_SHARE * torch.cat(means)


def bank_penalty(banks: Mapping[str, Tensor], query: str, to: str, candidates: Tensor) -> Tensor | None:
    """`hub_penalty` of candidates of the modality `to` for queries of another; None if the banks have no pairs of these two."""
    bank, partners = banks.get(f"{query}/{to}"), banks.get(f"{to}/{query}")
    return None if bank is None or partners is None else hub_penalty(candidates, bank, partners)


def recall(
    queries: Tensor,
    candidates: Tensor,
    right: Relevance,
    *,
    skip: Relevance | None = None,
    penalty: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Recall:
    """Recall@k and median rank of each query's best relevant candidate.

    Arguments:
        queries: (n, d) embeddings of unit length. Queries without a relevant candidate are ignored.
        candidates: (m, d) embeddings of unit length.
        right: which candidates are relevant.
        skip: pairs to exclude from the rankings, for example relevant ones that were seen in training.
        penalty: (m,) to take off each candidate's similarities, see `hub_penalty`.
        ks: the k of recall@k.

    Other relevant candidates never lower a rank. An irrelevant candidate that ties with the relevant one ranks before it, so
    collapsed embeddings score 0.
    """
    ranks = best_ranks(queries, candidates, right, skip, penalty)
    at = {k: float((ranks <= k).float().mean()) for k in ks}
    return Recall(len(ranks), len(candidates), at, float(ranks.double().quantile(0.5)))


def confidence_interval(share: float, queries: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of some queries (Wilson, 1927)."""
    count, z = max(1, queries), 1.959964  # untrusted metrics may say 0
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, (centre - half) / (1 + z**2 / count)), min(1.0, (centre + half) / (1 + z**2 / count))


def recall_cell(record: Mapping[str, Any], k: int) -> str:
    """recall@k as tables for people show it, in %: the value, and only its confidence interval for fewer than `FEW` queries.

    A dash where every ranking has recall 1, as there are only k candidates.

    Arguments:
        record: as from `bridgekit.evaluation.recall.evaluate_splits`.
        k: 1, 5 or 10.
    """
    share, queries = record[f"recall@{k}"], record["queries"]
    if record["candidates"] <= k:
        return "–"
    if queries >= FEW:
        return f"{100 * share:.1f}"
    return "–".join(f"{100 * bound:.0f}" for bound in confidence_interval(share, queries))


def random_recall(rights: NDArray[np.int64], candidates: NDArray[np.int64], ks: Sequence[int]) -> dict[int, float]:
    """Expected recall@k of a random ranking.

    Arguments:
        rights: (n,) number of relevant candidates of each query, n > 0.
        candidates: (n,) number of candidates of each query.
        ks: the k of recall@k.
    """
    # A query misses if its first k candidates, drawn without replacement, are all irrelevant.
    draws = np.arange(max(ks))
    among = candidates[:, None]
    left = np.clip(among - rights[:, None] - draws, 0, None) / np.maximum(among - draws, 1)
    missed = np.cumprod(left, axis=1).mean(0)
    return {k: float(1 - missed[k - 1]) for k in ks}


def similar_pairs(vectors: Tensor, threshold: float, limit: int) -> list[tuple[int, int, float]]:
    """Pairs of rows with a cosine similarity above a threshold: (i, j, cosine) with i < j.

    Arguments:
        vectors: (n, d); a zero vector is similar to nothing.
        threshold: exclusive lower bound of the cosine.
        limit: stop after this many pairs; n identical rows have n (n - 1) / 2.
    """
    found: list[tuple[int, int, float]] = []
    unit = nn.functional.normalize(vectors, dim=-1)
    for tile in _tiles(len(unit), len(unit)):
        scores = unit[tile] @ unit[tile.start :].T
        for row, column in (scores.triu(1) > threshold).nonzero()[: limit - len(found)].tolist():
            found.append((tile.start + row, tile.start + column, float(scores[row, column])))
        if len(found) == limit:
            break
    return found


def best_ranks(
    queries: Tensor, candidates: Tensor, right: Relevance, skip: Relevance | None = None, penalty: Tensor | None = None
) -> Tensor:
    """The rank, from 1, of the best relevant candidate of each query that has one. Tiled: memory does not grow with n m.

    Arguments are those of `recall`.

    Raises:
        ValueError: no query has a relevant candidate.
    """
    used = np.unique(right.query)
    if not len(used):
        raise ValueError("no query has a relevant candidate")
    ranks = []
    for tile in _tiles(len(used), len(candidates)):
        scores = _scores(queries[torch.from_numpy(used[tile]).to(queries.device)], candidates, penalty)
        cells = right.cells(used[tile], scores.device)
        best = torch.full((len(scores),), -torch.inf, dtype=scores.dtype, device=scores.device)
        best.scatter_reduce_(0, cells[0], scores[cells], "amax")
        scores[cells] = -torch.inf
        if skip is not None:
            scores[skip.cells(used[tile], scores.device)] = -torch.inf
        # `~(scores < best)` rather than `>=`: a NaN counts against the query.
        ranks.append(1 + (~(scores < best[:, None])).sum(1))
    return torch.cat(ranks).cpu()


def search(queries: Tensor, candidates: Tensor, k: int = 10, penalty: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k best candidates of each query, best first: those of the largest similarity, less their penalty if there is one.

    Arguments:
        queries: (n, d) embeddings of unit length.
        candidates: (m, d) embeddings of unit length.
        k: number of results per query.
        penalty: (m,) see `hub_penalty`.

    Returns:
        cosine similarities and indices, both (n, min(k, m)).
    """
    found = []
    for tile in _tiles(len(queries), len(candidates)):
        scores, indices = _scores(queries[tile], candidates, penalty).topk(min(k, len(candidates)), dim=1)
        found.append((scores if penalty is None else scores + penalty[indices], indices))
    return torch.cat([scores for scores, _ in found]), torch.cat([indices for _, indices in found])


def _scores(queries: Tensor, candidates: Tensor, penalty: Tensor | None) -> Tensor:
    similarities = queries @ candidates.T
    return similarities if penalty is None else similarities.sub_(penalty)


def nearest(
    queries: Tensor, candidates: Tensor, items: Sequence[Item], k: int = 10, penalty: Tensor | None = None
) -> list[list[Hit]]:
    """`search`, with each candidate's item: for each query its k hits, best first.

    Arguments:
        queries, candidates, k, penalty: as for `search`.
        items: the m candidates' items.
    """
    scores, indices = search(queries, candidates, k, penalty)
    return [
        [Hit(items[index], score) for score, index in zip(*row, strict=True)]
        for row in zip(scores.tolist(), indices.tolist(), strict=True)
    ]


def class_embeddings(
    embed_texts: Callable[[list[str]], Tensor], classes: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """One embedding per class: the mean over prompt templates, normalised to unit length, as in CLIP's zero-shot evaluation.

    Arguments:
        embed_texts: maps a list of texts to (n, d) embeddings of unit length.
        classes: class names.
        templates: prompts with `{}` in place of the class name.
    """
    sentences = [template.format(name) for name in classes for template in templates]
    embedded = embed_texts(sentences)
    means = embedded.view(len(classes), len(templates), -1).mean(1)
    return nn.functional.normalize(means, dim=-1)


def _tiles(n: int, m: int) -> Iterator[slice]:
    rows = max(1, TILE_NUMBERS // max(1, m))
    return (slice(start, start + rows) for start in range(0, n, rows))
