"""Shared by the benchmarks: encoding a table once, training, and printing tables."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bridgekit import Pairs, Preset, load_encoder, read_pairs
from bridgekit.evaluation.methods import Validation
from bridgekit.evaluation.recall import Embed
from bridgekit.fusion.adapter import project
from bridgekit.latents.encoded import EncodedPairs, encode_pairs
from bridgekit.progress import progress_bars
from bridgekit.recipes.fit import train_encoded
from bridgekit.tables.splits import split_pairs

#: The recordings are not part of the repository; they are next to it.
ESC10 = Path(__file__).resolve().parents[2] / "shared" / "data" / "esc10"


@cache
def encoded_source(source: str, *encoders: str) -> EncodedPairs:
    """A plugin's table with the latents of the named encoders, cached."""
    opened = [load_encoder(name, "cpu") for name in encoders]
    return encode(read_pairs(source, [encoder.modality for encoder in opened]), *encoders)


def encode(pairs: Pairs, *encoders: str) -> EncodedPairs:
    """A table with the latents of the named encoders."""
    opened = [load_encoder(name, "cpu") for name in encoders]
    with progress_bars() as report:
        return encode_pairs(pairs, {encoder.modality: encoder for encoder in opened}, report)


def random_split(encoded: EncodedPairs, seed: int) -> NDArray[np.str_]:
    """Split 80/10/10 by random seed, ignoring the table's own splits."""
    return np.asarray(split_pairs(replace(encoded.pairs, split=None), seed, encoded.ids))


def fusemix(encoded: EncodedPairs, split: NDArray[np.str_], preset: Preset, seed: int) -> Embed:
    """Train and return the embedding function."""
    trained = train_encoded(encoded, split, preset=preset, seed=seed)
    return lambda modality, matrix: project(trained.adapters[modality], matrix)


def validation(encoded: EncodedPairs, split: NDArray[np.str_]) -> Validation:
    """Measures embeddings on the validation rows."""
    return Validation.of_split(encoded, split)


def without_mixup(preset: Preset) -> Preset:
    """The same preset without mixup."""
    return replace(preset, alpha=0.0)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of fractions, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where() -> str:
    """The machine and package versions."""
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("bridgekit-core", "torch", "scikit-learn", "transformers", "timm")
    )
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}, {packages}"
