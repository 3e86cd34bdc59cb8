"""The server with toy encoders: no other plugin is needed to embed and to search."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bridgekit_app.state import AppState
from bridgekit_app.uploads import Input
from served import SMALL, served_bridges

from tests.conftest import Run
from tests.toys import NAMES, tone_table


@pytest.mark.usefixtures("toy")
def test_a_bridge_of_any_encoders_is_searched_and_without_a_model_nothing_is_drawn(run: Run, tmp_path: Path) -> None:
    tone_table(tmp_path)
    code, _, err = run("align", "--pairs", "pairs.csv")
    assert code == 0, err
    with served_bridges(Path("bridges")) as server:
        clip = (tmp_path / "clips" / "owl 0.wav").read_bytes()
        embedded = server.client.post("/embed", files={"audio": clip}, data={"text": "owl"}).json()
        assert sorted(each["modality"] for each in embedded["embeddings"]) == ["audio", "text"]
        [result] = server.client.post("/search", json={"text": "owl", "k": 3}).json()["results"]
        assert (result["to"], result["among"]) == ("audio", 120)
        assert result["found"][0]["item"].startswith("owl")
        assert server.client.get(result["found"][0]["media"]).headers["content-type"] == "audio/wav"
        answer = server.client.post("/generate", json={"text": "owl"})
        error = answer.json()["error"]
        assert (answer.status_code, error["what"]) == (404, "there is no text-to-image model")
        assert "pip install plugins/bridgekit-starter" in error["fix"]


@pytest.mark.usefixtures("toy")
def test_results_carry_captions_and_the_tables_other_columns_but_no_paths(run: Run, tmp_path: Path) -> None:
    with tone_table(tmp_path, copies=2).open(encoding="utf-8") as file:
        clips = [(row["audio"], row["text"]) for row in csv.DictReader(file)]
    others = [f"other {number}" for number in range(12)]
    with (tmp_path / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "text", "image", "original", "note", "empty", *others])
        for clip, name in clips:
            for number in range(7):
                note = "quiet" if number == 0 else "another row's"
                cells = [tmp_path / "originals" / "tape 1.wav", note, "", "x" * 1_000, *others[1:]]
                writer.writerow([clip, f"{name}, told {number} times", "picture.png", *cells])
    code, _, err = run("align", "--a", "audio", "--b", "text", "--pairs", "pairs.csv")
    assert code == 0, err
    with served_bridges(Path("bridges")) as server:
        answer = server.client.post("/search", json={"text": "owl, told 3 times", "to": ["audio", "text"], "k": 2})
        assert str(tmp_path) not in answer.text
        clip, text = (result["found"][0] for result in answer.json()["results"])
        name = clip["item"].split()[0]
        assert name in NAMES
        assert clip["captions"] == [f"{name}, told {number} times" for number in range(5)]
        assert list(clip["columns"]) == ["original", "note", *others[:6]]
        assert (clip["columns"]["original"], clip["columns"]["note"]) == ("tape 1.wav", "quiet")
        assert clip["columns"]["other 0"] == "x" * 239 + "…"
        assert text["item"] == "owl, told 3 times"
        assert (text["captions"], text["columns"]["note"]) == ([], "another row's")


@pytest.mark.usefixtures("toy")
def test_clips_inside_a_table_are_found_and_played_like_files(run: Run, tmp_path: Path) -> None:
    with tone_table(tmp_path).open(encoding="utf-8") as file:
        rows = [(tmp_path / row["audio"], row["text"]) for row in csv.DictReader(file)]
    clips = [{"bytes": clip.read_bytes(), "path": clip.name} for clip, _ in rows]
    pq.write_table(pa.table({"audio": clips, "text": [name for _, name in rows]}), tmp_path / "train.parquet")
    code, _, err = run("align", "--pairs", "train.parquet")
    assert code == 0, err
    shutil.rmtree(tmp_path / "clips")
    with served_bridges(Path("bridges")) as server:
        answer = server.client.post("/search", json={"text": "owl", "k": 3})
        assert str(tmp_path) not in answer.text
        found = answer.json()["results"][0]["found"][0]
        assert "owl" in found["item"]
        assert found["captions"] == ["owl"]
        played = server.client.get(found["media"])
        assert (played.status_code, played.headers["content-type"]) == (200, "audio/wav")


@pytest.mark.usefixtures("toy")
def test_names_that_are_not_utf_8_are_shown_with_escapes_and_found_by_them(run: Run, tmp_path: Path) -> None:
    tone_table(tmp_path)
    for number, clip in enumerate(sorted((tmp_path / "clips").iterdir())):
        odd = tmp_path / "sounds" / clip.name.split()[0] / os.fsdecode(b"caf\xe9 %d.wav" % number)
        odd.parent.mkdir(parents=True, exist_ok=True)
        try:
            clip.rename(odd)
        except OSError:
            pytest.skip("this file system takes Unicode names only")
    code, _, err = run("align", "--a", "audio", "--b", "text", "--pairs", "sounds")
    assert code == 0, err
    Path("bridges/audio-text").rename(os.fsdecode(b"bridges/caf\xe9"))
    with served_bridges(Path("bridges")) as server:
        [bridge] = server.client.get("/bridge").json()["bridges"]
        assert (bridge["name"], bridge["problem"]) == (r"caf\udce9", None)
        answer = server.client.post("/search", json={"text": "owl", "k": 3, "bridge": bridge["name"]})
        assert answer.status_code == 200
        json.loads(answer.content.decode("utf-8"))
        found = answer.json()["results"][0]["found"][0]
        assert found["item"].startswith(r"caf\udce9 ")
        assert server.client.get(found["media"]).headers["content-type"] == "audio/wav"


class Watched(OrderedDict[Any, Any]):
    """A dictionary that records which threads write it or walk through it."""

    made: ClassVar[list[Watched]] = []

    def __init__(self) -> None:
        super().__init__()
        self.threads = set[str]()
        self.made.append(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.threads.add(threading.current_thread().name)
        super().__setitem__(key, value)

    def __iter__(self) -> Iterator[Any]:
        self.threads.add(threading.current_thread().name)
        return super().__iter__()


@pytest.mark.usefixtures("toy")
def test_opening_a_bridge_again_leaves_alone_what_the_event_loop_writes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tone_table(tmp_path)
    code, _, err = run("align", "--pairs", "pairs.csv")
    assert code == 0, err
    monkeypatch.setattr("bridgekit_app.state.OrderedDict", Watched)
    texts = [Input("text", f"owl {number}", f"owl {number}") for number in range(20)]

    async def main() -> None:
        state = AppState(SMALL, Path("bridges"), warm=False)
        opened = await asyncio.to_thread(state.open)
        first = await state.embed(opened, texts)
        os.utime("bridges/audio-text/bridge.json", (1, 1))
        again = await asyncio.to_thread(state.open)
        assert again is not opened
        assert torch.equal(await state.embed(again, texts), first)
        state.close()

    asyncio.run(main())
    vectors = [each for each in Watched.made if any(isinstance(key, tuple) for key in each)]
    assert vectors
    assert all(each.threads == {threading.main_thread().name} for each in vectors)
    assert sum(map(len, vectors)) == 40
