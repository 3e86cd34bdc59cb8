"""Tables in the layouts that public data sets have: files in cells, folders by convention, and objects in memory."""

from __future__ import annotations

import io
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from bridgekit import Bridge, BridgekitError, align, read_pairs
from bridgekit.items import Blob
from bridgekit.media import as_item, content_hash, read_audio, read_image
from bridgekit.pairs import Pairs
from bridgekit.tables.reading import open_table, read_items
from tests.conftest import Run
from tests.test_align import QUICK
from tests.toys import tone_table

BOTH = ("image", "text")
COLOURS = ("red", "green", "blue", "gold")


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return file.getvalue()


def seen(pairs: Pairs) -> list[tuple[bytes, str]]:
    """Each row's content and text, whatever holds it."""
    return [(content_hash(item), text) for item, text in zip(*(pairs.columns[name] for name in BOTH), strict=True)]  # type: ignore[arg-type, misc]


@pytest.fixture
def expected(tmp_path: Path) -> list[tuple[bytes, str]]:
    """The four colours in files, with a CSV beside them."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(png(colour))
    (folder / "t.csv").write_text("image,text\n" + "".join(f"{colour}.png,{colour}\n" for colour in COLOURS))
    return seen(read_pairs(folder / "t.csv", BOTH))


def cells(**named: Any) -> dict[str, list[Any]]:
    return {"image": [{"bytes": png(colour), "path": f"{colour}.png"} for colour in COLOURS], **named}


def parquet(folder: Path) -> Path:
    pq.write_table(pa.table(cells(text=COLOURS)), folder / "t.parquet", row_group_size=3)
    return folder / "t.parquet"


def plain_binary(folder: Path) -> Path:
    pq.write_table(pa.table({"image": [png(colour) for colour in COLOURS], "text": COLOURS}), folder / "t.parquet")
    return folder / "t.parquet"


def bytes_under_another_name_with_classes(folder: Path) -> Path:
    """As `datasets` writes an image classifier's data."""
    features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": [*COLOURS]}}
    table = pa.table({"img": cells()["image"], "label": range(len(COLOURS)), "fine_label": range(len(COLOURS))})
    named = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(named, folder / "t.parquet")
    return folder / "t.parquet"


def paths_in_structs(folder: Path) -> Path:
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(png(colour))
    structs = pa.array(
        [{"bytes": None, "path": f"{colour}.png"} for colour in COLOURS],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"image": structs, "text": COLOURS}), folder / "t.parquet")
    return folder / "t.parquet"


