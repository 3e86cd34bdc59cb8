import os

os.environ["HF_HUB_OFFLINE"] = "1"

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from bridgekit_starter.speech import SAMPLE_RATE, SpeechEncoder, log_mel, pad_wave
from bridgekit_starter.voice import speak
from bridgekit_starter.weights import WHISPER_PARTS

from bridgekit.errors import ItemError
from bridgekit.latents.batches import agreement

ESC10 = next(
    (p for p in (Path(os.environ.get("ESC10", "shared/data/esc10")), Path("/work/shared/data/esc10")) if p.is_dir()), None
)


@pytest.fixture(scope="module")
def encoder() -> SpeechEncoder:
    return SpeechEncoder("cpu")


@pytest.fixture(scope="module")
def padded_encoder() -> SpeechEncoder:
    return SpeechEncoder("cpu", padded=True)


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Something between a voice and a machine: gliding harmonics that swell and fade, and noise."""
    time = np.arange(max(1, round(seconds * SAMPLE_RATE))) / SAMPLE_RATE
    random = np.random.default_rng(seed)
    pitch = 110 + 60 * random.random() + 30 * np.sin(2 * np.pi * (0.4 + random.random()) * time)
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    harmonics = sum(np.sin(k * phase) / k for k in range(1, 12))
    return (0.1 * harmonics * (1 + np.sin(5 * time)) + 0.01 * random.standard_normal(len(time))).astype(np.float32)


def clip(folder: Path, seconds: float, seed: int = 0) -> Path:
    path = folder / f"{seconds}-{seed}.wav"
    soundfile.write(path, sound(seconds, seed), SAMPLE_RATE, subtype="FLOAT")
    return path


def test_frames_agree_with_ctranslate2s_own_encoder(encoder: SpeechEncoder, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    (tmp_path / "model.bin").write_bytes(b"".join(part.read() for part in WHISPER_PARTS))
    for name in ("config.json", "vocabulary.txt"):
        shutil.copy(WHISPER_PARTS[0].locate().with_name(name), tmp_path)
    mel = log_mel(pad_wave(torch.from_numpy(sound(5)), padded=True))
    model = ctranslate2.models.Whisper(str(tmp_path), device="cpu", compute_type="float32")
    theirs = torch.from_numpy(np.array(model.encode(ctranslate2.StorageView.from_array(mel[None].numpy()))))[0]
    ours = encoder.states([mel])[0, :, 512:]  # the last states; before them stand those after layer 3
    assert ours.shape == theirs.shape == (1500, 512)
    assert torch.cosine_similarity(ours, theirs, dim=1).min() > 0.999


@pytest.mark.parametrize("seconds", [0.1, 1.0, 30.0])
def test_spectrograms_agree_with_transformers_feature_extractor(seconds: float) -> None:
    from transformers import WhisperFeatureExtractor

    wave = pad_wave(torch.from_numpy(sound(seconds)), padded=False)
    theirs = WhisperFeatureExtractor()(
        wave.numpy(), sampling_rate=SAMPLE_RATE, padding=False, return_tensors="pt"
    ).input_features[0]
    torch.testing.assert_close(log_mel(wave), theirs, atol=1e-4, rtol=0)


def test_a_clip_has_the_same_vector_alone_and_beside_longer_ones(encoder: SpeechEncoder, tmp_path: Path) -> None:
    prepared = [encoder.prepare(clip(tmp_path, seconds, seed)) for seed, seconds in enumerate([0.31, 1.0, 1.7, 2.9, 0.05])]
    together = encoder.encode(prepared)
    alone = torch.cat([encoder.encode([one]) for one in prepared])
    torch.testing.assert_close(together, alone, atol=5e-5, rtol=1e-5)


def test_the_frames_of_a_clip_do_not_depend_on_the_padding_behind_it(encoder: SpeechEncoder) -> None:
    short, long = (log_mel(pad_wave(torch.from_numpy(sound(seconds, seed=3)), padded=False)) for seconds in (1.0, 4.0))
    together, alone = encoder.states([short, long]), encoder.states([short])
    assert together.shape == (2, 200, 1024)
    assert alone.shape == (1, 50, 1024)
    torch.testing.assert_close(together[0, :50], alone[0], atol=2e-4, rtol=1e-4)


def test_vectors_are_float32_of_the_stated_width(encoder: SpeechEncoder, tmp_path: Path) -> None:
    found = encoder.encode([encoder.prepare(clip(tmp_path, 1.0, seed)) for seed in range(3)])
    assert found.shape == (3, encoder.dim)
    assert found.dtype == torch.float32
    assert (found[0] - found[1]).abs().max() > 0.1


def test_bfloat16_agrees_with_float32_on_short_words_too(encoder: SpeechEncoder, tmp_path: Path) -> None:
    # Short words are the hardest: of a thousand these were the worst, at 0.989 to 0.998, with all products in bfloat16.
    said = {"keycap 7": "en-us", "scarf": "en-us", "thumbs up": "en-us+f2", "cloud with snow": "en-us+f2"}
    said |= dict.fromkeys(("ear", "handbag", "clamp", "owl", "red apple", "fire engine", "guitar", "penguin", "star"), "en-us")
    for word, voice in said.items():
        samples, rate = speak(word, voice)
        soundfile.write(tmp_path / f"{word}.wav", samples, rate)
    words = [encoder.prepare(tmp_path / f"{word}.wav") for word in said]
    full = encoder.encode(words)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = encoder.encode(words)
    assert reduced.dtype == torch.float32
    assert not torch.equal(full, reduced)
    assert torch.cosine_similarity(full - full.mean(0), reduced - full.mean(0)).mean() > 0.9997
    assert agreement(full, reduced) > 0.998  # 0.9992 here, but another processor adds up in another order


def test_a_clip_of_70_seconds_is_heard_in_three_windows_to_its_end(encoder: SpeechEncoder, tmp_path: Path) -> None:
    windows = encoder.prepare(clip(tmp_path, 70.0))
    assert len(windows) == 3
    assert sum(window.frames for window in windows) == pytest.approx(3500, abs=3)
    whole = encoder.encode([windows])[0]
    parts = encoder.encode([[window] for window in windows])
    torch.testing.assert_close(whole, parts.mean(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("samples", [1, 2, 80, 1599])
@pytest.mark.parametrize("padded", [False, True])
def test_a_clip_of_a_few_samples_has_a_vector(
    encoder: SpeechEncoder, padded_encoder: SpeechEncoder, samples: int, padded: bool, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "click.wav", sound(1)[:samples], SAMPLE_RATE)
    chosen = padded_encoder if padded else encoder
    assert chosen.encode([chosen.prepare(tmp_path / "click.wav")]).isfinite().all()


def test_digital_silence_has_a_vector(encoder: SpeechEncoder, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    assert encoder.encode([encoder.prepare(tmp_path / "silence.wav")]).isfinite().all()


def test_padding_to_30_seconds_gives_other_vectors_under_another_revision(
    encoder: SpeechEncoder, padded_encoder: SpeechEncoder, tmp_path: Path
) -> None:
    path = clip(tmp_path, 1.0)
    assert encoder.revision != padded_encoder.revision
    assert [(window.mel.shape, window.frames) for window in padded_encoder.prepare(path)] == [((80, 3000), 50)]
    assert (encoder.encode([encoder.prepare(path)]) - padded_encoder.encode([padded_encoder.prepare(path)])).abs().max() > 0.1


def test_a_file_that_is_not_audio_fails_alone(encoder: SpeechEncoder, tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_text("not a sound")
    with pytest.raises(ItemError):
        encoder.prepare(tmp_path / "notes.wav")


@pytest.mark.skipif(ESC10 is None, reason="ESC-10 is not on this machine (set ESC10 to its folder)")
def test_a_linear_probe_tells_the_ten_sounds_of_esc10_apart(encoder: SpeechEncoder) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    assert ESC10 is not None
    with (ESC10 / "clips.csv").open() as file:  # two of its five folds: benchmarks/esc10.py takes all
        rows = [row for row in csv.DictReader(file) if row["fold"] in ("1", "2")]
    folder = ESC10
    latents = torch.cat([encoder.encode([encoder.prepare(folder / row["audio"])]) for row in rows]).numpy()
    labels, folds = np.array([row["label"] for row in rows]), np.array([row["fold"] for row in rows])
    right = 0
    for fold in sorted(set(folds)):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(
            latents[folds != fold], labels[folds != fold]
        )
        right += int((probe.predict(latents[folds == fold]) == labels[folds == fold]).sum())
    assert len(rows) == 160
    assert right / len(rows) > 0.85
