"""`starter:sound` and `starter:audio`: YAMNet's vectors, alone and beside Whisper's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from bridgekit_starter.audio import AudioEncoder
from bridgekit_starter.sound import SAMPLE_RATE, WINDOWS_AT_ONCE, SoundEncoder, load_sound_model, log_mel
from bridgekit_starter.speech import SpeechEncoder

from bridgekit.testing import check_encoder


def clip(folder: Path, seconds: float, seed: int = 0) -> Path:
    path = folder / f"{seconds}-{seed}.wav"
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.default_rng(seed).normal(size=len(t))
    soundfile.write(path, 0.2 * np.sin(2 * np.pi * (200 + 300 * seed) * t) + 0.05 * noise, SAMPLE_RATE)
    return path


def test_the_network_gives_what_a_forward_pass_in_numpy_gives() -> None:
    # Golden values: the weights of the TensorFlow Lite file in a forward pass written in NumPy. That pass and the TensorFlow
    # Lite interpreter, which rounds every layer to 8 bits, gave scores with a correlation of at least 0.998 on three clips.
    golden = {715: 4.8995, 591: 3.2520, 296: 2.0554, 898: 2.0362, 611: 1.9344, 548: 1.7834, 648: 1.7605, 596: 1.5805}
    t = np.arange(15_600) / SAMPLE_RATE
    wave = 0.3 * np.sin(2 * np.pi * (300 + 400 * t) * t) + 0.05 * np.cos(2 * np.pi * 3_000 * t) * (t > 0.5)
    encoder = SoundEncoder()
    found = encoder.encode([encoder.windows(torch.from_numpy(wave).float())])[0]
    assert found.topk(8).indices.tolist() == list(golden)
    torch.testing.assert_close(found[list(golden)], torch.tensor(list(golden.values())), atol=2e-3, rtol=0)
    assert found.sum().item() == pytest.approx(35.261, rel=1e-3)


def test_a_spectrogram_is_what_its_formula_says() -> None:
    wave = torch.from_numpy(np.random.default_rng(0).normal(size=6_000).astype(np.float32)) / 10
    found = log_mel(wave, load_sound_model().mel)
    assert found.shape == (1 + (6_000 - 400) // 160, 64)

    def mel(hertz: float) -> float:
        return 1127 * math.log(1 + hertz / 700)

    frame, band = 3, 40
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    magnitude = np.abs(np.fft.rfft(wave.numpy().astype(np.float64)[frame * 160 :][:400] * window, 512))
    low, step = mel(125), (mel(7_500) - mel(125)) / 65
    weights = [max(0.0, 1 - abs((mel(bin * SAMPLE_RATE / 512) - low) / step - (band + 1))) for bin in range(257)]
    assert found[frame, band].item() == pytest.approx(math.log(float(np.dot(weights, magnitude)) + 0.001), rel=1e-4)


@pytest.mark.parametrize("name", ["starter:sound", "starter:audio"])
def test_the_encoder_keeps_its_contract(name: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    check_encoder(name, [clip(tmp_path, seconds, seed) for seed, seconds in enumerate([0.02, 0.5, 3.0, 1.2])], [broken])


def test_every_part_of_a_clip_is_heard(tmp_path: Path) -> None:
    encoder = SoundEncoder()
    t = np.arange(round(3.3 * SAMPLE_RATE)) / SAMPLE_RATE
    wave = 0.3 * np.sin(2 * np.pi * 880 * t) * (t > 3.1)  # after the last whole window
    heard, silence = encoder.encode([encoder.windows(torch.from_numpy(each).float()) for each in (wave, 0 * wave)])
    assert (heard - silence).abs().max() > 1


def test_a_clip_longer_than_one_pass_has_the_maximum_of_its_parts(tmp_path: Path) -> None:
    encoder = SoundEncoder()
    pieces = encoder.prepare(clip(tmp_path, 40.0))
    assert len(pieces) > WINDOWS_AT_ONCE
    whole = encoder.encode([pieces])[0]
    torch.testing.assert_close(whole, encoder.encode([pieces[:50], pieces[50:]]).amax(0))


def test_speech_and_sound_are_concatenated(tmp_path: Path) -> None:
    path = clip(tmp_path, 1.0)
    vectors = [
        encoder.encode([encoder.prepare(path)])[0]  # type: ignore[attr-defined]
        for encoder in (AudioEncoder(), SpeechEncoder(), SoundEncoder())
    ]
    torch.testing.assert_close(vectors[0], torch.cat(vectors[1:]))
