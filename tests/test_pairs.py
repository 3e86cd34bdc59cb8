"""A table is read whole: every row is used, or set aside with a reason; rows with something in common stay together."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit.errors import BridgekitError
from bridgekit.hookspecs import PairSource
from bridgekit.pairs import Pairs
from bridgekit.tables.reading import open_table, read_items, read_pairs
from bridgekit.tables.splits import relation_keys, split_pairs

BOTH = ("audio", "text")
Rows = Sequence[Sequence["str | None"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a few files. Only their being there matters here."""
    (tmp_path / "clips").mkdir()
    for name in ("a.wav", "b.wav", "c.wav", "Köter 犬.wav"):
        (tmp_path / "clips" / name).write_bytes(b"x")
    return tmp_path


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def assert_linear(work: Callable[[int], None]) -> None:
    """Assert that ten times the rows take about ten times the CPU time; quadratic work would take a hundred times."""

    def seconds(rows: int) -> float:
        started = time.process_time()
        work(rows)
        return time.process_time() - started

    few = min(seconds(5_000) for _ in range(3))
    assert seconds(50_000) < 40 * few


def refusal(source: str | Path, modalities: Sequence[str] = BOTH) -> BridgekitError:
    """Why a table is refused; the error says where, and what to do."""
    with pytest.raises(BridgekitError) as caught:
        read_pairs(source, modalities)
    assert caught.value.where
    assert caught.value.remedy
    return caught.value


# ---- the same table in every format


def as_csv(folder: Path, header: Sequence[str], rows: Rows) -> Path:
    lines = [",".join('"' + (cell or "").replace('"', '""') + '"' for cell in row) for row in (header, *rows)]
    return write(folder / "table.csv", "\r\n".join(lines))


def as_tsv(folder: Path, header: Sequence[str], rows: Rows) -> Path:
    return write(folder / "table.TSV", "\n".join("\t".join(cell or "" for cell in row) for row in (header, *rows)) + "\n")


def as_json_lines(folder: Path, header: Sequence[str], rows: Rows) -> Path:
    lines = [json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=len(rows) % 2 == 0) for row in rows]
    return write(folder / "table.jsonl", "\n".join(lines) + "\n")


def as_parquet(folder: Path, header: Sequence[str], rows: Rows) -> Path:
    columns = {name: [row[at] for row in rows] for at, name in enumerate(header)}
    pq.write_table(pa.table(columns), folder / "table.parquet")
    return folder / "table.parquet"


@pytest.mark.parametrize(
    ("save", "first"), [(as_csv, 2), (as_tsv, 2), (as_json_lines, 1), (as_parquet, 1)], ids=["csv", "tsv", "jsonl", "parquet"]
)
def test_every_format_gives_the_same_pairs(folder: Path, save: Callable[..., Path], first: int) -> None:
    absolute = str(folder / "clips" / "b.wav")
    header = ["id", "text", "audio", "group", "split"]
    rows: Rows = [
        ["007", " a dog, barking ", "clips/a.wav", "yard", "Training"],
        ["", "¿un café? 犬 🐕", absolute, None, "VALIDATION"],
        ["9", "von hier", "clips/Köter 犬.wav", "yard", "Clotho"],
        ["9", None, "clips/c.wav", "yard", ""],
        ["9", "no file", "clips/missing.wav", "yard", ""],
        ["9", "von hier", "clips/Köter 犬.wav", "other", "test"],
        ["9", "last", "clips/c.wav", "12", None],
    ]
    path = save(folder, header, rows)
    pairs = read_pairs(path, BOTH)
    clips = folder / "clips"
    assert pairs.modalities == BOTH
    assert pairs.columns["audio"] == (clips / "a.wav", clips / "b.wav", clips / "Köter 犬.wav", clips / "c.wav")
    assert pairs.columns["text"] == ("a dog, barking", "¿un café? 犬 🐕", "von hier", "last")
    assert pairs.rows == (first, first + 1, first + 2, first + 6)
    assert pairs.split == ("train", "val", "clotho", "train")
    assert pairs.group == ("yard", "", "yard", "12")
    assert pairs.source == str(path)
    assert [(bad.row, bad.column) for bad in pairs.set_aside] == [
        (first + 3, "text"),
        (first + 4, "audio"),
        (first + 5, "audio"),
    ]
    hole, missing, repeated = pairs.set_aside
    assert "no item" in hole.reason
    assert missing.reason == "there is no such file"
    assert missing.item == str(clips / "missing.wav")
    assert repeated.reason == f"the same as row {first + 2}, in another split"


