"""The OpenMoji pictures and their names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bridgekit_starter import openmoji
from bridgekit_starter.openmoji import Picture, _draw, everyday_names, make_missing, pictures, plain_name, slug, split_of
from PIL import Image

DOG, CHERRIES, JAPAN = Picture("dog face", "1F436"), Picture("cherries", "1F352"), Picture("flag of Japan", "1F1EF-1F1F5")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRIDGEKIT_HOME", str(tmp_path))
    return tmp_path


def test_there_are_about_1900_pictures_each_with_a_name_and_a_file_name_of_its_own() -> None:
    chosen = pictures()
    assert 1_800 <= len(chosen) <= 1_950
    assert len({picture.name.casefold() for picture in chosen}) == len(chosen)
    assert len({slug(picture.name) for picture in chosen}) == len(chosen)
    assert {DOG, CHERRIES, JAPAN} <= set(chosen)


def test_skin_tones_mirror_images_and_twins_are_left_out() -> None:
    names = {picture.name for picture in pictures()}
    assert not [name for name in names if "skin tone" in name or "facing right" in name]
    assert "person walking" in names
    assert "man walking" not in names


def test_every_twin_is_the_name_of_a_picture_that_would_otherwise_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = openmoji.TWINS
    monkeypatch.setattr(openmoji, "TWINS", frozenset())
    assert twins <= {picture.name for picture in pictures()}


def test_every_name_is_plain_words() -> None:
    plain = re.compile(r"[\w' -]+")
    assert [picture.name for picture in pictures() if not plain.fullmatch(picture.name)] == []


@pytest.mark.parametrize(
    ("label", "is_flag", "name"),
    [
        (":dog_face:", False, "dog face"),
        (":A_button_(blood_type):", False, "A button blood type"),
        (":UP!_button:", False, "up button"),
        (":ATM_sign:", False, "ATM sign"),
        (":keycap_#:", False, "keycap hash"),
        (":woman’s_hat:", False, "woman's hat"),
        (":Japan:", True, "flag of Japan"),
        (":St._Kitts_&_Nevis:", True, "flag of Saint Kitts and Nevis"),
        (":U.S._Virgin_Islands:", True, "flag of US Virgin Islands"),
    ],
)
def test_labels_become_words_that_can_be_read_and_spoken(label: str, is_flag: bool, name: str) -> None:
    assert plain_name(label, is_flag=is_flag) == name


def test_a_slug_is_plain_ascii() -> None:
    assert slug("flag of Côte d'Ivoire") == "flag-of-cote-divoire"


def test_names_split_about_80_10_10_and_stay_where_they_are() -> None:
    splits = [split_of(picture.name) for picture in pictures()]
    shares = {split: splits.count(split) / len(splits) for split in ("train", "val", "test")}
    assert shares == pytest.approx({"train": 0.8, "val": 0.1, "test": 0.1}, abs=0.025)
    # Written down, for a name that moved between splits would spoil every bridge trained before.
    assert [split_of(name) for name in ("dog face", "guitar", "cactus")] == ["train", "val", "test"]


def test_a_picture_is_224_pixels_square_on_white_and_not_blank() -> None:
    for path in _draw([DOG, CHERRIES, JAPAN]):
        pixels = np.asarray(Image.open(path).convert("RGBA"))
        assert pixels.shape == (224, 224, 4)
        assert (pixels[..., 3] == 255).all()
        assert (pixels[0, 0, :3] == 255).all()
        assert pixels[..., :3].std() > 20


def test_pictures_that_are_there_are_kept_and_only_missing_ones_are_drawn() -> None:
    dog, _ = _draw([DOG, CHERRIES])
    dog.write_bytes(b"kept")
    before = dog.stat().st_mtime_ns
    again, cherries = _draw([DOG, CHERRIES])
    assert (again.read_bytes(), again.stat().st_mtime_ns) == (b"kept", before)
    cherries.unlink()
    _draw([DOG, CHERRIES])
    assert cherries.is_file()
    assert sorted(path.name for path in dog.parent.iterdir()) == ["cherries.png", "dog-face.png"]


def test_the_pairs_hold_absolute_paths_names_and_splits(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmoji, "pictures", lambda: (DOG, CHERRIES))
    pairs = openmoji.build()
    assert pairs.source == openmoji.SOURCE.name == "starter:openmoji"
    assert set(pairs.columns) == set(openmoji.SOURCE.modalities)
    assert pairs.columns["text"] == ("dog face", "cherries")
    assert all(isinstance(path, Path) and path.is_absolute() and path.is_file() for path in pairs.columns["image"])
    assert all(cache in Path(str(path)).parents for path in pairs.columns["image"])
    assert pairs.split == (split_of("dog face"), split_of("cherries"))
    assert pairs.rows == (1, 2)


def test_every_everyday_name_is_listed_once_and_names_a_picture() -> None:
    listed = openmoji.EVERYDAY.read_text(encoding="utf-8").replace("\n\n", ",").split(",")
    assert len(listed) == len(everyday_names()) == len(set(everyday_names()))


def test_pictures_of_some_names_alone_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmoji, "pictures", lambda: (DOG, CHERRIES))
    assert openmoji.build({"cherries", "dragon"}).columns["text"] == ("cherries",)


def test_progress_goes_to_stderr_and_stdout_stays_clean(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridgekit.progress.PATIENCE", 0)
    make_missing("drawing", [(number, tmp_path / str(number)) for number in range(3)], lambda task: None)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("drawing: 0 of 3\n")


def test_importing_the_sources_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'soundfile', 'soxr', 'rich', 'emoji', 'resvg_py'}"
    program = f"import sys, bridgekit_starter.openmoji, bridgekit_starter.spoken; print({heavy} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"
