"""Symmetric InfoNCE, forward and backward: time and memory compared with open_clip and sentence-transformers.

python benchmarks/loss.py
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import table
from processes import in_process, report
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit.fusion.contrastive import info_nce
from bridgekit.hardware import fast_products

WIDTH = 512
SIZES = (1_024, 4_096, 16_384, 65_536)
#: The largest n per method. Above it, ClipLoss does not fit into memory, and the others take minutes.
MOST = {"ClipLoss": 16_384, "Cached": 65_536, "bridgekit": 16_384, "bridgekit, fast products": 131_072}
#: Sizes up to REPEATED are run ROUNDS times, alternating; larger ones once.
REPEATED, ROUNDS = 16_384, 2


def embeddings(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """n similar pairs of unit vectors, and a scale of 1 / 0.07."""
    generator = torch.Generator().manual_seed(0)
    x = normalize(torch.randn(n, WIDTH, generator=generator), dim=1)
    y = normalize(0.5 * x + 0.5 * normalize(torch.randn(n, WIDTH, generator=generator), dim=1), dim=1)
    return x.requires_grad_(), y.requires_grad_(), torch.tensor(1 / 0.07, requires_grad=True)


def clip_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """open_clip's loss."""
    from open_clip.loss import ClipLoss

    loss: Tensor = ClipLoss()(x, y, scale)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def cached(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """sentence-transformers' loss in both directions, 1,024 rows at a time (the default, 32, is slower); its scale is fixed."""
    from sentence_transformers import losses

    loss = losses.CachedMultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()),
        scale=float(scale),
        mini_batch_size=1_024,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    parts = [[part.detach().requires_grad_() for part in side.split(1_024)] for side in (x, y)]  # type: ignore[no-untyped-call]
    found: Tensor = loss.calculate_loss(parts, with_backward=True)
    x.grad, y.grad = (torch.cat([part.grad for part in side]) for side in parts)
    return found


def ours(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Bridgekit's loss."""
    loss = info_nce(x, y, scale)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def ours_fast(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Bridgekit's loss as `train` runs it."""
    with fast_products():
        return ours(x, y, scale)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bridgekit": ours,
    "bridgekit, fast products": ours_fast,
    "ClipLoss": clip_loss,
    "Cached": cached,
}


def measure(way: str, n: int) -> None:
    """One forward and backward pass in this process."""
    WAYS[way](*embeddings(256))
    inputs = embeddings(n)

    def work() -> dict[str, Any]:
        loss = WAYS[way](*inputs)
        return {"loss": float(loss.detach()), "gradient": float(inputs[0].grad.norm())}  # type: ignore[union-attr]

    report(work)


def main() -> str:
    """Measure each method at each size in separate processes; return the table."""
    rows = []
    for n in (*SIZES, MOST["bridgekit, fast products"]):
        ways = [way for way in WAYS if n <= MOST[way]]
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(ROUNDS if n <= REPEATED else 1):
            for way in ways:
                runs[way].append(in_process(__file__, way, n))
        for way in ways:
            seconds = statistics.median(run["seconds"] for run in runs[way])
            held = max(run["bytes"] for run in runs[way])
            ratios = ["", ""]
            if "ClipLoss" in runs:
                peer = runs["ClipLoss"]
                ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs[way], peer, strict=True))
                ratios = [f"{ratio:.2f}", f"{held / max(run['bytes'] for run in peer):.3f}"]
            flops = 4 * 2 * n * n * WIDTH / seconds / 1e9
            first = runs[way][0]
            figures = [f"{seconds:.3g} s", f"{held / 2**20:,.0f} MiB", *ratios, f"{flops:,.0f}"]
            rows.append([f"{n:,}", way, *figures, f"{first['loss']:.6f}", f"{first['gradient']:.6f}"])
    notes = (
        f"d = {WIDTH}, float32 inputs, temperature 0.07; each run in its own process, medians of {ROUNDS} alternating runs up "
        f"to n = {REPEATED:,} and single runs above. Memory is the peak in addition to the embeddings, including gradients. "
        "GFLOP/s counts the four matrix products needed. `Cached` is sentence-transformers' "
        "CachedMultipleNegativesRankingLoss. It normalises its inputs again, so its gradient has no component along them; "
        f"its value is the same. ClipLoss is not run above n = {MOST['ClipLoss']:,}: its memory grows with n², to 65 GiB at "
        "65,536.\n\n"
    )
    head = ["n", "loss", "time", "memory", "time / ClipLoss", "memory / ClipLoss", "GFLOP/s", "value", "norm of x's gradient"]
    return notes + table(head, rows)


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        print(main())