def test_columns_are_in_the_requested_order_and_others_are_ignored(folder: Path) -> None:
    path = write(folder / "t.csv", "text,nonsense,audio\na,{},clips/a.wav\n")
    assert read_pairs(path, ("audio", "text")).modalities == ("audio", "text")
    assert read_pairs(path, ("text", "audio")).modalities == ("text", "audio")


def test_a_relative_table_gives_absolute_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "clips" / "t.csv", "audio,text\na.wav,a\n")
    monkeypatch.chdir(folder)
    assert read_pairs("clips/t.csv", BOTH).columns["audio"] == (folder / "clips" / "a.wav",)


def test_a_third_column_may_have_holes(folder: Path) -> None:
    path = write(folder / "t.csv", "audio,text,image\nclips/a.wav,a,\n,b,clips/b.wav\nclips/c.wav,,\n,,\n")
    pairs = read_pairs(path, ("audio", "text", "image"))
    assert pairs.columns["image"] == (None, folder / "clips/b.wav")
    assert pairs.columns["audio"] == (folder / "clips/a.wav", None)
    assert [bad.row for bad in pairs.set_aside] == [4], "a row of empty cells is no row"


def test_one_file_may_have_many_captions(folder: Path) -> None:
    path = write(folder / "t.csv", "audio,text\nclips/a.wav,one\nclips/a.wav,two\nclips/b.wav,one\n")
    assert len(read_pairs(path, BOTH)) == 3


def test_folders_and_empty_files_in_a_cell_are_set_aside(folder: Path) -> None:
    (folder / "empty.wav").touch()
    long_name = "x" * 5_000
    rows = ["clips,a folder", "empty.wav,empty", "a\0b.wav,a NUL", f"{long_name},too long", "clips/a.wav,good"]
    lines = [json.dumps(dict(zip(BOTH, row.split(","), strict=True))) for row in rows]
    pairs = read_pairs(write(folder / "t.ndjson", "\n".join(lines)), BOTH)
    assert pairs.rows == (5,)
    reasons = [bad.reason for bad in pairs.set_aside]
    assert "folder" in reasons[0]
    assert "empty" in reasons[1]
    assert all("cannot be read" in reason for reason in reasons[2:])
    assert len(pairs.set_aside[3].item) <= 200


# ---- CSV as people and programs write it


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_csv_may_have_a_byte_order_mark_and_any_line_endings(folder: Path, bom: str, newline: str) -> None:
    path = write(folder / "t.csv", bom + newline.join(["audio,text", "clips/a.wav,a dog", "clips/b.wav,b", ""]))
    pairs = read_pairs(path, BOTH)
    assert pairs.columns["text"] == ("a dog", "b")
    assert pairs.rows == (2, 3)


def test_csv_cells_may_hold_quotes_commas_and_line_breaks(folder: Path) -> None:
    path = write(folder / "t.csv", 'audio,text\nclips/a.wav,"a ""dog"",\nand a cat"\nclips/b.wav,5" nails\nclips/x.wav,x\n')
    pairs = read_pairs(path, BOTH)
    assert pairs.columns["text"] == ('a "dog",\nand a cat', '5" nails')
    assert pairs.rows == (2, 3)
    assert [bad.row for bad in pairs.set_aside] == [4]


def test_blank_lines_are_skipped_and_counted(folder: Path) -> None:
    path = write(folder / "t.csv", "\naudio,text\n\nclips/a.wav,a\n,\n   \nclips/b.wav,b\n\n")
    assert read_pairs(path, BOTH).rows == (4, 7)


def test_numbers_in_csv_stay_as_they_are_written(folder: Path) -> None:
    (folder / "007").write_bytes(b"x")
    pairs = read_pairs(write(folder / "t.csv", "audio,text,group\n007,1e5,01\n"), BOTH)
    assert pairs.columns == {"audio": (folder / "007",), "text": ("1e5",)}
    assert pairs.group == ("01",)


