"""The same items give the same adapters, byte for byte, however they are laid out, and nothing but latents is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import webdataset

from bridgekit import PRESETS, align, read_pairs
from bridgekit.media import content_hash

pytest.importorskip("bridgekit_starter", reason="the starter's encoders are not installed here")

COUNT = 60
QUICK = replace(PRESETS["default"], epochs=3, batch_size=32, shared_dim=32)
CAPTIONS = ("{}", "a {}", "the {}", "a picture of a {}", "this is a {}")


class Items:
    """Pictures and their names, and tones and their names, in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        emoji = read_pairs("starter:openmoji", ["image", "text"])
        for kind in ("image", "audio"):
            (folder / kind).mkdir()
        self.names = [str(name) for name in emoji.columns["text"][:COUNT]]
        self.pictures = [folder / "image" / f"{number:04}.png" for number in range(COUNT)]
        self.clips = [folder / "audio" / f"{number:04}.flac" for number in range(COUNT)]
        for number, file in enumerate(self.pictures):
            shutil.copy(Path(str(emoji.columns["image"][number])), file)
        time = np.arange(8_000) / 16_000
        for number, file in enumerate(self.clips):
            soundfile.write(file, 0.3 * np.sin(2 * np.pi * (200 + 20 * number) * time), 16_000)

    def files(self, kind: str) -> list[Path]:
        return self.pictures if kind == "image" else self.clips

    def table(self, kind: str, captions: int) -> Path:
        """The items in files, with a CSV: a row for each caption."""
        path = self.folder / f"{kind}-{captions}.csv"
        rows = [
            f"{file.relative_to(self.folder)},{template.format(name)}"
            for file, name in zip(self.files(kind), self.names, strict=True)
            for template in CAPTIONS[:captions]
        ]
        path.write_text("\n".join([f"{kind},text", *rows]), encoding="utf-8")
        return path

    def dataset(self, kind: str, captions: int) -> datasets.Dataset:
        """The items in memory, as `datasets` holds them."""
        texts = [[template.format(name) for template in CAPTIONS[:captions]] for name in self.names]
        cells = [{"bytes": file.read_bytes(), "path": file.name} for file in self.files(kind)]
        feature = datasets.Image() if kind == "image" else datasets.Audio()
        return datasets.Dataset.from_dict({kind: cells, "caption": texts}).cast_column(kind, feature)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Items:
    return Items(tmp_path_factory.mktemp("items"))


# ---- each writes the items into a folder, and returns what to give as --pairs


def parquet(items: Items, kind: str, folder: Path) -> str:
    items.dataset(kind, 5).to_parquet(folder / "train.parquet")
    return str(folder / "train.parquet")


def parquet_shards(items: Items, kind: str, folder: Path) -> str:
    for number in range(3):
        items.dataset(kind, 5).shard(3, number, contiguous=True).to_parquet(
            folder / "data" / f"train-{number:05}-of-00003.parquet"
        )
    return str(folder)


def saved(items: Items, kind: str, folder: Path) -> str:
    items.dataset(kind, 5).save_to_disk(str(folder / "saved"), num_shards=2)
    return str(folder / "saved")


def saved_by_the_library(items: Items, kind: str, folder: Path) -> str:
    return f"datasets:{saved(items, kind, folder)}"


def streamed(items: Items, kind: str, folder: Path) -> str:
    parquet_shards(items, kind, folder)
    return f"datasets:{folder},split=train"


def media_folder(items: Items, kind: str, folder: Path) -> str:
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for path, name in zip(items.files(kind), items.names, strict=True):
            shutil.copy(path, folder)
            file.write(json.dumps({"file_name": path.name, "text": [template.format(name) for template in CAPTIONS]}) + "\n")
    return str(folder)


def sidecars(items: Items, kind: str, folder: Path) -> str:
    for path, name in zip(items.files(kind), items.names, strict=True):
        shutil.copy(path, folder)
        (folder / path.name).with_suffix(".txt").write_text(name + "\n", encoding="utf-8")
    return str(folder)


