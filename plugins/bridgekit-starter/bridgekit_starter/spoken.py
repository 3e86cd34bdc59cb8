"""`starter:spoken-words` and `starter:spoken-openmoji`: names of OpenMoji images spoken by eSpeak NG. Clips are cached."""

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

#: Sample rate of the clips, in Hz.
SAMPLE_RATE = 16_000

# Part of the cache folder's name. Increase it if the same voice speaks the same name differently.
RECIPE = 1

# Six accents, four male (m) and four female (f) voices. Held-out voices share neither accent nor variant with them.
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

# Voices of `starter:spoken-words`: two male, two female, four accents. Its held-out voice is the harder one to recognise.
WORDS_VOICES = ("en-us+m3", "en+f4", "en-029+m4", "en-gb-scotland+f1")

# Silence kept before and after the speech, in seconds, and the largest sample treated as silence (full scale: 32,768).
SILENCE = 0.1
QUIET = 32


@dataclass(frozen=True)
class Clip:
    """A name spoken by a voice, and its split."""

    name: str
    voice: str
    split: str


def build() -> Pairs:
    """All names in eight training and two held-out voices: about 16,000 clips, 300 MB; see `_build`."""
    names = [picture.name for picture in pictures()]
    return _build(SOURCE.name, names, TRAINING_VOICES, HELD_OUT_VOICES)


def build_words() -> Pairs:
    """Everyday names in four training voices and one held-out voice: about 1,800 clips, 30 MB; see `_build`."""
    return _build(WORDS.name, everyday_names(), WORDS_VOICES, HELD_OUT_VOICES[1:])


def _build(source: str, names: Sequence[str], training_voices: Sequence[str], held_out_voices: Sequence[str]) -> Pairs:
    """The clips (columns `audio` and `text`), synthesised if they are not cached. A row's group is its name.

    Clips are 16 kHz mono FLAC files, shared by both sources. The build can be interrupted and resumed.

    Splits: `train`; `val` (two training voices); `test-voices` (training names, held-out voices); `test-names` (held-out names,
    four training voices). Held-out names are those of `starter:openmoji`.
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
    """Which voice speaks which name. Validation and held-out names get fewer voices to save time."""
    voices_of: dict[str, list[tuple[str, Sequence[str]]]] = {
        "train": [("train", training_voices), ("test-voices", held_out_voices)],
        "val": [("val", training_voices[:2])],
        "test": [("test-names", training_voices[:4])],
    }
    return [Clip(name, voice, split) for name in names for split, voices in voices_of[split_of(name)] for voice in voices]


def _speak(clips: Sequence[Clip]) -> list[Path]:
    """The FLAC file of each clip, synthesised if missing."""
    folder = cache_folder().absolute() / "starter" / f"spoken-openmoji-{RECIPE}"
    files = [folder / clip.voice / f"{slug(clip.name)}.flac" for clip in clips]
    make_missing("speaking", list(zip(clips, files, strict=True)), _write_clip)
    return files


def _write_clip(task: tuple[Clip, Path]) -> None:
    import soundfile

    clip, path = task
    samples = _say(clip.name, clip.voice)
    # FLAC is lossless and half the size of WAV. Encoded in memory because libsndfile does not report why a write failed.
    content = io.BytesIO()
    soundfile.write(content, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    write_atomically(path, lambda aside: aside.write_bytes(content.getbuffer()))


def _say(name: str, voice: str) -> NDArray[np.int16]:
    """A name spoken by a voice with the rate and pitch of `_manner`: 16 kHz samples of shape (n,), deterministic."""
    import numpy as np
    import soxr

    rate, pitch, pitch_range = _manner(name, voice)
    samples, samples_a_second = speak(_spoken_form(name), voice, rate=rate, pitch=pitch, pitch_range=pitch_range)
    trimmed = _trim(samples, round(SILENCE * samples_a_second))
    resampled = soxr.resample(trimmed.astype(np.float32), samples_a_second, SAMPLE_RATE)
    clipped: NDArray[np.int16] = np.clip(np.rint(resampled), -32_768, 32_767).astype(np.int16)
    return clipped


def _manner(name: str, voice: str) -> tuple[int, int, int]:
    """Rate (130 to 200 words per minute), pitch and pitch range (35 to 65 of 100), from a hash of voice and name."""
    draw = hashlib.sha256(f"{voice}:{name}".encode()).digest()
    fractions = [int.from_bytes(draw[i : i + 4], "big") / 2**32 for i in (0, 4, 8)]
    return 130 + int(71 * fractions[0]), 35 + int(31 * fractions[1]), 35 + int(31 * fractions[2])


def _spoken_form(name: str) -> str:
    """The name as input for eSpeak, which would read a single A as the article."""
    return re.sub(r"\bA ", "A-", name)


def _trim(samples: NDArray[np.int16], margin: int) -> NDArray[np.int16]:
    """Trim silence at both ends to at most `margin` samples."""
    import numpy as np

    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > QUIET)
    return samples[max(0, loud[0] - margin) : loud[-1] + 1 + margin] if loud.size else samples


SOURCE = PairSource(
    name="starter:spoken-openmoji",
    description="about 16,000 clips: all names of starter:openmoji spoken by eSpeak NG in ten voices (names: Unicode License)",
    modalities=("audio", "text"),
    build=build,
)
WORDS = PairSource(
    name="starter:spoken-words",
    description="1,801 clips: 393 everyday starter:openmoji names spoken by eSpeak NG in five voices (names: Unicode License)",
    modalities=("audio", "text"),
    build=build_words,
    default=True,
)
