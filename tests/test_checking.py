"""`check_pairs` finds what is wrong with a table of real files, and nothing in a clean one."""

from __future__ import annotations

import shutil
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from bridgekit import BridgekitError, align, check_pairs
from bridgekit.checks.findings import Finding, TableReport
from bridgekit.encoders import Item
from bridgekit.latents.encode import encode_items
from bridgekit.plugins import load_encoder
from bridgekit.retrieval import random_recall, similar_pairs
from tests.test_evaluation import SHORT, with_splits
from tests.toys import NAMES, LetterEncoder, ToneEncoder, ToyPlugin, install, tone_table


def check(table: Path, *, latents: bool = False) -> TableReport:
    return check_pairs(table, latents=latents, progress=False)


def found(report: TableReport, kind: str, grade: str | None = None) -> list[Finding]:
    return [finding for finding in report.findings if finding.kind == kind and grade in (None, finding.grade)]


def add(table: Path, *rows: str) -> Path:
    with table.open("a") as file:
        file.writelines(row + "\n" for row in rows)
    return table


def copy(table: Path, clip: str, name: str) -> str:
    shutil.copyfile(table.parent / "clips" / clip, table.parent / "clips" / name)
    return f"clips/{name}"


# ---- a clean table


def test_a_clean_table_has_no_errors_or_warnings_and_shows_the_splits_align_would_make(tmp_path: Path) -> None:
    report = check(tone_table(tmp_path))
    assert not report.count("error")
    assert not report.count("warning")
    assert not report.own_splits
    assert {name: split.rows for name, split in report.splits.items()} == {"train": 96, "val": 12, "test": 12}
    assert report.splits["test"].distinct["audio"] == 12
    assert report.splits["train"].chance is None, "nobody is asked there"
    assert report.figures["audio"]["least seconds"] == pytest.approx(0.2, abs=0.01)
    assert report.figures["text"]["most characters"] == 5


def test_chance_recall_is_reported_for_each_direction(tmp_path: Path) -> None:
    report = check(with_splits(tone_table(tmp_path)))
    assert report.own_splits
    chance = report.splits["test"].chance
    assert chance is not None
    assert set(chance) == {"audio → text", "text → audio"}
    assert chance["audio → text"][1] == pytest.approx(1 / 20)
    assert chance["text → audio"][10] == pytest.approx(10 / 20)


# ---- rows and files


