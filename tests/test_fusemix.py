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
    first, second = draw_partners(n, pairing, CPU)
    lam = draw_lambda(len(first), 1.0, per, CPU).double()
    mixed = fusemix(sides, first, second, lam)
    for k, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        share = float(lam[min(k, len(lam) - 1)])
        for side, result in zip(sides, mixed, strict=True):
            torch.testing.assert_close(result[k], share * side[i] + (1 - share) * side[j])


def test_halves_mix_one_half_of_the_batch_with_the_other() -> None:
    first, second = draw_partners(7, "halves", CPU)
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [3, 4, 5]


def test_a_permutation_keeps_every_row() -> None:
    first, second = draw_partners(50, "permutation", CPU)
    assert first.tolist() == list(range(50))
    assert sorted(second.tolist()) == list(range(50))


def test_an_alpha_of_zero_leaves_the_latents_alone() -> None:
    side = torch.randn(6, 4)
    first, second = draw_partners(6, "permutation", CPU)
    assert torch.equal(fusemix([side], first, second, draw_lambda(6, 0.0, "pair", CPU))[0], side)


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
