"""The plugin satisfies bridgekit's contract, and reads traces as they occur in practice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bridgekit import ItemError, load_encoder
from bridgekit.testing import check_encoder

NAME = "template:statistics"


def save(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def trace(path: Path, steps: float, samples: int, header: str = "") -> Path:
    """A file with three axes that oscillate `steps` times per 100 samples."""
    time = np.arange(samples)[:, None]
    swing = np.sin(2 * np.pi * steps / 100 * time + [0, 1, 2]) * [1.0, 0.5, 2.0]
    return save(path, header + "\n".join(",".join(f"{value:.5f}" for value in row) for row in swing) + "\n")


def test_the_encoder_keeps_the_contract(tmp_path: Path) -> None:
    good = [trace(tmp_path / f"{steps}.csv", steps, 60 + 7 * steps) for steps in (2, 5, 11, 24)]
    bad = [
        save(tmp_path / "empty.csv", ""),
        save(tmp_path / "words.csv", "this is\nno trace\n"),
        save(tmp_path / "two axes.csv", "1,2\n" * 50),
        save(tmp_path / "gap.csv", "1,2,3\n" * 50 + "1,nan,3\n"),
        trace(tmp_path / "short.csv", 5, 31),
        tmp_path / "missing.csv",
    ]
    check_encoder(NAME, good, bad)


def test_a_header_is_skipped(tmp_path: Path) -> None:
    encoder = load_encoder(NAME, "cpu")
    bare, titled = trace(tmp_path / "bare.csv", 5, 80), trace(tmp_path / "titled.csv", 5, 80, "x,y,z\n")
    assert encoder.prepare(bare).equal(encoder.prepare(titled))


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "cut.csv", "x,y,z\n" + "1,2,3\n" * 50 + "1,2\n")
    with pytest.raises(ItemError, match="line 52 is not 3 numbers: '1,2'"):
        load_encoder(NAME, "cpu").prepare(path)
