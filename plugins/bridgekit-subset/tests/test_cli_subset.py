"""`bridgekit subset`: training rows are selected, test rows stay, and `align` reads the table it writes."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from bridgekit import read_pairs
from tests.conftest import Run
from tests.toys import NAMES, tone_table

pytestmark = pytest.mark.usefixtures("toy")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def split_table(folder: Path) -> Path:
    """The table of tones with splits, groups and a custom column: four of the six clips of each name are training rows."""
    rows = rows_of(tone_table(folder))
    splits = ["train", "training", "", "TRAIN", "dev", "test"]
    lines = ["group,note,audio,text,split"]
    lines += [f"g{number % 7},n,{row['audio']},{row['text']},{splits[number % 6]}" for number, row in enumerate(rows)]
    table = folder / "pairs.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def test_help_has_an_example(run: Run) -> None:
    code, out, _ = run("subset", "--help")
    assert code == 0
    assert "Example: bridgekit subset" in " ".join(out.split())
    assert "--json" in out


def test_one_row_of_each_text_is_chosen_before_any_text_repeats(run: Run, tmp_path: Path) -> None:
    tone_table(tmp_path)
    code, out, _ = run("subset", "--pairs", "pairs.csv", "--k", 20)
    assert code == 0
    assert "Chose 20 of 120 rows by k-dpp on text latents (toy:letters)" in out
    assert "no `split` column" in out
    assert "bridgekit align --pairs chosen.csv" in out
    assert sorted(row["text"] for row in rows_of(tmp_path / "chosen.csv")) == sorted(NAMES)
    code, out, _ = run("subset", "--pairs", "pairs.csv", "--k", 30)
    assert "only 20 distinct text items" in out
    assert sorted(Counter(row["text"] for row in rows_of(tmp_path / "chosen.csv")).values()) == [1] * 10 + [2] * 10
    run("subset", "--pairs", "pairs.csv", "--k", 30, "--method", "uniform")
    assert len({row["text"] for row in rows_of(tmp_path / "chosen.csv")}) < 20


def test_only_training_rows_are_thinned(run: Run, tmp_path: Path) -> None:
    before = rows_of(split_table(tmp_path))
    code, out, _ = run("subset", "--pairs", "pairs.csv", "--k", 15, "--on", "audio")
    assert code == 0
    assert "15 of 80 rows" in out
    assert "Kept unchanged: 20 val, 20 test." in out
    after = rows_of(tmp_path / "chosen.csv")
    assert Counter(row["split"] for row in after) == {"train": 15, "val": 20, "test": 20}
    known = {row["audio"]: (row["text"], row["group"]) for row in before}
    assert all(known[row["audio"]] == (row["text"], row["group"]) for row in after)
    assert {row["audio"] for row in before if row["split"] in ("dev", "test")} <= {row["audio"] for row in after}
    assert list(after[0]) == ["audio", "text", "split", "group"], "columns that no plugin has an encoder for are left out"
    place = {row["audio"]: number for number, row in enumerate(before)}
    assert [place[row["audio"]] for row in after] == sorted(place[row["audio"]] for row in after), "in the table's order"


def test_align_reads_the_written_table_wherever_it_is(run: Run, tmp_path: Path) -> None:
    split_table(tmp_path)
    code, printed, _ = run("subset", "--pairs", "pairs.csv", "--k", 40, "--out", "elsewhere/deep/chosen.csv")
    assert code == 0
    assert "bridgekit align --pairs elsewhere/deep/chosen.csv --outside" in printed, "its clips lie outside its folder"
    assert run("align", "--pairs", "elsewhere/deep/chosen.csv")[0] == 2
    code, printed, err = run("align", "--pairs", "elsewhere/deep/chosen.csv", "--outside", "--json")
    assert code == 0, err
    provenance = json.loads(printed)["provenance"]
    assert provenance["rows"] == {"train": 40, "val": 20, "test": 20}
    assert provenance["set_aside"] == 0


@pytest.mark.parametrize("ending", ["tsv", "jsonl", "parquet"])
def test_other_formats_hold_the_same_rows(run: Run, tmp_path: Path, ending: str) -> None:
    split_table(tmp_path)
    tables = []
    for out in ("chosen.csv", f"chosen.{ending}"):
        assert run("subset", "--pairs", "pairs.csv", "--k", 40, "--out", out)[0] == 0
        tables.append(read_pairs(tmp_path / out, ("audio", "text")))
    assert tables[0].columns == tables[1].columns
    assert (tables[0].split, tables[0].group) == (tables[1].split, tables[1].group)


def test_json_reports_what_was_chosen_and_how(run: Run, tmp_path: Path) -> None:
    split_table(tmp_path)
    code, out, _ = run("subset", "--pairs", "pairs.csv", "--k", 15, "--on", "toy:tone", "--seed", 3, "--json")
    assert code == 0
    assert json.loads(out) == {
        "table": "chosen.csv",
        "method": "k-dpp",
        "encoder": "toy:tone",
        "modality": "audio",
        "seed": 3,
        "candidates": 80,
        "distinct": 80,
        "chosen": 15,
        "kept": {"val": 20, "test": 20},
        "set_aside": [],
    }


@pytest.mark.parametrize("method", ["k-dpp", "uniform"])
def test_the_same_command_writes_the_same_bytes_and_another_seed_different_ones(run: Run, tmp_path: Path, method: str) -> None:
    split_table(tmp_path)
    for out, seed in (("a.csv", 0), ("b.csv", 0), ("c.csv", 1)):
        assert run("subset", "--pairs", "pairs.csv", "--k", 30, "--method", method, "--seed", seed, "--out", out)[0] == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.csv", "b.csv", "c.csv"))
    assert a == b != c


def test_more_rows_than_there_are_means_all(run: Run, tmp_path: Path) -> None:
    tone_table(tmp_path)
    code, out, _ = run("subset", "--pairs", "pairs.csv", "--k", 1_000)
    assert code == 0
    assert "120 of 120 rows" in out
    assert "no more" in out
    assert len(rows_of(tmp_path / "chosen.csv")) == 120


def test_rows_that_cannot_be_encoded_are_not_candidates(run: Run, tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    (tmp_path / "clips" / "broken.wav").write_text("no sound")
    with table.open("a") as file:
        file.write("clips/broken.wav,owl\nclips/gone.wav,owl\n")
    code, out, err = run("subset", "--pairs", "pairs.csv", "--k", 1_000, "--on", "audio")
    assert code == 0
    assert "2 rows were set aside" in err
    assert "row 122, audio" in err
    assert "120 of 120" in out
    assert "broken" not in (tmp_path / "chosen.csv").read_text()
    assert len(json.loads(run("subset", "--pairs", "pairs.csv", "--k", 5, "--on", "audio", "--json")[1])["set_aside"]) == 2
    code, _, err = run("subset", "--pairs", "pairs.csv", "--k", 5, "--on", "audio", "--strict", "--out", "other.csv")
    assert code == 2
    assert "--strict" in err
    assert not (tmp_path / "other.csv").exists()


def without_text(folder: Path) -> None:
    (folder / "pairs.csv").write_text("audio,words\na.wav,owl\n")


def only_tests(folder: Path) -> None:
    table = tone_table(folder)
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0] + ",split", *(f"{line},test" for line in lines[1:])]))


def only_noise(folder: Path) -> None:
    (folder / "a.wav").write_text("no sound")
    (folder / "pairs.csv").write_text("audio,text\na.wav,owl\n")


MISTAKES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "a missing table": (lambda folder: None, ["--pairs", "gone.csv"], ["no such table", "gone.csv"]),
    "no column to choose by": (without_text, [], ["no column `text`", "`audio`, `words`"]),
    "an unknown method": (tone_table, ["--method", "dpp"], ["'dpp'", "k-dpp, uniform"]),
    "an unknown encoder": (tone_table, ["--on", "smell"], ["smell", "bridgekit plugins"]),
    "no rows to train on": (only_tests, [], ["train split", "pairs.csv"]),
    "nothing that can be encoded": (only_noise, ["--on", "audio"], ["cannot be used", "row 2", "a.wav"]),
    "an ending that is no table's": (tone_table, ["--out", "chosen.docx"], [".docx", ".csv"]),
    "the table itself": (tone_table, ["--out", "./pairs.csv"], ["would overwrite", "pairs.csv"]),
    "a place that cannot be written": (tone_table, ["--out", "/proc/x/chosen.csv"], ["cannot be written", "/proc/x"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message_with_exit_code_2(run: Run, tmp_path: Path, mistake: str) -> None:
    prepare, arguments, expected = MISTAKES[mistake]
    prepare(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.csv")}
    code, _, err = run("subset", "--k", 5, *(arguments if "--pairs" in arguments else ["--pairs", "pairs.csv", *arguments]))
    assert code == 2
    message = [line for line in err.splitlines() if line.strip()]
    assert message[0].startswith("bridgekit: ")
    assert len(message) <= 3
    for part in expected:
        assert part in err
    assert {path: path.read_bytes() for path in tmp_path.glob("*.csv")} == before


def test_choosing_zero_rows_is_refused(run: Run, tmp_path: Path) -> None:
    tone_table(tmp_path)
    assert run("subset", "--pairs", "pairs.csv", "--k", 0)[0] == 2
    assert not (tmp_path / "chosen.csv").exists()
