"""`bridgekit generate` and `bridgekit eval --generate` as a new user sees them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bridgekit import Bridge
from bridgekit.bridge.bridge import Heard
from bridgekit.diffusion import painter
from bridgekit.diffusion.conditioner import Fit, fit_conditioner
from bridgekit.hookspecs import ImageGenerator, hookimpl
from tests.conftest import Run
from tests.painting import PicturePlugin, Workshop
from tests.toys import ToyPlugin, install

pytestmark = pytest.mark.usefixtures("picture_toys")
QUICK_FIT = Fit(steps=100, batch_size=32, noise=0.2)


@pytest.fixture
def ready(run: Run, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`run` where there is a bridge, and clips of an owl, a seal and a fox."""
    monkeypatch.setattr(painter, "fit_conditioner", partial(fit_conditioner, fit=QUICK_FIT))
    workshop.bridge(tmp_path / "bridges" / "audio-text")
    (tmp_path / "clips").mkdir()
    for name in ("fox", "owl", "seal"):
        shutil.copy(workshop.clip(name), tmp_path / "clips" / f"{name}.wav")
    return run


def test_a_clip_becomes_a_picture_and_json_tells_all_of_it(ready: Run, tmp_path: Path) -> None:
    code, out, err = ready("generate", "--audio", "clips/owl.wav", "--json")
    assert code == 0
    assert "bridges/audio-text" in err
    told = json.loads(out)
    assert told["bridge"] == "bridges/audio-text"
    [picture] = told["pictures"]
    assert (picture["file"], picture["inputs"], picture["seed"]) == ("owl.png", ["clips/owl.wav"], 0)
    assert [set(near) for near in picture["nearest"]] == [{"item", "similarity"}] * 3
    assert picture["nearest"][0]["item"] == "owl"
    assert (told["sheet"], told["set_aside"]) == (None, [])
    assert told["conditioner"]["items"] == 20
    assert 0 < told["conditioner"]["cosine"] <= 1
    assert told["conditioner"]["fitted"]
    story = json.loads(Image.open(tmp_path / "owl.png").info["bridgekit"])
    assert story["command"] == "bridgekit generate --audio clips/owl.wav --json"
    assert not json.loads(ready("generate", "--audio", "clips/owl.wav", "--json")[1])["conditioner"]["fitted"]


def test_the_output_names_the_nearest_captions_and_the_image_files(ready: Run, tmp_path: Path) -> None:
    code, out, _ = ready("generate", "--audio", "clips/owl.wav")
    assert code == 0
    assert "Fitted a conditioner on 20 captions" in out
    assert "Saved in bridges/audio-text/conditioners" in out
    assert "owl.png: nearest captions: owl (" in out
    (tmp_path / "clips" / "note.wav").write_text("not audio")
    code, out, err = ready("generate", "--audio", "clips", "-n", 2, "--seed", 5, "--out", "seen")
    assert code == 0
    assert "Fitted" not in out
    assert "set aside: " in err
    assert "note.wav" in err
    assert out.splitlines()[-1] == "Contact sheet: seen/sheet.png"
    assert len(list((tmp_path / "seen").iterdir())) == 7
    assert json.loads(Image.open(tmp_path / "seen" / "owl-1.png").info["bridgekit"])["seed"] == 6


def test_text_weights_prompt_and_gap_are_passed_on(ready: Run) -> None:
    heard = []
    for weights in ("20,1", "1,20"):
        inputs = ["--audio", "clips/owl.wav", "--text", "seal", "--weights", weights, "--gap", "none", "--prompt", "in oil"]
        code, out, _ = ready("generate", *inputs, "--json")
        assert code == 0
        heard.append(json.loads(out)["pictures"][0]["nearest"][0]["item"])
    assert heard == ["owl", "seal"]


