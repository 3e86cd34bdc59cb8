"""Names of data sets are opened by their provider, refused with a reason, and not followed for strangers."""

from __future__ import annotations

import contextlib
import io
import json
import random
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from bridgekit import BridgekitError, ItemError, read_pairs
from bridgekit.bridge.trust import refuse_untrusted_table
from bridgekit.media import content_hash
from bridgekit.tables.reading import open_table
from tests.conftest import Run

BOTH = ("image", "text")


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (16, 16), shade).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def test_members_are_grouped_by_key_and_metadata_is_columns(tmp_path: Path) -> None:
    members = {
        "a/1.png": png(10),
        "a/1.json": json.dumps(
            {"caption": "ten", "id": 7, "tags": ["x", "y"], "box": {"left": 1}, "image": "/etc/passwd"}
        ).encode(),
        "b/1.png": png(20),
        "b/1.txt": b"twenty\n",
        "b/2.left.png": png(30),
        "b/2.png": png(40),
        "b/2.txt": b"forty",
        "README": b"no sample",
        ".hidden.png": png(50),
    }
    table = open_table(f"webdataset:{shard(tmp_path / '0.tar', members)}")
    assert set(table.load().names) == {"key", "image", "caption", "id", "tags", "text", "left.png"}
    pairs = table.pairs(BOTH)
    assert pairs.columns["text"] == ["twenty", "forty"]
    assert content_hash(pairs.columns["image"][1]) == content_hash_of(png(40))  # type: ignore[arg-type]
    assert [row.item for row in pairs.set_aside] == [f"beside {tmp_path / '0.tar'}, a/1.png"]
    left = open_table(f"webdataset:{tmp_path / '0.tar'}", columns={"image": "left.png"}).pairs(BOTH)
    assert left.columns["text"] == ["forty"]


def content_hash_of(content: bytes) -> bytes:
    from bridgekit.items import Blob

    return content_hash(Blob("", lambda: content))


def test_a_path_in_a_shards_metadata_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    members = {
        f"{number}.json": json.dumps({"image": str(tmp_path / "secret.png"), "text": "x"}).encode() for number in range(3)
    }
    with pytest.raises(BridgekitError, match="holds texts, not files"):
        read_pairs(f"webdataset:{shard(tmp_path / '0.tar', members)}", BOTH)


def test_a_data_set_from_elsewhere_may_not_name_files_on_this_machine(tmp_path: Path) -> None:
    """Its Parquet lies in the user's folder, and names a file outside it."""
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "set").mkdir()
    rows = {
        "image": [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": png(2), "path": "2.png"}],
        "text": ["a", "b"],
    }
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "set" / "train.parquet")
    pairs = read_pairs(f"datasets:{tmp_path / 'set'},split=train", BOTH)
    assert pairs.columns["text"] == ["b"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("webdataset:gone/{0000..0003}.tar", "no such shard"),
        ("webdataset:https://example.org/0.tar", "not fetched"),
        ("webdataset:pipe:curl x", "not fetched"),
        ("webdataset:{0..", "braces do not match"),
        ("webdataset:text.tar", "not an uncompressed tar"),
        ("datasets:gone/nowhere", "cannot open"),
        ("datasets:here,splitt=train", "did you mean 'split'"),
        ("dataset:here", "there is no pair source"),
    ],
)
def test_a_name_that_cannot_be_opened_is_refused_with_a_reason(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.tar").write_bytes(b"no tar file" * 200)
    with pytest.raises(BridgekitError) as caught:
        read_pairs(name, BOTH)
    assert says in str(caught.value)


def test_two_members_of_a_key_with_one_ending_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("1.png"))
    with pytest.raises(BridgekitError, match="two members with the same ending") as caught:
        read_pairs(f"webdataset:{tmp_path / '0.tar'}", BOTH)
    assert caught.value.where == f"{tmp_path / '0.tar'}, 1.png"


def test_a_strangers_bridge_may_not_have_a_data_set_fetched_or_shards_read_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = tmp_path / "work" / "bridge"
    bridge.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    shard(tmp_path / "0.tar", {"1.png": png(1)})
    shard(tmp_path / "work" / "0.tar", {"1.png": png(1)})
    for name in (
        "datasets:org/name",
        "datasets:name",
        f"webdataset:{tmp_path}/0.tar",
        "webdataset:../{0..1}.tar",
        "webdataset:/x/*.tar",
    ):
        with pytest.raises(BridgekitError, match="needs your permission"):
            refuse_untrusted_table(name, bridge)
        refuse_untrusted_table(name, None)
    refuse_untrusted_table("webdataset:0.tar", bridge)
    refuse_untrusted_table(f"webdataset:{tmp_path}/work/{{0..1}}.tar", bridge)
    monkeypatch.setenv("BRIDGEKIT_OUTSIDE", "yes")
    refuse_untrusted_table(f"webdataset:{tmp_path}/0.tar", bridge)


def test_the_plugin_is_listed_with_what_it_opens(run: Run) -> None:
    _, out, _ = run("plugins")
    assert "pairs webdataset:...: WebDataset shards" in out
    assert "pairs datasets:...:" in out


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_shard_ends_in_rows_or_in_one_message(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    members = {}
    for number in range(12):
        members |= {f"{number}.png": png(number), f"{number}.json": b'{"caption": "c%d", "n": %d}' % (number, number)}
    path = shard(tmp_path / "0.tar", members)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 5, 50])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(bytes(data[: rng.randrange(len(data))]) if rng.random() < 0.4 else bytes(data))
    with contextlib.suppress(BridgekitError):
        for item in read_pairs(f"webdataset:{path}", BOTH).columns["image"]:
            assert item is not None
            with contextlib.suppress(ItemError):
                content_hash(item)
