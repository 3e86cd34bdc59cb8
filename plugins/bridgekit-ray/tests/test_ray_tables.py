"""Workers read Parquet and WebDataset themselves, also from object storage; the latents are those of one machine."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from bridgekit_ray import streaming, tables
from bridgekit_ray.encoding import cluster as ray_cluster
from torch.nn.functional import cosine_similarity

from bridgekit import read_pairs
from bridgekit.errors import BridgekitError
from bridgekit.latents.encode import encode_items
from bridgekit.latents.encoded import encode_pairs
from bridgekit.plugins import load_encoder
from bridgekit.progress import silent
from bridgekit.recipes.encode import EncodedTable, encode_table

pytest.importorskip("bridgekit_starter", reason="workers need an encoder of an installed plugin")

COUNT = 24
BROKEN = 5  # the index of a picture that is cut short


class Items:
    """Pictures with two captions each; one picture is broken."""

    def __init__(self) -> None:
        emoji = read_pairs("starter:openmoji", ["image", "text"])
        names = [str(name) for name in emoji.columns["text"][:COUNT]]
        self.captions = [[name, f"a picture of {name}"] for name in names]
        self.pictures = [Path(str(emoji.columns["image"][number])).read_bytes() for number in range(COUNT)]
        self.pictures[BROKEN] = self.pictures[BROKEN][:100]

    def parquet(self, path: Path) -> Path:
        """A Parquet file as `datasets` writes it: structs of bytes and path, lists of captions, and several row groups."""
        pictures = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(self.pictures)]
        features = {"img": {"_type": "Image"}, "caption": {"feature": {"_type": "Value"}, "_type": "List"}}
        table = pa.table({"img": pictures, "caption": self.captions, "year": list(range(COUNT))})
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=10)
        return path

    def shards(self, folder: Path) -> str:
        """Two WebDataset shards, with the first caption."""
        for shard in range(2):
            with tarfile.open(folder / f"{shard}.tar", "w") as archive:
                for number in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                    for ending, content in (("png", self.pictures[number]), ("txt", self.captions[number][0].encode())):
                        member = tarfile.TarInfo(f"{number:04}.{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        return f"{folder}/{{0..1}}.tar"


@pytest.fixture(scope="module")
def items() -> Items:
    return Items()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster():
        yield


@pytest.fixture
def encode(cluster: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`encode --ray` on the cluster that runs."""
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return partial(encode_table, "starter:image", "text", ray=True, progress=False)


def same_as_one_machine(done: EncodedTable, pairs: object, folder: Path) -> None:
    """All that `align` opens is in the store, and the latents are those of a run without Ray."""
    for modality in ("image", "text"):
        encoder = load_encoder(f"starter:{modality}", "cpu")
        items = read_pairs(pairs, ["image", "text"]).columns[modality]
        there, here = encode_items(encoder, items), encode_items(encoder, items, folder=folder)
        assert there.encoded == 0, "align encodes nothing anew"
        assert here.encoded == len(here.matrix) == done.sides[modality].items
        assert done.sides[modality].encoded == here.encoded
        assert there.fingerprint == here.fingerprint
        assert cosine_similarity(there.matrix, here.matrix).min() > 0.9999


def test_workers_read_parquet_with_pictures_and_lists_of_captions(items: Items, encode: Any, tmp_path: Path) -> None:
    table = items.parquet(tmp_path / "train.parquet")
    done = encode(table)
    same_as_one_machine(done, table, tmp_path / "here")
    assert done.rows == 2 * (COUNT - 1)
    encoders = {modality: load_encoder(f"starter:{modality}", "cpu") for modality in ("image", "text")}
    here = encode_pairs(read_pairs(table, ["image", "text"]), encoders, silent)
    assert done.set_aside == list(here.pairs.set_aside), "named by table, row and column, once for each caption"
    assert done.set_aside[0].item == f"{table}, row {BROKEN + 1}, column img ({BROKEN}.png)"
    again = encode(table)
    assert {side.encoded for side in again.sides.values()} == {0}
    assert (again.rows, again.set_aside) == (done.rows, done.set_aside)
    with pytest.raises(BridgekitError, match="2 of 48 rows cannot be used"):
        encode(table, strict=True)