def shards(items: Items, kind: str, folder: Path) -> str:
    with webdataset.ShardWriter(str(folder / "%04d.tar"), maxcount=COUNT // 10, verbose=0) as writer:
        for path, name in zip(items.files(kind), items.names, strict=True):
            captions = {"caption": [template.format(name) for template in CAPTIONS], "source": "openmoji.org"}
            writer.write({"__key__": path.stem, path.suffix[1:]: path.read_bytes(), "json": captions})
    assert len(list(folder.glob("*.tar"))) == 10
    return f"webdataset:{folder}/{{0000..0009}}.tar"


LAYOUTS: list[tuple[Callable[[Items, str, Path], str], str, int]] = [
    (parquet, "image", 5),
    (parquet, "audio", 5),
    (parquet_shards, "image", 5),
    (saved, "image", 5),
    (saved_by_the_library, "audio", 5),
    (streamed, "image", 5),
    (media_folder, "image", 5),
    (media_folder, "audio", 5),
    (sidecars, "image", 1),
    (sidecars, "audio", 1),
    (shards, "image", 5),
    (shards, "audio", 5),
]


def adapters(pairs: object, kind: str, out: Path) -> bytes:
    a = "starter:image" if kind == "image" else "starter:sound"
    align(a, "text", pairs, out=out, preset=QUICK, progress=False, write_report=False)
    return (out / "adapters.safetensors").read_bytes()


@pytest.fixture(scope="module")
def expected(items: Items, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], bytes]:
    """The adapters of the items in files, for a number of captions."""
    made: dict[tuple[str, int], bytes] = {}

    def find(kind: str, captions: int) -> bytes:
        if (kind, captions) not in made:
            made[kind, captions] = adapters(items.table(kind, captions), kind, tmp_path_factory.mktemp("expected") / "bridge")
        return made[kind, captions]

    return find


@pytest.mark.parametrize(("lay_out", "kind", "captions"), LAYOUTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_each_layout_gives_the_adapters_of_the_same_items_in_files(
    items: Items,
    expected: Callable[[str, int], bytes],
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lay_out: Callable[[Items, str, Path], str],
    kind: str,
    captions: int,
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "home").mkdir()
    pairs = lay_out(items, kind, tmp_path / "data")
    for name in ("HOME", "HF_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    right = expected(kind, captions)
    before = {*tmp_path.rglob("*")}
    shutil.rmtree(own_cache)
    assert adapters(pairs, kind, tmp_path / "bridge") == right
    grown = {path for path in tmp_path.rglob("*") if path.is_file() and path not in before}
    assert {path for path in grown if not path.is_relative_to(tmp_path / "bridge")} == set(), "nothing is unpacked"
    assert {path.parent.name for path in own_cache.rglob("*") if path.is_file()} <= {"training", *_stores(own_cache)}


def _stores(home: Path) -> set[str]:
    return {path.name for path in (home / "latents").iterdir()}


def test_a_data_set_in_memory_gives_them_too(items: Items, expected: Callable[[str, int], bytes], tmp_path: Path) -> None:
    assert adapters(items.dataset("image", 5), "image", tmp_path / "bridge") == expected("image", 5)


def test_broken_members_are_set_aside_by_shard_and_key(items: Items, tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "%04d.tar"), maxcount=20, verbose=0) as writer:
        for number, (path, name) in enumerate(zip(items.pictures[:60], items.names, strict=False)):
            content = path.read_bytes()
            writer.write({"__key__": path.stem, "png": content[:100] if number in (7, 33) else content, "txt": name})
    bridge = align("starter:image", "text", f"webdataset:{tmp_path}/*.tar", out=tmp_path / "b", preset=QUICK, progress=False)
    assert bridge.provenance["set_aside"] == 2
    from bridgekit import check_pairs

    found = check_pairs(f"webdataset:{tmp_path}/*.tar", latents=False, progress=False)
    assert [row.item for row in found.set_aside] == [f"{tmp_path}/0000.tar, 0007.png", f"{tmp_path}/0001.tar, 0033.png"]


def test_a_shard_that_is_cut_short_is_used_as_far_as_it_goes(
    items: Items, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for path, name in zip(items.pictures[:20], items.names, strict=False):
            writer.write({"__key__": path.stem, "png": path.read_bytes(), "txt": name})
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(whole) // 2])
    pairs = read_pairs(f"webdataset:{tmp_path}/0.tar", ["image", "text"])
    assert 5 < len(pairs) < 20
    assert content_hash(pairs.columns["image"][0]) == content_hash(items.pictures[0])  # type: ignore[arg-type]
    assert "0.tar is cut short" in capsys.readouterr().err
