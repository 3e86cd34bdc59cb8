"""Pictures on disk: PNG files that say how they were made, and contact sheets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridgekit.diffusion.sheets import LINE, TILE, contact_sheet, made_here, write_png


def plain(colour: str = "navy", side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


@pytest.mark.parametrize(("pictures", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (5, 3, 2), (10, 4, 3), (60, 6, 10)])
def test_a_sheet_has_about_as_many_columns_as_rows_and_six_at_most(pictures: int, columns: int, rows: int) -> None:
    sheet = contact_sheet([plain()] * pictures, [["owl", "heard"]] * pictures)
    assert sheet.size == (columns * (TILE + 8) + 8, rows * (TILE + 2 * LINE + 8) + 8)


def test_a_sheet_may_have_no_labels() -> None:
    assert contact_sheet([plain()] * 2, [[]] * 2).size == (2 * (TILE + 8) + 8, TILE + 16)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_pictures_of_any_size_and_kind_are_drawn_at_one_size_in_their_order(mode: str) -> None:
    pictures = [Image.new("RGB", (9, 9), "white").convert(mode), Image.new("RGB", (300, 20), "black").convert(mode)]
    sheet = np.asarray(contact_sheet(pictures, [[], []]))
    assert (sheet[8 : 8 + TILE, 8 : 8 + TILE] == 255).all()
    assert (sheet[8 : 8 + TILE, 16 + TILE : 16 + 2 * TILE] == 0).all()


@pytest.mark.parametrize("label", ["a very long name " * 20, "x" * 100_000, "鳥" * 500])
def test_a_line_too_long_for_its_tile_does_not_run_into_the_next(label: str) -> None:
    below = np.asarray(contact_sheet([plain()] * 2, [[label], [""]]))[8 + TILE : -8]
    assert (below[:, 8 : 8 + TILE] < 255).any()
    assert (below[:, 16 + TILE :] == 255).all()


@pytest.mark.parametrize("label", ["ふくろう", "сова", "🦉 owl", "بومة", "two\nlines", "tab\tbed", "", "caf\udce9", "\0"])
def test_any_text_can_be_a_label(label: str) -> None:
    assert contact_sheet([plain()], [[label, label]]).size == (TILE + 16, TILE + 2 * LINE + 16)


def test_a_sheet_needs_a_label_for_each_picture() -> None:
    with pytest.raises(ValueError):
        contact_sheet([plain()] * 2, [["owl"]])


def test_a_picture_keeps_its_metadata_and_its_pixels(tmp_path: Path) -> None:
    story = {"inputs": ["鳥.wav", "caf\udce9.wav"], "seed": 7, "nearest": [("owl", 0.5)], "prompt": None}
    write_png(plain("teal"), tmp_path / "deep" / "er" / "owl.png", story)
    read = Image.open(tmp_path / "deep" / "er" / "owl.png")
    assert json.loads(read.info["bridgekit"]) == {**story, "nearest": [["owl", 0.5]]}
    assert "鳥.wav" in read.info["bridgekit"]
    assert read.format == "PNG"
    assert np.array_equal(np.asarray(read), np.asarray(plain("teal")))


def test_a_picture_replaces_another_atomically(tmp_path: Path) -> None:
    for colour in ("teal", "navy"):
        write_png(plain(colour), tmp_path / "owl.png", {"colour": colour})
    assert json.loads(Image.open(tmp_path / "owl.png").info["bridgekit"]) == {"colour": "navy"}
    assert [path.name for path in tmp_path.iterdir()] == ["owl.png"]


def test_only_a_picture_of_bridgekits_may_be_overwritten(tmp_path: Path) -> None:
    write_png(plain(), tmp_path / "ours.png", {})
    plain().save(tmp_path / "theirs.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    free = {name: made_here(tmp_path / f"{name}.png") for name in ("ours", "gone", "theirs", "text", "folder")}
    assert free == {"ours": True, "gone": True, "theirs": False, "text": False, "folder": False}