def test_rows_set_aside_are_counted_by_reason(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    for name in ("a.wav", "b.wav"):
        (tmp_path / "clips" / name).write_text("no sound")
    add(table, "clips/gone.wav,owl", "clips/lost.wav,owl", "clips/a.wav,owl", "clips/b.wav,owl", "clips/owl 0.wav,owl")
    reasons = found(check(table), "set aside", "warning")
    assert [finding.what.split(":")[0] for finding in reasons] == [
        "2 of 125 rows are set aside",
        "1 of 125 rows are set aside",
        "2 of 125 rows are set aside",
    ]
    assert "no such file" in reasons[0].what
    assert "the same as row 86" in reasons[1].what
    assert [item.split(",")[0] for item in reasons[2].items] == ["row 124", "row 125"]


def test_a_table_of_which_no_row_can_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("no sound")
    (tmp_path / "pairs.csv").write_text("audio,text\na.wav,owl\n")
    with pytest.raises(BridgekitError, match="no row of the table is usable"):
        check(tmp_path / "pairs.csv")


def test_silence_clipping_and_extreme_lengths_are_reported(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    hum = np.sin(np.arange(16_000) / 10)
    clips = {
        "zeros": np.zeros(16_000),
        "whisper": 0.0005 * hum,
        "soft": 0.002 * hum,
        "clipped": np.clip(3 * hum, -1, 1),
        "loud": 0.99 * hum,
        "long": 0.5 * np.tile(hum, 31),
        "short": 0.5 * hum[:1_500],
    }
    for name, wave in clips.items():
        soundfile.write(tmp_path / "clips" / f"{name}.wav", wave, 16_000)
    add(table, *(f"clips/{name}.wav,{name}" for name in clips), f"clips/owl 0.wav,{'long ' * 20}")
    report = check(table)
    (silence,), (clipping,) = found(report, "silence", "warning"), found(report, "clipping", "note")
    assert ["zeros.wav" in item or "whisper.wav" in item for item in silence.items] == [True, True]
    assert "peak -66 dBFS" in silence.items[1]
    assert ["clipped.wav" in item for item in clipping.items] == [True]
    lengths = {finding.what.split("items ")[1]: finding for finding in found(report, "length")}
    assert lengths["under 0.1 s"].grade == "warning"
    assert "short.wav" in lengths["under 0.1 s"].items[0]
    assert "long.wav" in lengths["over 30 s"].items[0]
    assert any("median of 0.2" in what and "s" in what for what in lengths)
    (text,) = (finding for what, finding in lengths.items() if "characters" in what)
    assert "(99 characters)" in text.items[0]


def test_single_colour_pictures_are_reported(tmp_path: Path) -> None:
    rows = ["image,text"]
    for number in range(12):
        pixels = np.full((16, 16, 3), 20 * number, np.uint8)
        if number > 1:
            pixels[0, 0] = 255
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,picture {number}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    (flat,) = found(check(tmp_path / "pairs.csv"), "one colour", "warning")
    assert [Path(item.split(": ")[1].split(" (")[0]).name for item in flat.items] == ["0.png", "1.png"]


def test_pictures_with_transparency_are_judged_as_encoders_see_them_on_white(tmp_path: Path) -> None:
    drawing = np.zeros((16, 16), np.uint8)
    drawing[4:12, 4:12] = np.arange(0, 256, 4).reshape(8, 8)
    clear, flat = np.zeros_like(drawing), np.full_like(drawing, 128)
    alphas = {"black drawing": (0, drawing), "white drawing": (255, drawing), "clear": (40, clear), "grey": (40, flat)}
    rows = ["image,text"]
    for name, (level, alpha) in alphas.items():
        grey = np.full_like(alpha, level)
        Image.fromarray(np.dstack([grey, grey, grey, alpha])).save(tmp_path / f"{name}.png")
        rows.append(f"{name}.png,{name}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    report = check(tmp_path / "pairs.csv")
    (one,), (white,) = found(report, "one colour", "warning"), found(report, "white on transparent", "warning")
    assert [item.split("image: ")[1].split("/")[-1] for item in one.items] == [
        "clear.png (fully transparent)",
        "grey.png (one colour)",
    ]
    assert white.what == "1 of 4 image files is white on a transparent background, which encoders see as white"
    assert white.remedy == "save them on a background of another colour"
    assert "white drawing.png" in white.items[0]


# ---- splits


def test_a_row_of_train_in_the_test_is_an_error_and_align_refuses_it_as_well(tmp_path: Path, toy: object) -> None:
    table = with_splits(tone_table(tmp_path))
    assert not check(table).count("error")
    add(table, copy(table, "owl 0.wav", "copy.wav") + ",owl,test")
    report = check(table)
    (leak,) = found(report, "leak", "error")
    assert report.findings[0] is leak, "the worst comes first"
    assert leak.items == ("row 122 (test) = row 86 (train)",)
    with pytest.raises(BridgekitError, match="row 122"):
        align(pairs=table, out=tmp_path / "bridge", preset=SHORT, progress=False)


def test_a_file_alone_in_two_splits_is_a_warning_and_a_text_a_note(tmp_path: Path) -> None:
    table = with_splits(tone_table(tmp_path))
    add(table, copy(table, "owl 0.wav", "copy.wav") + ",a bird of the night,test")
    report = check(table)
    assert not report.count("error")
    (leak,) = found(report, "file leak", "warning")
    assert leak.items == (f"row 122 (test), audio: {tmp_path}/clips/copy.wav",)
    (text,) = found(report, "text leak", "note")
    assert text.what == f"{len(NAMES)} texts of other splits also in train"


def test_a_row_whose_path_is_also_in_another_split_is_reported_as_such(tmp_path: Path) -> None:
    table = add(with_splits(tone_table(tmp_path)), "clips/owl 0.wav,owl,test", "clips/owl 0.wav,owl,train")
    told = [finding.what for finding in found(check(table), "set aside")]
    assert [what.endswith("in another split") for what in told] == [True, False]


def test_a_group_in_two_splits_is_a_note(tmp_path: Path) -> None:
    table = with_splits(tone_table(tmp_path))
    header, *rows = table.read_text().splitlines()
    groups = ["night" if "owl" in row else "" for row in rows]
    table.write_text("\n".join([f"{header},group", *(f"{row},{group}" for row, group in zip(rows, groups, strict=True))]))
    report = check(table)
    (leak,) = found(report, "group leak", "note")
    assert leak.items == ("group night: test, train, val",)
    assert report.splits["test"].groups == 1


def test_splits_that_bridgekit_makes_never_leak(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    add(table, *(copy(table, f"{name} 0.wav", f"copy of {name}.wav") + f",{name}" for name in NAMES))
    report = check(table)
    assert not found(report, "leak")
    assert not found(report, "file leak")
    (rows,) = found(report, "duplicate", "warning")
    assert len(rows.items) == len(NAMES)
    (files,) = found(report, "duplicate file", "note")
    assert len(files.items) == len(NAMES)


def test_what_align_cannot_split_or_tell_apart_is_an_error(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    rows = table.read_text().splitlines()
    table.write_text("\n".join(rows[:5]))
    assert "too few to train on" in found(check(table), "split", "error")[0].what
    table.write_text("audio,text\n" + "\n".join(row.split(",")[0] + ",sound" for row in rows[1:]))
    assert "same text" in found(check(table), "variety", "error")[0].what


# ---- latents, by real encoders


def test_items_with_the_same_real_latents_are_reported_and_the_latents_are_kept(tmp_path: Path) -> None:
    words = ["red dog", "blue cup", "old train", "wet apple", "tiny boat", "loud violin", "tall hat", "grey owl", "hot tea"]
    words += ["cold rain", "new car", "green hill"]
    header, *rows = with_splits(tone_table(tmp_path, copies=6)).read_text().splitlines()
    texts = [word for word in words for _ in range(6)]
    lines = [",".join([row.split(",")[0], text, row.split(",")[2]]) for row, text in zip(rows, texts, strict=False)]
    lines += [
        f"clips/toad {copy}.wav,{text},{split}" for copy, text, split in ((0, "GREY OWL", "test"), (1, "Hot Tea", "train"))
    ]
    table = tmp_path / "words.csv"
    table.write_text("\n".join([header, *lines]))
    report = check(table, latents=True)
    across, within = sorted(
        found(report, "near-duplicate"), key=lambda finding: "between train and another split" not in finding.what
    )
    assert "grey owl = row 74 (test), text: GREY OWL" in across.items[0]
    assert "hot tea = row 75 (train), text: Hot Tea" in within.items[0]
    assert 0.1 < report.figures["text"]["share of latents in common"] < 0.9
    assert report.figures["audio"]["share of latents in common"] > 0.8, "Whisper's pooled latents have most in common"
    again = encode_items(load_encoder("starter:text", "cpu"), words)
    assert again.encoded == 0


class Constant(LetterEncoder):
    """Nearly the same vector for all texts."""

    revision = "toy:constant@1"

    def encode(self, batch: list[Tensor]) -> Tensor:  # type: ignore[override]
        return 100 + 1e-3 * super().encode(batch)


def test_nearly_identical_latents_are_a_warning(tmp_path: Path, toy: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bridgekit.recipes.check.load_encoder", lambda name, device: Constant() if "letters" in name else ToneEncoder()
    )
    report = check(tone_table(tmp_path), latents=True)
    (constant,) = [finding for finding in found(report, "latents", "warning") if "text" in finding.what]
    assert "barely differ" in constant.what


def test_an_item_whose_latents_dwarf_all_others_is_reported(
    tmp_path: Path, toy: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loud(LetterEncoder):
        def prepare(self, item: Item) -> Tensor:
            return super().prepare(item) * {"owl": 1e10, "ant": 1e4}.get(str(item), 1)

    monkeypatch.setattr(
        "bridgekit.recipes.check.load_encoder", lambda name, device: Loud(revision="l") if "letters" in name else ToneEncoder()
    )
    (finding,) = found(check(tone_table(tmp_path), latents=True), "latents", "warning")
    assert finding.what.startswith("2 text items with latents far from all others")
    assert [item.rsplit(": ")[-1] for item in finding.items] == ["ant", "owl"]


def test_an_item_that_cannot_be_encoded_is_reported(tmp_path: Path, toy: object, monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(LetterEncoder):
        def encode(self, batch: list[Tensor]) -> Tensor:  # type: ignore[override]
            latents = super().encode(batch)
            latents[0] = torch.nan
            return latents

    monkeypatch.setattr(
        "bridgekit.recipes.check.load_encoder", lambda name, device: Picky(revision="p") if "letters" in name else ToneEncoder()
    )
    report = check(tone_table(tmp_path), latents=True)
    (finding,) = [finding for finding in found(report, "set aside") if "cannot be encoded" in finding.what]
    assert "not finite" in finding.items[0]


def test_without_any_plugin_everything_but_the_latents_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = with_splits(tone_table(tmp_path))
    add(table, copy(table, "owl 0.wav", "copy.wav") + ",owl,test")
    try:
        install(monkeypatch)
        report = check(table, latents=True)
    finally:
        install(monkeypatch, ToyPlugin())
    assert found(report, "leak", "error")
    assert {finding.what.split(" were")[0] for finding in found(report, "encoder", "note")} == {
        "the latents of audio",
        "the latents of text",
    }
    assert "dimensions" not in report.figures["audio"]


def test_a_named_encoder_that_is_not_installed_is_refused(tmp_path: Path, toy: object) -> None:
    with pytest.raises(BridgekitError, match="absent"):
        check_pairs(tone_table(tmp_path), "absent:model", "text", progress=False)


# ---- arithmetic


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=8))
def test_chance_is_the_mean_over_all_orders(links: list[tuple[int, int]]) -> None:
    unique = np.unique(np.array(links), axis=0)
    queries, answers = np.unique(unique[:, 0], return_counts=True)
    candidates = sorted(set(unique[:, 1].tolist()))
    for k, expected in random_recall(answers, np.full(len(queries), len(candidates)), (1, 2, 3)).items():
        hits = [
            bool({candidate for query, candidate in links if query == asked} & set(order[:k]))
            for asked in queries.tolist()
            for order in permutations(candidates)
        ]
        assert expected == pytest.approx(np.mean(hits))


def test_similar_pairs_are_found_in_every_tile_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    vectors[[7, 31, 49]] = vectors[3] * torch.tensor([[2.0], [0.5], [1.0]])
    vectors[11] = 0
    vectors[12] = 0
    monkeypatch.setattr("bridgekit.retrieval.TILE_NUMBERS", 300)
    pairs = [(one, other) for one, other, _ in similar_pairs(vectors, 0.9999, 100)]
    assert pairs == [(3, 7), (3, 31), (3, 49), (7, 31), (7, 49), (31, 49)]
    assert len(similar_pairs(torch.ones(50, 8), 0.9999, 20)) == 20
