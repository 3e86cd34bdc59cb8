"""The names of the pictures, spoken."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from bridgekit_starter import openmoji, spoken
from bridgekit_starter.openmoji import Picture
from bridgekit_starter.spoken import (
    HELD_OUT_VOICES,
    SAMPLE_RATE,
    TRAINING_VOICES,
    WORDS_VOICES,
    Clip,
    _plan,
    _say,
    _speak,
    _spoken_form,
    _trim,
)
from bridgekit_starter.voice import speak
from numpy.typing import NDArray

from bridgekit.errors import BridgekitError
from bridgekit.plugins import default_pair_source, find_pair_source

VOICES = (*TRAINING_VOICES, *HELD_OUT_VOICES)
NAMES = ("dog face", "guitar", "cactus")  # a name of each split


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRIDGEKIT_HOME", str(tmp_path))
    return tmp_path


def read(path: Path) -> NDArray[np.float32]:
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == SAMPLE_RATE
    return np.asarray(samples)


def brightness(samples: NDArray[np.float32]) -> float:
    """The spectral centroid in hertz."""
    spectrum = np.abs(np.fft.rfft(samples))
    return float((np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE) * spectrum).sum() / spectrum.sum())


@pytest.mark.parametrize("voice", VOICES)
def test_every_voice_speaks_audibly_and_as_long_as_speech_takes(voice: str) -> None:
    paths = _speak([Clip(name, voice, "train") for name in ("ear", "dog face", "woman playing water polo")])
    clips = [read(path) for path in paths]
    assert all(clip.ndim == 1 for clip in clips)
    assert all(0.15 < len(clip) / SAMPLE_RATE < 3 for clip in clips)
    assert len(clips[0]) < len(clips[1]) < len(clips[2])
    assert all(0.03 < np.sqrt((clip**2).mean()) < 0.4 for clip in clips)
    # Speech, not a hum or noise.
    assert all(400 < brightness(clip) < 4_000 for clip in clips)


def test_no_two_voices_say_a_name_alike() -> None:
    paths = _speak([Clip("dog face", voice, "train") for voice in VOICES])
    assert len({path.read_bytes() for path in paths}) == len(VOICES) == 10
    assert len({path.parent.name for path in paths}) == len(VOICES)


def test_no_accent_and_no_variant_of_a_held_out_voice_is_heard_in_training() -> None:
    heard = {part for voice in TRAINING_VOICES for part in voice.split("+")}
    held_out = {part for voice in HELD_OUT_VOICES for part in voice.split("+")}
    assert not heard & held_out


def test_a_voice_varies_its_speed_and_pitch_from_name_to_name() -> None:
    manners = {spoken._manner(name, "en-us+m3") for name in ("ear", "dog face", "pear", "cherries")}
    assert len(manners) == 4
    assert all(130 <= rate <= 200 and 35 <= pitch <= 65 and 35 <= width <= 65 for rate, pitch, width in manners)


def test_a_clip_does_not_depend_on_what_was_said_before_it() -> None:
    first = _say("dog face", "en-us+f2")
    _say("woman playing water polo", "en-029+m4")
    assert np.array_equal(_say("dog face", "en-us+f2"), first)


def test_another_process_writes_the_same_bytes() -> None:
    (path,) = _speak([Clip("dog face", "en-us+f2", "train")])
    program = "import hashlib; from bridgekit_starter.spoken import _say; _say('pear', 'en+m7');"
    program += "print(hashlib.sha256(_say('dog face', 'en-us+f2').tobytes()).hexdigest())"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    samples, _ = soundfile.read(path, dtype="int16")
    assert said.strip() == hashlib.sha256(samples.tobytes()).hexdigest()
    once = path.read_bytes()
    path.unlink()
    _speak([Clip("dog face", "en-us+f2", "train")])
    assert path.read_bytes() == once


def test_clips_that_are_there_are_kept_and_only_missing_ones_are_spoken() -> None:
    clips = [Clip(name, "en+f4", "train") for name in ("ear", "pear")]
    ear, pear = _speak(clips)
    ear.write_bytes(b"kept")
    pear.unlink()
    _speak(clips)
    assert ear.read_bytes() == b"kept"
    assert len(read(pear)) > 0
    assert sorted(path.name for path in ear.parent.iterdir()) == ["ear.flac", "pear.flac"]


def test_training_names_get_all_voices_and_held_out_names_are_never_heard_in_training() -> None:
    clips = _plan(NAMES, TRAINING_VOICES, HELD_OUT_VOICES)
    by_split: dict[str, set[tuple[str, str]]] = {}
    for clip in clips:
        by_split.setdefault(clip.split, set()).add((clip.name, clip.voice))
    train, val, test = NAMES
    assert by_split == {
        "train": {(train, voice) for voice in TRAINING_VOICES},
        "test-voices": {(train, voice) for voice in HELD_OUT_VOICES},
        "val": {(val, voice) for voice in TRAINING_VOICES[:2]},
        "test-names": {(test, voice) for voice in TRAINING_VOICES[:4]},
    }


def test_the_pairs_hold_absolute_paths_names_splits_and_a_group_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken, "pictures", lambda: (Picture(NAMES[1], ""), Picture(NAMES[2], "")))
    pairs = spoken.build()
    assert pairs.source == spoken.SOURCE.name == "starter:spoken-openmoji"
    assert set(pairs.columns) == set(spoken.SOURCE.modalities)
    assert all(isinstance(path, Path) and path.is_absolute() and path.is_file() for path in pairs.columns["audio"])
    assert pairs.columns["text"] == pairs.group == (NAMES[1],) * 2 + (NAMES[2],) * 4
    assert pairs.split == ("val",) * 2 + ("test-names",) * 4


def test_the_small_table_is_the_default_and_the_whole_one_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken, "_speak", lambda clips: [f"{clip.voice}/{clip.name}" for clip in clips])
    assert default_pair_source(["audio", "text"]) is spoken.WORDS
    small, whole = (find_pair_source(name).build() for name in ("starter:spoken-words", "starter:spoken-openmoji"))
    assert (len(whole), len(small)) == (16_050, 1_801)
    assert small.split
    assert whole.split
    # Written down, for bridges trained on the whole table are evaluated on the rows that it has today.
    rows = zip(whole.columns["audio"], whole.columns["text"], whole.split, strict=True)
    digest = hashlib.sha256("\n".join(map(str, rows)).encode()).hexdigest()
    assert digest == "ccf4b45c700ffc93dd2e89c78c3bfa482a1b2abbba47785f19dc078f0c7b3f20"


def test_the_small_table_has_only_everyday_names_and_tests_with_a_voice_that_training_never_hears(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spoken, "_speak", lambda clips: [clip.voice for clip in clips])
    pairs = spoken.build_words()
    assert pairs.split
    heard = {
        split: {voice for voice, of in zip(pairs.columns["audio"], pairs.split, strict=True) if of == split}
        for split in set(pairs.split)
    }
    assert heard["train"] == set(WORDS_VOICES) <= set(TRAINING_VOICES)
    assert heard["test-voices"] == {HELD_OUT_VOICES[1]}
    assert {"penguin", "red apple", "fire engine"} <= set(pairs.columns["text"])


def test_the_table_of_three_modalities_pairs_clips_with_pictures_in_test_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken, "_speak", lambda clips: [clip.voice for clip in clips])
    monkeypatch.setattr(openmoji, "_draw", lambda chosen: [picture.name for picture in chosen])
    source = default_pair_source(["audio", "text", "image"])
    pairs = source.build()
    assert source.name == pairs.source == "starter:spoken-words-pictures"
    assert pairs.split
    both = {
        split
        for clip, image, split in zip(pairs.columns["audio"], pairs.columns["image"], pairs.split, strict=True)
        if clip and image
    }
    assert both == {"test-voices", "test-names"}
    assert all(image in (None, name) for image, name in zip(pairs.columns["image"], pairs.columns["text"], strict=True))


def test_a_lone_capital_a_is_said_as_the_letter() -> None:
    assert _spoken_form("A button blood type") == "A-button blood type"
    assert _spoken_form("AB button blood type") == "AB button blood type"


def test_silence_at_the_ends_is_cut_to_the_margin_and_nothing_else_is() -> None:
    speech = np.array([900, 0, 0, 0, -900], dtype=np.int16)
    quiet = np.zeros(10, dtype=np.int16)
    assert _trim(np.concatenate([quiet, speech, quiet]), 2).tolist() == [0, 0, *speech.tolist(), 0, 0]
    assert _trim(speech, 2).tolist() == speech.tolist()
    assert _trim(quiet, 2).tolist() == quiet.tolist()


def test_a_voice_that_does_not_exist_is_named() -> None:
    with pytest.raises(BridgekitError, match=r"no such voice\n  in: xx-nowhere"):
        speak("dog face", "xx-nowhere")


def test_missing_data_raise_an_error_rather_than_end_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espeakng_loader.get_data_path", lambda: str(tmp_path / ("far" * 60)))
    with pytest.raises(BridgekitError, match="cannot read its data"):
        speak("dog face", "en-us")


def test_faster_speech_is_shorter_and_higher_pitch_is_higher() -> None:
    slow, _ = speak("dog face", "en-us", rate=120)
    fast, _ = speak("dog face", "en-us", rate=220)
    assert len(fast) < 0.8 * len(slow)
    low, _ = speak("aaah", "en-us", pitch=10, pitch_range=0)
    high, rate = speak("aaah", "en-us", pitch=90, pitch_range=0)
    assert rate == 22_050
    assert period(high) < 0.8 * period(low)


def period(samples: NDArray[np.int16]) -> int:
    """How many samples, between 2.5 and 20 ms, the middle of a steady vowel takes to repeat."""
    middle = samples[len(samples) // 3 :][:2048].astype(np.float64)
    likeness = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    return 55 + int(np.argmax(likeness[55:441]))
