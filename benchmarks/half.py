"""Latents in half precision: peak memory of training and evaluation, and recall, beside float32."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import encoded_source, fusemix, random_split, table
from numpy.typing import NDArray
from processes import can_measure_memory, in_process, peak_memory, report

from bridgekit.evaluation.recall import evaluate_splits
from bridgekit.fusion.adapter import project
from bridgekit.fusion.training import PRESETS
from bridgekit.hardware import HALF
from bridgekit.latents.batches import FLOAT32
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.latents.store import Latents, LatentStore
from bridgekit.pairs import Column, Pairs
from bridgekit.recipes.fit import train_encoded
from bridgekit.tables.splits import relation_keys

ROWS = 200_000
SEEDS = 3
WIDTHS = {"image": 1_024, "text": 1_024}


def contents(rows: int) -> Sequence[bytes]:
    """A content hash for each row."""
    return [number.to_bytes(32, "big") for number in range(rows)]


def store(folder: Path, rows: int) -> None:
    """Latents that are different views of the same 64 random numbers, around a mean, as encoders give them."""
    generator = torch.Generator().manual_seed(0)
    views = {name: torch.randn(64, width, generator=generator) for name, width in WIDTHS.items()}
    stores = {name: LatentStore(f"synthetic:{name}", width, folder) for name, width in WIDTHS.items()}
    for start in range(0, rows, 20_000):
        digests = contents(rows)[start : start + 20_000]
        meaning = torch.randn(len(digests), 64, generator=generator)
        for name, view in views.items():
            noise = torch.randn(len(digests), WIDTHS[name], generator=generator)
            stores[name].write(digests, 4 + meaning @ view / 8 + noise)


def encoded_table(folder: Path, rows: int, half: bool) -> tuple[EncodedPairs, NDArray[np.str_]]:
    """The stored latents as a table, with a split."""
    latents, ids = {}, {}
    for name, width in WIDTHS.items():
        own = LatentStore(f"synthetic:{name}", width, folder)
        matrix = own.read(contents(rows), half)
        latents[name] = Latents(matrix, np.arange(rows), {}, 0, name, FLOAT32, 0.0, own.folder, contents(rows))
        ids[name] = np.arange(rows)
    pairs = Pairs({name: Column(range(rows), np.arange(rows), make=str) for name in WIDTHS}, "synthetic", range(rows))
    split = np.where(np.arange(rows) % 100 == 0, "test", np.where(np.arange(rows) % 100 == 1, "val", "train"))
    return EncodedPairs(pairs, latents, ids, relation_keys(pairs, ids)), split


def measured(folder: Path, rows: int, half: bool) -> dict[str, Any]:
    """Read the latents, train for an epoch and evaluate; the peaks after each of the first two steps."""
    before = peak_memory()
    encoded, split = encoded_table(folder, rows, half)
    read = peak_memory() - before
    trained = train_encoded(encoded, split, preset=replace(PRESETS["default"], epochs=1))
    found = {"read": read, "train": peak_memory() - before}
    evaluate_splits(encoded, split.tolist(), lambda name, matrix: project(trained.adapters[name], matrix), "FuseMix")
    return found


def memory(rows: int) -> str:
    """The table of peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        store(Path(folder), rows)
        found = {which: in_process(__file__, which, folder, rows) for which in ("float32", "float16")}
    lines = [
        [which, *(f"{each[step] / 1e9:.2f}" for step in ("read", "train", "bytes")), f"{each['seconds']:.0f} s"]
        for which, each in found.items()
    ]
    lines.append(
        ["ratio", *(f"{found['float32'][step] / found['float16'][step]:.2f}" for step in ("read", "train", "bytes")), ""]
    )
    widths = " and ".join(map(str, WIDTHS.values()))
    text = f"{rows:,} synthetic pairs, latents of {widths} numbers, one epoch of the `default` preset. "
    text += "Peaks in GB, above what the process has after its imports; without the baselines of `align`'s table."
    return f"{text}\n\n{table(['latents', 'read', 'and trained', 'and evaluated', 'time'], lines)}"


def recalls() -> str:
    """The table of recalls on a real table."""
    whole = encoded_source("starter:openmoji", "starter:image", "starter:text")
    latents = {name: replace(each, matrix=each.matrix.to(HALF)) for name, each in whole.latents.items()}
    lines = []
    for which, encoded in (("float32", whole), ("float16", replace(whole, latents=latents))):
        scores: dict[str, list[float]] = {}
        for seed in range(SEEDS):
            split = random_split(encoded, seed)
            embed = fusemix(encoded, split, PRESETS["default"], seed)
            for record in evaluate_splits(encoded, split.tolist(), embed, which):
                if record["among"] == "split":
                    scores.setdefault(record["direction"], []).append(100 * record["recall@10"])
        lines += [
            [which, direction, *(f"{score:.1f}" for score in found), f"{np.mean(found):.1f}"]
            for direction, found in scores.items()
        ]
    head = ["latents", "direction", *(f"seed {seed}" for seed in range(SEEDS)), "mean"]
    return f"Recall@10 in % on `starter:openmoji`, `default` preset.\n\n{table(head, lines)}"


def main(rows: int = ROWS) -> str:
    """Both tables."""
    return f"{memory(rows) if can_measure_memory() else 'No memory: this system does not report it.'}\n\n{recalls()}"


if __name__ == "__main__":
    if sys.argv[1:2] in (["float32"], ["float16"]):
        report(lambda: measured(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[1] == "float16"))
    else:
        print(main(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS))
