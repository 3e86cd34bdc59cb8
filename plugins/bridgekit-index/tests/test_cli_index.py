"""`bridgekit index` and `bridgekit search --index` as a user sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bridgekit_index import index as module
from bridgekit_index import lance
from bridges import pictures, real_bridge, toy_bridge, words

from bridgekit import Index
from bridgekit.hookspecs import Approximate
from tests.conftest import Run
from tests.toys import tone_table


@pytest.fixture
def toys(tmp_path: Path, toy: object) -> Path:
    """A table of 120 clips with their names, and a bridge of toy encoders in ./bridges."""
    toy_bridge().save(tmp_path / "bridges" / "audio-text")
    return tone_table(tmp_path)


def test_index_then_search_pictures_by_words_with_real_encoders(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = real_bridge()
    bridge.save(tmp_path / "bridges" / "shapes ü")
    monkeypatch.setattr(
        "bridgekit.bridge.bridge.load_encoder", lambda name, device, revision: bridge.encoder(name.partition(":")[2])
    )
    pictures(tmp_path)
    code, out, err = run("index", "pictures.csv", "--bridge", "bridges/shapes ü")
    assert code == 0, err
    assert "image: 24 rows, 24 new, 0 unchanged" in out
    assert "text: 24 rows, 24 new, 0 unchanged" in out
    assert "search: exact" in out
    assert "Index: bridges/shapes ü.index" in out
    assert "24 unchanged" in run("index", "pictures.csv", "--bridge", "bridges/shapes ü")[1]
    code, out, _ = run("search", "a red circle", "--index", "bridges/shapes ü.index", "--where", "split = 'test'", "-k", 3)
    assert code == 0
    assert out.count(".png") == 3
    assert "Among 6 rows of image that pass the filter: exact" in out
    code, out, _ = run("search", "pictures/red circle.png", "--index", "bridges/shapes ü.index", "--json", "-k", 2)
    told = json.loads(out)
    assert (told["to"], told["among"], told["search"]) == ("text", 24, {"exact": True})
    (answer,) = told["answers"]
    assert answer["query"] == "pictures/red circle.png"
    assert {"split", "Year", "code", "image"} <= answer["found"][0]["columns"].keys()


def test_the_hits_are_those_of_the_search_without_an_index(run: Run, toys: Path) -> None:
    run("index", "pairs.csv")
    for query, *to in (["owl", "--to", "audio"], ["clips/owl 0.wav"]):
        (plain,) = json.loads(run("search", query, *to, "--among", "pairs.csv", "-k", 4, "--json")[1])
        found = json.loads(run("search", query, *to, "--index", "bridges/audio-text.index", "-k", 4, "--json")[1])["answers"][0]
        assert [hit["item"] for hit in found["found"]] == [hit["item"] for hit in plain["found"]]


def test_an_index_remembers_its_bridge_wherever_it_lies(run: Run, toys: Path) -> None:
    assert run("index", "clips", "--out", "elsewhere/clips.index")[0] == 0
    code, out, err = run("search", "owl", "--index", "elsewhere/clips.index", "-k", 1)
    assert code == 0
    assert "Among 120 rows of audio: exact" in out
    assert "the newest" not in err, "no bridge had to be looked for"


def test_a_folder_lines_and_a_table_go_into_one_index(run: Run, toys: Path) -> None:
    Path("lines.txt").write_text("\n".join(words(7)))
    assert "audio: 120 rows" in run("index", "clips")[1]
    assert "text: 7 rows" in run("index", "lines.txt")[1]
    out = run("index", "pairs.csv", "--json")[1]
    tables = json.loads(out)["tables"]
    assert (tables["audio"]["new"], tables["audio"]["changed"]) == (0, 120), "the table says more of them"
    assert tables["text"]["rows"] == 27
    assert Path(json.loads(out)["index"]).name == "audio-text.index"


def test_vanished_rows_are_reported_and_prune_removes_them(run: Run, toys: Path) -> None:
    run("index", "pairs.csv")
    for clip in Path("clips").glob("owl *.wav"):
        clip.unlink()
    code, out, err = run("index", "pairs.csv")
    assert code == 0
    assert "6 rows of pairs.csv are no longer in it; --prune removes them" in out
    assert "6 rows were set aside" in err
    assert "114 rows, 0 new, 114 unchanged, 6 removed" in run("index", "pairs.csv", "--prune")[1]


def test_an_approximate_index_reports_its_recall(run: Run, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "APPROXIMATE_FROM", 300)
    Path("lines.txt").write_text("\n".join(words(400)))
    out = run("index", "lines.txt")[1]
    assert f"approximate ({module.KIND}), recall@10 against exact: " in out
    assert "for text queries" in out
    index = "bridges/audio-text.index"
    assert "approximate" in run("search", "red", "--index", index)[1]
    assert run("search", "red", "--index", index, "--exact")[1].splitlines()[-1] == "Among 400 rows of text: exact"
    told = json.loads(run("search", "red", "--index", index, "--json")[1])["search"]
    assert told["exact"] is False
    assert 0.5 < told["recall@10"]["text"] <= 1


def test_neither_an_index_nor_a_name_controls_the_terminal(run: Run, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil, shown = "\x1b]52;c;eA==\x07\u202e[bold]", "\\x1b]52;c;eA==\\x07\\u202e[bold]"
    monkeypatch.setattr(module, "APPROXIMATE_FROM", 300)
    lines = Path(f"{evil}.txt")
    lines.write_text("\n".join(words(400)))
    code, printed, err = run("index", lines, "--out", "x\u202e.index")
    assert code == 0, err
    lines.write_text("\n".join(words(390)))
    printed += run("index", lines, "--out", "x\u202e.index")[1]
    assert f"rows of {shown}.txt are no longer in it" in printed
    assert "Index: x\\u202e.index" in printed
    lance.write_approximate(Index.open("x\u202e.index")._tables["text"], Approximate(evil, 400, {evil: 0.5}))
    found = run("search", "red", "--index", "x\u202e.index")[1]
    assert f"approximate ({shown}), recall@10 against exact: 0.500 for {shown} queries" in found
    assert "\x1b" not in printed + found
    assert "\u202e" not in printed + found


MISTAKES = {
    "no index": (["search", "owl", "--index", "gone"], "there is no such folder"),
    "a filter without an index": (["search", "owl", "--where", "split = 'x'"], "name one with --index"),
    "among and an index": (
        ["search", "owl", "--index", "bridges/audio-text.index", "--among", "clips"],
        "do not apply to an index",
    ),
    "an unknown column": (["search", "owl", "--index", "bridges/audio-text.index", "--where", "colour = 'red'"], "`colour`"),
    "an unknown modality": (
        ["search", "owl", "--index", "bridges/audio-text.index", "--to", "image"],
        "the index has no image",
    ),
    "a modality that the bridge lacks": (["index", "clips", "--modality", "image"], "no modality 'image'"),
    "nothing to index": (["index", "nothing.csv"], "no such table"),
    "a folder without any": (["index", "bridges"], "found no text or audio"),
    "the bridge's own folder": (["index", "clips", "--out", "bridges/audio-text"], "not an index"),
    "another bridge": (["search", "owl", "--index", "bridges/audio-text.index", "--bridge", "other"], "another bridge"),
    "another bridge to add": (
        ["index", "clips", "--bridge", "other", "--out", "bridges/audio-text.index"],
        "or create another index for this one with --out",
    ),
    "a place that cannot be written": (["index", "clips", "--out", "/proc/x"], "/proc/x"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message_with_exit_code_2(run: Run, toys: Path, mistake: str) -> None:
    assert run("index", "pairs.csv")[0] == 0
    toy_bridge(seed=1).save("other")
    rows = Index.open("bridges/audio-text.index").rows("audio")
    arguments, told = MISTAKES[mistake]
    code, _, err = run(*arguments)
    assert code == 2
    assert told in err
    message = [line for line in err.splitlines() if line.strip()]
    message = message[next(at for at, line in enumerate(message) if line.startswith("bridgekit: ")) :]
    assert len(message) <= 3
    assert Index.open("bridges/audio-text.index").rows("audio") == rows


def test_help_has_an_example(run: Run) -> None:
    assert "Example: bridgekit index" in " ".join(run("index", "--help")[1].split())
    assert "--index clips.index" in " ".join(run("search", "--help")[1].split())