def test_a_very_long_text_is_fine(folder: Path) -> None:
    text = "word " * 400_000
    for path in (
        write(folder / "t.csv", f"audio,text\nclips/a.wav,{text}\n"),
        write(folder / "t.jsonl", json.dumps({"audio": "clips/a.wav", "text": text})),
    ):
        assert read_pairs(path, BOTH).columns["text"] == (text.strip(),)


def test_empty_split_and_group_columns_are_ignored(folder: Path) -> None:
    pairs = read_pairs(write(folder / "t.csv", "audio,text,split,group\nclips/a.wav,a,,\n"), BOTH)
    assert pairs.split is None
    assert pairs.group is None


# ---- tables that are refused


def test_a_missing_column_is_named_with_the_existing_ones(folder: Path) -> None:
    error = refusal(write(folder / "t.csv", "audios,words,other\nclips/a.wav,a,b\n"))
    assert error.what == "the table has no column `audio`; its columns are `audios`, `words`, `other`"
    python = '(in Python: columns={"audio": "audios"})'
    assert error.remedy == f"name the column with the audio items, for example --column audio=audios {python}"
    error = refusal(write(folder / "t.csv", "audio,words,other\nclips/a.wav,a,b\n"))
    assert str(error.remedy).startswith("name the column with the text items: --column text=NAME (in Python")
    assert "text=txet" in str(refusal(write(folder / "t.jsonl", '{"audio": "clips/a.wav", "txet": "a"}')).remedy)


@pytest.mark.parametrize(
    ("audio", "text"), [("Audio", "TEXT"), ("sound", "caption"), ("audio_path", "Transcription"), ("wav", "label")]
)
def test_capitals_do_not_matter_and_one_obvious_guess_is_taken_and_printed(
    folder: Path, capsys: pytest.CaptureFixture[str], audio: str, text: str
) -> None:
    rows = "id\nclips/a.wav,a,1\nclips/b.wav,b,2\n"
    table = write(folder / "t.csv", f"{audio},{text},{rows}")
    assert open_table(table).modalities == ("audio", "text", "id")
    assert read_pairs(table, BOTH).columns == read_pairs(write(folder / "u.csv", f"audio,text,{rows}"), BOTH).columns
    said = capsys.readouterr().err
    assert (f"audio from the column `{audio}`" in said) == (audio != "Audio")
    assert (f"text from the column `{text}`" in said) == (text != "TEXT")


def test_two_possible_guesses_are_not_guessed_among(folder: Path) -> None:
    error = refusal(write(folder / "t.csv", "audio,caption,title\nclips/a.wav,a,b\n"))
    assert str(error.remedy).startswith("name the column with the text items, for example --column text=caption (in Python")
    pairs = read_pairs(folder / "t.csv", BOTH, columns={"text": "title"})
    assert pairs.columns["text"] == ["b"]


def test_several_columns_of_captions_make_a_row_of_each(folder: Path) -> None:
    """As in Clotho."""
    table = write(folder / "t.csv", "audio,caption_1,caption_2,id\nclips/a.wav,a,an a,1\nclips/b.wav,,a b,2\nclips/c.wav,,,3\n")
    for named in ("caption_1,caption_2", "caption_*"):
        pairs = read_pairs(table, BOTH, columns={"text": named})
        assert pairs.columns["text"] == ["a", "an a", "a b"]
        assert pairs.rows == [2, 2, 3]
        assert [row.row for row in pairs.set_aside] == [4]
    with pytest.raises(BridgekitError, match="no column `caption_1,caption_3`"):
        read_pairs(table, BOTH, columns={"text": "caption_1,caption_3"})


def test_a_column_named_for_no_modality_is_refused(folder: Path) -> None:
    table = write(folder / "t.csv", "audio,caption\nclips/a.wav,a\n")
    with pytest.raises(BridgekitError, match="which is no modality here") as caught:
        read_pairs(table, BOTH, columns={"caption": "text"})
    assert str(caught.value.remedy).startswith("did you mean text=caption?")


def test_a_column_that_the_user_names_wins_over_the_one_with_the_modalitys_name(folder: Path) -> None:
    table = write(folder / "t.csv", "audio,text,long\nclips/a.wav,a,an a\n")
    assert read_pairs(table, BOTH, columns={"text": "Long"}).columns["text"] == ["an a"]
    with pytest.raises(BridgekitError, match="no column `lnog`"):
        read_pairs(table, BOTH, columns={"text": "lnog"})


