"""The judge of generated pictures: it sees pixels, counts ties as errors, and looks at held-out rows only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bridgekit import Bridge, BridgekitError, judge_generation
from bridgekit.bridge.bridge import Embedded
from bridgekit.diffusion import painter
from bridgekit.diffusion.conditioner import Fit, fit_conditioner
from bridgekit.latents.encoded import encode_pairs
from bridgekit.progress import silent
from bridgekit.recipes.judge import open_gallery, shares
from bridgekit.tables.reading import read_pairs
from bridgekit.tables.splits import split_pairs
from tests.conftest import tone
from tests.painting import Workshop
from tests.toys import NAMES

pytestmark = pytest.mark.usefixtures("picture_toys")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditioners fitted with two hundred small steps: enough for eight patches of colour."""
    fit = Fit(steps=200, batch_size=32, noise=0.2)
    monkeypatch.setattr(painter, "fit_conditioner", partial(fit_conditioner, fit=fit))


@pytest.fixture
def judged(workshop: Workshop, tmp_path: Path) -> Any:
    """`judge_generation` of the toy model on a bridge of sounds and names."""
    return partial(judge_generation, workshop.bridge(tmp_path / "bridge"), gallery=str(workshop.folder / "gallery.csv"))


def shown(workshop: Workshop, *names: str) -> list[Image.Image]:
    return [Image.open(workshop.folder / "seen" / f"{name}.png") for name in names]


# ---- the gallery


def test_the_true_picture_itself_comes_first(workshop: Workshop) -> None:
    gallery = open_gallery(str(workshop.folder / "gallery.csv"))
    assert gallery.names == NAMES
    assert gallery.ranks(shown(workshop, *NAMES), NAMES).tolist() == [1] * len(NAMES)


def test_another_names_picture_does_not_come_first(workshop: Workshop) -> None:
    gallery = open_gallery(str(workshop.folder / "gallery.csv"))
    pictures = shown(workshop, "owl", "ant")
    assert (gallery.ranks(pictures, ["ant", "owl"]) > 1).all()
    assert gallery.ranks(pictures, ["ant", "owl"], among=["ant", "owl"]).tolist() == [2, 2]
    assert gallery.ranks(pictures[:1], ["ant"], among=["ant"]).tolist() == [1]


def test_ties_count_against(workshop: Workshop, tmp_path: Path) -> None:
    lines = [
        f"{workshop.folder}/seen/{picture}.png,{name}" for name, picture in {"ant": "ant", "emmet": "ant", "owl": "owl"}.items()
    ]
    (tmp_path / "twins.csv").write_text("\n".join(["image,text", *lines]))
    gallery = open_gallery(str(tmp_path / "twins.csv"), outside=True)
    assert gallery.ranks(shown(workshop, "ant", "ant", "owl"), ["ant", "emmet", "owl"]).tolist() == [2, 2, 1]


