"""The starter's text-to-image model: real weights, real pictures, and a judge that sees only pixels."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from bridgekit_starter import generator, openmoji

from bridgekit import load_encoder
from bridgekit.diffusion.models import DrawOptions, draw, open_model
from bridgekit.errors import PluginError
from bridgekit.image_models import ImageModel
from bridgekit.recipes.judge import open_gallery

NAMES = ["penguin", "red apple", "snowman", "guitar", "rainbow", "dog face", "fire", "helicopter", "umbrella", "banana"]


@pytest.fixture(scope="module")
def model() -> ImageModel:
    return open_model("starter:openmoji-64", "cpu")


def pictures(
    model: ImageModel,
    names: list[str],
    options: DrawOptions = DrawOptions(),  # noqa: B008  (frozen)
    seeds: list[int] | int = 0,
) -> list[np.ndarray]:
    conditioning = model.conditionings[0]
    return [np.asarray(picture) for picture in draw(model, conditioning, conditioning.encode(names), options, seeds=seeds)]


def test_it_is_the_default_model_and_runs_in_a_stock_pipeline(model: ImageModel) -> None:
    assert open_model(None, "cpu").name == model.name
    assert type(model.pipeline).__module__.startswith("diffusers.")
    assert model.pipeline.text_encoder is None


def test_most_names_it_was_trained_on_are_recognised_at_first_sight(
    model: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGEKIT_HOME", str(tmp_path / "home"))
    known = openmoji.pictures()
    shown = [picture for number, picture in enumerate(known) if number % 40 == 0 or picture.name in NAMES]
    rows = zip(openmoji._draw(shown), shown, strict=True)
    table = tmp_path / "gallery.csv"
    table.write_text("image,text\n" + "".join(f"{file},{picture.name}\n" for file, picture in rows), encoding="utf-8")
    gallery = open_gallery(str(table), device="cpu")
    conditioning = model.conditionings[0]
    ranks = gallery.ranks(draw(model, conditioning, conditioning.encode(NAMES)), NAMES)
    assert (ranks == 1).sum() >= 8


def test_the_same_seed_gives_the_same_picture_alone_and_in_a_batch(model: ImageModel) -> None:
    alone = pictures(model, ["penguin"], seeds=3)[0]
    batch = pictures(model, ["rainbow", "penguin", "fire"], seeds=[1, 3, 2])[1]
    assert np.abs(alone.astype(int) - batch.astype(int)).max() <= 3
    assert alone.shape == (64, 64, 3)


def test_guidance_changes_the_picture(model: ImageModel) -> None:
    plain, guided = (pictures(model, ["penguin"], DrawOptions(guidance=guidance))[0] for guidance in (1.0, 3.0))
    assert (plain != guided).any()


def test_a_frozen_side_of_the_starters_text_encoder_needs_no_conditioner(model: ImageModel) -> None:
    assert model.conditionings[0].takes_latents_of(load_encoder("starter:text", "cpu"))
    assert not model.conditionings[0].takes_latents_of(load_encoder("starter:image", "cpu"))


@pytest.mark.parametrize("change", ["flip", "remove"])
def test_weights_that_are_not_the_expected_ones_are_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(generator.FOLDER, folder)
    monkeypatch.setattr(generator, "FOLDER", folder)
    file = folder / "head.safetensors"
    if change == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.raises(PluginError, match="model is") as caught:
        generator.open_generator("cpu")
    assert "head.safetensors" in str(caught.value)
    assert caught.value.remedy
