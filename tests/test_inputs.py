"""What `embed`, `search` and `generate` are given: files and texts of one modality, and folders and tables of them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from bridgekit import PRESETS, Bridge, BridgekitError
from bridgekit.bridge.bridge import Side
from bridgekit.diffusion import painter
from bridgekit.diffusion.conditioner import Fit, fit_conditioner
from bridgekit.recipes.inputs import read_inputs
from tests.conftest import Run
from tests.painting import Workshop

pytestmark = pytest.mark.usefixtures("picture_toys")


@pytest.fixture
def here(run: Run, workshop: Workshop, tmp_path: Path) -> Path:
    """A folder with clips, pictures, a table of both, and bridges of audio with text and with images."""
    workshop.bridge(tmp_path / "bridges" / "pictures", "audio", "image")
    workshop.bridge(tmp_path / "bridges" / "texts")
    for name in ("fox", "owl"):
        (tmp_path / "clips").mkdir(exist_ok=True)
        (tmp_path / "pics").mkdir(exist_ok=True)
        shutil.copy(workshop.clip(name), tmp_path / "clips" / f"{name}.wav")
        shutil.copy(workshop.folder / "seen" / f"{name}.png", tmp_path / "pics" / f"{name}.png")
    rows = ["image,audio,text", "pics/owl.png,clips/owl.wav,owl", "pics/fox.png,clips/gone.wav,fox"]
    (tmp_path / "all.csv").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path


def bridge_of(*modalities: str) -> Bridge:
    """A bridge that nothing is embedded with."""
    return Bridge({modality: Side(f"toy:{modality}", "1", 4, False) for modality in modalities}, {}, PRESETS["default"], 0.07)


def items_of(bridge: Bridge, *arguments: str, modality: str | None = None) -> tuple[str, list[str]]:
    found = read_inputs(bridge, arguments, modality, option="--from")
    return found.modality, [str(item) for item in found.items]


def test_a_folder_is_its_files_and_never_the_word_that_it_is_called(run: Run, here: Path) -> None:
    code, out, _ = run("embed", "pics", "--bridge", "bridges/pictures", "--json")
    embedded = json.loads(out)
    assert (code, embedded["modality"]) == (0, "image")
    assert [Path(record["item"]).name for record in embedded["embeddings"]] == ["fox.png", "owl.png"]
    code, out, _ = run("search", "clips", "--bridge", "bridges/texts", "-k", 1, "--json")
    assert [Path(answer["query"]).name for answer in json.loads(out)] == ["fox.wav", "owl.wav"]
    code, _, err = run("search", "pics", "--bridge", "bridges/texts")
    assert (code, err.splitlines()[0]) == (
        2,
        "bridgekit: the folder has no files of this bridge's modalities, audio and text",
    )


def test_the_name_of_a_folder_is_a_text_with_a_space(run: Run, here: Path) -> None:
    code, _, err = run("search", "clips", "--from", "text", "--bridge", "bridges/texts")
    assert (code, err.splitlines()[-1]) == (2, '  fix: for its name as a text, add a space, as in "clips "')
    assert items_of(bridge_of("audio", "text"), "clips ") == ("text", ["clips "])


def test_a_bridge_or_a_clip_given_for_a_text_is_refused_with_what_to_write(run: Run, here: Path) -> None:
    code, _, err = run("search", "bridges/texts", "an owl")
    assert (code, err.splitlines()[-3:]) == (
        2,
        ["bridgekit: this is a bridge, not an input", "  in: bridges/texts", "  fix: use it with --bridge bridges/texts"],
    )
    code, _, err = run("search", "clips/owl.wav", "--from", "text", "--bridge", "bridges/texts")
    assert (code, err.splitlines()[-1]) == (2, '  fix: for its name as a text, add a space, as in "clips/owl.wav "')
    assert run("search", "clips/owl.wav ", "--from", "text", "--bridge", "bridges/texts")[0] == 0


def test_a_table_is_one_of_its_columns_and_its_unusable_rows_are_set_aside(run: Run, here: Path) -> None:
    code, _, err = run("embed", "all.csv", "--bridge", "bridges/texts")
    assert (code, err.splitlines()) == (
        2,
        [
            "bridgekit: one modality at a time: this has audio and text",
            "  in: all.csv",
            "  fix: choose one with --modality audio or --modality text",
        ],
    )
    code, out, err = run("embed", "all.csv", "--modality", "audio", "--bridge", "bridges/texts", "--json")
    embedded = json.loads(out)
    assert [Path(record["item"]).name for record in embedded["embeddings"]] == ["owl.wav"]
    assert [(row["row"], row["reason"]) for row in embedded["set_aside"]] == [(3, "there is no such file")]
    assert run("embed", "all.csv", "--modality", "audio", "--bridge", "bridges/texts", "--strict")[0] == 2
    code, out, _ = run("search", "all.csv", "--from", "text", "--bridge", "bridges/texts", "-k", 1, "--json")
    assert [answer["query"] for answer in json.loads(out)] == ["owl", "fox"]
    # A file beside it says which column is meant.
    assert items_of(bridge_of("audio", "text"), "all.csv", "clips/fox.wav")[0] == "audio"


def test_a_folder_of_two_modalities_asks_which_is_meant(run: Run, here: Path) -> None:
    shutil.copy("clips/owl.wav", "pics/owl.wav")
    code, _, err = run("search", "pics", "--bridge", "bridges/pictures")
    assert (code, err.splitlines()) == (
        2,
        [
            "bridgekit: one modality at a time: this has audio and image",
            "  in: pics",
            "  fix: choose one with --from audio or --from image",
        ],
    )
    code, out, _ = run("search", "pics", "--from", "image", "--bridge", "bridges/pictures", "-k", 1, "--json")
    assert (code, len(json.loads(out))) == (0, 2)


def test_a_picture_and_a_text_are_refused_rather_than_one_of_them_set_aside(run: Run, here: Path) -> None:
    code, _, err = run("embed", "clips/owl.wav", "an owl", "--bridge", "bridges/texts")
    assert (code, err.splitlines()) == (
        2,
        [
            "bridgekit: one modality at a time, not audio and text",
            "  in: clips/owl.wav is audio, 'an owl' is text",
            "  fix: run the command once for each modality",
        ],
    )
    assert not Path("embeddings.safetensors").exists()
    code, _, err = run("search", "pics/owl.png", "--bridge", "bridges/texts")
    assert (code, err.splitlines()[0]) == (2, "bridgekit: this is image, and the bridge takes audio and text")


def test_a_misspelt_file_is_refused_with_the_one_that_was_meant(run: Run, here: Path) -> None:
    for arguments in (["embed", "clips/fox.wav", "clips/olw.wav"], ["embed", "an owl", "clips/olw.wav"]):
        code, _, err = run(*arguments, "--bridge", "bridges/texts")
        fix = "did you mean clips/owl.wav? If not, check the path, or add --modality text for a text"
        assert (code, err.splitlines()) == (
            2,
            ["bridgekit: there is no such file", "  in: clips/olw.wav", f"  fix: {fix}"],
        )
    code, _, err = run("search", "clips/olw.wav", "--from", "audio", "--bridge", "bridges/texts")
    assert (code, err.splitlines()[-1]) == (2, "  fix: did you mean clips/owl.wav? If not, check the path")
    assert run("search", "clips/olw.wav", "--from", "text", "--bridge", "bridges/texts")[0] == 0
    assert run("search", "clipz/", "--bridge", "bridges/texts")[0] == 2
    with pytest.raises(BridgekitError, match="no such file"):
        items_of(bridge_of("audio", "image"), "an owl")


def test_a_broken_file_ends_a_search_if_it_was_named_and_is_set_aside_in_a_folder(run: Run, here: Path) -> None:
    Path("clips/note.wav").write_text("not audio")
    code, out, err = run("search", "clips", "--bridge", "bridges/texts", "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    assert "1 row was set aside" in err
    assert "note.wav" in err
    code, _, err = run("search", "clips/note.wav", "clips/owl.wav", "--bridge", "bridges/texts")
    assert code == 2
    assert "note.wav" in err


def test_texts_are_the_lines_of_a_file_or_the_whole_of_another(here: Path) -> None:
    Path("names.txt").write_text("an owl\n\na fox\n", encoding="utf-8")
    Path("names.md").write_text("an owl\nand a fox\n", encoding="utf-8")
    bridge = bridge_of("audio", "text")
    assert items_of(bridge, "names.txt", "a seal") == ("text", ["an owl", "a fox", "a seal"])
    assert items_of(bridge, "names.md", modality="text") == ("text", ["an owl\nand a fox"])
    for text in ("an owl. " * 200, ""):  # no path, and not the current folder
        assert items_of(bridge, text) == ("text", [text])


def test_a_csv_file_may_be_an_item_of_a_plugins_modality(here: Path) -> None:
    Path("walk.csv").write_text("x,y\n1,2\n", encoding="utf-8")
    Path("walks.csv").write_text("motion,text\nwalk.csv,a walk\n", encoding="utf-8")
    bridge = bridge_of("motion", "text")
    assert items_of(bridge, "walk.csv") == ("motion", ["walk.csv"])
    assert items_of(bridge, "walks.csv", modality="motion") == ("motion", [str(here / "walk.csv")])
    with pytest.raises(BridgekitError, match="this has motion and text"):
        items_of(bridge, "walks.csv")
    with pytest.raises(BridgekitError, match="no column of this bridge's modalities, audio and text; its columns are `x`, `y`"):
        items_of(bridge_of("audio", "text"), "walk.csv")


def test_each_row_of_a_table_becomes_a_picture(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painter, "fit_conditioner", partial(fit_conditioner, fit=Fit(steps=50)))
    code, out, _ = run("generate", "--audio", "all.csv", "--bridge", "bridges/texts", "--out", "heard", "--json")
    made = json.loads(out)
    assert code == 0
    assert [Path(picture["file"]).name for picture in made["pictures"]] == ["owl.png"]
    assert [(Path(row["item"]).name, row["reason"]) for row in made["set_aside"]] == [("gone.wav", "there is no such file")]
    code, out, _ = run("generate", "--text", "all.csv", "--bridge", "bridges/texts", "--out", "read", "--json")
    assert [Path(picture["file"]).name for picture in json.loads(out)["pictures"]] == ["owl.png", "fox.png"]