def test_a_name_is_in_the_gallery_once_and_a_broken_picture_not_at_all(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("not a picture")
    seen = workshop.folder / "seen"
    lines = [f"{seen}/ant.png,ant", f"{seen}/owl.png,ant", f"{seen}/owl.png,owl", f"{tmp_path}/broken.png,fox"]
    (tmp_path / "some.csv").write_text("\n".join(["image,text", *lines]))
    gallery = open_gallery(str(tmp_path / "some.csv"), outside=True)
    assert (gallery.names, [file.name for file in gallery.files]) == (["ant", "owl"], ["ant.png", "owl.png"])


def test_shares_are_of_first_places_and_of_the_first_five() -> None:
    assert shares(torch.tensor([1, 2, 5, 6])) == {"top1": 0.25, "top5": 0.75}


# ---- whole evaluations


def test_sounds_are_judged_between_a_ceiling_and_a_floor(judged: Any) -> None:
    records = judged(gaps=["captions", "none"])
    assert [(record["made_from"], record["gap"]) for record in records] == [
        ("audio", "captions"),
        ("audio", "none"),
        ("the true caption", None),
        ("another caption", None),
    ]
    sounds, _, ceiling, floor = records
    assert all(record.keys() == {"made_from", "gap", "pictures", "candidates", "top1", "top5"} for record in records)
    assert all((record["pictures"], record["candidates"]) == (12, 20) for record in records)
    assert ceiling["top1"] == ceiling["top5"] == 1.0
    assert floor["top1"] == 0.0
    assert sounds["top1"] > 0.5
    assert judged(gaps=["captions", "none"]) == records


def test_a_frozen_text_side_needs_no_fitting(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painter, "fit_conditioner", None)
    folder = workshop.bridge(tmp_path / "bridge", frozen="text")
    sounds, ceiling, _ = judge_generation(folder, gallery=str(workshop.folder / "gallery.csv"))
    assert ceiling["top1"] == 1.0
    assert sounds["top1"] > 0.5


def test_the_gallery_may_be_the_queries_alone_and_their_number_limited(judged: Any) -> None:
    records = judged(among="queries", limit=3)
    assert all(record["pictures"] == 3 for record in records)
    assert all(1 <= record["candidates"] <= 3 for record in records)


def test_another_table_is_evaluated_whole_or_by_its_splits(judged: Any, workshop: Workshop, tmp_path: Path) -> None:
    clips = [f"{tone(tmp_path / 'new' / f'{name}.wav', 151 * 1.19**number)},{name}" for number, name in enumerate(NAMES)]
    (tmp_path / "foreign.csv").write_text("\n".join(["audio,text", *clips]))
    assert judged(pairs=str(tmp_path / "foreign.csv"), outside=True)[0]["pictures"] == 20
    split = [f"{line},{'train' if number else 'later'}" for number, line in enumerate(clips)]
    (tmp_path / "split.csv").write_text("\n".join(["audio,text,split", *split]))
    assert judged(pairs=str(tmp_path / "split.csv"), outside=True)[0]["pictures"] == 1
    assert judged(pairs=str(tmp_path / "split.csv"), outside=True, splits=["train", "val"])[0]["pictures"] == 19


def test_another_table_with_training_clips_is_refused(judged: Any, workshop: Workshop, tmp_path: Path) -> None:
    clips = [f"{workshop.clip(name)},{name}" for name in NAMES]
    (tmp_path / "seen.csv").write_text("\n".join(["audio,text", *clips]))
    with pytest.raises(BridgekitError, match="19 of 20 rows were seen in training"):
        judged(pairs=str(tmp_path / "seen.csv"), outside=True)
    assert judged(pairs=str(tmp_path / "seen.csv"), outside=True, unseen=True)[0]["pictures"] == 1


def test_only_held_out_rows_are_queries(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a row was set aside then, or a clip occurs under two names: both change the split."""
    rows = (workshop.folder / "pairs.csv").read_text().splitlines()
    (tmp_path / "note.wav").write_text("not audio")
    (tmp_path / "again.wav").write_bytes(workshop.clip("owl").read_bytes())
    moved = [f"{workshop.folder}/{row}" for row in rows[1:]]
    lines = [rows[0], f"{tmp_path}/note.wav,owl", f"{tmp_path}/again.wav,owl", *moved]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    folder = workshop.bridge(tmp_path / "bridge")
    story = json.loads((folder / "bridge.json").read_text())
    story["provenance"]["pairs"] = str(tmp_path / "pairs.csv")
    (folder / "bridge.json").write_text(json.dumps(story))
    asked: list[str] = []

    def embed(self: Bridge, modality: str, items: Sequence[Any], **options: Any) -> Embedded:
        if modality == "audio":
            asked.extend(map(str, items))
        return plain(self, modality, items, **options)

    plain = Bridge.embed_usable
    monkeypatch.setattr(Bridge, "embed_usable", embed)
    judge_generation(folder, gallery=str(workshop.folder / "gallery.csv"), outside=True)
    bridge = Bridge.load(folder)
    table = read_pairs(tmp_path / "pairs.csv", ("audio", "text"), outside=True)
    encoded = encode_pairs(table, {name: bridge.encoder(name) for name in ("audio", "text")}, silent)
    split = split_pairs(encoded.pairs, 0, encoded.ids)  # as `align` does
    held_out = [str(item) for item, name in zip(encoded.pairs.columns["audio"], split, strict=True) if name == "test"]
    assert sorted(asked) == sorted(held_out)


# ---- mistakes


def test_a_gallery_without_any_of_the_captions_is_reported(judged: Any, workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "others.csv").write_text(
        f"image,text\n{workshop.folder}/seen/owl.png,heron\n{workshop.folder}/seen/ant.png,bug\n"
    )
    with pytest.raises(BridgekitError, match="no rows to judge") as caught:
        judged(gallery=str(tmp_path / "others.csv"), outside=True)
    assert "--gallery" in str(caught.value)
    with pytest.raises(BridgekitError, match="no rows to judge"):
        judged(splits=["later"])


@pytest.mark.parametrize("options", [{"among": "all"}, {"gaps": ["wide"]}, {"judge": "audio"}, {"model": "toy:patchs"}])
def test_an_invalid_option_is_one_message(judged: Any, options: dict[str, Any]) -> None:
    with pytest.raises(BridgekitError):
        judged(**options)


def test_a_bridge_without_text_has_no_captions_to_judge_by(workshop: Workshop, tmp_path: Path) -> None:
    folder = workshop.bridge(tmp_path / "bridge", "audio", "image")
    with pytest.raises(BridgekitError, match="no modality 'text'"):
        judge_generation(folder, gallery=str(workshop.folder / "gallery.csv"))