def arrow(folder: Path) -> Path:
    table = pa.table(cells(text=COLOURS))
    with pa.OSFile(str(folder / "t.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return folder / "t.arrow"


def arrow_stream(folder: Path) -> Path:
    table = pa.table(cells(text=COLOURS))
    with pa.OSFile(str(folder / "t.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return folder / "t.arrow"


def parquet_shards(folder: Path) -> Path:
    (folder / "data").mkdir()
    for number in range(2):
        part = pa.table(cells(text=COLOURS)).slice(2 * number, 2)
        pq.write_table(part, folder / "data" / f"train-{number:05}-of-00002.parquet")
    return folder


def image_folder(ending: str) -> Callable[[Path], Path]:
    def lay_out(folder: Path) -> Path:
        for colour in COLOURS:
            (folder / f"{colour}.png").write_bytes(png(colour))
        rows = [{"file_name": f"{colour}.png", "caption": colour} for colour in COLOURS]
        if ending == "csv":
            pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
        else:
            (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    lay_out.__name__ = f"imagefolder with metadata.{ending}"
    return lay_out


def json_array(folder: Path) -> Path:
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(png(colour))
    (folder / "t.json").write_text(json.dumps([{"image": f"{colour}.png", "text": colour} for colour in COLOURS]))
    return folder / "t.json"


def one_table_in_a_folder(folder: Path) -> Path:
    json_array(folder)
    return folder


@pytest.mark.parametrize(
    "lay_out",
    [
        parquet,
        plain_binary,
        bytes_under_another_name_with_classes,
        paths_in_structs,
        arrow,
        arrow_stream,
        parquet_shards,
        image_folder("csv"),
        image_folder("jsonl"),
        json_array,
        one_table_in_a_folder,
    ],
    ids=lambda lay_out: lay_out.__name__,
)
def test_a_layout_holds_the_same_rows_as_files_with_a_table(
    lay_out: Callable[[Path], Path], expected: list[tuple[bytes, str]], tmp_path: Path
) -> None:
    (tmp_path / "data set").mkdir()
    assert seen(read_pairs(lay_out(tmp_path / "data set"), BOTH)) == expected


def test_files_may_be_in_the_one_folder_beside_the_table_that_has_them(
    expected: list[tuple[bytes, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in ESC-50, Common Voice and Flickr8k."""
    folder = tmp_path / "set"
    for name in ("Images", "other"):
        (folder / name).mkdir(parents=True)
    for colour in COLOURS:
        (folder / "Images" / f"{colour}.png").write_bytes(png(colour))
    rows = [{"filename": f"{colour}.png", "sentences": [{"raw": colour, "tokens": [colour]}]} for colour in COLOURS]
    (folder / "dataset.json").write_text(json.dumps({"images": rows, "dataset": "colours"}))
    assert seen(read_pairs(folder / "dataset.json", BOTH)) == expected
    assert "the image files are in `Images/`" in capsys.readouterr().err
    for colour in COLOURS:
        (folder / "other" / f"{colour}.png").write_bytes(png(colour))
    with pytest.raises(BridgekitError, match="there is no such file"):
        read_pairs(folder / "dataset.json", BOTH)


def test_texts_beside_files_are_their_texts(expected: list[tuple[bytes, str]], tmp_path: Path) -> None:
    folder = tmp_path / "sidecars" / "below"
    folder.mkdir(parents=True)
    for number, colour in enumerate(COLOURS):
        (folder / f"{number}.png").write_bytes(png(colour))
        (folder / f"{number}.txt").write_text(f"{colour}\n")
    assert seen(read_pairs(tmp_path / "sidecars", BOTH)) == expected


def test_each_line_beside_a_file_is_a_text_and_what_stands_alone_is_set_aside(tmp_path: Path) -> None:
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
        (tmp_path / f"{colour}.txt").write_text(f"{colour}\n\na {colour} square\n")
    (tmp_path / "alone.png").write_bytes(png("white"))
    (tmp_path / "other.txt").write_text("other")
    pairs = read_pairs(tmp_path, BOTH)
    assert [text for _, text in seen(pairs)][:2] == ["blue", "a blue square"]
    assert len(pairs) == 8
    assert [(row.column, row.item) for row in pairs.set_aside] == [
        ("text", f"beside {tmp_path / 'alone.png'}"),
        ("image", "beside other"),
    ]


def test_tables_named_after_splits_are_one_table(expected: list[tuple[bytes, str]], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for colour in COLOURS:
        (folder / "images" / f"{colour}.png").write_bytes(png(colour))
    for split, colours in (("train", COLOURS[:2]), ("dev", COLOURS[2:3]), ("test", COLOURS[3:])):
        rows = "".join(f"{colour}.png\t{colour}\n" for colour in colours)
        (folder / f"{split}.tsv").write_text(f"path\tsentence\n{rows}")
    pairs = read_pairs(folder, BOTH)
    assert sorted(seen(pairs)) == sorted(expected)
    assert pairs.split == ["val", "test", "train", "train"]


def test_a_table_in_a_folder_beside_that_of_the_files_names_them(expected: list[tuple[bytes, str]], tmp_path: Path) -> None:
    """As in ESC-50."""
    for name in ("set/meta", "set/audio"):
        (tmp_path / name).mkdir(parents=True)
    for colour in COLOURS:
        (tmp_path / "set" / "audio" / f"{colour}.png").write_bytes(png(colour))
    table = tmp_path / "set" / "meta" / "all.csv"
    table.write_text("filename,category\n" + "".join(f"{colour}.png,{colour}\n" for colour in COLOURS))
    assert seen(read_pairs(tmp_path / "set", BOTH)) == expected
    with pytest.raises(BridgekitError, match="are not in the table's folder, but in") as caught:
        read_pairs(table, BOTH)
    assert f"--pairs {tmp_path / 'set'}" in str(caught.value.remedy)
    assert seen(read_pairs(table, BOTH, outside=True)) == expected


def test_a_csv_may_end_in_txt(expected: list[tuple[bytes, str]], tmp_path: Path) -> None:
    (tmp_path / "plain" / "captions.txt").write_text((tmp_path / "plain" / "t.csv").read_text())
    assert seen(read_pairs(tmp_path / "plain" / "captions.txt", BOTH)) == expected


def test_metadata_whose_paths_begin_with_splits_is_split_so(tmp_path: Path) -> None:
    rows = []
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        for colour in COLOURS:
            (tmp_path / split / f"{colour}.png").write_bytes(png(colour) + split.encode())
            rows.append(f"{split}/{colour}.png,{colour}")
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    assert read_pairs(tmp_path, BOTH).split == ["train"] * 4 + ["val"] * 4 + ["test"] * 4


def test_folders_beside_several_tables_are_not_taken_for_classes(tmp_path: Path) -> None:
    """As in COCO: `train2017` is no class."""
    for name in ("train2017", "val2017", "annotations"):
        (tmp_path / name).mkdir()
    for name in ("train2017", "val2017"):
        (tmp_path / name / "1.png").write_bytes(png("red"))
        (tmp_path / "annotations" / f"captions_{name}.json").write_text("{}")
    with pytest.raises(BridgekitError, match="several tables beside its files: annotations/captions_train2017") as caught:
        read_pairs(tmp_path, BOTH)
    assert "--pairs" in str(caught.value.remedy)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(b"")
    with pytest.raises(BridgekitError, match="has tar files") as caught:
        read_pairs(tmp_path / "shards", BOTH)
    assert "webdataset:" in str(caught.value.remedy)


def test_class_folders_may_stand_in_folders_named_after_splits(expected: list[tuple[bytes, str]], tmp_path: Path) -> None:
    for split in ("train", "test"):
        for colour in COLOURS:
            place = tmp_path / "classes" / split / colour
            place.mkdir(parents=True)
            (place / f"{split}.png").write_bytes(png(colour) + b"\0" * (split == "test"))
    pairs = read_pairs(tmp_path / "classes", BOTH)
    assert pairs.split == ["test"] * 4 + ["train"] * 4
    assert {text for _, text in seen(pairs)} == {*COLOURS}


def test_metadata_in_folders_named_after_splits_is_one_table(expected: list[tuple[bytes, str]], tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / "set" / split).mkdir(parents=True)
        image_folder("csv")(tmp_path / "set" / split)
    pairs = read_pairs(tmp_path / "set", BOTH)
    assert seen(pairs) == expected * 2
    assert pairs.split == ["train"] * 4 + ["val"] * 4


def test_a_linked_class_folder_is_set_aside_with_the_option_that_follows_it(
    expected: list[tuple[bytes, str]], tmp_path: Path
) -> None:
    mine = tmp_path / "classes"
    for colour in COLOURS:
        (tmp_path / "elsewhere" / colour).mkdir(parents=True)
        (tmp_path / "elsewhere" / colour / "1.png").write_bytes(png(colour))
        mine.mkdir(exist_ok=True)
        (mine / colour).symlink_to(tmp_path / "elsewhere" / colour)
    with pytest.raises(BridgekitError, match="none of the 4 rows is usable") as caught:
        read_pairs(mine, BOTH)
    assert "--outside" in str(caught.value.remedy)
    assert sorted(seen(read_pairs(mine, BOTH, outside=True))) == sorted(expected)
    assert len(read_items(mine, "image", outside=True)) == 4
    (mine / "round").symlink_to(mine)
    assert len(read_pairs(mine, BOTH, outside=True)) == 4, "a folder that links to itself is read once"
    (tmp_path / "whole").symlink_to(tmp_path / "elsewhere")
    assert len(read_pairs(tmp_path / "whole", BOTH)) == 4, "a folder that is itself a link is one's own"


def test_a_path_inside_a_table_may_not_leave_its_folder(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.png").write_bytes(png("red"))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for path in ("../secret.png", str(tmp_path / "secret.png")):
        pq.write_table(
            pa.table({"image": pa.array([{"bytes": None, "path": path}], kind), "text": ["a"]}), tmp_path / "set" / "t.parquet"
        )
        with pytest.raises(BridgekitError, match="leads outside"):
            read_pairs(tmp_path / "set" / "t.parquet", BOTH)


def test_missing_files_in_a_table_are_missing_items(tmp_path: Path) -> None:
    images = [{"bytes": png("red"), "path": None}, None, {"bytes": None, "path": None}, {"bytes": png("blue"), "path": "b.png"}]
    pq.write_table(pa.table({"image": images, "text": list("abcd")}), tmp_path / "t.parquet")
    pairs = read_pairs(tmp_path / "t.parquet", BOTH)
    assert [str(item) for item in pairs.columns["image"]] == [
        f"{tmp_path / 't.parquet'}, row 1, column image",
        f"{tmp_path / 't.parquet'}, row 4, column image (b.png)",
    ]
    assert [(row.row, row.column) for row in pairs.set_aside] == [(2, "image"), (3, "image")]


def test_a_column_without_any_value_has_missing_items(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.nulls(3), "text": pa.nulls(3, pa.list_(pa.string()))}), tmp_path / "t.parquet")
    with pytest.raises(BridgekitError, match="none of the 3 rows is usable"):
        read_pairs(tmp_path / "t.parquet", BOTH)
    pq.write_table(pa.table({"image": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / "t.parquet")
    with pytest.raises(BridgekitError, match="no rows"):
        read_pairs(tmp_path / "t.parquet", BOTH)


def test_a_damaged_file_in_a_table_costs_its_row(run: Run, toy: object, tmp_path: Path) -> None:
    wave = io.BytesIO()
    tones = []
    for number in range(40):
        wave = io.BytesIO()
        soundfile.write(wave, 0.3 * np.sin(np.arange(4_000) * (0.05 + 0.01 * number)), 16_000, format="FLAC")
        tones.append(wave.getvalue())
    tones[7] = tones[7][:200]
    pq.write_table(pa.table({"sound": tones, "caption": [f"tone {number}" for number in range(40)]}), tmp_path / "t.parquet")
    bridge = align(pairs=tmp_path / "t.parquet", out=tmp_path / "bridge", preset=QUICK, progress=False)
    assert bridge.provenance["set_aside"] == 1
    code, out, _ = run("check", str(tmp_path / "t.parquet"), "--json")
    assert json.loads(out)["set_aside"][0]["item"] == f"{tmp_path / 't.parquet'}, row 8, column sound"
    assert code == 0


def test_many_rows_are_read_in_runs_and_few_of_them_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bridgekit.tables import arrow as module

    monkeypatch.setattr(module, "_BLOB_BYTES", 10_000)
    monkeypatch.setattr(module, "_KEPT_BYTES", 30_000)
    files = [bytes([number % 251]) * 1_000 for number in range(200)]
    pq.write_table(
        pa.table({"image": files, "text": [str(number) for number in range(200)]}), tmp_path / "t.parquet", row_group_size=70
    )
    column = read_pairs(tmp_path / "t.parquet", BOTH).columns["image"]
    order = np.random.default_rng(0).permutation(200).tolist()
    assert all(isinstance(column[row], Blob) and column[row].read() == files[row] for row in order)  # type: ignore[union-attr]


# ---- objects in memory


def pictures() -> list[Image.Image]:
    return [Image.open(io.BytesIO(png(colour))) for colour in COLOURS]


TABLES: dict[str, Callable[[Path], Any]] = {
    "a list of tuples": lambda folder: list(zip(pictures(), COLOURS, strict=True)),
    "a list of dicts": lambda folder: [{"image": image, "text": text} for image, text in zip(pictures(), COLOURS, strict=True)],
    "a dict of lists": lambda folder: {"img": pictures(), "caption": [*COLOURS]},
    "pandas": lambda folder: pd.DataFrame({"image": pictures(), "caption": COLOURS}),
    "pandas with paths": lambda folder: pd.DataFrame(
        {"image": [str(folder / f"{colour}.png") for colour in COLOURS], "text": COLOURS}
    ),
    "polars": lambda folder: pl.DataFrame({"image": [png(colour) for colour in COLOURS], "text": COLOURS}),
    "arrow": lambda folder: pa.table(cells(text=COLOURS)),
    "arrays": lambda folder: [(np.asarray(image), text) for image, text in zip(pictures(), COLOURS, strict=True)],
    "Pairs": lambda folder: Pairs({"image": pictures(), "text": COLOURS}, "mine", range(4)),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", TABLES)
def test_objects_in_memory_are_tables(name: str, expected: list[tuple[bytes, str]], tmp_path: Path) -> None:
    pairs = read_pairs(TABLES[name](tmp_path / "plain"), BOTH)
    assert pairs.columns["text"] == COLOURS
    assert [read_image(item).getpixel((0, 0)) for item in pairs.columns["image"] if item is not None] == [
        image.getpixel((0, 0)) for image in pictures()
    ]


def test_several_captions_of_an_object_in_memory_are_rows_of_one_item() -> None:
    pairs = read_pairs({"image": pictures(), "text": [[colour, f"a {colour} square"] for colour in COLOURS]}, BOTH)
    assert len(pairs) == 8
    assert pairs.columns["image"][0] is not None
    assert content_hash(pairs.columns["image"][0]) == content_hash(pairs.columns["image"][1])  # type: ignore[arg-type]
    assert len({*pairs.columns["image"]}) == 4


@pytest.mark.parametrize("thing", [3, "text.txt", object(), [], [1, 2], [("a",), ("a", "b")], {"a": [1], "b": []}])
def test_what_is_no_table_is_refused_with_what_is(thing: Any) -> None:
    with pytest.raises(BridgekitError) as caught:
        open_table(thing)
    assert "DataFrame" in str(caught.value.remedy) or "path" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("value", "modality", "says"),
    [
        (3, "image", "cannot take a int as image"),
        (np.zeros((4, 4)), "image", "of shape (4, 4) and type float64"),
        (np.zeros(100, np.float32), "audio", "(samples, sample rate)"),
        (object(), "audio", "cannot take a object as audio"),
        (["a"], "text", "give a string"),
        (1.5, "motion", "a path or the bytes of a file"),
    ],
)
def test_a_wrong_type_is_refused_with_what_is_taken(value: object, modality: str, says: str) -> None:
    with pytest.raises(BridgekitError) as caught:
        as_item(value, modality, "row 3")
    assert says in str(caught.value)
    assert caught.value.where == "row 3"


@pytest.mark.parametrize("shape", [(8_000,), (2, 8_000), (8_000, 2)])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16])
def test_samples_in_memory_are_heard_as_they_are(shape: tuple[int, ...], kind: type) -> None:
    wave = 0.5 * np.sin(np.arange(8_000) * 0.1)
    samples = np.broadcast_to(wave if len(shape) == 1 or shape[0] == 2 else wave[:, None], shape)
    given = (samples * 32767).astype(kind) if kind is np.int16 else samples.astype(kind)
    for value in ((given, 16_000), {"array": given, "sampling_rate": 16_000}):
        heard = read_audio(as_item(value, "audio", "clip"), 16_000)
        np.testing.assert_allclose(heard, wave, atol=2e-4)


def test_a_bridge_embeds_classifies_and_finds_objects_in_memory(toy: object, tmp_path: Path) -> None:
    bridge = align(pairs=tone_table(tmp_path), out=tmp_path / "bridge", preset=QUICK, progress=False)
    clip = next((tmp_path / "clips").glob("*.wav"))
    samples, rate = soundfile.read(clip, dtype="float32")
    embedded = bridge.embed(audio=[(samples, rate), clip], text=["ant", "bee"])
    assert {name: (type(each), each.shape, each.dtype) for name, each in embedded.items()} == {
        "audio": (np.ndarray, (2, 32), np.float32),
        "text": (np.ndarray, (2, 32), np.float32),
    }
    np.testing.assert_allclose(embedded["audio"][0], embedded["audio"][1], atol=1e-5)
    chances = bridge.classify("audio", [(samples, rate), clip], ["ant", "bee", "cat"])
    assert chances.shape == (2, 3)
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-5)
    [hits] = bridge.search("audio", (samples, rate), "text", ["ant", "bee"], k=1)
    assert hits[0].item in ("ant", "bee")
    with pytest.raises(BridgekitError, match="cannot take a int as audio"):
        bridge.embed(audio=[3])


def test_a_bridge_is_shown_on_one_line(toy: object, tmp_path: Path) -> None:
    bridge = align(pairs=tone_table(tmp_path), out=tmp_path / "bridge", preset=QUICK, progress=False)
    assert repr(bridge).startswith("Bridge(audio='toy:tone', text='toy:letters', dim=32, temperature=")
    assert "\n" not in repr(bridge)
    assert len(repr(bridge)) < 120


def test_a_bridge_finds_the_column_again_that_the_user_named(
    run: Run, toy: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = tone_table(tmp_path)
    text = table.read_text().replace("audio,text", "recorded,words", 1)
    (tmp_path / "mine.csv").write_text(text)
    align(pairs="mine.csv", columns={"audio": "recorded", "text": "words"}, out="bridge", preset=QUICK, progress=False)
    assert len(Bridge.load("bridge").own_items("text")) > 10
    code, _, err = run("eval", "bridge", "--json")
    assert code == 0, err
    code, _, err = run("align", "--pairs", "mine.csv", "--column", "audio=recorded", "--column", "words")
    assert code == 2
    assert "MODALITY=NAME" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed_is_told(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0)
    with pytest.raises(BridgekitError):
        read_pairs(tmp_path / "shut", BOTH)


# ---- what comes after


def test_the_next_command_names_columns_and_items_that_can_be_typed(run: Run, toy: object, tmp_path: Path) -> None:
    rows = [(soundfile.read(tmp_path / clip), name) for clip, name in _clips(tone_table(tmp_path))]
    waves = []
    for (samples, rate), _ in rows:
        wave = io.BytesIO()
        soundfile.write(wave, samples, rate, format="FLAC")
        waves.append(wave.getvalue())
    pq.write_table(pa.table({"audio": waves, "words": [name for _, name in rows]}), tmp_path / "t.parquet")
    named = ("--column", "text=words")
    _, out, _ = run("check", "t.parquet", *named)
    assert out.splitlines()[-1] == "Next:   bridgekit align --pairs t.parquet --column text=words"
    code, out, err = run("align", "--pairs", "t.parquet", *named, "--no-report")
    assert code == 0, err
    [following] = [line for line in out.splitlines() if line.startswith("Next:")]
    code, out, err = run(*shlex.split(following.removeprefix("Next:   bridgekit ")))
    assert (code, "0." in out) == (0, True), err
    code, _, err = run("eval", "bridges/audio-text", "--pairs", "t.parquet", "--unseen")
    assert code == 0, err
    code, _, err = run("search", f"{tmp_path / 't.parquet'}, row 3, column audio")
    assert (code, "cannot be named alone" in err) == (2, True)
    (tmp_path / "t.parquet").rename(tmp_path / "moved.parquet")
    code, _, err = run("search", "owl", "--to", "audio")
    assert (code, "is not here" in err, "--among" in err) == (2, True, True)


def _clips(table: Path) -> list[tuple[str, str]]:
    return [tuple(line.split(",")[:2]) for line in table.read_text().splitlines()[1:]]  # type: ignore[misc]


def test_a_bridge_of_a_table_in_memory_asks_for_a_table(
    toy: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(str(tmp_path / clip), name) for clip, name in _clips(tone_table(tmp_path))]
    align("audio", "text", [("gone.wav", "x"), *rows], out=tmp_path / "bridge", preset=QUICK, write_report=False)
    assert "1 row was set aside, the first: row 1, audio: gone.wav: there is no such file" in capsys.readouterr().err
    bridge = Bridge.load(tmp_path / "bridge")
    with pytest.raises(BridgekitError, match="was in memory") as caught:
        bridge.own_items("text")
    assert "--among" in str(caught.value.remedy)
    found = bridge.embed("text", pd.Series(["ant", "bee"]))
    assert found.shape == (2, 32)


def test_two_columns_for_one_modality_are_named_together(run: Run, toy: object, tmp_path: Path) -> None:
    code, _, err = run("align", "--pairs", str(tone_table(tmp_path)), "--column", "text=a", "--column", "text=b")
    assert (code, "--column text=a,b" in err) == (2, True)
