"""Training compared with a plain loop as the FuseMix release describes it: time to its final recall, and memory.

python benchmarks/training.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import encoded_source, table, validation
from processes import in_process, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, Dataset

from bridgekit import PRESETS, Preset
from bridgekit.evaluation.methods import training_rows
from bridgekit.fusion import training
from bridgekit.fusion.adapter import project
from bridgekit.fusion.training import learning_rate
from bridgekit.latents.encoded import EncodedPairs

SEED = 0
#: The release's hyperparameters, except that 500 epochs with batches of 40,960 are for millions of pairs.
PAPER = replace(PRESETS["paper"], batch_size=1_024, epochs=10)
DEFAULT = PRESETS["default"]
LARGE_BATCH = 40_960


class PlainBlock(nn.Module):
    """`x + W2 Dropout(GELU(W1 LayerNorm(x)))` with torch's own dropout."""

    def __init__(self, dim: int, preset: Preset) -> None:
        super().__init__()
        hidden = round(dim * preset.expansion)
        self.inner = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(preset.dropout),
            nn.Linear(hidden, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, dim) to (n, dim)."""
        out: Tensor = x + self.inner(x)
        return out


class PairsDataset(Dataset[tuple[Tensor, Tensor]]):
    """One pair of latents per index."""

    def __init__(self, one: Tensor, other: Tensor) -> None:
        self.one, self.other = one, other

    def __len__(self) -> int:
        return len(self.one)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.one[index], self.other[index]


def plain_loop(
    one: Tensor, other: Tensor, preset: Preset, after_epoch: Callable[[int, list[nn.Module], float], object], steps: int = 0
) -> None:
    """A plain implementation of the paper: DataLoader, mixed halves, the full similarity matrix, AdamW, float32.

    Arguments:
        one, other: (n, d) latents of pairs.
        preset: hyperparameters; mixup is always one lambda per batch over two halves, as in the release.
        after_epoch: called with the epoch, the adapters and the seconds of training so far.
        steps: stop after this many, unless 0.
    """
    torch.manual_seed(SEED)
    adapters: list[nn.Module] = [
        nn.Sequential(
            nn.Dropout(preset.input_dropout),
            *(PlainBlock(side.shape[1], preset) for _ in range(preset.blocks)),
            nn.LayerNorm(side.shape[1]),
            nn.Linear(side.shape[1], preset.shared_dim),
        )
        for side in (one, other)
    ]
    temperature = nn.Parameter(torch.tensor(preset.temperature))
    parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": preset.weight_decay},
            {"params": [*(parameter for parameter in parameters if parameter.ndim <= 1), temperature], "weight_decay": 0.0},
        ],
        lr=preset.lr,
    )
    loader = DataLoader(PairsDataset(one, other), batch_size=min(preset.batch_size, len(one)), shuffle=True, drop_last=True)
    beta = torch.distributions.Beta(preset.alpha, preset.alpha)
    done, seconds = 0, 0.0
    for epoch in range(1, preset.epochs + 1):
        started = time.perf_counter()
        for adapter in adapters:
            adapter.train()
        for step, (a, b) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(preset, epoch, step, len(loader))
            with torch.no_grad():
                temperature.clamp_(*training.TEMPERATURE_BOUNDS)
            half, lam = len(a) // 2, beta.sample()
            mixed = [lam * side[:half] + (1 - lam) * side[half : 2 * half] for side in (a, b)]
            x, y = (normalize(adapter(side), dim=-1) for adapter, side in zip(adapters, mixed, strict=True))
            logits = x @ y.T / temperature
            target = torch.arange(len(x))
            loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
            if done == steps:
                return
        seconds += time.perf_counter() - started
        for adapter in adapters:
            adapter.eval()
        after_epoch(epoch, adapters, seconds)


def speech() -> tuple[EncodedPairs, Any]:
    """The starter's clips and names, encoded."""
    encoded = encoded_source("starter:spoken-openmoji", "starter:audio", "starter:text")
    return encoded, np.asarray(encoded.pairs.split)


def paired(encoded: EncodedPairs, split: Any) -> tuple[Tensor, Tensor]:
    """The latents of the training rows."""
    latents, rows = training_rows(encoded, split)
    one, other = (latents[name][rows[name]] for name in ("audio", "text"))
    return one, other


