"""The plugin satisfies bridgekit's contract, and describes a sound whatever its file is like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch

from bridgekit import load_encoder
from bridgekit.testing import check_encoder

NAME = "template:statistics"


def tone(path: Path, hertz: float, seconds: float, rate: int = 16_000) -> Path:
    time = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hertz * time), rate)
    return path


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_the_encoder_keeps_the_contract(tmp_path: Path) -> None:
    good = [tone(tmp_path / f"{hertz}.wav", hertz, hertz / 1_000) for hertz in (30, 250, 700, 1_900)]
    bad = [
        save(tmp_path / "empty.wav", b""),
        save(tmp_path / "words.wav", b"this is no sound\n"),
        save(tmp_path / "cut short.wav", good[-1].read_bytes()[:1_000]),
        tmp_path / "missing.wav",
    ]
    check_encoder(NAME, good, bad)


def test_the_format_and_the_sample_rate_of_a_file_do_not_matter(tmp_path: Path) -> None:
    encoder = load_encoder(NAME, "cpu")
    files = [tone(tmp_path / "a.wav", 440, 1), tone(tmp_path / "b.flac", 440, 1, 44_100), tone(tmp_path / "c.wav", 1_760, 1)]
    one, same, other = encoder.encode([encoder.prepare(file) for file in files])
    assert torch.dist(one, same) < torch.dist(one, other) / 3
