"""`starter:spoken-words` and `starter:spoken-openmoji`: eSpeak NG says the names of OpenMoji pictures, once, into the cache."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bridgekit.hookspecs import PairSource
from bridgekit.pairs import Pairs
from bridgekit.storage.cache import cache_folder, write_atomically
from bridgekit_starter.openmoji import everyday_names, make_missing, pictures, slug, split_of
from bridgekit_starter.voice import speak

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Samples a second in a clip's file.
SAMPLE_RATE = 16_000

# Part of the cache folder's name. Increase it when the same voice would say the same name differently.
RECIPE = 1

# Six accents, four men (m) and four women (f). No training voice has the accent or the variant of a held-out voice.
TRAINING_VOICES = (
    "en-us+m3",
    "en-us+f2",
    "en+m7",  # plain `en` is British
    "en+f4",
    "en-gb-x-rp+m1",
    "en-gb-scotland+f1",
    "en-029+m4",  # Caribbean
    "en-gb-x-gbcwmd+f3",  # West Midlands
)
HELD_OUT_VOICES = ("en-us-nyc+m6", "en-gb-x-gbclan+steph")  # New York City; Lancaster

# Of `starter:spoken-words`: two men, two women, four accents. Its held-out voice is the one that is harder to recognise.
WORDS_VOICES = ("en-us+m3", "en+f4", "en-029+m4", "en-gb-scotland+f1")

# Silence kept before and after the speech, in seconds, and the largest sample that counts as silence (32,768 is full scale).
SILENCE = 0.1
QUIET = 32


@dataclass(frozen=True)
class Clip:
    """One name, spoken by one voice, and the split that it belongs to."""

    name: str
    voice: str
    split: str


def build() -> Pairs:
    """Every name, by eight training voices and two held-out ones: about 16,000 clips, 300 MB; see `_build`."""
    names = [picture.name for picture in pictures()]
    return _build(SOURCE.name, names, TRAINING_VOICES, HELD_OUT_VOICES)


def build_words() -> Pairs:
    """Everyday names, by four training voices and a held-out one: about 1,800 clips, 30 MB; see `_build`."""
    return _build(WORDS.name, everyday_names(), WORDS_VOICES, HELD_OUT_VOICES[1:])


def _build(source: str, names: Sequence[str], training_voices: Sequence[str], held_out_voices: Sequence[str]) -> Pairs:
    """The clips (columns `audio` and `text`), spoken where the cache lacks them. A row's group is its name.

    Clips are FLAC files, 16 kHz, mono. The same voice and name give the same file in every source. A build that was killed
    continues where it stopped.

    Splits: `train` and `val` (in two of the training voices), `test-voices` (training names in held-out voices) and
    `test-names` (held-out names, in four training voices). Names are held out as in `starter:openmoji`.
    """
    clips = _plan(names, training_voices, held_out_voices)
    return Pairs(
        columns={"audio": tuple(_speak(clips)), "text": tuple(clip.name for clip in clips)},
        source=source,
        rows=tuple(range(1, len(clips) + 1)),
        split=tuple(clip.split for clip in clips),
        group=tuple(clip.name for clip in clips),
    )


def _plan(names: Sequence[str], training_voices: Sequence[str], held_out_voices: Sequence[str]) -> list[Clip]:
    """Which voice says which name. Validation and held-out names get fewer voices, to save time."""
    voices_of: dict[str, list[tuple[str, Sequence[str]]]] = {
        "train": [("train", training_voices), ("test-voices", held_out_voices)],
        "val": [("val", training_voices[:2])],
        "test": [("test-names", training_voices[:4])],
    }
    return [Clip(name, voice, split) for name in names for split, voices in voices_of[split_of(name)] for voice in voices]


def _speak(clips: Sequence[Clip]) -> list[Path]:
    """The FLAC file of each clip, spoken if it is not there."""
    folder = cache_folder().absolute() / "starter" / f"spoken-openmoji-{RECIPE}"
    files = [folder / clip.voice / f"{slug(clip.name)}.flac" for clip in clips]
    make_missing("speaking", list(zip(clips, files, strict=True)), _write_clip)
    return files


def _write_clip(task: tuple[Clip, Path]) -> None:
    import soundfile

    clip, path = task
    samples = _say(clip.name, clip.voice)
    # FLAC is lossless and half as large as WAV. Encoded in memory, since libsndfile does not say why writing to a disk failed.
    content = io.BytesIO()
    soundfile.write(content, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    write_atomically(path, lambda aside: aside.write_bytes(content.getbuffer()))


def _say(name: str, voice: str) -> NDArray[np.int16]:
    """A name spoken by a voice, at the speed and pitch of `_manner`: 16 kHz samples of shape (n,), the same on every run."""
    import numpy as np
    import soxr

    rate, pitch, pitch_range = _manner(name, voice)
    samples, samples_a_second = speak(_spoken_form(name), voice, rate=rate, pitch=pitch, pitch_range=pitch_range)
    trimmed = _trim(samples, round(SILENCE * samples_a_second))
    resampled = soxr.resample(trimmed.astype(np.float32), samples_a_second, SAMPLE_RATE)
    whole: NDArray[np.int16] = np.clip(np.rint(resampled), -32_768, 32_767).astype(np.int16)
    return whole


def _manner(name: str, voice: str) -> tuple[int, int, int]:
    """The rate (130 to 200 words a minute), pitch and pitch range (35 to 65 of 100) at which a voice says a name."""
    draw = hashlib.sha256(f"{voice}:{name}".encode()).digest()
    fractions = [int.from_bytes(draw[i : i + 4], "big") / 2**32 for i in (0, 4, 8)]
    return 130 + int(71 * fractions[0]), 35 + int(31 * fractions[1]), 35 + int(31 * fractions[2])


def _spoken_form(name: str) -> str:
    """The name as eSpeak has to read it: it would take a lone A for the article."""
    return re.sub(r"\bA ", "A-", name)


def _trim(samples: NDArray[np.int16], margin: int) -> NDArray[np.int16]:
    """Cut silence at both ends down to at most `margin` samples."""
    import numpy as np

    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > QUIET)
    return samples[max(0, loud[0] - margin) : loud[-1] + 1 + margin] if loud.size else samples


SOURCE = PairSource(
    name="starter:spoken-openmoji",
    description="about 16,000 clips: eSpeak NG says all names of starter:openmoji in ten voices (names: Unicode License)",
    modalities=("audio", "text"),
    build=build,
)
WORDS = PairSource(
    name="starter:spoken-words",
    description="1,801 clips: eSpeak NG says 393 everyday names of starter:openmoji in five voices (names: Unicode License)",
    modalities=("audio", "text"),
    build=build_words,
    default=True,
)
