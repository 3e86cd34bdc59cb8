"""Two processes give the loss, the gradients and the adapters of one, and one bridge."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bridgekit.fusion import pieces
from bridgekit.fusion.distributed import broadcast_from_first, rank, world_size
from tests import two_processes
from tests.test_align import adapters
from tests.toys import tone_table

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes that `torchrun` started make: see `tests/two_processes.py`."""
    folder = tmp_path_factory.mktemp("together")
    tone_table(folder)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "BRIDGEKIT_HOME": str(folder / "home"),
        "BRIDGEKIT_PRECISION": "float32",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, "tests/two_processes.py", str(folder)], env=environment, cwd=ROOT, check=True, timeout=600)
    return folder


def test_a_single_process_is_rank_zero_of_one() -> None:
    assert (world_size(), rank(), broadcast_from_first("word")) == (1, 0, "word")


def test_two_processes_give_the_loss_the_gradients_and_the_adapters_of_one(
    together: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGEKIT_PRECISION", "float32")
    for name, value in (("SMALLEST_PIECE", two_processes.SMALLEST_PIECE), ("CPU_ROOM", pieces.CPU_ROOM)):
        monkeypatch.setattr(pieces, name, value)
    alone, shared = two_processes.results(), load_file(together / "results.safetensors")
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        assert tensor.isfinite().all(), name
        tolerance = 1e-10 if tensor.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(
            shared[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda why, name=name: f"{name}: {why}"
        )  # type: ignore[misc]


@pytest.mark.usefixtures("toy")
def test_two_processes_make_one_bridge_which_is_that_of_one(together: Path, tmp_path: Path) -> None:
    alone = two_processes.bridge(together / "pairs.csv", tmp_path / "bridge")
    # One process cuts such small batches into one piece, two into two: their dropout differs, and so do the adapters.
    assert len(adapters(alone)) == len(adapters(together / "bridge"))
    assert not list(together.glob(".*.part"))


@pytest.mark.parametrize("n", [1, 7, 300, 1_024, 20_480])
@pytest.mark.parametrize("world", [1, 2, 3, 8, 11])
def test_pieces_cover_a_batch_in_order_and_every_process_has_its_run(
    n: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "world_size", lambda: world)
    covered: list[int] = []
    for number in range(world):
        monkeypatch.setattr(pieces, "rank", lambda number=number: number)
        cut = pieces.cut(n, 1_000)
        own = [row for piece in cut.own for row in range(n)[cut.rows[piece]]]
        assert own == list(range(*cut.bounds[number]))
        covered += own
    assert covered == list(range(n))
    assert max(piece.stop - piece.start for piece in cut.rows) <= 1_000


def test_up_to_eight_processes_cut_a_large_batch_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = pieces.cut(20_480, 10_000).rows
    for world in (2, 3, 8):
        monkeypatch.setattr(pieces, "world_size", lambda world=world: world)
        assert pieces.cut(20_480, 10_000).rows == alone
