"""`paper` trains as FuseMix's release does: a plain loop, written from the release's description, gets the same losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgekit.fusion import training
from bridgekit.fusion.adapter import Dropout
from bridgekit.fusion.training import PRESETS, initial_adapters, train

#: `paper`, small enough for a test: 24 steps, 4 an epoch, warm-up within the first. 100 rows leave an incomplete batch.
ROWS, BATCH, EPOCHS, WARMUP, BLOCKS, DIMS, WIDTH = 100, 24, 6, 2, 2, {"a": 10, "b": 7}, 8
SMALL = replace(PRESETS["paper"], batch_size=BATCH, epochs=EPOCHS, warmup_steps=WARMUP, blocks=BLOCKS, shared_dim=WIDTH)


class ReplayedDropout(nn.Module):
    """Multiplies by masks that were drawn before."""

    def __init__(self, masks: Iterator[Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        return x * next(self.masks)


class Block(nn.Module):
    def __init__(self, dim: int, dropout: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.dropout(F.gelu(self.up(self.norm(x)))))
        return out


class Adapter(nn.Module):
    def __init__(self, dim: int, dropout: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(dim, dropout) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out


def release_loop(
    adapters: Mapping[str, Adapter], latents: Mapping[str, Tensor], batches: list[Tensor], lambdas: list[float], lr: float
) -> list[float]:
    """Trains the adapters; gives the loss of every step."""
    temperature = nn.Parameter(torch.tensor(0.07, dtype=torch.float64))
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": [*others, temperature], "weight_decay": 0.0}], lr=lr
    )
    losses = []
    for number, (batch, lam) in enumerate(zip(batches, lambdas, strict=True)):
        epoch, step = divmod(number, len(batches) // EPOCHS)
        if epoch == 0:
            rate = min(lr, 1e-6 + (lr - 1e-6) * step / WARMUP)
        else:
            rate = (lr - 1e-6) * 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        one, other = batch.chunk(2)
        mixed = {name: lam * side[one] + (1 - lam) * side[other] for name, side in latents.items()}
        with torch.no_grad():
            temperature.clamp_(0.001, 0.5)
        x, y = (F.normalize(adapter(mixed[name]), dim=-1) for name, adapter in adapters.items())
        target = torch.arange(len(x))
        loss = (F.cross_entropy(x @ y.T / temperature, target) + F.cross_entropy(y @ x.T / temperature, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dropout", [0.0, PRESETS["paper"].dropout])
@pytest.mark.parametrize("lr", [PRESETS["paper"].lr, 0.1])
def test_the_paper_preset_gives_the_losses_of_a_plain_loop(lr: float, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGEKIT_PRECISION", "float32")  # no autocast
    batches: list[Tensor] = []
    lambdas: list[float] = []
    losses: list[float] = []
    masks: list[tuple[float, Tensor]] = []
    draw_batches, draw_lambda, train_step, drop = (
        training.draw_batches,
        training.draw_lambda,
        training.train_step,
        Dropout.forward,
    )

    def recorded_batches(*arguments: object) -> object:
        drawn = draw_batches(*arguments)  # type: ignore[arg-type]
        batches.extend(drawn)
        return drawn

    def recorded_lambda(*arguments: object) -> Tensor:
        lam = draw_lambda(*arguments)  # type: ignore[arg-type]
        lambdas.append(lam.item())  # fails unless one serves the whole batch
        return lam

    def recorded_step(*arguments: object) -> Tensor:
        loss = train_step(*arguments)  # type: ignore[arg-type]
        losses.append(loss.item())
        return loss

    def recorded_dropout(module: Dropout, x: Tensor) -> Tensor:
        mask = drop(module, torch.ones_like(x))
        if module.training and module.p:
            masks.append((module.p, mask))
        return x * mask

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
    latents = {name: hidden @ torch.randn(5, dim, generator=generator, dtype=torch.float64) for name, dim in DIMS.items()}
    rows = {name: torch.arange(ROWS) for name in latents}
    preset = replace(SMALL, lr=lr, dropout=dropout)
    start = copy.deepcopy(initial_adapters(latents, rows, preset, seed=3))
    with monkeypatch.context() as patch:
        patch.setattr(training, "draw_batches", recorded_batches)
        patch.setattr(training, "draw_lambda", recorded_lambda)
        patch.setattr(training, "train_step", recorded_step)
        patch.setattr(Dropout, "forward", recorded_dropout)
        epochs = iter(range(EPOCHS))
        trained = train(
            latents, rows, rows["a"][:, None], validate=lambda _: {"score": float(next(epochs))}, preset=preset, seed=3
        )

    steps = ROWS // BATCH
    assert [len(batch) for batch in batches] == [BATCH] * steps * EPOCHS
    assert all(len(torch.cat(batches[first : first + steps]).unique()) == steps * BATCH for first in range(0, 24, steps))
    if dropout:
        assert {rate for rate, _ in masks} == {0.6}
        dims = [dim for dim in DIMS.values() for _ in range(BLOCKS)]
        assert [mask.shape for _, mask in masks] == [(BATCH // 2, 4 * dim) for dim in dims] * steps * EPOCHS
        assert float(torch.cat([mask.flatten() for _, mask in masks]).eq(0).double().mean()) == pytest.approx(0.6, abs=0.01)
    replayed = ReplayedDropout(iter([mask for _, mask in masks])) if dropout else nn.Identity()
    adapters = {name: Adapter(dim, replayed).double() for name, dim in DIMS.items()}
    for name, adapter in adapters.items():
        weights = dict(start[name].state_dict())
        assert (weights.pop("mean").unique().tolist(), weights.pop("std").unique().tolist()) == ([0], [1]), "not standardised"
        adapter.load_state_dict(weights)
    expected = release_loop(adapters, latents, batches, lambdas, lr)
    assert len(losses) == 24
    assert losses == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)
    for name, adapter in adapters.items():
        for key, weight in adapter.state_dict().items():
            torch.testing.assert_close(trained.adapters[name].state_dict()[key], weight, rtol=1e-8, atol=1e-8)
    assert (0.5 in [record["temperature"] for record in trained.history]) == (lr == 0.1), "large steps reach its upper bound"
