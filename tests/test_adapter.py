"""The fusion adapter is the paper's formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from bridgekit.fusion.adapter import Dropout, FrozenSide, FusionAdapter


def test_it_computes_residual_blocks_then_layer_norm_and_a_linear_map() -> None:
    torch.manual_seed(0)
    adapter = FusionAdapter(6, 4, blocks=2, expansion=3, dropout=0.5).eval()
    latents = torch.randn(5, 6) * 3 + 2
    adapter.standardise(latents)
    x = (latents - latents.mean(0)) / latents.std(0)
    for block in adapter.blocks:
        inner = layer_norm(x, (6,), block.norm.weight, block.norm.bias) @ block.up.weight.T + block.up.bias
        x = x + gelu(inner) @ block.down.weight.T + block.down.bias
    expected = layer_norm(x, (6,), adapter.norm.weight, adapter.norm.bias) @ adapter.head.weight.T + adapter.head.bias
    torch.testing.assert_close(adapter(latents), expected)
    assert adapter(latents).shape == (5, 4)


def test_a_constant_dimension_does_not_become_noise() -> None:
    adapter = FusionAdapter(3, 2, blocks=0, expansion=1, dropout=0)
    latents = torch.randn(50, 3)
    latents[:, 1] = 7.0
    adapter.standardise(latents)
    assert ((latents - adapter.mean) / adapter.std).abs().max() < 10


def test_dropout_acts_in_training_only() -> None:
    adapter = FusionAdapter(8, 4, blocks=1, expansion=2, dropout=0.5)
    x = torch.randn(3, 8)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


def test_a_frozen_side_is_the_identity() -> None:
    x = torch.randn(3, 8)
    assert torch.equal(FrozenSide(3)(x), x)


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout_drops_its_share_keeps_the_expectation_and_masks_gradients_the_same_way(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1_000, 257, requires_grad=True)
    out = Dropout(p)(x)
    out.sum().backward()
    assert abs((out == 0).float().mean() - p) < 0.005
    assert abs(out.mean() - 1) < 0.02
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())
    # No row and no column is dropped more than the others.
    assert abs((out == 0).float().mean(0) - p).max() < 0.1
    assert abs((out == 0).float().mean(1) - p).max() < 0.2


def test_dropout_is_the_identity_in_eval_mode_and_where_nothing_is_dropped() -> None:
    x = torch.rand(5, 3)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
