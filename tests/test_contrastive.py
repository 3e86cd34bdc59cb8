"""Tiled InfoNCE equals InfoNCE over the whole matrix, in value and every gradient."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bridgekit.fusion import contrastive
from bridgekit.fusion.contrastive import info_nce, needed_keys


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
    block=st.integers(1, 30),
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
    loss = info_nce(*inputs, keys, tile=block)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_the_loss_of_perfect_pairs_is_zero_at_a_low_temperature_and_of_unrelated_ones_log_n() -> None:
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


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 24), scale=st.sampled_from([0.5, 14.0, 599.0, 601.0, 5_000.0]), seed=st.integers(0, 2**20))
def test_the_value_and_gradients_hold_at_any_scale_on_either_side_of_where_plain_exponentials_end(
    n: int, scale: float, seed: int
) -> None:
    expected_inputs, inputs = problem(n, 3, seed), problem(n, 3, seed)
    for each in (expected_inputs, inputs):
        each[2].data.fill_(scale)
    expected, loss = dense(*expected_inputs, None), info_nce(*inputs, tile=7)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)


def test_upstream_gradients_are_passed_on() -> None:
    doubled, plain = problem(9, 4, 1), problem(9, 4, 1)
    (2 * info_nce(*doubled)).backward()
    info_nce(*plain).backward()
    for ours, theirs in zip(doubled, plain, strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, 2 * theirs.grad)


def test_products_in_bfloat16_are_summed_in_float32() -> None:
    x, y, scale = (each.detach().float() for each in problem(600, 64, 3))
    x, y = x.bfloat16().requires_grad_(), y.bfloat16().requires_grad_()
    loss = info_nce(x, y, scale)
    loss.backward()
    exact = info_nce(x.detach().double(), y.detach().double(), scale.double())
    assert loss.dtype == torch.float32
    # A sum of 600 exponentials in bfloat16 would stop growing at 256.
    torch.testing.assert_close(loss.double(), exact, rtol=2e-3, atol=0)
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_memory_does_not_grow_with_the_square_of_the_rows() -> None:
    allocated: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[type-arg]
            out = func(*args, **(kwargs or {}))  # type: ignore[operator]
            allocated.extend(each.untyped_storage().nbytes() for each in tree_leaves(out) if isinstance(each, Tensor))
            return out

    x, y, scale = (each.detach().float().requires_grad_() for each in problem(3_000, 4, 0))
    keys = torch.arange(3_000)[:, None, None] // 7
    with Watch():
        info_nce(x, y, scale, keys, tile=100).backward()
    assert max(allocated) < 3_000 * 100 * 4


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 12), columns=st.integers(1, 4), groups=st.integers(1, 4), seed=st.integers(0, 2**20))
def test_redundant_key_columns_are_dropped_and_no_relation_is_lost(n: int, columns: int, groups: int, seed: int) -> None:
    keys = torch.randint(-1, groups, (n, columns), generator=torch.Generator().manual_seed(seed))

    def relation(keys: Tensor) -> Tensor:
        return ((keys[:, None] == keys[None]) & (keys[:, None] >= 0)).any(-1)

    needed = needed_keys(keys)
    assert torch.equal(relation(keys), relation(needed))
    for column in range(needed.shape[1]):
        if needed.shape[1] > 1:
            others = [other for other in range(needed.shape[1]) if other != column]
            single = [
                torch.equal(relation(needed[:, [other]]) | relation(needed[:, [column]]), relation(needed[:, [other]]))
                for other in others
            ]
            assert not any(single), "a column that another one implies is still there"


def test_files_of_one_class_need_the_class_alone() -> None:
    files, classes = torch.arange(12), torch.arange(12) // 3
    assert torch.equal(needed_keys(torch.stack([files, classes, classes], 1)), classes[:, None])


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler for torch.compile")
def test_compiled_passes_over_a_tile_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected_inputs, inputs = problem(40, 4, 6), problem(40, 4, 6)
    info_nce(*expected_inputs, tile=20).backward()
    monkeypatch.setattr(contrastive, "FUSED_ON", {"cpu"})
    info_nce(*inputs, tile=20).backward()
    for ours, theirs in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
