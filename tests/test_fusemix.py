"""FuseMix mixes latents, and a mixed pair is still a pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit.fusion.fusemix import LambdaPer, Pairing, draw_lambda, draw_partners, fusemix

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 30),
    pairing=st.sampled_from(["halves", "permutation"]),
    per=st.sampled_from(["batch", "pair"]),
    seed=st.integers(0, 999),
)
def test_the_same_lambda_is_used_in_every_modality(n: int, pairing: Pairing, per: LambdaPer, seed: int) -> None:
    torch.manual_seed(seed)
    sides = [torch.randn(n, 3, dtype=torch.float64), torch.randn(n, 5, dtype=torch.float64)]
    first, second = draw_partners(torch.zeros(n, dtype=torch.long), pairing)
    lam = draw_lambda(len(first), 1.0, per, CPU).double()
    mixed = [fusemix(side[first], side[second], lam) for side in sides]
    for k, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        share = float(lam[min(k, len(lam) - 1)])
        for side, result in zip(sides, mixed, strict=True):
            torch.testing.assert_close(result[k], share * side[i] + (1 - share) * side[j])


def test_halves_mix_one_half_of_the_batch_with_the_other() -> None:
    first, second = draw_partners(torch.zeros(7, dtype=torch.long), "halves")
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [3, 4, 5]


def test_a_permutation_keeps_every_row() -> None:
    first, second = draw_partners(torch.zeros(50, dtype=torch.long), "permutation")
    assert first.tolist() == list(range(50))
    assert sorted(second.tolist()) == list(range(50))


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.lists(st.sampled_from([3, 5, 6, 7]), min_size=2, max_size=40),
    pairing=st.sampled_from(["halves", "permutation"]),
    seed=st.integers(0, 999),
)
def test_only_rows_with_the_same_modalities_are_mixed(pattern: list[int], pairing: Pairing, seed: int) -> None:
    torch.manual_seed(seed)
    first, second = draw_partners(torch.tensor(pattern), pairing)
    assert [pattern[i] for i in first] == [pattern[j] for j in second]
    if pairing == "permutation":
        assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(len(pattern)))
    else:
        halves = sum(pattern.count(kind) // 2 for kind in set(pattern))
        assert len(set(first.tolist()) | set(second.tolist())) == 2 * halves == 2 * len(first)


def test_an_alpha_of_zero_leaves_the_latents_alone() -> None:
    side = torch.randn(6, 4)
    first, second = draw_partners(torch.zeros(6, dtype=torch.long), "permutation")
    assert torch.equal(fusemix(side[first], side[second], draw_lambda(6, 0.0, "pair", CPU)), side)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lambda_follows_the_beta_distribution(alpha: float) -> None:
    torch.manual_seed(0)
    lam = draw_lambda(200_000, alpha, "pair", CPU).double()
    assert lam.min() >= 0
    assert lam.max() <= 1
    assert abs(float(lam.mean()) - 0.5) < 0.01
    assert abs(float(lam.var()) - 1 / (4 * (2 * alpha + 1))) < 0.005


def test_one_lambda_serves_a_batch_where_it_is_drawn_per_batch() -> None:
    assert draw_lambda(9, 1.0, "batch", CPU).shape == (1, 1)
    assert draw_lambda(9, 1.0, "pair", CPU).shape == (9, 1)
