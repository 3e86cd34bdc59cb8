"""Which rows are queries, which answers are correct, and what the gallery is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bridgekit import Bridge, align, bind
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.bridges import EvalOptions, evaluate_bridge
from bridgekit.evaluation.leaks import leaks
from bridgekit.evaluation.recall import evaluate_splits, split_recall
from bridgekit.evaluation.zero_shot import evaluate_zero_shot
from bridgekit.latents.encoded import EncodedPairs, encode_pairs
from bridgekit.pairs import Pairs
from bridgekit.progress import silent
from bridgekit.tables.reading import read_pairs
from bridgekit.tables.seen import FILE, TrainingRows
from bridgekit.tables.splits import split_pairs
from tests.conftest import Run, tone
from tests.test_align import QUICK
from tests.toys import NAMES, LetterEncoder, ToneEncoder, tone_table

SHORT = replace(QUICK, epochs=3)


class OtherLetters(LetterEncoder):
    """A second text-like modality, so that pairs of strings make a table."""


def table(left: list[str], right: list[str], split: list[str], group: list[str] | None = None) -> EncodedPairs:
    other = OtherLetters(modality="other", revision="toy:other@1")
    other_items = tuple(left)
    pairs = Pairs(
        {"other": other_items, "text": tuple(right)},
        "a test",
        tuple(range(2, 2 + len(left))),
        tuple(split),
        tuple(group) if group else None,
    )
    return encode_pairs(pairs, {"other": other, "text": LetterEncoder()}, silent)


def placed(encoded: EncodedPairs, other: dict[int, list[float]], text: dict[int, list[float]]) -> dict[str, Tensor]:
    """Embeddings given by row, arranged by item."""
    embedded = {}
    for modality, rows in (("other", other), ("text", text)):
        matrix = torch.zeros(len(encoded.latents[modality].matrix), 2)
        for row, vector in rows.items():
            matrix[encoded.ids[modality][row]] = torch.tensor(vector)
        embedded[modality] = matrix
    return embedded


def test_among_all_the_other_splits_distract_but_right_answers_that_training_saw_neither_count_nor_hinder() -> None:
    # Row 0 is the query. Row 1, in training, has the same text; row 2, in training, has another one.
    encoded = table(["q", "seen", "else"], ["name", "name", "stranger"], ["test", "train", "train"])
    rows = np.array([0])
    near_stranger = placed(encoded, {0: [1, 0], 1: [0, 1], 2: [0, 1]}, {0: [0.6, 0.8], 2: [0.9, 0.1]})
    assert split_recall(encoded, near_stranger, rows, "other", "text", "split").at[1] == 1
    assert split_recall(encoded, near_stranger, rows, "other", "text", "all").at[1] == 0
    # Backwards, a training clip that is also correct for the name is nearer: it is left out of the ranking.
    seen_nearer = placed(encoded, {0: [0.8, 0.6], 1: [1, 0], 2: [0, 1]}, {0: [1, 0], 2: [0, 1]})
    result = split_recall(encoded, seen_nearer, rows, "text", "other", "all")
    assert result.at[1] == 1
    assert result.candidates == 3


def test_rows_of_one_group_are_correct_answers_for_each_other() -> None:
    encoded = table(["a", "b"], ["one", "two"], ["test", "test"], ["g", "g"])
    crossed = placed(encoded, {0: [1, 0], 1: [0, 1]}, {0: [0, 1], 1: [1, 0]})
    assert split_recall(encoded, crossed, np.array([0, 1]), "other", "text").at[1] == 1
    alone = table(["a", "b"], ["one", "two"], ["test", "test"])
    assert split_recall(alone, crossed, np.array([0, 1]), "other", "text").at[1] == 0


def test_train_and_val_are_not_reported_and_every_other_split_is() -> None:
    encoded = table(list("abcd"), ["one", "two", "six", "ten"], ["train", "val", "night", "day"])
    records = evaluate_splits(encoded, encoded.pairs.split or (), lambda modality, matrix: matrix, "raw")
    assert {record["split"] for record in records} == {"night", "day"}
    assert {record["direction"] for record in records} == {"other → text", "text → other"}


def test_a_table_whose_every_row_is_bad_says_why() -> None:
    with pytest.raises(BridgekitError, match="row 2"):
        table([" ", " "], ["one", "two"], ["train", "test"])


# ---- rows that training saw


def with_splits(table: Path) -> Path:
    """The table with splits of its own: the copies 0 to 3 train, 4 is for validation and 5 for a test."""
    header, *rows = table.read_text().splitlines()
    names = {" 4.wav": "val", " 5.wav": "test"}
    split = [next((name for part, name in names.items() if part in row), "train") for row in rows]
    table.write_text("\n".join([f"{header},split", *(f"{row},{name}" for row, name in zip(rows, split, strict=True))]) + "\n")
    return table


def renamed(table: Path, folder: Path, names: dict[str, str] | None = None) -> Path:
    """A table of the same clips under other names in another folder, and perhaps with other texts."""
    folder.mkdir()
    lines = ["audio,text"]
    for number, row in enumerate(table.read_text().splitlines()[1:]):
        clip, text = row.split(",")[:2]
        shutil.copyfile(table.parent / clip, folder / f"{number}.wav")
        lines.append(f"{number}.wav,{(names or {}).get(text, text)}")
    (folder / "renamed.csv").write_text("\n".join(lines) + "\n")
    return folder / "renamed.csv"


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("split", ["test", "val", "night"])
def test_a_row_whose_bytes_are_in_train_too_is_refused_in_every_other_split(tmp_path: Path, split: str) -> None:
    table = with_splits(tone_table(tmp_path))
    shutil.copyfile(tmp_path / "clips" / "owl 0.wav", tmp_path / "clips" / "copy.wav")
    with table.open("a") as file:
        file.write(f"clips/copy.wav, owl ,{split}\n")
    with pytest.raises(BridgekitError, match=rf"1 row duplicates .* row 122 \({split}\) = row 86 \(train\)") as refusal:
        align(pairs=table, out=tmp_path / "bridge", preset=SHORT, progress=False)
    assert "bridgekit check" in str(refusal.value.remedy)
    assert not (tmp_path / "bridge").exists()


@pytest.mark.usefixtures("toy")
def test_a_test_row_that_chose_the_epoch_is_refused_and_a_text_or_a_file_that_repeats_is_not(tmp_path: Path) -> None:
    table = with_splits(tone_table(tmp_path))
    shutil.copyfile(tmp_path / "clips" / "owl 0.wav", tmp_path / "clips" / "copy.wav")
    plain = table.read_text()
    table.write_text(plain + "clips/copy.wav,an owl,test\n")
    align(pairs=table, out=tmp_path / "bridge", preset=SHORT, progress=False)
    shutil.copyfile(tmp_path / "clips" / "owl 4.wav", tmp_path / "clips" / "chosen.wav")
    table.write_text(plain + "clips/chosen.wav,owl,test\n")
    with pytest.raises(BridgekitError, match=r"row 122 \(test\) = row 90 \(val\)"):
        align(pairs=table, out=tmp_path / "other", preset=SHORT, progress=False)


@pytest.mark.usefixtures("toy")
def test_eval_refuses_the_bridges_own_table_once_a_row_of_train_was_copied_into_its_test(tmp_path: Path) -> None:
    table = with_splits(tone_table(tmp_path))
    bridge = align(pairs=table, out=tmp_path / "bridge", preset=SHORT, progress=False)
    shutil.copyfile(tmp_path / "clips" / "owl 0.wav", tmp_path / "clips" / "copy.wav")
    with table.open("a") as file:
        file.write("clips/copy.wav,owl,test\n")
    with pytest.raises(BridgekitError, match="row 122"):
        evaluate_bridge(bridge, EvalOptions())


@pytest.mark.usefixtures("toy")
def test_the_modality_being_bound_is_checked_for_leaks_too(tmp_path: Path) -> None:
    table = with_splits(tone_table(tmp_path))
    align(pairs=table, out=tmp_path / "bridge", preset=SHORT, progress=False)
    shutil.copyfile(tmp_path / "clips" / "owl 0.wav", tmp_path / "clips" / "copy.wav")
    noise = tmp_path / "noise.csv"
    rows = [row.split(",") for row in table.read_text().splitlines()[1:]]
    noise.write_text("text,other,split\n" + "".join(f"{text},{clip},{split}\n" for clip, text, split in rows))
    with noise.open("a") as file:
        file.write("owl,clips/copy.wav,test\n")
    opened = ToneEncoder(modality="other", revision="toy:other@1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bridgekit.recipes.bind.load_encoder", lambda name, device: opened)
        patch.setattr("bridgekit.recipes.bind.encoder_name", lambda name: "toy:other")
        with pytest.raises(BridgekitError, match=r"row 122 \(test\) = row 86"):
            bind(tmp_path / "bridge", "other", noise, progress=False)
        noise.write_text(noise.read_text().replace("owl,clips/copy.wav,test\n", ""))
        before = Bridge.load(tmp_path / "bridge").training_rows.marks
        bind(tmp_path / "bridge", "other", noise, progress=False)
    after = Bridge.load(tmp_path / "bridge").training_rows.marks
    assert np.isin(before, after).all()
    assert len(after) == 2 * len(before)


@pytest.mark.usefixtures("toy")
def test_where_bridgekit_splits_files_of_the_same_bytes_stay_together(tmp_path: Path) -> None:
    table = tone_table(tmp_path, copies=3)
    for clip in list((tmp_path / "clips").iterdir()):
        shutil.copyfile(clip, clip.with_name(f"copy of {clip.name}"))
    rows = table.read_text().splitlines()
    table.write_text("\n".join([*rows, *(row.replace("clips/", "clips/copy of ") for row in rows[1:])]))
    encoded = encode_pairs(read_pairs(table, ("audio", "text")), {"audio": ToneEncoder(), "text": LetterEncoder()}, silent)
    for seed in range(20):
        split = split_pairs(encoded.pairs, seed, encoded.ids)
        assert split[:60] == split[60:]
        assert set(split) == {"train", "val", "test"}
        assert not leaks(split, encoded.ids, encoded.contents)


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(st.tuples(st.integers(-1, 12), st.integers(-1, 12), st.integers(0, 3)), min_size=10, max_size=40),
    seed=st.integers(0, 5),
)
def test_where_bridgekit_splits_no_row_is_ever_in_two_splits(rows: list[tuple[int, int, int]], seed: int) -> None:
    ids = {name: np.array(each) for name, each in zip(("audio", "image", "text"), zip(*rows, strict=True), strict=True)}
    ids["audio"] = np.where((ids["audio"] < 0) & (ids["image"] < 0), 13, ids["audio"])
    contents = {name: [f"{name} {number}".encode() for number in range(14)] for name in ids}
    columns = {name: tuple(None if number < 0 else str(number) for number in each) for name, each in ids.items()}
    try:
        split = split_pairs(Pairs(columns, "a test", tuple(range(len(rows)))), seed, ids)
    except BridgekitError:
        return  # its rows share too much to be split
    assert not leaks(split, ids, contents)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.integers(-1, 2), st.integers(-1, 2), st.integers(0, 2), st.sampled_from(["train", "val", "test", "night"])
        ),
        min_size=1,
        max_size=12,
    )
)
def test_leaks_are_just_the_rows_all_of_whose_items_stand_in_one_row_of_an_earlier_split(
    rows: list[tuple[int, int, int, str]],
) -> None:
    names = ("audio", "image", "text")
    *columns, split = zip(*rows, strict=True)
    ids = {name: np.array(column) for name, column in zip(names, columns, strict=True)}
    ids["audio"] = np.where((ids["audio"] < 0) & (ids["image"] < 0), 3, ids["audio"])
    contents = {name: [f"{name} {number}".encode() for number in range(4)] for name in ids}

    def within(row: int, other: int) -> bool:
        return all(each[row] < 0 or each[row] == each[other] for each in ids.values())

    order = {"train": 0, "val": 1}
    expected = {
        row
        for row in range(len(rows))
        for other in range(len(rows))
        if order.get(split[other], 2) < order.get(split[row], 2) and within(row, other)
    }
    found = leaks(split, ids, contents)
    assert {row for row, _ in found} == expected
    assert all(within(row, other) and order.get(split[other], 2) < order.get(split[row], 2) for row, other in found)


@pytest.mark.usefixtures("toy")
def test_a_table_of_rows_that_training_saw_is_refused_whatever_the_files_are_called(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    align(pairs=table, out=tmp_path / "bridge", preset=SHORT, progress=False)
    bridge = Bridge.load(tmp_path / "bridge")
    for pairs in (table, renamed(table, tmp_path / "same"), renamed(table, tmp_path / "new", {"owl": "a bird of the night"})):
        with pytest.raises(BridgekitError, match="108 of 120 rows were seen in training") as refusal:
            evaluate_bridge(bridge, EvalOptions(pairs=pairs))
        assert "--unseen" in str(refusal.value.remedy)
    with pytest.raises(BridgekitError, match="108 of 120 rows were seen in training"):
        evaluate_zero_shot(bridge, EvalOptions(pairs=tmp_path / "new" / "renamed.csv"), ("{}",))


@pytest.mark.usefixtures("toy")
def test_unseen_evaluates_the_other_rows_and_counts_those_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = tone_table(tmp_path)
    trained = align(pairs=table, out=tmp_path / "bridge", preset=SHORT, progress=False)
    bridge = Bridge.load(tmp_path / "bridge")
    records, set_aside = evaluate_bridge(bridge, EvalOptions(pairs=renamed(table, tmp_path / "same"), unseen=True))
    assert len(set_aside) == 108
    assert {row.reason for row in set_aside} == {"seen in training"}
    own = [record for record in trained.metrics if record["method"] == trained.method("audio", "text")]
    assert len(own) == len(records)
    for mine, theirs in zip(own, records, strict=True):
        assert {**mine, "split": ""} == {**theirs, "split": ""}, "it is the bridge's own test, under other names"
    foreign = evaluate_zero_shot(bridge, EvalOptions(pairs=table, unseen=True), ("{}",))
    assert foreign.items == 12
    assert replace(foreign, set_aside=()) == evaluate_zero_shot(bridge, EvalOptions(), ("{}",))


@pytest.mark.usefixtures("toy")
def test_rows_with_repeated_texts_are_still_evaluated(tmp_path: Path) -> None:
    bridge = align(pairs=tone_table(tmp_path), out=tmp_path / "bridge", preset=SHORT, progress=False)
    for number, name in enumerate(NAMES):
        tone(tmp_path / "new" / f"{name}.wav", 151 * 1.19**number)
    (tmp_path / "new.csv").write_text("audio,text\n" + "".join(f"new/{name}.wav,{name}\n" for name in NAMES))
    records, set_aside = evaluate_bridge(bridge, EvalOptions(pairs=tmp_path / "new.csv"))
    assert records[0]["queries"] == len(NAMES)
    assert not set_aside
    assert evaluate_zero_shot(bridge, EvalOptions(pairs=tmp_path / "new.csv"), ("{}",)).items == len(NAMES)


@pytest.mark.usefixtures("toy")
def test_a_table_that_has_grown_sets_aside_test_rows_that_were_training_rows(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    bridge = align(pairs=table, out=tmp_path / "bridge", preset=SHORT, progress=False)
    assert not evaluate_bridge(bridge, EvalOptions())[1]
    for number in range(30):
        tone(tmp_path / "clips" / f"late {number}.wav", 200 + 7 * number)
    with table.open("a") as file:
        file.writelines(f"clips/late {number}.wav,late\n" for number in range(30))
    records, set_aside = evaluate_bridge(bridge, EvalOptions())
    assert {row.reason for row in set_aside} == {"seen in training"}
    assert len(set_aside) + records[0]["queries"] == 15


@pytest.mark.usefixtures("toy")
def test_train_is_evaluated_only_on_request(tmp_path: Path) -> None:
    table = with_splits(tone_table(tmp_path))
    bridge = align(pairs=table, out=tmp_path / "bridge", preset=SHORT, progress=False)
    for pairs in (None, table):
        records, _ = evaluate_bridge(bridge, EvalOptions(pairs=pairs, splits=["train"]))
        assert {record["split"] for record in records} == {"train"}
        assert records[0]["queries"] == 80
    assert evaluate_bridge(bridge, EvalOptions(pairs=table))[0][0]["queries"] == 20


@pytest.mark.usefixtures("toy")
def test_the_command_line_says_how_many_rows_training_saw_and_what_to_do(run: Run, tmp_path: Path) -> None:
    tone_table(tmp_path)
    run("align", "--pairs", "pairs.csv")
    code, out, err = run("eval", "--pairs", "pairs.csv", "--json")
    assert code == 2
    assert "108 of 120 rows were seen in training" in err
    assert "--unseen" in json.loads(out)["error"]["fix"]
    code, out, err = run("eval", "--pairs", "pairs.csv", "--unseen")
    assert code == 0
    assert "108 rows were set aside" in err
    assert "inflated" not in out
    (tmp_path / "bridges" / "audio-text" / FILE).unlink()
    code, out, _ = run("eval", "--pairs", "pairs.csv")
    assert code == 0, "a bridge of an older version does not tell"
    assert "metrics are inflated" in out


@pytest.mark.usefixtures("toy")
def test_training_rows_of_which_a_byte_has_changed_are_damage(tmp_path: Path) -> None:
    align(pairs=tone_table(tmp_path), out=tmp_path / "bridge", preset=SHORT, progress=False)
    file = tmp_path / "bridge" / FILE
    whole = file.read_bytes()
    for place in (3, 40, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(BridgekitError, match=f"damaged: {FILE}"):
            Bridge.load(tmp_path / "bridge")
    file.write_bytes(whole)
    assert len(Bridge.load(tmp_path / "bridge").training_rows.marks) == 2 * 108


def test_row_hashes_are_the_same_on_every_machine() -> None:
    ids = {"text": np.array([0]), "audio": np.array([0])}
    rows = TrainingRows.of(ids, {"text": [b"t" * 32], "audio": [b"a" * 32]}, np.array([0]))
    assert rows.marks.tolist() == [-2862523160435249147, 8866373048281210534], "bridges on disk hold them"


@pytest.mark.usefixtures("toy")
def test_an_embedding_that_is_not_finite_fails_only_its_item(tmp_path: Path) -> None:
    bridge = align(pairs=tone_table(tmp_path), out=tmp_path / "bridge", preset=SHORT, progress=False)

    class Loud(LetterEncoder):
        def prepare(self, item: object) -> Tensor:
            return super().prepare(str(item)) * (3e38 if item == "owl" else 1)

    loud = replace(bridge, _encoders={"text": Loud(revision="toy:loud@1")})
    embedded = loud.embed_usable("text", ["ant", "owl", "bee"])
    assert embedded.failed == {1: "its embedding is not finite"}
    assert embedded.vectors.isfinite().all()
    with pytest.raises(BridgekitError, match="not finite"):
        loud.embed("text", "owl")
