"""A small real bridge that joins speech, words and pictures, and a voice that it never heard: what the server's tests serve."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

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
    """Twenty-four words in three voices, and their pictures, aligned with the default preset (about 15 s)."""
    pytest.importorskip("bridgekit_starter")
    from bridgekit_starter import openmoji, spoken

    from bridgekit import align

    folder = tmp_path_factory.mktemp("spoken")
    made = SpokenWords(folder / "home", folder / "bridges", folder / "words.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRIDGEKIT_HOME", str(made.home))
        chosen = [picture for picture in openmoji.pictures() if picture.name in WORDS]
        picture = dict(zip([each.name for each in chosen], openmoji._draw(chosen), strict=True))
        clips = [spoken.Clip(word, voice, split) for word in WORDS for voice, split in VOICES.items()]
        with made.table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["audio", "text", "image", "split"])
            for clip, path in zip(clips, spoken._speak(clips), strict=True):
                writer.writerow([path, clip.name, picture[clip.name], clip.split])
        align(pairs=made.table, out=made.bridge, progress=False)
    return made


def say(word: str, path: Path, *, silence: float = 0.0) -> Path:
    """A WAV of a word in the voice that the bridge never heard, with so many seconds of silence around it."""
    from bridgekit_starter.voice import speak

    samples, rate = speak(word, NEW_VOICE, rate=165)
    quiet = np.zeros(int(silence * rate), dtype=np.int16)
    soundfile.write(path, np.concatenate([quiet, samples, quiet]), rate)
    return path
