"""`starter:sound` and `starter:speech+sound`: aiSFX's vectors, alone and beside Whisper's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from bridgekit_starter.audio import AudioEncoder
from bridgekit_starter.hearing import HearingEncoder
from bridgekit_starter.sound import SAMPLE_RATE, SoundEncoder, load_sound_model, log_mel

from bridgekit.testing import check_encoder


def clip(folder: Path, seconds: float, seed: int = 0) -> Path:
    path = folder / f"{seconds}-{seed}.wav"
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.default_rng(seed).normal(size=len(t))
    soundfile.write(path, 0.2 * np.sin(2 * np.pi * (200 + 300 * seed) * t) + 0.05 * noise, SAMPLE_RATE)
    return path


def test_the_network_gives_what_the_original_package_gives() -> None:
    # From aisfx 0.1.2's own CrossNet(EmbeddingNet("max", 3, 1, 64)) with its checkpoint in float32, torch 2.13.
    golden = {493: 6.8585, 440: 6.8387, 37: 5.9535, 479: 5.8043, 390: 5.5615, 466: 5.2947, 194: 5.2715, 310: 5.0823}
    t, f = torch.meshgrid(torch.arange(100.0), torch.arange(96.0), indexing="ij")
    spectrogram = 0.2 + 0.2 * torch.sin(t / 7 + f / 11) * torch.cos(f * t / 500)
    with torch.no_grad():
        found = load_sound_model()(spectrogram[None])[0]
    assert found.topk(8).indices.tolist() == list(golden)
    torch.testing.assert_close(found[list(golden)], torch.tensor(list(golden.values())), atol=0.02, rtol=0)
    assert found.sum().item() == pytest.approx(674.037, rel=1e-3)


def test_a_spectrogram_is_what_its_formula_says() -> None:
    wave = torch.from_numpy(np.random.default_rng(0).normal(size=6_000).astype(np.float32)) / 10
    found = log_mel(wave)
    assert found.shape == (1 + 6_000 // 1_024, 96)

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    frame, band = 3, 40
    piece = wave.numpy().astype(np.float64)[frame * 1_024 - 1_024 : frame * 1_024 + 1_024]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2_048) / 2_047)
    power = np.abs(np.fft.rfft(piece * window)) ** 2
    step = mel(22_050) / 97
    weights = [max(0.0, 1 - abs(mel(bin * 44_100 / 2_048) - (band + 1) * step) / step) for bin in range(1_025)]
    expected = math.log10(1 + 1e4 * float(np.dot(weights, power)) / sum(weights)) / 9.457798957824707
    assert found[frame, band].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["starter:sound", "starter:speech+sound"])
def test_the_encoder_keeps_its_contract(name: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    check_encoder(name, [clip(tmp_path, seconds, seed) for seed, seconds in enumerate([0.02, 0.5, 3.0, 1.2])], [broken])


def test_a_clip_longer_than_one_pass_has_the_maximum_of_its_parts(tmp_path: Path) -> None:
    encoder = SoundEncoder()
    frames = encoder.prepare(clip(tmp_path, 30.0))
    whole = encoder.encode([frames])[0]
    parts = encoder.encode([frames[:1_000], frames[1_000:]])
    torch.testing.assert_close(whole, parts.amax(0))


def test_speech_and_sound_are_concatenated(tmp_path: Path) -> None:
    path = clip(tmp_path, 1.0)
    vectors = [
        encoder.encode([encoder.prepare(path)])[0]  # type: ignore[attr-defined]
        for encoder in (HearingEncoder(), AudioEncoder(), SoundEncoder())
    ]
    torch.testing.assert_close(vectors[0], torch.cat(vectors[1:]))
