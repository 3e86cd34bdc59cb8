"""InfoNCE without the matrix equals InfoNCE with it, in value and every gradient."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bridgekit.fusion.contrastive import info_nce


def dense(x: Tensor, y: Tensor, scale: Tensor, keys: Tensor | None) -> Tensor:
    """The textbook formula: two cross-entropies over the whole similarity matrix."""
    logits = scale * x @ y.T
    n = len(x)
    if keys is not None:
        shared = torch.tensor(
            [
                [
                    i != j and any(set(a.tolist()) & set(b.tolist()) - {-1} for a, b in zip(keys[i], keys[j], strict=True))
                    for j in range(n)
                ]
                for i in range(n)
            ]
        )
        logits = logits.masked_fill(shared, -torch.inf)
    target = torch.arange(n)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def problem(n: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
    scale = torch.tensor(7.3, dtype=torch.float64)
    return x.requires_grad_(), y.requires_grad_(), scale.requires_grad_()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 24),
    d=st.integers(1, 9),
    block=st.integers(1, 200),
    groups=st.none() | st.integers(1, 6),
    columns=st.integers(1, 3),
    parts=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
def test_the_tiled_loss_equals_the_dense_formula_and_its_gradients(
    n: int, d: int, block: int, groups: int | None, columns: int, parts: int, seed: int
) -> None:
    keys = None
    if groups is not None:
        keys = torch.randint(-1, groups, (n, columns, parts), generator=torch.Generator().manual_seed(seed))
    expected_inputs, inputs = problem(n, d, seed), problem(n, d, seed)
    expected = dense(*expected_inputs, keys)
    loss = info_nce(*inputs, keys, block)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_perfect_pairs_at_a_low_temperature_cost_nothing_and_strangers_cost_the_logarithm_of_their_number() -> None:
    eye = torch.eye(8)
    assert info_nce(eye, eye, torch.tensor(100.0)) < 1e-6
    same = normalize(torch.ones(8, 4), dim=-1)
    torch.testing.assert_close(info_nce(same, same, torch.tensor(10.0)), torch.tensor(8.0).log())


def test_rows_that_are_all_related_have_no_negatives_and_no_loss() -> None:
    x, y, scale = problem(5, 3, 0)
    loss = info_nce(x, y, scale, torch.zeros(5, 1, 1, dtype=torch.long))
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 1e-12


def test_extreme_scales_stay_finite() -> None:
    x, y = (normalize(torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)), dim=-1) for seed in (1, 2))
    x.requires_grad_()
    loss = info_nce(x, y, torch.tensor(1000.0))
    loss.backward()
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()
