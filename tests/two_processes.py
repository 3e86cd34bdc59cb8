"""What tests/test_distributed.py does in two processes, and in its own to compare: torchrun tests/two_processes.py FOLDER.

The folder has a table `pairs.csv`; into it come `results.safetensors` and a bridge.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit.fusion import pieces
from bridgekit.fusion.contrastive import info_nce
from bridgekit.fusion.distributed import Shares, joined_processes, rank, sum_over_processes, world_size
from bridgekit.fusion.training import train
from bridgekit.recipes.align import AlignOptions, run_alignment
from tests.test_align import QUICK
from tests.test_training import SMALL, two_views
from tests.toys import ToyPlugin, install

#: So that even these batches are cut.
SMALLEST_PIECE = 8


def losses() -> dict[str, Tensor]:
    """InfoNCE and its gradients with uneven shares: plain, at a scale too large for plain exponentials, with groups."""
    found = {}
    for name, scale, grouped in (("plain", 14.0, False), ("sharp", 900.0, False), ("groups", 14.0, True)):
        generator = torch.Generator().manual_seed(7)
        x, y = (normalize(torch.randn(53, 6, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
        keys = torch.randint(-1, 9, (53, 2, 2), generator=generator) if grouped else None
        counts = [53] if world_size() == 1 else [20, 33]
        shares = Shares(counts, rank())
        mine = slice(shares.first, shares.first + counts[rank()])
        own = x[mine].clone().requires_grad_(), y[mine].clone().requires_grad_()
        temperature = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        loss = info_nce(*own, temperature, keys, tile=16, shares=shares if world_size() > 1 else None)
        loss.backward()
        found[f"{name}/loss"] = loss.detach()
        for side, part in zip("xy", own, strict=True):
            whole = torch.zeros(53, 6, dtype=torch.float64)
            whole[mine] = part.grad
            found[f"{name}/{side}"] = sum_over_processes(whole) if world_size() > 1 else whole
        assert temperature.grad is not None
        found[f"{name}/scale"] = sum_over_processes(temperature.grad) if world_size() > 1 else temperature.grad
    return found


def adapters() -> dict[str, Tensor]:
    """Trained with dropout, whole and in pieces that are embedded twice, and with a third side that many rows lack."""
    found = {}
    for name in ("whole", "again", "holes"):
        latents = two_views()
        rows = {side: torch.arange(200) for side in latents}
        if name == "holes":
            latents["c"] = latents["a"][:, :9] * 2
            rows["c"] = torch.where(torch.arange(200) % 3 == 0, torch.arange(200), -1)
            rows["a"] = torch.where(torch.arange(200) % 3 == 1, -1, torch.arange(200))
            rows["b"] = torch.where(torch.arange(200) % 3 == 2, rows["b"], torch.arange(200))
            rows["c"][1::3] = torch.arange(1, 200, 3)
        epochs = count()  # the later, the better: the last one's adapters are kept
        pieces.CPU_ROOM = 1 << (29 if name != "again" else 14)
        trained = train(
            latents,
            rows,
            torch.arange(200)[:, None] // 2,
            validate=lambda adapters, epochs=epochs: {"score": float(next(epochs))},  # type: ignore[misc]
            preset=replace(SMALL, epochs=5, dropout=0.3, input_dropout=0.1, pairing="permutation"),
        )
        found |= {
            f"{name}/{side}/{key}": value
            for side, adapter in trained.adapters.items()
            for key, value in adapter.state_dict().items()
        }
        found[f"{name}/losses"] = torch.tensor([record["loss"] for record in trained.history])
    return found


def results() -> dict[str, Tensor]:
    """All of the above."""
    return {name: tensor.contiguous() for name, tensor in {**losses(), **adapters()}.items()}


def bridge(table: Path, out: Path) -> Path:
    """A bridge of toys, which the same call afterwards finds finished."""
    options = AlignOptions(pairs=table, out=out, preset=QUICK, progress=False, write_report=False)
    assert "FuseMix" in {record["method"] for record in run_alignment(options).bridge.metrics}
    assert run_alignment(options).reused
    return out


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    patch = pytest.MonkeyPatch()
    install(patch, ToyPlugin())
    patch.setattr("bridgekit.report.plots._png", lambda figure: b"not rendered")
    with joined_processes():
        pieces.SMALLEST_PIECE, smallest = SMALLEST_PIECE, pieces.SMALLEST_PIECE
        found = results()
        if rank() == 0:
            save_file(found, folder / "results.safetensors")
        pieces.SMALLEST_PIECE = smallest
        bridge(folder / "pairs.csv", folder / "bridge")