def test_workers_read_shards_and_name_broken_members_by_shard_and_key(items: Items, encode: Any, tmp_path: Path) -> None:
    pattern = items.shards(tmp_path)
    done = encode(f"webdataset:file://{pattern}")
    same_as_one_machine(done, f"webdataset:{pattern}", tmp_path / "here")
    assert done.rows == COUNT - 1
    assert [row.item for row in done.set_aside] == [f"file://{tmp_path}/0.tar, {BROKEN:04}.png"]
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    done = encode(f"webdataset:{tmp_path}/*.tar")
    assert COUNT // 2 < done.rows < COUNT - 1
    assert done.set_aside[-1].item == f"{tmp_path}/1.tar"
    assert "the shard cannot be read from here on" in done.set_aside[-1].reason


class ObjectStorage(BaseHTTPRequestHandler):
    """As much of S3 as reading takes: a bucket of which a folder's files are the objects."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.asked.append(self.path)
        file = self.folder / self.path.partition("?")[0].removeprefix("/bucket/")
        if not file.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if with_body:
            self.wfile.write(part)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[str]:
    """The end of URLs of objects in a bucket with the files of a folder."""
    ObjectStorage.folder, ObjectStorage.asked = tmp_path, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), ObjectStorage)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"?endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1&allow_bucket_creation=false"
    server.shutdown()


def test_workers_read_parquet_and_shards_from_object_storage(items: Items, encode: Any, storage: str, tmp_path: Path) -> None:
    table = items.parquet(tmp_path / "train.parquet")
    done = encode(f"s3://key:secret@bucket/train.parquet{storage}")
    same_as_one_machine(done, table, tmp_path / "here")
    items.shards(tmp_path)
    done = encode(f"webdataset:s3://key:secret@bucket/{{0..1}}.tar{storage}")
    assert {side.encoded for side in done.sides.values()} == {0}, "the same items, by content"
    assert done.rows == COUNT - 1
    assert any("0.tar" in path for path in ObjectStorage.asked)


def test_what_workers_cannot_read_is_one_clear_message(items: Items, encode: Any, storage: str, tmp_path: Path) -> None:
    table = items.parquet(tmp_path / "train.parquet")
    with pytest.raises(BridgekitError, match="it cannot be read"):
        encode(f"file://{tmp_path}/other.parquet")
    with pytest.raises(BridgekitError, match="it cannot be read"):
        encode(f"s3://key:secret@bucket/other.parquet{storage}")
    with pytest.raises(BridgekitError, match="no column `photo`"):
        encode(table, columns={"image": "photo"})
    with pytest.raises(BridgekitError, match="the column `year` for image holds texts"):
        encode(table, columns={"image": "year"})
    with pytest.raises(BridgekitError, match=r"there is no \.parquet file"):
        encode(f"file://{tmp_path}/none*.parquet")


def test_a_table_whose_files_lie_beside_it_is_read_as_before(items: Items, encode: Any, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(items.pictures[number])
    rows = {"image": [f"{number}.png" for number in range(3)], "text": [items.captions[number][0] for number in range(3)]}
    pq.write_table(pa.table(rows), tmp_path / "table.parquet")
    done = encode(tmp_path / "table.parquet")
    assert (done.rows, done.sides["image"].encoded) == (3, 3)


def test_reading_goes_on_while_a_block_is_encoded() -> None:
    """The next block is asked for before the first is done with."""
    asked: list[int] = []

    def blocks() -> Iterator[int]:
        for number in range(3):
            asked.append(number)
            yield number

    coming = streaming._ahead(blocks())
    assert next(coming) == 0
    for _ in range(100):
        if 1 in asked:
            break
        threading.Event().wait(0.01)
    assert 1 in asked
    assert list(coming) == [1, 2]


def test_digests_that_end_in_zeros_are_known() -> None:
    worker = streaming.TableWorker({}, {}, {})
    digests = torch.arange(64, dtype=torch.uint8).reshape(2, 32)
    digests[1, -3:] = 0
    import numpy as np

    worker._known["text"] = np.sort(streaming._as_strings(digests.numpy()))
    assert worker._is_known("text", digests[1].numpy().tobytes())
    assert not worker._is_known("text", bytes(32))
    assert not worker._is_known("text", b"\xff" * 32)


def test_a_folder_of_parquet_is_found_and_other_tables_are_not(items: Items, tmp_path: Path) -> None:
    items.parquet(tmp_path / "b.parquet")
    items.parquet(tmp_path / "a.parquet")
    assert tables.find_files(tmp_path) == [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    assert tables.find_files(f"file://{tmp_path}") == [f"file://{tmp_path}/a.parquet", f"file://{tmp_path}/b.parquet"]
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    assert tables.find_files(tmp_path) is None
    assert tables.find_files(tmp_path / "clips.csv") is None
    assert tables.find_files("starter:openmoji") is None
    with pytest.raises(BridgekitError, match="the braces do not match"):
        tables.find_files("data/{0..9.parquet")