def standardised(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised latents, for the plain loop."""
    return (one - one.mean(0)) / one.std(0), (other - other.mean(0)) / other.std(0)


def curve(way: str) -> dict[str, Any]:
    """Train; return (seconds of training, score on `val`) after each epoch."""
    encoded, split = speech()
    score = validation(encoded, split).figures
    points: list[tuple[float, float]] = []
    if way.startswith("plain"):
        preset = PAPER if way == "plain, paper" else DEFAULT
        one, other = paired(encoded, split)
        moments = [(side.mean(0), side.std(0)) for side in (one, other)]
        if preset.standardise:
            one, other = standardised(one, other)
        moments = moments if preset.standardise else [(torch.zeros(()), torch.ones(()))] * 2

        def after_epoch(epoch: int, adapters: list[nn.Module], seconds: float) -> None:
            sides = dict(zip(("audio", "text"), zip(adapters, moments, strict=True), strict=True))
            with torch.inference_mode():
                found = score(
                    lambda name, matrix: normalize(sides[name][0]((matrix - sides[name][1][0]) / sides[name][1][1]), dim=-1)
                )
            points.append((seconds, found["score"]))

        plain_loop(one, other, preset, after_epoch)
        return {"curve": points}
    preset = PAPER if way == "bridgekit, paper" else DEFAULT
    started, away = time.perf_counter(), 0.0

    def timed(adapters: Mapping[str, Any]) -> dict[str, float]:
        nonlocal away
        paused = time.perf_counter()
        found = score(lambda name, matrix: project(adapters[name], matrix))
        points.append((paused - started - away, found["score"]))
        away += time.perf_counter() - paused
        return found

    latents, rows = training_rows(encoded, split)
    keys = torch.from_numpy(encoded.keys[split == "train"])
    training.train(latents, rows, keys, validate=timed, preset=preset, seed=SEED)
    return {"curve": points}


def large_step(way: str) -> dict[str, Any]:
    """Two steps of the `paper` preset at its batch size, on random latents."""
    generator = torch.Generator().manual_seed(SEED)
    latents = {name: torch.randn(LARGE_BATCH, dim, generator=generator) for name, dim in (("audio", 1_024), ("text", 384))}
    preset = replace(PRESETS["paper"], epochs=2)
    started = time.perf_counter()
    if way.startswith("plain"):
        plain_loop(latents["audio"], latents["text"], preset, lambda epoch, adapters, seconds: None, steps=2)
    else:
        training.train(
            latents,
            {name: torch.arange(LARGE_BATCH) for name in latents},
            torch.arange(LARGE_BATCH)[:, None],
            validate=lambda adapters: {"score": 0.0},
            preset=preset,
            seed=SEED,
        )
    return {"a step": (time.perf_counter() - started) / 2}


def main() -> str:
    """Train in separate processes; return the tables."""
    ways = ("bridgekit, default", "bridgekit, paper", "plain, paper", "plain, default")
    curves = {way: in_process(__file__, "curve", way)["curve"] for way in ways}
    rows = []
    for way, points in curves.items():
        cells = [f"{points[-1][0]:.0f} s", f"{100 * points[-1][1]:.1f}"]
        for peer in ("plain, paper", "plain, default"):
            aim = curves[peer][-1][1]
            reached = next((seconds for seconds, score in points if score >= aim), None)
            cells.append("never" if reached is None else f"{reached:.1f} s ({reached / curves[peer][-1][0]:.3f})")
        rows.append([way, *cells])
    memory = {way: in_process(__file__, "large", way) for way in ("bridgekit", "plain")}
    steps = [
        [
            way,
            f"{run['bytes'] / 2**30:.2f} GiB",
            f"{run['bytes'] / memory['plain']['bytes']:.2f}",
            f"{run['a step']:.1f} s",
            f"{run['a step'] / memory['plain']['a step']:.2f}",
        ]
        for way, run in memory.items()
    ]
    notes = (
        f"The starter's speech: 11,944 training pairs, latents of 1,024 and 384 dimensions, seed {SEED}. The score is the "
        "mean of recall@1, @5, @10 in both directions on `val` (held-out names) after each epoch, in %. Seconds are training "
        "time, including the closed-form start and excluding validation; in parentheses, as a fraction of the plain loop's "
        "total time. `paper` is 10 epochs of the release's adapters (4 blocks, expansion 4, dropout 0.6) and learning rates "
        "with batches of 1,024; `default` is 30 epochs. `plain, default` has the default preset's adapters, batches, "
        "learning rates and standardised latents, but no closed-form start, and the release's mixup.\n\n"
    )
    head = ["loop", "total", "score", "time to the score of `plain, paper`", "time to the score of `plain, default`"]
    return (
        notes
        + table(head, rows)
        + f"\n\nOne step of `paper`, batch {LARGE_BATCH:,} (20,480 mixed pairs); peak memory excludes the latents:\n\n"
        + table(["loop", "memory", "relative", "time", "relative"], steps)
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        report(lambda: (curve if sys.argv[1] == "curve" else large_step)(sys.argv[2]))
    else:
        print(main())
