"""Selecting training pairs: lazy compared with fast greedy k-DPP, and training on k-DPP compared with uniform subsets.

python benchmarks/subsets.py
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from bridgekit_subset.k_dpp import choose_subset, greedy_k_dpp
from common import encoded_source, fusemix, random_split, spread, table
from numpy.typing import NDArray
from processes import can_measure_memory, peak_memory

from bridgekit import PRESETS
from bridgekit.evaluation.recall import evaluate_splits

WIDTH = 384
#: The number of items, and how many are selected.
LARGE, SMALL = (200_000, 5_000), (20_000, 1_000)
#: Alternating runs of each method at the smaller size.
ROUNDS = 3
SEEDS = range(5)
SHARES = (0.1, 0.25, 0.5)

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Choice:
    """A method's selection.

    Arguments:
        items: (k,) in order.
        gains: (k,), whose logarithms sum to the log-determinant.
        evaluations: number of gains computed, excluding the initial ones.
    """

    items: NDArray[np.int64]
    gains: NDArray[np.float64]
    evaluations: int


def latents(n: int) -> Matrix:
    """Synthetic clusters: n / 100 random centres, and noise of half their standard deviation."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((n // 100, WIDTH), dtype=np.float32)
    x: Matrix = centres[rng.integers(0, len(centres), n)]
    for rows in np.array_split(x, n // 1_000):
        rows += 0.5 * rng.standard_normal(rows.shape, dtype=np.float32)
    return x


def lazy(x: Matrix, k: int) -> Choice:
    """Bridgekit's method."""
    found = greedy_k_dpp(x, k)
    return Choice(found.items, found.gains, found.evaluations)


def plain(x: Matrix, k: int) -> Choice:
    """Fast greedy MAP inference as in Chen et al. (2018): a row of the Cholesky factor for every item, in float64."""
    n = len(x)
    unit = x.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    rows = np.zeros((k, n))
    gains, chosen, taken = np.full(n, 4.0), np.empty(k, np.int64), np.empty(k)
    for step in range(k):
        best = int(gains.argmax())
        chosen[step], taken[step] = best, gains[best]
        kernel = (unit @ unit[best] + 1) ** 2
        column = (kernel - rows[:step, best] @ rows[:step]) / np.sqrt(gains[best])
        rows[step] = column
        gains -= column**2
        gains[best] = -np.inf
    return Choice(chosen, taken, n * k)


WAYS: dict[str, Callable[[Matrix, int], Choice]] = {"lazy": lazy, "plain": plain}


def log_determinant(x: Matrix, items: NDArray[np.int64]) -> float:
    """Log-determinant of the items' kernel matrix."""
    unit = x[items].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return float(np.linalg.slogdet((unit @ unit.T + 1) ** 2)[1])


def measure(way: str, n: int, k: int) -> None:
    """Run one method in this process and print its result and cost."""
    x = latents(n)
    WAYS[way](x[:2_000], 20)
    started, worked = time.perf_counter(), time.process_time()
    found = WAYS[way](x, k)
    figures = {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - worked,
        "bytes": peak_memory(),
        "evaluations": found.evaluations,
        "items": hashlib.sha256(found.items.tobytes()).hexdigest(),
        "log_det": float(np.log(found.gains).sum()),
        "uniform": log_determinant(x, choose_subset(x, k, method="uniform")),
    }
    print(json.dumps(figures))


def in_a_process(way: str, n: int, k: int, threads: int | None = None) -> dict[str, float]:
    """Run `measure` in a separate process, with this many threads."""
    command = [sys.executable, __file__, way, str(n), str(k)]
    environment = os.environ if threads is None else {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def speed() -> str:
    """Compare both methods; return the table."""
    runs: dict[tuple[str, tuple[int, int]], list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        runs.setdefault(("lazy", SMALL), []).append(in_a_process("lazy", *SMALL))
        runs.setdefault(("plain", SMALL), []).append(in_a_process("plain", *SMALL))
        runs.setdefault(("plain, one thread", SMALL), []).append(in_a_process("plain", *SMALL, threads=1))
    runs["lazy", LARGE] = [in_a_process("lazy", *LARGE)]
    rounds = list(zip(*(measured for (_, size), measured in runs.items() if size == SMALL), strict=True))
    ratio = statistics.median(min(each["seconds"] for each in others) / own["seconds"] for own, *others in rounds)
    less = statistics.median(min(each["bytes"] for each in others) / own["bytes"] for own, *others in rounds)
    same = len({run["items"] for each in rounds for run in each}) == 1
    rows = []
    for (way, (n, k)), measured in runs.items():
        rows.append(
            [
                f"{k:,} of {n:,}",
                way,
                f"{statistics.median(run['seconds'] for run in measured):,.1f} s",
                f"{statistics.median(run['cpu'] for run in measured):,.1f} s",
                f"{max(run['bytes'] for run in measured) / 2**30:.2f} GiB",
                f"{measured[0]['evaluations'] / n:,.1f}",
                f"{measured[0]['log_det']:,.0f}",
                f"{measured[0]['uniform']:,.0f}",
            ]
        )
    notes = (
        f"Synthetic latents (seed 0, {WIDTH} dimensions): n / 100 random centres, and noise of half their spread. Each run in "
        "its own process; memory is all that it used, including the latents and Python. At the smaller size, medians of "
        f"{ROUNDS} alternating runs. `lazy` is bridgekit's; `plain` is fast greedy as in Chen et al. (2018), in float64, "
        f"which computes every gain at every step and would need {8 * LARGE[0] * LARGE[1] / 2**30:.1f} GiB at the larger "
        f"size. Lazy is {ratio:.1f} times as fast as the faster of the plain runs, with {less:.1f} times less memory, and "
        f"selects {'the same items in the same order' if same else 'OTHER ITEMS'}. Log-determinants are of the kernel (cosine "
        "+ 1)²."
    )
    head = ["selected", "method", "time", "CPU time", "peak memory", "gains per item", "log-det, k-DPP", "log-det, uniform"]
    return notes + "\n\n" + table(head, rows)


def training() -> str:
    """Train on subsets of the starter's images; return the table."""
    encoded = encoded_source("starter:openmoji", "starter:image", "starter:text")
    preset = PRESETS["default"]
    figures: dict[tuple[str, str], list[list[float]]] = {}
    count = 0
    for seed in SEEDS:
        split = random_split(encoded, seed)
        train = np.random.default_rng(seed).permutation(np.flatnonzero(split == "train"))
        count = len(train)
        for share in (*SHARES, 1.0):
            k = round(share * len(train))
            ways = {"uniform": train[:k]}
            if share < 1:
                for modality in ("text", "image"):
                    matrix = encoded.latents[modality].matrix[encoded.ids[modality][train]]
                    ways[f"k-DPP on {modality}"] = train[choose_subset(matrix, k)]
            for way, chosen in ways.items():
                thinned = np.where(split == "train", "unused", split)
                thinned[chosen] = "train"
                embed = fusemix(encoded, thinned, preset, seed)
                records = evaluate_splits(encoded, thinned.tolist(), embed, way, ["test"])
                recalls = [record[f"recall@{at}"] for record in records if record["among"] == "split" for at in (1, 5, 10)]
                key = (f"{k:,} ({share:.0%})", way if share < 1 else "all")
                figures.setdefault(key, []).append([*recalls, statistics.mean(recalls)])
    rows = []
    for (rows_used, way), measured in figures.items():
        uniform = figures.get((rows_used, "uniform"), measured)
        differences = [100 * (a[-1] - b[-1]) for a, b in zip(measured, uniform, strict=True)]
        against = (
            f"{statistics.mean(differences):+.1f} ± {statistics.stdev(differences):.1f}" if uniform is not measured else ""
        )
        rows.append([rows_used, way, *(spread(column) for column in zip(*measured, strict=True)), against])
    notes = (
        f"`starter:openmoji`, FuseMix trained on subsets of {count:,} rows, {len(SEEDS)} splits and seeds; recall of held-out "
        "emoji among each other in %, mean ± standard deviation. The last column is the difference from the uniform subset "
        "of the same split and seed."
    )
    head = ["rows", "selected by", *(f"{way} @{k}" for way in ("image → text", "text → image") for k in (1, 5, 10))]
    return notes + "\n\n" + table([*head, "mean of the six", "minus uniform"], rows)


def main() -> str:
    """Measure and train; return both tables."""
    if not can_measure_memory():
        return "Not measured: peak memory needs Linux."
    return speed() + "\n\n" + training()


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        print(main())