def test_a_list_of_captions_makes_a_row_of_each(folder: Path) -> None:
    lines = [
        '{"audio": "clips/a.wav", "text": ["a", "an a", ""]}',
        '{"audio": "clips/b.wav", "text": "b"}',
        '{"audio": "clips/c.wav", "text": []}',
    ]
    pairs = read_pairs(write(folder / "t.jsonl", "\n".join(lines)), BOTH)
    assert pairs.columns["text"] == ["a", "an a", "b"]
    assert [Path(str(item)).name for item in pairs.columns["audio"]] == ["a.wav", "a.wav", "b.wav"]
    assert pairs.rows == [1, 1, 2]
    assert [(row.row, row.column) for row in pairs.set_aside] == [(1, "text"), (3, "text")]
    with pytest.raises(BridgekitError, match="both have lists"):
        read_pairs(write(folder / "u.jsonl", '{"audio": ["clips/a.wav"], "text": ["a"]}'), BOTH)


def test_a_json_array_is_a_table(folder: Path) -> None:
    rows = '[{"audio": "clips/a.wav", "text": "a"}, {"audio": "clips/b.wav", "text": "b"}]'
    for text in (rows, f'{{"version": 1, "items": {rows}}}'):
        assert read_pairs(write(folder / "t.json", text), BOTH).columns["text"] == ["a", "b"]
    for text in ("[1]", "{}", '{"a": [], "b": []}', "[{]"):
        error = refusal(write(folder / "t.json", text))
        assert "JSON" in error.what
        assert "array of objects" in str(error.remedy)


def test_an_address_in_a_cell_is_told_not_to_be_fetched(folder: Path) -> None:
    pairs = read_pairs(write(folder / "t.csv", "audio,text\nhttps://example.org/a.wav,a\nclips/b.wav,b\n"), BOTH)
    assert [row.reason for row in pairs.set_aside] == ["URLs are not fetched: download the files and give their paths"]


def test_a_table_without_a_header_is_told_to_have_one(folder: Path) -> None:
    error = refusal(write(folder / "t.csv", "clips/a.wav,a\nclips/b.wav,b\n"))
    assert error.remedy == "the first row must name the columns: add a header, for example audio,text"


def test_a_media_file_given_as_a_table_is_told_to_be_none(folder: Path) -> None:
    error = refusal(folder / "clips" / "a.wav")
    assert error.what == "this is a file of audio, not a table"
    assert str(error.remedy).startswith("give a folder, or a table: .csv")


def test_other_separators_are_recognised(folder: Path) -> None:
    assert "commas" in str(refusal(write(folder / "t.csv", "audio;text\nclips/a.wav;a\n")).remedy)


def test_a_duplicate_column_is_refused(folder: Path) -> None:
    assert "several columns named `text`" in refusal(write(folder / "t.csv", "audio,text,text\nclips/a.wav,a,b\n")).what


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "ndjson"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_table_is_refused(folder: Path, suffix: str, content: str) -> None:
    assert "empty" in refusal(write(folder / f"t.{suffix}", content)).what


def test_a_table_with_only_a_header_is_refused(folder: Path) -> None:
    assert "no rows" in refusal(write(folder / "t.csv", "audio,text\n")).what
    assert "no rows" in refusal(as_parquet(folder, BOTH, [])).what


def test_a_missing_table_and_one_of_an_unknown_kind_are_refused(folder: Path) -> None:
    assert "no such table" in refusal(folder / "missing.csv").what
    assert "no such table" in refusal("c:missing.csv").what
    error = refusal(write(folder / "t.xlsx", "PK"))
    assert ".xlsx" in error.what
    assert ".csv" in str(error.remedy)
    assert "without an extension" in refusal(write(folder / "table", "audio,text")).what
    assert "cannot be read" in refusal("x" * 5_000).what


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_text_that_is_not_utf8_is_refused_with_its_row(folder: Path, suffix: str) -> None:
    rows = {
        "csv": "audio,text\nclips/a.wav,a dog\nclips/b.wav,un café\n",
        "tsv": "audio\ttext\nclips/a.wav\ta dog\nclips/b.wav\tun café\n",
        "jsonl": '\n{"audio": "clips/a.wav", "text": "a"}\n{"audio": "clips/b.wav", "text": "un café"}\n',
    }
    path = write(folder / f"t.{suffix}", rows[suffix].encode("latin-1"))
    error = refusal(path)
    assert error.where == f"{path}, row 3"
    assert error.remedy == "save the table as UTF-8"
    assert "UTF-8" in refusal(write(path, rows[suffix].encode("utf-16"))).what


