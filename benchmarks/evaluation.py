"""Computing recall: ranks counted in tiles, compared with sorting each row of the similarity matrix.

python benchmarks/evaluation.py
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import table
from processes import can_measure_memory, in_process, report
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit.retrieval import recall, relevance

SIZES, WIDTH = (5_000, 20_000), 512
#: Alternating runs of each method.
ROUNDS = 3
#: Cosine similarity of the correct candidate. Among 20,000 it ranks first for about half of the queries.
COSINE = 0.18


def tiled(x: Tensor, y: Tensor) -> dict[str, float]:
    """Bridgekit's recall."""
    rows = np.arange(len(x))
    return recall(x, y, relevance(rows, rows)).as_json()


def sorting(x: Tensor, y: Tensor) -> dict[str, float]:
    """open_clip's `get_clip_metrics`, in one direction."""
    ranking = torch.argsort(x @ y.T, descending=True)
    ranks = 1 + torch.where(ranking == torch.arange(len(x))[:, None])[1]
    recalls = {f"recall@{k}": round(float((ranks <= k).float().mean()), 6) for k in (1, 5, 10)}
    return {"queries": len(x), "candidates": len(y), **recalls, "median_rank": float(ranks.double().quantile(0.5))}


WAYS: dict[str, Callable[[Tensor, Tensor], dict[str, float]]] = {"tiled": tiled, "sorting": sorting}


def measure(way: str, n: int) -> None:
    """Run one method in this process."""
    torch.manual_seed(0)
    y = normalize(torch.randn(n, WIDTH), dim=1)
    x = normalize(COSINE * y + (1 - COSINE**2) ** 0.5 * normalize(torch.randn(n, WIDTH), dim=1), dim=1)
    WAYS[way](x[:256], y[:256])
    report(lambda: {"figures": WAYS[way](x, y)})


def main() -> str:
    """Measure each method in separate processes; return the table."""
    if not can_measure_memory():
        return "Not measured: peak memory needs Linux."
    rows = []
    for n in SIZES:
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(ROUNDS):
            for way in WAYS:
                runs[way].append(in_process(__file__, way, n))
        seconds = {way: statistics.median(run["seconds"] for run in runs[way]) for way in WAYS}
        held = {way: max(run["bytes"] for run in runs[way]) / 2**20 for way in WAYS}
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(runs["tiled"], runs["sorting"], strict=True))
        figures = [run["figures"] for way in WAYS for run in runs[way]]
        equal = "equal" if all(each == figures[0] for each in figures) else f"unequal: {figures}"
        cells = [f"{seconds[way]:.2f} s, {held[way]:,.0f} MiB" for way in WAYS]
        rows.append([f"{n:,}", *cells, f"{ratio:.1f}", f"{held['sorting'] / held['tiled']:.0f}", equal])
    notes = (
        f"n queries among n candidates, d = {WIDTH}, float32; medians of {ROUNDS} alternating runs, each in its own process. "
        "Memory is the peak in addition to the embeddings. Results are recall@1, @5, @10 and the median rank."
    )
    head = ["n", "bridgekit", "sorting each row", "speed-up", "memory ratio", "results"]
    return notes + "\n\n" + table(head, rows)


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        print(main())
