"""Recall@k of an encoded table in every direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridgekit.latents.encoded import EncodedPairs
from bridgekit.retrieval import Recall, Relevance, bank_penalty, random_recall, recall, relevance
from bridgekit.tables.splits import test_splits

#: Samples of the bootstrap.
SAMPLES = 2_000

Embed = Callable[[str, Tensor], Tensor]


def evaluate_splits(
    encoded: EncodedPairs,
    split: Sequence[str],
    embed: Embed,
    method: str,
    splits: Sequence[str] | None = None,
    banks: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Recall@k of each test split in every direction that it has rows for.

    Arguments:
        encoded: the table.
        split: each row's split.
        embed: maps a modality and its latents (m, d) to embeddings (m, shared) of unit length.
        method: a name for the records.
        splits: which splits; the default is all but `train` and `val`.
        banks: at `a/b`, embeddings of a in rows that have both, (n, shared), see `bank_latents`: hubs count less.

    Returns:
        flat records: split, direction, among (`split`, or `all` if the rest of the table adds distractors), method,
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
                result = split_recall(encoded, embedded, rows, query, candidate, among, banks)
                if among == "all" and result.candidates == records[-1]["candidates"]:
                    continue
                label = {"split": name, "direction": f"{query} → {candidate}", "among": among, "method": method}
                records.append({**label, **result.as_json()})
    return records


def mean_recall(records: Sequence[Mapping[str, Any]], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """The mean of recall@1, @5 and @10 over records, and its 95 % interval by a bootstrap over the queries of each.

    A query counts in none of the three, in the last, the last two or all: that their recalls say how many queries did each is
    all that the bootstrap needs.

    Arguments:
        records: one for each direction, as from `evaluate_splits`.
        seed: random seed of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    samples = np.zeros(SAMPLES)
    for record in records:
        recalls = [1.0, record["recall@10"], record["recall@5"], record["recall@1"], 0.0]
        shares = np.clip(-np.diff(recalls), 0, None)
        drawn = generator.multinomial(record["queries"], shares / shares.sum(), size=SAMPLES)
        samples += drawn @ (np.arange(4) / 3) / record["queries"] / len(records)
    low, high = np.quantile(samples, (0.025, 0.975)).tolist()
    return sum(record[f"recall@{k}"] for record in records for k in (1, 5, 10)) / 3 / len(records), (low, high)


def sides_of(record: Mapping[str, Any]) -> frozenset[str]:
    """The two modalities of a record of `evaluate_splits`."""
    return frozenset(record["direction"].split(" → "))


def directions(encoded: EncodedPairs, rows: NDArray[np.int64]) -> list[tuple[str, str]]:
    """(query, candidate) modalities with relevant pairs: rows with both, or groups with both."""
    pairs = combinations(encoded.ids, 2)
    return [way for a, b in pairs if len(correct_items(encoded, rows, a, b).query) for way in ((a, b), (b, a))]


def split_recall(
    encoded: EncodedPairs,
    embedded: Mapping[str, Tensor],
    rows: NDArray[np.int64],
    query: str,
    candidate: str,
    among: str = "split",
    banks: Mapping[str, Tensor] | None = None,
) -> Recall:
    """Recall@k of the items in some rows, in one direction.

    Arguments:
        encoded: the table.
        embedded: modality to the embeddings of its distinct items.
        rows: indices of the query rows, with at least one relevant pair (see `directions`).
        query, candidate: modalities.
        among: `split`: candidates are the rows' own items. `all`: all other items of the table are distractors; relevant
            items of other splits, which training may have seen, are excluded.
        banks: as for `evaluate_splits`.
    """
    right = correct_items(encoded, rows, query, candidate)
    used, skip = np.unique(right.candidate), None
    if among == "all":
        everywhere = correct_items(encoded, np.arange(len(encoded.pairs)), query, candidate)
        used = np.unique(encoded.ids[candidate][encoded.ids[candidate] >= 0])
        skip = Relevance(everywhere.query, np.searchsorted(used, everywhere.candidate))
    # Candidates are renumbered to the ones used.
    right = Relevance(right.query, np.searchsorted(used, right.candidate))
    candidates = embedded[candidate][torch.from_numpy(used)]
    penalty = bank_penalty(banks or {}, query, candidate, candidates)
    return recall(embedded[query], candidates, right, skip=skip, penalty=penalty)


def chance(
    encoded: EncodedPairs, rows: NDArray[np.int64], query: str, candidate: str, among: str, ks: Sequence[int]
) -> dict[int, float]:
    """The expected recall@k of a random ranking, for each k in `ks`. Other arguments as for `split_recall`.

    It is k / gallery size if each query has one correct item, and more if it has several.
    """
    correct = correct_items(encoded, rows, query, candidate)
    queries, answers = np.unique(correct.query, return_counts=True)
    candidates = np.full(len(queries), len(np.unique(correct.candidate)))
    if among == "all":  # correct items outside these rows are left out of the ranking
        everywhere = correct_items(encoded, np.arange(len(encoded.pairs)), query, candidate)
        ids, known = np.unique(everywhere.query, return_counts=True)
        candidates[:] = len(np.unique(encoded.ids[candidate][encoded.ids[candidate] >= 0]))
        candidates -= known[np.searchsorted(ids, queries)] - answers
    return random_recall(answers, candidates, ks) if len(queries) else dict.fromkeys(ks, 0.0)


def correct_items(encoded: EncodedPairs, rows: NDArray[np.int64], query: str, candidate: str) -> Relevance:
    """Which items of some rows are relevant to which queries, by item ids."""
    group = encoded.group
    return relevance(encoded.ids[query][rows], encoded.ids[candidate][rows], None if group is None else group[rows])
