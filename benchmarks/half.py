"""Peak memory of training and evaluation with latents in float32 and in half precision: `python benchmarks/half.py`.

200,000 synthetic pairs, with latents of 1,024 numbers on both sides, are stored, read, trained on for one epoch and evaluated,
each time in a process of its own. Figures are above what the process has after its imports. `--baselines` also fits the rows of
`align`'s table besides FuseMix.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bridgekit.evaluation.recall import evaluate_splits
from bridgekit.fusion.adapter import project
from bridgekit.fusion.training import PRESETS
from bridgekit.latents.batches import FLOAT32
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.latents.store import Latents, LatentStore
from bridgekit.pairs import Column, Pairs
from bridgekit.recipes.fit import baselines, train_encoded
from bridgekit.tables.splits import relation_keys

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


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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


def measure(folder: Path, rows: int, half: bool, with_baselines: bool) -> None:
    """Print the peaks after each step, as JSON."""
    before, started = peak(), time.monotonic()
    encoded, split = encoded_table(folder, rows, half)
    found: dict[str, float] = {"read": peak() - before}
    preset = replace(PRESETS["default"], epochs=1)
    trained = train_encoded(encoded, split, preset=preset)
    found["train"] = peak() - before

    def embed(modality: str, matrix: torch.Tensor) -> torch.Tensor:
        return project(trained.adapters[modality], matrix)

    records = evaluate_splits(encoded, split.tolist(), embed, "FuseMix")
    found["evaluate"] = peak() - before
    if with_baselines:
        for method, each in baselines(encoded, split, preset=preset).items():
            evaluate_splits(encoded, split.tolist(), each, method)
        found["baselines"] = peak() - before
    print(json.dumps({**found, "seconds": time.monotonic() - started, "recall@1": records[0]["recall@1"]}))


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "PRECISION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, precision = options.measure
        measure(Path(folder), options.rows, precision == "half", options.baselines)
        return
    with tempfile.TemporaryDirectory() as folder:
        store(Path(folder), options.rows)
        for precision in ("float32", "half"):
            command = [sys.executable, __file__, "--rows", str(options.rows), "--measure", folder, precision]
            command += ["--baselines"] if options.baselines else []
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
            found = json.loads(done.stdout)
            steps = ", ".join(f"{step} {found[step] / 1e9:.2f} GB" for step in found if step not in ("seconds", "recall@1"))
            print(f"{precision}: peak after {steps}; recall@1 {found['recall@1']:.4f}; {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