def test_the_newest_bridge_with_the_inputs_modalities_is_used(ready: Run, workshop: Workshop, tmp_path: Path) -> None:
    workshop.bridge(tmp_path / "bridges" / "newer", "audio", "image")
    (tmp_path / "bridges" / "newer" / "bridge.json").touch()
    code, out, _ = ready("generate", "--text", "owl", "--json")
    assert code == 0
    assert json.loads(out)["bridge"] == "bridges/audio-text"


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no input": ([], ["no input given", "--audio"]),
    "no input for a named bridge": (["--bridge", "bridges/audio-text"], ["no input given", "--audio"]),
    "a missing clip": (["--audio", "gone.wav"], ["no such file", "gone.wav"]),
    "a missing bridge": (["--audio", "clips/owl.wav", "--bridge", "gone"], ["gone", "bridgekit align"]),
    "an empty folder": (["--audio", "bridges"], ["found no audio items"]),
    "too many weights": (["--audio", "clips/owl.wav", "--weights", "1,2"], ["--weights 1,2", "1 input"]),
    "weights that are none": (["--audio", "clips/owl.wav", "--weights", "loud"], ["--weights loud"]),
    "a weight of nothing": (["--audio", "clips/owl.wav", "--weights", "0"], ["must be positive"]),
    "an unknown gap": (["--audio", "clips/owl.wav", "--gap", "wide"], ["wide", "captions, mean, none"]),
    "an unknown model": (["--audio", "clips/owl.wav", "--model", "toy:patchs"], ["toy:patchs", "toy:patches"]),
    "a modality that no bridge has": (["--image", "clips/owl.wav"], ["no bridge for image"]),
    "a folder for one file": (["--audio", "clips", "--out", "all.png"], ["3 images", "all.png"]),
    "captions that are not there": (["--audio", "clips/owl.wav", "--captions", "gone.txt"], ["gone.txt"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message_with_exit_code_2(ready: Run, tmp_path: Path, mistake: str) -> None:
    arguments, expected = MISTAKES[mistake]
    code, out, err = ready("generate", *arguments)
    assert code == 2
    assert len(err[err.index("bridgekit: ") :].splitlines()) <= 3
    for part in expected:
        assert part in err
    assert not list(tmp_path.glob("*.png"))
    code, out, _ = ready("generate", *arguments, "--json")
    assert code == 2
    assert json.loads(out)["error"]["what"] in err


@pytest.mark.parametrize(
    "option", [["-n", "0"], ["--seed", "-1"], ["--seed", 2**70], ["--size", "1"], ["--prompt-weight", "2"]]
)
def test_an_option_out_of_range_is_refused(ready: Run, option: list[object]) -> None:
    code, _, err = ready("generate", "--audio", "clips/owl.wav", *option)
    assert code == 2
    assert str(option[0]) in err


def test_without_a_bridge_and_without_a_plugin_that_brings_one_the_remedy_is_to_train_one(run: Run, workshop: Workshop) -> None:
    code, out, err = run("generate", "--audio", workshop.clip("owl"))
    assert code == 2
    assert "no bridge for audio in ./bridges" in err
    assert "bridgekit align" in err
    assert not out


def test_a_bridge_that_comes_with_a_plugin_is_used_where_there_is_no_other(
    run: Run, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought = workshop.bridge(tmp_path / "elsewhere" / "hearing")
    monkeypatch.setattr("bridgekit.plugins.bundled_bridge", lambda: brought)
    monkeypatch.setattr(painter, "fit_conditioner", partial(fit_conditioner, fit=QUICK_FIT))
    code, out, err = run("generate", "--audio", workshop.clip("owl"))
    assert code == 0
    assert "Bridge: hearing (comes with bridgekit; bridgekit align trains your own)" in err
    assert "nearest captions: owl" in out
    assert run("generate", "--image", workshop.clip("owl"))[0] == 2, "it has no images"
    workshop.bridge(tmp_path / "bridges" / "own")
    assert "Bridge: bridges/own (the newest" in run("generate", "--audio", workshop.clip("owl"))[2]


def test_a_clip_unlike_anything_known_is_said_to_be_so(ready: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bridge, "heard", lambda bridge, modality, vectors, nearest: [Heard(False, 0.25)] * len(vectors))
    code, out, _ = ready("generate", "--audio", "clips/owl.wav")
    assert code == 0
    assert "a sound, not sure, nearest captions: owl" in out
    code, out, _ = ready("generate", "--audio", "clips/owl.wav", "--json")
    [picture] = json.loads(out)["pictures"]
    assert (picture["sure"], picture["speech"]) == (False, 0.25)
    code, out, _ = ready("search", "clips/owl.wav")
    assert "clips/owl.wav: not sure, the nearest are" in out
    [answer] = json.loads(ready("search", "clips/owl.wav", "--json")[1])
    assert answer["sure"] is False


def test_pictures_are_evaluated_between_two_bounds(ready: Run, workshop: Workshop) -> None:
    arguments = ["eval", "--generate", "--gallery", workshop.folder / "gallery.csv", "--limit", 6]
    code, out, _ = ready(*arguments, "--gap", "mean", "--gap", "none", "--json")
    assert code == 0
    records = json.loads(out)["generated"]
    assert [record["gap"] for record in records] == ["mean", "none", None, None]
    assert all((record["pictures"], record["candidates"]) == (6, 20) for record in records)
    assert records[2]["top1"] == 1.0
    code, out, _ = ready(*arguments)
    assert code == 0
    assert "on 6 images each, among 20 candidates" in out
    assert "audio (gap: captions)" in out
    assert "100.0" in next(line for line in out.splitlines() if line.startswith("the true caption"))


def test_plugins_lists_text_to_image_models(run: Run) -> None:
    assert "text-to-image toy:patches: eight patches of colour a caption" in run("plugins")[1]
    (toy,) = json.loads(run("plugins", "--json")[1])
    assert toy["image_generators"] == [{"name": "toy:patches", "description": "eight patches of colour a caption"}]


class Failing(ToyPlugin):
    @hookimpl
    def image_generators(self) -> list[ImageGenerator]:
        raise RuntimeError("out of paint")


class Confused(ToyPlugin):
    @hookimpl
    def image_generators(self) -> list[Any]:
        return ["toy:patches"]


@pytest.mark.parametrize(
    ("plugin", "problem"),
    [
        (Failing(), "image_generators() failed: RuntimeError: out of paint"),
        (Confused(), "image_generators() must return a list of ImageGenerator"),
    ],
)
def test_a_plugin_whose_models_cannot_be_listed_is_reported_and_its_encoders_still_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, plugin: object, problem: str
) -> None:
    install(monkeypatch, plugin)
    code, out, _ = run("plugins")
    assert code == 0
    assert f"PROBLEM: {problem}" in out
    assert "toy:tone" in out


def test_two_models_with_the_same_name_are_both_named_and_neither_is_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PicturePlugin(), PicturePlugin())
    for plugin in json.loads(run("plugins", "--json")[1]):
        assert not plugin["image_generators"]
        assert "'toy:patches' cannot be used" in plugin["problem"]


def test_without_any_model_the_message_names_a_package_that_has_one(ready: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin())
    code, _, err = ready("generate", "--audio", "clips/owl.wav")
    assert code == 2
    assert "no installed plugin has a text-to-image model" in err
    assert "bridgekit-starter" in err


def test_help_has_an_example(run: Run) -> None:
    code, out, _ = run("generate", "--help")
    assert code == 0
    assert "Example: bridgekit generate --audio clip.wav" in " ".join(out.split())
    assert "--json" in out
