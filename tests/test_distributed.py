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
from tests.test_align import adapters
from tests.toys import tone_table

ROOT = Path(__file__).resolve().parents[1]


def run(tmp_path: Path, *command: str, processes: int) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "BRIDGEKIT_HOME": str(tmp_path / f"home-{processes}"),
        "BRIDGEKIT_PRECISION": "float32",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    subprocess.run([sys.executable, *launcher, *command], env=environment, cwd=ROOT, check=True, timeout=300)


def test_alone_a_process_is_the_first_of_one() -> None:
    assert (world_size(), rank(), broadcast_from_first("word")) == (1, 0, "word")


def test_two_processes_give_the_loss_the_gradients_and_the_adapters_of_one(tmp_path: Path) -> None:
    for processes in (1, 2):
        run(tmp_path, "tests/two_processes.py", str(tmp_path / f"{processes}.safetensors"), processes=processes)
    alone, together = (load_file(tmp_path / f"{processes}.safetensors") for processes in (1, 2))
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        assert tensor.isfinite().all(), name
        tolerance = 1e-10 if tensor.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(
            together[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda why, name=name: f"{name}: {why}"
        )  # type: ignore[misc]


ALIGN = """
import sys
import pytest
from tests.toys import ToyPlugin, install

install(pytest.MonkeyPatch(), ToyPlugin())
from bridgekit.recipes.align import AlignOptions, run_alignment
from tests.test_align import QUICK

done = run_alignment(AlignOptions(pairs=sys.argv[1], out=sys.argv[2], preset=QUICK, progress=False))
print("FuseMix" in {record["method"] for record in done.bridge.metrics})
assert run_alignment(AlignOptions(pairs=sys.argv[1], out=sys.argv[2], preset=QUICK, progress=False)).reused
"""


def test_two_processes_make_one_bridge_which_is_that_of_one(tmp_path: Path) -> None:
    script, table = tmp_path / "align.py", tone_table(tmp_path)
    script.write_text(ALIGN)
    for processes in (1, 2):
        run(tmp_path, str(script), str(table), str(tmp_path / f"bridge-{processes}"), processes=processes)
    # One process cuts such small batches into one piece, two into two: their dropout differs, and so do the adapters.
    assert len(adapters(tmp_path / "bridge-1")) == len(adapters(tmp_path / "bridge-2"))
    assert not list(tmp_path.glob(".*.part"))


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


def test_up_to_eight_processes_cut_a_large_batch_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = pieces.cut(20_480, 10_000).rows
    for world in (2, 3, 8):
        monkeypatch.setattr(pieces, "world_size", lambda world=world: world)
        assert pieces.cut(20_480, 10_000).rows == alone
