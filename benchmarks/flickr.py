"""Fits on Flickr8k for benchmarks/studies.py: which pairs, training, and recall, kept in the cache folder."""

from __future__ import annotations

import csv
import hashlib
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bridgekit_subset.k_dpp import choose_subset
from common import ESC10, encode
from numpy.typing import NDArray
from torch import nn

from bridgekit import Pairs, Preset
from bridgekit.evaluation.recall import evaluate_splits
from bridgekit.fusion import training
from bridgekit.fusion.adapter import FusionAdapter, project
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.recipes.fit import train_encoded
from bridgekit.storage.cache import cache_folder
from bridgekit.tables.splits import relation_keys

#: The photographs are not part of the repository; they are next to it.
FLICKR = ESC10.with_name("flickr8k-train")
#: Photographs to test and as many to validate; photographs to train, and their captions.
HELD_OUT, PHOTOGRAPHS, CAPTIONS = 300, 2_400, 12_000


@dataclass(frozen=True)
class Fit:
    """What is trained, and on which pairs.

    Arguments:
        preset: hyperparameters.
        pairs: number of training pairs.
        subset: how they are chosen: `uniform`: random photographs, with further captions only once all photographs have one;
            `captions`: all five captions of random photographs; `image` or `text`: a k-DPP on these latents.
        wrong: share of the pairs whose captions are exchanged among them.
        noise: Gaussian noise on the latents, in standard deviations of each dimension.
    """

    preset: Preset
    pairs: int = PHOTOGRAPHS
    subset: str = "uniform"
    wrong: float = 0.0
    noise: float = 0.0


@cache
def flickr() -> EncodedPairs:
    """Every caption with its photograph, and their latents."""
    with (FLICKR / "captions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {"image": tuple(FLICKR / row["image"] for row in rows), "text": tuple(row["text"] for row in rows)}
    return encode(Pairs(columns, "Flickr8k", tuple(range(len(rows)))), "starter:image-last", "starter:text")


def chosen(encoded: EncodedPairs, rows: NDArray[np.int64], fit: Fit) -> NDArray[np.int64]:
    """The training rows of a fit, from those of each training photograph, (photographs, 5)."""
    if fit.subset in encoded.ids:
        own = rows[:, 0]
        return own[choose_subset(encoded.latents[fit.subset].matrix[encoded.ids[fit.subset][own]], fit.pairs)]
    return (rows if fit.subset == "captions" else rows.T).reshape(-1)[: fit.pairs]


def with_wrong_captions(encoded: EncodedPairs, rows: NDArray[np.int64]) -> EncodedPairs:
    """The table with the captions of these rows each moved to the next of them."""
    text = encoded.ids["text"].copy()
    text[rows] = np.roll(text[rows], 1)
    ids = {**encoded.ids, "text": text}
    return replace(encoded, ids=ids, keys=relation_keys(encoded.pairs, ids))


@contextmanager
def gaussian_noise(scale: float) -> Iterator[None]:
    """Within this context, adapters in training add noise to their latents: `scale` deviations of each dimension in a batch."""

    def add(module: nn.Module, inputs: Any) -> Any:
        if scale and module.training and isinstance(module, FusionAdapter):
            return (inputs[0] + scale * inputs[0].std(0) * torch.randn_like(inputs[0]),)
        return None

    hook = nn.modules.module.register_module_forward_pre_hook(add)
    try:
        yield
    finally:
        hook.remove()


def measure(fit: Fit, seed: int) -> dict[str, float]:
    """Split, train, and return the mean of the six recalls on the test photographs, the best epoch and the seconds."""
    started, encoded, rng = time.monotonic(), flickr(), np.random.default_rng(seed)
    rows = np.argsort(encoded.ids["image"], kind="stable").reshape(-1, 5)  # of each photograph
    rows = rng.permuted(rng.permutation(rows), axis=1)
    test, val, own = rows[:HELD_OUT, 0], rows[HELD_OUT : 2 * HELD_OUT, 0], chosen(encoded, rows[2 * HELD_OUT :], fit)
    split = np.full(len(encoded.pairs), "unused")
    split[val], split[own] = "val", "train"
    noisy = with_wrong_captions(encoded, own[: round(fit.wrong * fit.pairs)])
    with gaussian_noise(fit.noise):
        adapters = train_encoded(noisy, split, preset=fit.preset, seed=seed).adapters
    held_out = ["test"] * HELD_OUT
    records = evaluate_splits(encoded.take(test), held_out, lambda name, matrix: project(adapters[name], matrix), "FuseMix")
    recall = statistics.mean(record[f"recall@{k}"] for record in records for k in (1, 5, 10))
    return {"recall": recall, "seconds": time.monotonic() - started}


class Results:
    """The recalls of fits, kept in a file of JSON lines."""

    def __init__(self) -> None:
        self.path = cache_folder() / "studies.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.known: dict[str, dict[str, Any]] = {line["key"]: line for line in map(json.loads, lines)}
        self.seconds: dict[str, float] = {}
        sources = b"".join(path.read_bytes() for path in sorted(Path(training.__file__).parent.glob("*.py")))
        self.depends = [hashlib.sha256(sources).hexdigest(), *(latents.fingerprint for latents in flickr().latents.values())]

    def recall(self, fit: Fit, seed: int) -> float:
        """The recall of a fit; it is trained if that is not known."""
        settings = {**asdict(fit), "seed": seed}
        key = hashlib.sha256(json.dumps([settings, self.depends]).encode()).hexdigest()[:32]
        if key not in self.known:
            self.known[key] = {"key": key, **measure(fit, seed), **settings}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.known[key]) + "\n")
        self.seconds[key] = self.known[key]["seconds"]
        return float(self.known[key]["recall"])

    def recalls(self, fit: Fit, seeds: int) -> list[float]:
        """The recalls of a fit with the first seeds."""
        return [self.recall(fit, seed) for seed in range(seeds)]