@pytest.mark.parametrize("row", ["clips/b.wav", "clips/b.wav,a dog, barking"])
def test_a_row_with_more_or_fewer_cells_is_refused_with_its_number(folder: Path, row: str) -> None:
    path = write(folder / "t.csv", f'audio,text\nclips/a.wav,"a\nb"\n{row}\nclips/c.wav,c\n')
    error = refusal(path)
    assert error.where == f"{path}, row 3"
    assert "quotes" in str(error.remedy)


@pytest.mark.parametrize("cell", ['"never closed', '"closed" too early'])
def test_a_stray_quote_is_refused_where_it_stands(folder: Path, cell: str) -> None:
    path = write(folder / "t.csv", f"audio,text\nclips/a.wav,a\nclips/b.wav,{cell}\nclips/c.wav,c\nclips/c.wav,d\n")
    assert refusal(path).where == f"{path}, row 3"


@pytest.mark.parametrize(
    "line", ['{"audio": "clips/a.wav", ', "[1, 2]", "null", "audio,text", '{"audio": {"a": 1}, "text": "a"}', "[" * 100_000]
)
def test_a_malformed_line_of_json_is_refused_with_its_number(folder: Path, line: str) -> None:
    path = write(folder / "t.jsonl", f'{{"audio": "clips/a.wav", "text": "a"}}\n\n{line}\n')
    assert str(refusal(path).where).removesuffix(", column audio") == f"{path}, row 3"


def test_json_lines_may_omit_keys_and_have_any_values_elsewhere(folder: Path) -> None:
    lines = [
        '{"audio": "clips/a.wav", "text": 7, "extra": [1]}',
        '{"text": "b"}',
        '{"audio": "clips/b.wav", "text": "x\u2028y"}',
    ]
    pairs = read_pairs(write(folder / "t.jsonl", "\r\n".join(lines)), BOTH)
    assert pairs.columns["text"] == ("7", "x\u2028y")
    assert [bad.row for bad in pairs.set_aside] == [2]


def test_parquet_of_other_types(folder: Path) -> None:
    audio = pa.array(["clips/a.wav", "clips/b.wav"]).dictionary_encode()
    table = pa.table({"audio": audio, "text": pa.array(["a", "b"], pa.large_string()), "group": [1, None], "x": [b"", b"1"]})
    pq.write_table(table, folder / "t.parquet")
    pairs = read_pairs(folder / "t.parquet", BOTH)
    assert pairs.columns["text"] == ("a", "b")
    assert pairs.group == ("1", "")
    pq.write_table(pa.table({"audio": [{"start": 1}], "text": ["a"]}), folder / "t.parquet")
    assert refusal(folder / "t.parquet").where == f"{folder / 't.parquet'}, column audio"


def test_a_file_that_only_looks_like_parquet_is_refused(folder: Path) -> None:
    assert "not a Parquet file" in refusal(write(folder / "t.parquet", "audio,text\n" * 10)).what
    path = as_parquet(folder, BOTH, [["clips/a.wav", "a"]])
    write(path, path.read_bytes()[:-20])
    assert "not a Parquet file" in refusal(path).what


def test_a_table_of_which_no_row_can_be_used_is_refused_with_the_first_reason(folder: Path) -> None:
    error = refusal(write(folder / "t.csv", "audio,text\ngone.wav,a\nb.wav,b\n"))
    assert "none of the 2 rows" in error.what
    assert f"row 2: there is no such file: {folder / 'gone.wav'}" in error.what
    assert "relative to its own folder" in str(error.remedy)


# ---- class folders


