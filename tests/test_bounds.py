"""What a file claims costs nothing until it is there: memory and time are bounded by the bytes that someone stored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from bridgekit import Bridge, BridgekitError, read_pairs
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


# ---- tables


def read_refused(path: Path, saying: str, log: Path, memory: int) -> None:
    def read() -> None:
        with pytest.raises(BridgekitError, match=saying):
            read_pairs(path, ("audio", "text"))

    assert taken(read, log)[0] < memory


@pytest.mark.parametrize("lists", [False, True], ids=["rows", "elements of a list"])
def test_a_parquet_of_a_million_equal_cells_in_no_bytes_is_refused(tmp_path: Path, lists: bool) -> None:
    texts = ["a dog"] * 1_000_000
    columns = {"audio": ["a.wav"], "text": [texts]} if lists else {"audio": ["a.wav"] * len(texts), "text": texts}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", compression="zstd")
    assert (tmp_path / "t.parquet").stat().st_size < 10_000
    read_refused(tmp_path / "t.parquet", "has 1,000,000 cells in a column, but only", tmp_path / "log", 30 * MB)


def test_a_parquet_of_many_short_rows_that_differ_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    texts = [str(number) for number in range(200_000)]
    table = pa.table({"audio": ["a.wav"] * len(texts), "text": texts})
    small = {"compression": "zstd", "use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    pq.write_table(table, tmp_path / "t.parquet", **small)
    assert len(read_pairs(tmp_path / "t.parquet", ("audio", "text"))) == len(texts)


def test_rows_that_are_set_aside_share_their_texts(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    (tmp_path / "t.csv").write_text("audio,text\n" + "a.wav,a dog\n" * 100_000 + "a.wav,\n" * 100_000)
    left_out = read_pairs(tmp_path / "t.csv", ("audio", "text")).set_aside
    assert len(left_out) == 199_999
    assert len({id(row.item) for row in left_out}) == 2
    assert len({id(row.reason) for row in left_out}) <= 100_001
    assert (left_out[0].reason, left_out[-1].item) == ("the same as row 2", f"beside {tmp_path / 'a.wav'}")


@pytest.mark.parametrize("start", ["a.wav,", 'a.wav,"', "a.wav,x\n"])
def test_a_csv_of_half_a_gigabyte_of_nothing_is_refused_at_its_first_row(tmp_path: Path, start: str) -> None:
    with (tmp_path / "t.csv").open("w") as file:
        file.write(f"audio,text\n{start}")
        file.truncate(512 << 20)
    read_refused(tmp_path / "t.csv", "over 16,777,216 characters|line contains NUL", tmp_path / "log", 120 * MB)


def test_a_row_of_a_csv_is_bounded_as_its_cells_are(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("audio,text\n" + '"x\n",' * 10_000_000)
    read_refused(tmp_path / "t.csv", "over 16,777,216 characters", tmp_path / "log", 400 * MB)
    (tmp_path / "t.csv").write_text("a," * 20_000 + "\n")
    read_refused(tmp_path / "t.csv", "over 16,384 columns", tmp_path / "log", 30 * MB)


def test_the_cells_of_a_csv_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridgekit.tables.formats.MAX_CELLS", 20)
    (tmp_path / "t.csv").write_text("audio,text\n" + "a,b\n" * 11)
    read_refused(tmp_path / "t.csv", "over 20 cells", tmp_path / "log", 30 * MB)


def test_a_csv_is_kept_in_arrow_whatever_its_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    rows = [("audio", "text"), *(("a.wav", f"caption {number} of é 😀\u2028") for number in range(150_000))]
    for line_break in ("\n", "\r\n", "\r"):
        text = line_break.join(",".join(row) for row in rows)
        (tmp_path / "t.csv").write_text(text, encoding="utf-8-sig", newline="")
        pairs = read_pairs(tmp_path / "t.csv", ("audio", "text"))
        assert list(pairs.columns["text"]) == [text.strip() for _, text in rows[1:]]
        assert list(pairs.rows[-1:]) == [150_001]
    assert taken(lambda: read_pairs(tmp_path / "t.csv", ("audio", "text")), tmp_path / "log")[0] < 12 * len(text)


@pytest.mark.parametrize("line_break", ["\n", "\r"])
def test_the_row_that_is_not_in_utf_8_is_named_however_far_down(tmp_path: Path, line_break: str) -> None:
    good = f"a.wav,a caption of a dog{line_break}".encode()
    (tmp_path / "t.csv").write_bytes(f"audio,text{line_break}".encode() + good * 100_000 + b"a.wav,\xe9t\xe9" + good)
    read_refused(tmp_path / "t.csv", r"not valid UTF-8\n.*row 100002", tmp_path / "log", 60 * MB)
