from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from bridgekit_clap import open_encoder
from bridgekit_clap.audio import WINDOW, split_windows
from safetensors.torch import save_file
from torch import Tensor

from bridgekit.errors import ItemError
from bridgekit.testing import check_encoder

Clip = Callable[..., Path]


@pytest.fixture(scope="module")
def encoder(released: Any) -> Any:
    return open_encoder(str(released.checkpoint), "cpu")


def encode(encoder: Any, *clips: Path) -> Tensor:
    found: Tensor = encoder.encode([encoder.prepare(path) for path in clips])
    return found


@pytest.mark.parametrize("seconds", [10, 3, 7.3, 0.01])
def test_vectors_of_clips_up_to_10_seconds_are_laion_claps_own(encoder: Any, released: Any, clip: Clip, seconds: float) -> None:
    clips = [clip(seconds, seed) for seed in range(2)]
    found = encode(encoder, *clips)
    theirs = torch.from_numpy(released.module.get_audio_embedding_from_filelist([str(path) for path in clips]))
    assert found.shape == theirs.shape == (2, 512)
    assert torch.cosine_similarity(found, theirs).min() > 0.99999
    if seconds > 1:
        assert torch.cosine_similarity(found[:1], found[1:]).item() < 0.99


def test_samples_are_rounded_to_16_bit_as_laion_clap_does(encoder: Any, released: Any, clip: Clip) -> None:
    wave, _ = soundfile.read(clip(10, subtype="FLOAT"), dtype="float32")
    soundfile.write(quiet := clip(10, 1), wave * 1e-4, 48_000, subtype="FLOAT")
    theirs = torch.from_numpy(released.module.get_audio_embedding_from_data([soundfile.read(quiet, dtype="float32")[0]]))
    assert torch.cosine_similarity(encode(encoder, quiet), theirs).item() > 0.9999


def test_a_clip_of_25_seconds_is_the_mean_of_three_windows_each_time_the_same(encoder: Any, released: Any, clip: Clip) -> None:
    path = clip(25)
    wave, _ = soundfile.read(path, dtype="float32")
    starts = (0, 360_000, 720_000)
    theirs = torch.from_numpy(released.module.get_audio_embedding_from_data([wave[start : start + WINDOW] for start in starts]))
    expected = torch.nn.functional.normalize(theirs.mean(0, keepdim=True), dim=-1)
    found = encode(encoder, path)
    assert torch.equal(found, encode(encoder, path))
    assert torch.cosine_similarity(found, expected).item() > 0.99999
    assert found.norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("samples", "starts"), [(1, [0]), (WINDOW, [0]), (WINDOW + 1, [0, 1]), (2 * WINDOW, [0, WINDOW])])
def test_windows_cover_a_clip_and_none_is_short_beside_others(samples: int, starts: list[int]) -> None:
    windows = split_windows(torch.arange(samples))
    assert [int(window[0]) for window in windows] == starts
    assert {len(window) for window in windows} == {min(samples, WINDOW)}
    assert int(windows[-1][-1]) == samples - 1


def test_stereo_at_44100_hertz_is_heard_as_the_same_sound(encoder: Any, clip: Clip) -> None:
    # Noise up to the upper end of hearing is other noise at another rate: so none here.
    time = np.arange(3 * 48_000) / 48_000
    tone = 0.3 * np.sin(2 * np.pi * 440 * time * (1 + 0.1 * time))
    soundfile.write(mono := clip(3), tone, 48_000, subtype="FLOAT")
    time = np.arange(3 * 44_100) / 44_100
    tone = 0.3 * np.sin(2 * np.pi * 440 * time * (1 + 0.1 * time))
    soundfile.write(stereo := clip(3, rate=44_100, channels=2), np.stack([tone, tone], axis=1), 44_100, subtype="FLOAT")
    assert torch.cosine_similarity(encode(encoder, mono), encode(encoder, stereo)).item() > 0.999


def test_silence_and_a_single_sample_have_vectors(encoder: Any, clip: Clip, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(48_000), 48_000)
    found = encode(encoder, tmp_path / "silence.wav", clip(1e-9))
    assert found.isfinite().all()
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)


def test_no_clips_give_no_vectors(encoder: Any) -> None:
    assert encoder.encode([]).shape == (0, 512)


def test_an_empty_file_fails_alone(encoder: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    with pytest.raises(ItemError):
        encoder.prepare(tmp_path / "empty.wav")


def test_it_keeps_the_contract_and_other_weights_have_another_revision(released: Any, clip: Clip, tmp_path: Path) -> None:
    weights = released.audio_weights()
    weights["audio_projection.2.bias"] = weights["audio_projection.2.bias"] + 0.001
    save_file(weights, other := tmp_path / "other.safetensors")
    (empty := tmp_path / "empty.wav").touch()
    (text := tmp_path / "text.wav").write_text("no sound", encoding="utf-8")
    clips = [clip(seconds, seed) for seed, seconds in enumerate([0.2, 3, 12])]
    check_encoder(f"clap:{released.checkpoint}", clips, [empty, text, tmp_path / "missing.wav"], changed=f"clap:{other}")
