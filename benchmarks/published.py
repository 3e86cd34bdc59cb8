"""Published ways to align frozen encoders with few pairs, written from their papers and released code, for `small.py`.

- CSA (Li et al., ICLR 2025): canonical correlation analysis, directions weighted by their correlation, cosine over the first s.
- STRUCTURE (Gröger et al., NeurIPS 2025, arXiv 2506.16895): a linear map each, InfoNCE, and a regulariser that keeps each
  batch's similarities. Released: temperature 0.05 for the regulariser, weight 10, ramped in over the first third here.
- SAIL (Zhang et al., CVPR 2025, arXiv 2412.04616): gated MLPs of four times the width into 1,024 numbers, sigmoid loss with
  scale 20 and bias -10, Lion with weight decay 1e-4. Released for 23 million pairs: batches of 32,768, learning rate 1e-5.
- FuseMix's release (preset `paper`), with fewer epochs.

What their papers leave to the table (learning rate, s, the epoch) is chosen on the validation rows, as ours are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product

import torch
from common import fusemix, validation
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, logsigmoid, normalize

from bridgekit import PRESETS
from bridgekit.evaluation.methods import training_rows
from bridgekit.evaluation.recall import Embed
from bridgekit.latents.encoded import EncodedPairs

#: Epochs and rows of a batch of the trained methods.
EPOCHS, BATCH = 30, 1_024
#: The release trains for 500.
PAPER_EPOCHS = 30


def csa(encoded: EncodedPairs, split: NDArray, seed: int) -> Embed:  # type: ignore[type-arg]
    """Canonical correlation analysis with the weights and the truncation of CSA, after PCA, without which it overfits here."""
    rows = _pairs(encoded, split)
    means = {name: each.mean(0) for name, each in rows.items()}
    parts = {name: torch.linalg.svd((each - means[name]).double(), full_matrices=False) for name, each in rows.items()}
    a, b = rows

    def of(width: int, size: int) -> Embed:
        u, correlations, vt = torch.linalg.svd(parts[a].U[:, :width].T @ parts[b].U[:, :width], full_matrices=False)
        weights, turned = correlations[:size].clamp(0, 1).sqrt(), {a: u, b: vt.T}
        maps = {name: (part.Vh[:width].T / part.S[:width]) @ turned[name][:, :size] * weights for name, part in parts.items()}
        return lambda name, matrix: normalize(((matrix - means[name]).double() @ maps[name]).float(), dim=-1)

    widths = [(width, size) for width in (32, 64, 128, 256, 384) for size in (16, 32, 64, 128, 256) if size <= width]
    return _best(encoded, split, (of(*each) for each in widths))


def structure(encoded: EncodedPairs, split: NDArray, seed: int) -> Embed:  # type: ignore[type-arg]
    """Linear maps with InfoNCE and the STRUCTURE regulariser."""

    def loss(x: Tensor, y: Tensor, latents: tuple[Tensor, Tensor], progress: float) -> Tensor:
        kept = (divergence(latents[0], x) + divergence(latents[1], y)) / 2
        return _info_nce(x, y) + 10 * min(1.0, 3 * progress) * kept

    return _trained(encoded, split, seed, lambda width: nn.Linear(width, 512), loss, _adamw, (3e-3, 1e-3, 3e-4))


def sail(encoded: EncodedPairs, split: NDArray, seed: int) -> Embed:  # type: ignore[type-arg]
    """Gated MLPs with a sigmoid loss whose scale and bias are learned."""

    def loss(x: Tensor, y: Tensor, latents: tuple[Tensor, Tensor], progress: float) -> Tensor:
        signs = 2 * torch.eye(len(x)) - 1
        return -logsigmoid(signs * (20 * x @ y.T - 10)).sum() / len(x)

    return _trained(encoded, split, seed, _Gated, loss, _Lion, (1e-3, 3e-4, 1e-4))


def release(encoded: EncodedPairs, split: NDArray, seed: int) -> Embed:  # type: ignore[type-arg]
    """FuseMix as released, but with fewer epochs."""
    return fusemix(encoded, split, replace(PRESETS["paper"], epochs=PAPER_EPOCHS), seed)


METHODS: Mapping[str, Callable[..., Embed]] = {
    "CSA": csa,
    f"STRUCTURE ({EPOCHS} epochs)": structure,
    f"SAIL ({EPOCHS} epochs)": sail,
    f"FuseMix, release ({PAPER_EPOCHS} epochs)": release,
}


def _pairs(encoded: EncodedPairs, split: NDArray) -> dict[str, Tensor]:  # type: ignore[type-arg]
    latents, rows = training_rows(encoded, split)
    return {name: latents[name][rows[name]] for name in latents}


def _best(encoded: EncodedPairs, split: NDArray, found: Iterator[Embed]) -> Embed:  # type: ignore[type-arg]
    return max(found, key=lambda embed: validation(encoded, split).figures(embed)["score"])


def _trained(
    encoded: EncodedPairs,
    split: NDArray,  # type: ignore[type-arg]
    seed: int,
    make: Callable[[int], nn.Module],
    loss: Callable[[Tensor, Tensor, tuple[Tensor, Tensor], float], Tensor],
    optimizer: Callable[..., torch.optim.Optimizer],
    rates: tuple[float, ...],
) -> Embed:
    """Two maps trained side by side, at the learning rate and the epoch with the best recall on the validation rows."""
    rows, measure = _pairs(encoded, split), validation(encoded, split).figures
    count = len(next(iter(rows.values())))
    size = max(2, min(BATCH, count // 3))
    best, weights, names = -1.0, {}, list(rows)
    maps = nn.ModuleDict()

    def embed(name: str, matrix: Tensor) -> Tensor:
        with torch.no_grad():
            return normalize(maps[name](matrix), dim=-1)

    for rate in rates:
        torch.manual_seed(seed)
        maps.update({name: make(each.shape[1]) for name, each in rows.items()})
        stepper = optimizer(maps.parameters(), lr=rate, weight_decay=1e-4)
        for epoch, batches in product(range(EPOCHS), [count // size]):
            for batch in torch.randperm(count)[: batches * size].split(size):  # type: ignore[no-untyped-call]
                latents = rows[names[0]][batch], rows[names[1]][batch]
                x, y = (normalize(maps[name](each), dim=-1) for name, each in zip(names, latents, strict=True))
                stepper.zero_grad()
                loss(x, y, latents, epoch / EPOCHS).backward()  # type: ignore[no-untyped-call]
                stepper.step()
            if epoch % 3 == 2 and (score := measure(embed)["score"]) > best:
                best, weights = score, {name: tensor.clone() for name, tensor in maps.state_dict().items()}
    maps.load_state_dict(weights)
    return embed


def _info_nce(x: Tensor, y: Tensor) -> Tensor:
    scores, right = x @ y.T / 0.07, torch.arange(len(x))
    return (cross_entropy(scores, right) + cross_entropy(scores.T, right)) / 2


def divergence(latents: Tensor, embedded: Tensor) -> Tensor:
    """Jensen-Shannon divergence between the similarities of a batch before and after the map."""
    before, after = (
        ((unit - unit.mean(0)) @ (unit - unit.mean(0)).T / 0.05).softmax(1)
        for unit in (normalize(latents, dim=1), normalize(embedded, dim=1))
    )
    middle = (before + after) / 2
    one, other = (kl_div((middle + 1e-12).log(), each, reduction="batchmean") for each in (before, after))
    return (one + other) / 2


class _Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.other, self.out = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width), nn.Linear(4 * width, 1_024)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(nn.functional.relu(self.one(x)) * self.other(x))
        return out


def _adamw(parameters: Iterator[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


class _Lion(torch.optim.Optimizer):
    """Lion (Chen et al., 2023): the sign of an average of gradients."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter."""
        for group in self.param_groups:
            for each in group["params"]:
                mean = self.state[each].setdefault("mean", torch.zeros_like(each))
                each.mul_(1 - group["lr"] * group["weight_decay"])
                each.sub_(group["lr"] * (0.9 * mean + 0.1 * each.grad).sign())
                mean.mul_(0.99).add_(each.grad, alpha=0.01)
