"""What a file claims costs nothing until it is there: memory and time are bounded by the bytes that someone stored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bridgekit import Bridge, BridgekitError
from bridgekit.fusion.adapter import FusionAdapter
from bridgekit.storage.bounded import OutOfBounds
from bridgekit.storage.tensors import open_tensors
from tests.shared import taken
from tests.test_bridge import untrained

MB = 1_000_000


Shapes = Mapping[str, tuple[int, ...]]
Contents = Mapping[str, NDArray[np.generic]]


def write_listed(path: Path, shapes: Shapes, dtype: str, metadata: Mapping[str, str], fill: Contents) -> str:
    """A safetensors file whose tensors are holes but for those in `fill`; returns its SHA-256."""
    listed: dict[str, object] = {"__metadata__": dict(metadata)}
    at, starts, width = 0, {}, int(dtype[1:]) // 8
    for name, shape in shapes.items():
        starts[name], size = at, width * int(np.prod(shape))
        listed[name], at = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}, at + size
    header = json.dumps(listed).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + at)
        for name, content in fill.items():
            file.seek(8 + len(header) + starts[name])
            file.write(content.tobytes())
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def wide_bridge(folder: Path, dim: int, filled: tuple[str, ...]) -> Path:
    """A bridge with an adapter of 32 dim² bytes, whose tensors with these endings are random numbers and the others holes."""
    untrained().save(folder)
    metadata = json.loads((folder / "bridge.json").read_text())
    metadata["preset"] |= {"blocks": 4, "expansion": 1.0}
    metadata["sides"]["audio"]["dim"] = dim
    with torch.device("meta"):
        adapters = {name: FusionAdapter(side["dim"], 8, 4, 1.0, 0.0) for name, side in metadata["sides"].items()}
    shapes = {
        f"{side}.{name}": tuple(each.shape) for side, adapter in adapters.items() for name, each in adapter.state_dict().items()
    }
    numbers = np.random.default_rng(0).random(dim * dim, np.float32) + 1
    fill = {name: numbers[: int(np.prod(shape))] for name, shape in shapes.items() if name.endswith((".std", *filled))}
    metadata["adapters_sha256"] = write_listed(folder / "adapters.safetensors", shapes, "F32", {}, fill)
    (folder / "bridge.json").write_text(json.dumps(metadata))
    return folder


def refused(folder: Path, saying: str, log: Path, memory: int = 30 * MB) -> None:
    def load() -> None:
        with pytest.raises(BridgekitError, match=saying):
            Bridge.load(folder, "cpu")

    assert taken(load, log)[0] < memory


def test_adapters_that_are_holes_are_not_read(tmp_path: Path) -> None:
    folder = wide_bridge(tmp_path / "b", 2_800, ())
    assert (folder / "adapters.safetensors").stat().st_size > 250 * MB
    refused(folder, "bytes are on disk", tmp_path / "log")


def test_adapters_whose_zeros_a_copy_has_turned_into_holes_are_read_in_their_own_size(tmp_path: Path) -> None:
    folder = wide_bridge(tmp_path / "b", 1_800, ("up.weight", "0.weight", "1.weight", "head.weight"))
    file = folder / "adapters.safetensors"
    size, on_disk = file.stat().st_size, file.stat().st_blocks * 512
    assert 0.3 * size < on_disk < 0.7 * size
    memory, _ = taken(lambda: Bridge.load(folder, "cpu"), tmp_path / "log")
    assert memory < size + 30 * MB


def test_adapters_that_exceed_the_free_memory_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = wide_bridge(tmp_path / "b", 1_800, ("weight",))
    monkeypatch.setattr("bridgekit.bridge.format.free_memory", lambda: 10 * MB)
    refused(folder, r"it takes 0\.1 GB of memory, of which 0\.0 GB are free", tmp_path / "log")


def with_marks(folder: Path, marks: NDArray[np.int64], count: int) -> Path:
    """A bridge with the record of `count` training rows, of which only the first are there."""
    untrained().save(folder)
    whole = hashlib.sha256(marks.tobytes())
    for _ in range((count - len(marks)) >> 17):
        whole.update(bytes(1 << 20))
    path = folder / "training_rows.safetensors"
    write_listed(path, {"marks": (count,)}, "I64", {"sha256": whole.hexdigest()}, {"marks": marks})
    return folder


def test_training_rows_that_are_holes_are_not_read(tmp_path: Path) -> None:
    folder = with_marks(tmp_path / "b", np.zeros(0, np.int64), 1 << 25)
    refused(folder, "bytes are on disk", tmp_path / "log")


def test_training_rows_are_read_once_and_no_further_than_they_ascend(tmp_path: Path) -> None:
    marks = np.arange(1 << 23) * 5
    good = with_marks(tmp_path / "good", marks, len(marks))
    memory, _ = taken(lambda: Bridge.load(good, "cpu"), tmp_path / "log")
    assert memory < marks.nbytes + 30 * MB
    np.testing.assert_array_equal(Bridge.load(good, "cpu").training_rows.marks, marks)
    for number, at in enumerate((1 << 17, 1_000)):
        twice = marks.copy()
        twice[at] = twice[at - 1]
        refused(with_marks(tmp_path / f"twice {number}", twice, len(twice)), "do not ascend", tmp_path / "log")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"shape": [2, 3]}, "contradicts itself"),
        ({"shape": [1 << 40, 1 << 40]}, "contradicts itself"),
        ({"shape": [-1, -4]}, "no tensor"),
        ({"shape": [True, 4]}, "no tensor"),
        ({"shape": 4}, "no tensor"),
        ({"dtype": "F31"}, "no tensor"),
        ({"data_offsets": [0, 16, 32]}, "no tensor"),
        ({"data_offsets": [4, 20]}, "contradicts itself"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, change: dict[str, object], why: str) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **change}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(OutOfBounds, match=why), open_tensors(tmp_path / "x", 1):
        pass


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cut short"),
        ((1 << 50).to_bytes(8, "little") + b"{}", "cut short"),
        ((9).to_bytes(8, "little") + b"[1, 2, 3]", "not a list"),
        ((2).to_bytes(8, "little") + b"{}more", "4 bytes follow"),
        ((1 << 20).to_bytes(8, "little") + b" " * (1 << 20), "over 66,560 bytes"),
    ],
)
def test_what_is_no_list_of_tensors_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(OutOfBounds, match=why), open_tensors(tmp_path / "x", 1):
        pass


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    write_listed(tmp_path / "x", {"x": (1 << 20,)}, "F32", {}, {"x": np.ones(1 << 20, np.float32)})
    with open_tensors(tmp_path / "x", 1) as file:
        os.truncate(tmp_path / "x", 1 << 20)
        with pytest.raises(OutOfBounds, match="cut short"):
            list(file.read_into(memoryview(bytearray(1 << 22))))