def test_class_folders_give_files_with_the_folders_names(tmp_path: Path) -> None:
    names = ["dog_bark/2.WAV", "dog_bark/1.mp3", "dog_bark/notes.txt", "dog_bark/.hidden.wav", "Église-bell/x.flac"]
    for name in [*names, ".git/y.wav", "loose.wav", "dog_bark/deeper/z.wav", "empty class/readme.md"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    pairs = read_pairs(tmp_path, ("text", "audio"))
    assert pairs.columns == {
        "text": ("dog bark", "dog bark", "Église bell"),
        "audio": (tmp_path / "dog_bark/1.mp3", tmp_path / "dog_bark/2.WAV", tmp_path / "Église-bell/x.flac"),
    }
    assert pairs.rows == (1, 2, 3)
    assert pairs.split is None
    assert pairs == read_pairs(str(tmp_path), ("text", "audio"))


def test_class_folders_of_images_and_of_any_other_modality(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for name in ("1.jpg", "2.wav", "3.sensor"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    assert read_pairs(tmp_path, ("image", "text")).columns["image"] == (tmp_path / "cat/1.jpg",)
    assert len(read_pairs(tmp_path, ("sensor", "text"))) == 3


def test_an_empty_file_in_a_class_folder_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.wav").touch()
    (tmp_path / "cat" / "2.wav").write_bytes(b"x")
    pairs = read_pairs(tmp_path, BOTH)
    assert pairs.rows == (2,)
    assert pairs.set_aside[0].row == 1


def test_a_folder_without_class_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1.wav").write_bytes(b"x")
    assert "no class folders with audio files" in refusal(tmp_path).what
    (tmp_path / "cat").mkdir()
    assert "no class folders with audio files" in refusal(tmp_path).what
    (tmp_path / "cat" / "1.wav").write_bytes(b"x")
    assert "not audio with image" in refusal(tmp_path, ("audio", "image")).what


# ---- named sources


def test_a_plugins_source_is_found_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bridgekit.plugins

    clips = tuple(folder / "clips" / name for name in ("a.wav", "b.wav", "missing.wav"))
    built = Pairs({"audio": clips, "text": ("a", "b", "c"), "image": (None,) * 3}, "kit:yard", (1, 2, 3), ("Train", "dev", ""))
    source = PairSource("kit:yard", "a yard", BOTH, lambda: built)
    monkeypatch.setattr(bridgekit.plugins, "find_pair_source", {"kit:yard": source}.__getitem__)
    pairs = read_pairs("kit:yard", BOTH)
    assert pairs.columns == {"audio": clips[:2], "text": ("a", "b")}
    assert pairs.split == ("train", "val")
    assert [bad.row for bad in pairs.set_aside] == [3]
    assert "no column `sensor`" in refusal("kit:yard", ("audio", "sensor")).what


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(BridgekitError):
        read_pairs("no-such-plugin:nothing", BOTH)


def test_a_path_wins_over_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "kit:yard" / "dog").mkdir(parents=True)
    (folder / "kit:yard" / "dog" / "1.wav").write_bytes(b"x")
    assert read_pairs("kit:yard", BOTH).columns["text"] == ("dog",)


# ---- rows of a table


def test_take_picks_rows_in_the_requested_order(folder: Path) -> None:
    text = "audio,text,split,group\nclips/a.wav,a,train,g\nclips/b.wav,b,val,h\nclips/x.wav,x,,\nclips/c.wav,c,test,\n"
    pairs = read_pairs(write(folder / "t.csv", text), BOTH)
    some = pairs.take(np.array([2, 0]))
    assert some.columns["text"] == ("c", "a")
    assert some.rows == (5, 2)
    assert some.split == ("test", "train")
    assert some.group == ("", "g")
    assert some.set_aside == pairs.set_aside
    assert len(some) == 2
    assert len(pairs.take([])) == 0


def test_the_time_to_read_a_table_grows_with_its_rows_and_no_faster(folder: Path) -> None:
    def read(rows: int) -> None:
        lines = [f'clips/a.wav,"caption {row}, with a comma"' for row in range(rows)]
        path = write(folder / f"{rows}.csv", "audio,text\n" + "\n".join(lines))
        assert len(read_pairs(path, BOTH)) == rows

    assert_linear(read)


# ---- splits


def table(count: int, split: Sequence[str] | None = None, group: Sequence[str] | None = None) -> Pairs:
    """A table of n rows whose items do not matter, since `content` says which are the same."""
    items = tuple(f"text {row}" for row in range(count))
    files = tuple(Path(f"/{row}.wav") for row in range(count))
    return Pairs(
        {"audio": files, "text": items},
        "made up",
        tuple(range(2, count + 2)),
        None if split is None else tuple(split),
        None if group is None else tuple(group),
    )


def distinct(count: int) -> dict[str, list[int]]:
    return {"audio": list(range(count)), "text": list(range(count))}


@pytest.mark.parametrize("count", [10, 11, 25, 200, 1_000])
def test_a_table_without_splits_is_split_80_10_10(count: int) -> None:
    split = split_pairs(table(count), 0, distinct(count))
    assert len(split) == count
    assert split.count("val") == split.count("test") == round(count / 10)
    assert split.count("train") == count - 2 * round(count / 10)


def test_a_split_depends_on_the_seed_and_on_nothing_else() -> None:
    first = split_pairs(table(100), 0, distinct(100))
    assert first == split_pairs(table(100), 0, {name: np.array(ids) for name, ids in distinct(100).items()})
    assert first != split_pairs(table(100), 1, distinct(100))


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_fewer_than_ten_rows_are_too_few(count: int) -> None:
    with pytest.raises(BridgekitError, match=f"{count} rows? (is|are) too few to train on: at least 10"):
        split_pairs(table(count), 0, distinct(count))


def test_captions_may_repeat_across_splits() -> None:
    content = {"audio": list(range(40)), "text": [row % 2 for row in range(40)]}
    split = split_pairs(table(40), 0, content)
    assert split.count("val") == split.count("test") == 4


def test_rows_that_share_a_file_stay_together() -> None:
    content = {"audio": [row // 5 for row in range(100)], "text": list(range(100))}
    split = np.array(split_pairs(table(100), 3, content)).reshape(20, 5)
    assert (split == split[:, :1]).all()
    assert set(split[:, 0].tolist()) == {"train", "val", "test"}


def test_the_largest_component_is_not_held_out_if_smaller_ones_suffice() -> None:
    content = {"audio": [0] * 90 + list(range(1, 11)), "text": list(range(100))}
    for seed in range(20):
        split = split_pairs(table(100), seed, content)
        assert set(split[:90]) == {"train"}
        assert {"val", "test"} <= set(split)


def test_holes_and_empty_groups_do_not_connect_rows() -> None:
    content = {"audio": [-1] * 40, "text": list(range(40))}
    split = split_pairs(table(40, group=[""] * 20 + ["a", "b"] * 10), 0, content)
    assert split.count("val") == split.count("test") == 4


def test_a_table_whose_rows_are_all_connected_cannot_be_split() -> None:
    content = {"audio": [0] * 6 + [1] * 6, "text": list(range(12))}
    with pytest.raises(BridgekitError, match="share files or groups"):
        split_pairs(table(12), 0, content)
    with pytest.raises(BridgekitError, match="share files or groups"):
        split_pairs(table(12, group=["one"] * 12), 0, distinct(12))


def test_names_of_splits_are_accepted_in_any_case() -> None:
    names = ["Train", "TRAINING", "", " train "] * 3 + ["dev", "Valid", "VALIDATION", "val"] + ["Test", "clotho"]
    split = split_pairs(table(18, names), 0, distinct(18))
    assert split == ("train",) * 12 + ("val",) * 4 + ("test", "clotho")


def test_a_table_with_train_and_no_val_holds_out_a_tenth_of_train() -> None:
    names = ["train"] * 60 + ["test"] * 40
    content = {"audio": [row // 2 for row in range(100)], "text": list(range(100))}
    split = split_pairs(table(100, names), 0, content)
    assert split[60:] == ("test",) * 40
    assert split[:60].count("val") == 6
    assert split[:60:2] == split[1:60:2]


def test_a_table_without_a_train_split_cannot_be_learned_from() -> None:
    with pytest.raises(BridgekitError, match="no row is in the train split; the splits are test, val") as caught:
        split_pairs(table(12, ["test"] * 6 + ["val"] * 6), 0, distinct(12))
    assert "`train`" in str(caught.value.remedy)


def test_the_time_to_split_a_table_grows_with_its_rows_and_no_faster() -> None:
    def split(rows: int) -> None:
        content = {"audio": np.arange(rows) // 5, "text": np.arange(rows)}
        assert split_pairs(table(rows), 0, content).count("val") == rows // 10

    assert_linear(split)


ids = st.integers(-1, 12)
tables = st.integers(10, 40).flatmap(
    lambda n: st.tuples(
        st.lists(ids, min_size=n, max_size=n),
        st.lists(ids, min_size=n, max_size=n),
        st.lists(st.integers(-1, 3), min_size=n, max_size=n),
        st.none() | st.lists(st.sampled_from(["", "", "", "g", "h", "i"]), min_size=n, max_size=n),
        st.none() | st.lists(st.sampled_from(["", "train", "Training", "test", "other"]), min_size=n, max_size=n),
    )
)


def three_columns(count: int, group: list[str] | None, split: list[str] | None) -> Pairs:
    plain = table(count, split, group)
    return Pairs({**plain.columns, "image": plain.columns["audio"]}, plain.source, plain.rows, plain.split, plain.group)


def related(columns: Sequence[Sequence[int]], group: Sequence[str] | None, one: int, other: int) -> bool:
    """Whether two rows have something in common, by the definition."""
    same = any(column[one] == column[other] and column[one] >= 0 for column in columns)
    return same or (group is not None and group[one] == group[other] != "")


@settings(deadline=None, max_examples=200)
@given(tables, st.integers(0, 5))
def test_no_two_splits_share_a_file_or_a_group(
    columns: tuple[list[int], list[int], list[int], list[str] | None, list[str] | None], seed: int
) -> None:
    audio, image, text, group, given_split = columns
    pairs = three_columns(len(audio), group, given_split)
    content = {"audio": audio, "image": image, "text": text}
    try:
        split = split_pairs(pairs, seed, content)
    except BridgekitError:
        split = None
    if split is None:
        with pytest.raises(BridgekitError, match=r"share files|no row is in the train split"):
            split_pairs(pairs, seed, content)
        return
    assert len(split) == len(audio)
    assert split == split_pairs(pairs, seed, content)
    assert {"train", "val"} <= set(split)
    mine = range(len(audio))
    if given_split is None:
        assert set(split) == {"train", "val", "test"}
    else:
        free = ("", "train", "Training")
        assert all(name == old for name, old in zip(split, given_split, strict=True) if old not in free)
        mine = [row for row in mine if given_split[row] in free]  # type: ignore[assignment]
    for one in mine:
        for other in mine:
            if related((audio, image), group, one, other):
                assert split[one] == split[other]


@settings(deadline=None, max_examples=200)
@given(tables)
def test_relation_keys_agree_with_the_definition(
    columns: tuple[list[int], list[int], list[int], list[str] | None, list[str] | None],
) -> None:
    audio, image, text, group, _ = columns
    pairs = three_columns(len(audio), group, None)
    keys = relation_keys(pairs, {"text": text, "image": image, "audio": audio})
    assert keys.dtype == np.int64
    assert keys.shape == (len(audio), 3 + (group is not None))
    np.testing.assert_array_equal(keys[:, :3], np.stack([audio, text, image], axis=1))
    equal = ((keys[:, None] == keys[None]) & (keys[:, None] >= 0)).any(-1)
    wanted = [[related((audio, text, image), group, i, j) for j in range(len(audio))] for i in range(len(audio))]
    np.testing.assert_array_equal(equal, wanted)


def test_reading_a_table_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, bridgekit.pairs, bridgekit.media; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0


def test_items_are_read_from_a_column_a_folder_a_text_file_or_class_folders(tmp_path: Path) -> None:
    (tmp_path / "sounds" / "dog_bark").mkdir(parents=True)
    clip = tmp_path / "sounds" / "dog_bark" / "a.wav"
    clip.write_bytes(b"RIFF")
    (tmp_path / "sounds" / "notes.md").write_text("not a sound")
    (tmp_path / "words.txt").write_text("owl\n\n cat \nowl\n", encoding="utf-8")
    (tmp_path / "t.csv").write_text("audio,text\nsounds/dog_bark/a.wav,bark\nsounds/dog_bark/a.wav,woof\n")
    assert read_items(tmp_path / "sounds", "audio") == [clip]
    assert read_items(tmp_path / "sounds", "text") == ["dog bark"]
    assert read_items(tmp_path / "words.txt", "text") == ["owl", "cat"]
    assert read_items(tmp_path / "t.csv", "text") == ["bark", "woof"]
    assert read_items(tmp_path / "t.csv", "audio") == [clip]


def test_a_folder_with_nothing_to_read_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BridgekitError, match="found no image items"):
        read_items(tmp_path, "image")
