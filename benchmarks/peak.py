"""The loss and an adapter's training step as a fraction of the machine's fastest matrix product.

python benchmarks/peak.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from common import table
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from bridgekit import PRESETS
from bridgekit.fusion.adapter import FusionAdapter
from bridgekit.fusion.contrastive import info_nce
from bridgekit.hardware import fast_products

SIDES = (1_024, 2_048, 4_096)
#: Alternating rounds. The best is reported, because other processes can only slow it down.
ROUNDS = 3
N, WIDTH = 16_384, 512
ROWS, LATENTS = 2_048, 1_024
#: Number format and context of each mode.
MODES: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[None]]]] = {
    "float32": (torch.float32, nullcontext),
    "float32, fast products": (torch.float32, fast_products),
    "bfloat16": (torch.bfloat16, nullcontext),
}


@dataclass(frozen=True)
class Task:
    """A timed function and its number of floating-point operations."""

    run: Callable[[], object]
    operations: float


def product(dtype: torch.dtype, side: int) -> Task:
    """A product of two square matrices."""
    a, b, out = torch.randn(3, side, side).to(dtype).unbind()
    return Task(lambda: torch.mm(a, b, out=out), 2.0 * side**3)


def loss(dtype: torch.dtype) -> Task:
    """InfoNCE forward and backward: four matrix products (the similarities twice, the gradients of x and y)."""
    x, y = (normalize(torch.randn(N, WIDTH), dim=1).to(dtype).requires_grad_() for _ in range(2))
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    return Task(lambda: torch.autograd.grad(info_nce(x, y, scale), (x, y, scale)), 4 * 2.0 * N**2 * WIDTH)


def adapter(dtype: torch.dtype) -> Task:
    """A training step of the paper's adapter: float32 weights, autocast for bfloat16."""
    preset = PRESETS["paper"]
    model = FusionAdapter(LATENTS, preset.shared_dim, preset.blocks, preset.expansion, preset.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.lr, fused=True)
    latents, upstream = torch.randn(ROWS, LATENTS), torch.randn(ROWS, preset.shared_dim) / ROWS

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            embedded = normalize(model(latents).float(), dim=-1)
        embedded.backward(upstream)  # type: ignore[no-untyped-call]
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step()
    return Task(step, float(counter.get_total_flops()))


def main() -> str:
    """Measure; return the table."""
    torch.manual_seed(0)
    tasks = {
        mode: {
            **{f"product, {side:,} a side": product(dtype, side) for side in SIDES},
            f"InfoNCE, n = {N:,}, d = {WIDTH}": loss(dtype),
            f"adapter step, {ROWS:,} rows": adapter(dtype),
        }
        for mode, (dtype, _) in MODES.items()
    }
    best: dict[tuple[str, str], float] = {}
    for _ in range(ROUNDS):
        for mode, (_, context) in MODES.items():
            for name, task in tasks[mode].items():
                with context():
                    started = time.perf_counter()
                    task.run()
                    taken = time.perf_counter() - started
                best[mode, name] = min(taken, best.get((mode, name), taken))
    rates = {(mode, name): tasks[mode][name].operations / seconds / 1e9 for (mode, name), seconds in best.items()}
    peaks: dict[torch.dtype, float] = {}
    for (mode, name), rate in rates.items():
        if name.startswith("product"):
            peaks[MODES[mode][0]] = max(rate, peaks.get(MODES[mode][0], 0.0))
    rows = [
        [
            mode,
            name,
            f"{1000 * seconds:,.0f} ms",
            f"{rates[mode, name]:,.0f}",
            f"{rates[mode, name] / peaks[MODES[mode][0]]:.0%}",
        ]
        for (mode, name), seconds in best.items()
    ]
    notes = (
        f"Best of {ROUNDS} alternating rounds, {torch.get_num_threads()} threads. The peak is the fastest product in a number "
        "format. Training uses `fast products` for the loss (float32 matrices multiplied by oneDNN, in bfloat16 on CPUs with "
        "AMX) and bfloat16 for the adapters. Operations counted: for the loss, four products of 2 n² d each; for a step of "
        f"the `paper` preset's adapter (latents of {LATENTS:,} dimensions), the count of torch's FlopCounterMode, which "
        "excludes dropout, norms and AdamW."
    )
    return notes + "\n\n" + table(["format", "what", "time", "GFLOP/s", "of peak"], rows)


if __name__ == "__main__":
    print(main())
