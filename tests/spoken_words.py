"""A small real bridge of speech, words and pictures, and a voice that it never heard, for the tests of the server."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.shared import made_once

WORDS = re.split(
    r",\s+",
    """penguin, red apple, fire engine, cat, guitar, umbrella, rocket, mushroom, banana, bicycle, camera, crown, elephant,
    ghost, hammer, lemon, octopus, pizza, rabbit, scissors, snail, strawberry, trumpet, violin""",
)
VOICES = {"en-us+m3": "train", "en+f4": "train", "en-gb-x-rp+m1": "val"}
NEW_VOICE = "en-gb-x-gbclan+steph"


@dataclass(frozen=True)
class SpokenWords:
    """The bridge `spoken-words`.

    Arguments:
        home: the cache that has its latents.
        bridges: the folder that it is in.
        table: its table.
    """

    home: Path
    bridges: Path
    table: Path

    @property
    def bridge(self) -> Path:
        return self.bridges / "spoken-words"


@pytest.fixture(scope="session")
def spoken_words(tmp_path_factory: pytest.TempPathFactory) -> SpokenWords:
    """Twenty-four words in three voices, and their pictures, aligned, with a conditioner for the starter's model."""
    pytest.importorskip("bridgekit_starter")
    folder = made_once(tmp_path_factory, "spoken", _make)
    return _at(folder)


def _at(folder: Path) -> SpokenWords:
    return SpokenWords(folder / "home", folder / "bridges", folder / "words.csv")


def _make(folder: Path) -> None:
    from bridgekit_starter import openmoji, spoken

    from bridgekit import PRESETS, Input, align, generate
    from bridgekit.diffusion.conditioner import Fit, fit_conditioner

    made = _at(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRIDGEKIT_HOME", str(made.home))
        patch.setenv("BRIDGEKIT_OUTSIDE", "yes")
        patch.setattr("bridgekit.report.plots._png", lambda figure: b"not rendered")
        patch.setitem(fit_conditioner.__kwdefaults__ or {}, "fit", Fit(steps=200))
        preset = replace(PRESETS["default"], shared_dim=128)
        chosen = [picture for picture in openmoji.pictures() if picture.name in WORDS]
        picture = dict(zip([each.name for each in chosen], openmoji._draw(chosen), strict=True))
        clips = [spoken.Clip(word, voice, split) for word in WORDS for voice, split in VOICES.items()]
        with made.table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["audio", "text", "image", "split"])
            for clip, path in zip(clips, spoken._speak(clips), strict=True):
                writer.writerow([path, clip.name, picture[clip.name], clip.split])
        align(pairs=made.table, out=made.bridge, preset=preset, write_report=False, progress=False)
        generate(made.bridge, [Input("text", "cat")], out=folder / "cat.png", progress=False)


def say(word: str, path: Path, *, silence: float = 0.0) -> Path:
    """A WAV of a word in the voice that the bridge never heard, with so many seconds of silence around it."""
    from bridgekit_starter.voice import speak

    samples, rate = speak(word, NEW_VOICE, rate=165)
    quiet = np.zeros(int(silence * rate), dtype=np.int16)
    soundfile.write(path, np.concatenate([quiet, samples, quiet]), rate)
    return path
