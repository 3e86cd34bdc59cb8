"""From an encoded table to a measured bridge: train on its `train` rows, choose by its `val` rows, report on the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.baselines import before_training, linear
from bridgekit.evaluation.recall import Embed, directions, evaluate_splits, split_recall
from bridgekit.fusion.adapter import Adapter, project
from bridgekit.fusion.training import Preset, Trained, train
from bridgekit.fusion.warm_start import joining_order, spread_rows
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.progress import Report, silent

#: Validation looks at this many rows at most, so that it stays a small part of training.
VALIDATION_ROWS = 4_096


def train_encoded(
    encoded: EncodedPairs,
    split: NDArray[np.str_],
    *,
    preset: Preset,
    seed: int = 0,
    fixed: Mapping[str, Adapter] | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    report: Report = silent,
) -> Trained:
    """Train adapters on the `train` rows of an encoded table, choosing the epoch by recall on its `val` rows.

    Arguments:
        encoded: the table with its latents.
        split: (n,) each row's split.
        preset, seed, fixed, device, checkpoint: as for `bridgekit.fusion.training.train`.
        report: progress.

    Raises:
        BridgekitError: the training rows do not join all modalities, or training diverged before its first validation.
    """
    latents, rows = training_rows(encoded, split)
    start = list(fixed or list(rows)[:1])
    lost = set(rows) - {*start, *(name for name, _ in joining_order(start, rows))}
    if lost:
        raise BridgekitError(
            f"no row to train on joins {' or '.join(sorted(lost))} with the other modalities", where=encoded.pairs.source
        )
    score = validation(encoded, split, fixed or ())
    trained = train(
        latents,
        rows,
        torch.from_numpy(encoded.keys[split == "train"]),
        validate=lambda adapters: score(lambda modality, matrix: project(adapters[modality], matrix)),
        preset=preset,
        seed=seed,
        fixed=fixed,
        device=device,
        checkpoint=checkpoint,
        on_epoch=lambda epoch, loss: report("training", epoch, preset.epochs),
    )
    report("training", preset.epochs, preset.epochs)
    return trained


def validation(
    encoded: EncodedPairs, split: NDArray[np.str_], fixed: Collection[str] = ()
) -> Callable[[Embed], dict[str, float]]:
    """A function that measures embeddings on the `val` rows: recalls in all directions, and their mean as `score`.

    Directions between two fixed sides are left out: nothing that is trained changes them.
    """
    rows = np.flatnonzero(split == "val")
    if len(rows) > VALIDATION_ROWS:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:VALIDATION_ROWS])
    measured = [pair for pair in directions(encoded, rows) if not set(pair) <= set(fixed)]
    small = encoded.take(rows)
    everyone = np.arange(len(rows))

    def measure(embed: Embed) -> dict[str, float]:
        names = dict.fromkeys(name for pair in measured for name in pair)
        embedded = {modality: embed(modality, small.latents[modality].matrix) for modality in names}
        recalls = {(query, answer): split_recall(small, embedded, everyone, query, answer) for query, answer in measured}
        figures = {"score": sum(recall.mean for recall in recalls.values()) / max(1, len(recalls))}
        for (query, answer), recall in recalls.items():
            figures |= {f"recall@{k} {query} → {answer}": recall.at[k] for k in (1, 10)}
        return figures

    return measure


def training_rows(encoded: EncodedPairs, split: NDArray[np.str_]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Modality to its latents, (m, d), and modality to the training rows' indices into them, (n,), negative for a hole."""
    latents = {modality: latents.matrix for modality, latents in encoded.latents.items()}
    rows = {modality: torch.from_numpy(ids[split == "train"]) for modality, ids in encoded.ids.items()}
    return latents, rows


def baselines(
    encoded: EncodedPairs,
    split: NDArray[np.str_],
    *,
    preset: Preset,
    seed: int = 0,
    fixed: Mapping[str, Adapter] | None = None,
) -> dict[str, Embed]:
    """What FuseMix is measured against, by name: the adapters before training, and ridge regression on the same rows."""
    latents, rows = spread_rows(*training_rows(encoded, split))
    score = validation(encoded, split, fixed or ())
    return {
        **before_training(latents, rows, preset, seed, fixed),
        "linear": linear(latents, rows, lambda embed: score(embed)["score"], fixed),
    }


def measure(
    bridge: Bridge,
    encoded: EncodedPairs,
    split: NDArray[np.str_],
    *,
    preset: Preset,
    seed: int,
    fixed: Mapping[str, Adapter],
) -> list[dict[str, Any]]:
    """Recall of the baselines and of the bridge on the test splits, as `evaluate_splits` gives it."""
    methods = {**baselines(encoded, split, preset=preset, seed=seed, fixed=fixed), "FuseMix": bridge.project}
    return [record for method, embed in methods.items() for record in evaluate_splits(encoded, split.tolist(), embed, method)]


def measure_gap(bridge: Bridge, encoded: EncodedPairs, split: NDArray[np.str_]) -> Bridge:
    """The bridge with the means of its training embeddings, and how far apart its modalities lie (Liang et al., 2022).

    In the provenance, for each pair of modalities, `modality_gap` is the distance between the two means, and `pair_cosine` the
    mean cosine similarity of the pairs in `val`, if it has some.
    """

    def embed(modality: str, ids: NDArray[np.int64]) -> Tensor:
        return bridge.project(modality, encoded.latents[modality].matrix[torch.from_numpy(ids)])

    means = dict(bridge.means)
    for modality, ids in encoded.ids.items():
        known = np.unique(ids[(split == "train") & (ids >= 0)])
        means.setdefault(modality, embed(modality, known).mean(0))
    gaps = {f"{a}, {b}": round(float((means[a] - means[b]).norm()), 4) for a, b in combinations(means, 2)}
    cosines = dict(bridge.provenance.get("pair_cosine", {}))
    for a, b in combinations(encoded.ids, 2):
        rows = (split == "val") & (encoded.ids[a] >= 0) & (encoded.ids[b] >= 0)
        if rows.any() and f"{a}, {b}" not in cosines:
            together = embed(a, encoded.ids[a][rows]) * embed(b, encoded.ids[b][rows])
            cosines[f"{a}, {b}"] = round(float(together.sum(1).mean()), 4)
    return replace(bridge, means=means, provenance={**bridge.provenance, "modality_gap": gaps, "pair_cosine": cosines})
