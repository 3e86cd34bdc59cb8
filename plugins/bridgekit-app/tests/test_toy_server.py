"""The server with toy encoders: no other plugin is needed to embed and to search."""

from __future__ import annotations

from pathlib import Path

import pytest
from served import served_bridges

from tests.conftest import Run
from tests.toys import tone_table


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
