"""Recall is counted as papers count it, tile by tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch.nn.functional import normalize

from bridgekit import retrieval
from bridgekit.retrieval import (
    Hit,
    class_embeddings,
    confidence_interval,
    nearest,
    recall,
    recall_cell,
    relevance,
    search,
)


def brute_force(scores: torch.Tensor, right: set[tuple[int, int]], skip: set[tuple[int, int]]) -> list[int]:
    """Per query with a correct answer: one plus the wrong candidates that do not score below its best correct one."""
    ranks = []
    for query in sorted({query for query, _ in right}):
        mine = {candidate for asked, candidate in right if asked == query}
        best = max(float(scores[query, candidate]) for candidate in mine)
        wrong = [c for c in range(scores.shape[1]) if c not in mine and (query, c) not in skip]
        ranks.append(1 + sum(float(scores[query, candidate]) >= best for candidate in wrong))
    return ranks


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 15), links=st.integers(1, 30), tile=st.integers(1, 60), seed=st.integers(0, 9999))
def test_ranks_equal_those_counted_by_hand_whatever_the_tile(n: int, m: int, links: int, tile: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Few distinct values, so that ties are common.
    queries = torch.from_numpy(rng.integers(-1, 2, (n, 3))).float()
    candidates = torch.from_numpy(rng.integers(-1, 2, (m, 3))).float()
    right = relevance(rng.integers(0, n, links), rng.integers(0, m, links))
    skip = relevance(rng.integers(0, n, links), rng.integers(0, m, links))
    pairs, left_out = (set(zip(r.query.tolist(), r.candidate.tolist(), strict=True)) for r in (right, skip))
    expected = brute_force(queries @ candidates.T, pairs, left_out)
    old = retrieval.TILE_NUMBERS
    retrieval.TILE_NUMBERS = tile
    try:
        ranks = retrieval.best_ranks(queries, candidates, right, skip).tolist()
    finally:
        retrieval.TILE_NUMBERS = old
    assert ranks == expected


def test_all_five_captions_of_an_image_count_as_correct() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    captions = normalize(torch.tensor([[0.3, 1.0], [1.0, 0.1], [0.2, 1.0], [0.1, 1.0]]), dim=-1)
    right = relevance(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3]))
    assert recall(images, captions, right).at[1] == 1.0, "one of two captions is enough"
    back = recall(captions, images, relevance(right.candidate, right.query))
    assert back.at[1] == 0.75, "the first caption is nearer to the wrong image"


def test_all_candidates_of_a_group_count_as_correct_for_its_queries() -> None:
    links = relevance(np.array([0, 1, 2]), np.array([0, 1, 2]), np.array([7, 7, -1]))
    assert list(zip(links.query.tolist(), links.candidate.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2)]


def test_embeddings_collapsed_into_one_point_score_zero() -> None:
    same = torch.ones(20, 4) / 2
    result = recall(same, same, relevance(np.arange(20), np.arange(20)))
    assert result.at[1] == result.at[10] == 0
    assert result.median_rank == 20


def test_nan_counts_against_the_query() -> None:
    queries, candidates = torch.eye(3), torch.eye(3)
    candidates[0, 0] = torch.nan
    result = recall(queries, candidates, relevance(np.arange(3), np.arange(3)))
    assert result.at[1] < 1


def test_search_returns_the_best_first_and_no_more_than_there_are() -> None:
    scores, indices = search(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]]), 10)
    assert indices.tolist() == [[1, 2, 0], [0, 2, 1]]
    assert scores[0].tolist() == pytest.approx([1.0, 0.6, 0.0])


def test_nearest_pairs_each_hit_with_its_own_item() -> None:
    candidates = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
    hits = nearest(torch.eye(2), candidates, ["owl", "dog", "cat"], 2)
    similarity = pytest.approx
    assert hits[0] == [Hit("dog", similarity(1.0)), Hit("cat", similarity(0.6))]
    assert hits[1] == [Hit("owl", similarity(1.0)), Hit("cat", similarity(0.8))]


@pytest.mark.parametrize(("right", "queries"), [(0, 1), (1, 1), (2, 4), (7, 29), (500, 1000)])
def test_the_confidence_interval_is_wilsons(right: int, queries: int) -> None:
    expected = binomtest(right, queries).proportion_ci(method="wilson")
    assert confidence_interval(right / queries, queries) == pytest.approx(tuple(expected))


def test_a_recall_of_few_queries_is_shown_as_its_interval_and_one_that_cannot_fail_not_at_all() -> None:
    def cells(queries: int, candidates: int) -> list[str]:
        recalls = {"recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0}
        return [recall_cell({**recalls, "queries": queries, "candidates": candidates}, k) for k in (1, 5, 10)]

    assert cells(1, 12) == ["21–100"] * 3
    assert cells(1, 1) == ["–"] * 3
    assert cells(29, 5) == ["88–100", "–", "–"]
    assert cells(30, 11) == ["100.0"] * 3


def test_a_class_is_the_mean_of_its_prompts() -> None:
    asked: list[str] = []

    def embed(texts: list[str]) -> torch.Tensor:
        asked.extend(texts)
        return torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])

    classes = class_embeddings(embed, ["dog", "rain"], ["a {}", "the sound of a {}"])
    assert asked == ["a dog", "the sound of a dog", "a rain", "the sound of a rain"]
    torch.testing.assert_close(classes, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_a_hundred_thousand_by_a_hundred_thousand_never_holds_more_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    plain = torch.Tensor.__matmul__

    def watched(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        product = plain(left, right)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    n = 100_000
    points = normalize(torch.randn(n, 2, generator=torch.Generator().manual_seed(0)), dim=-1)
    some = np.arange(0, n, 500)
    result = recall(points, points, relevance(some, some))
    assert result.candidates == n
    assert 0 < largest <= retrieval.TILE_NUMBERS
