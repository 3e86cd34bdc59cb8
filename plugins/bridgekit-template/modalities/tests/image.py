"""The plugin satisfies bridgekit's contract, and describes a picture whatever its file is like."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from bridgekit import load_encoder
from bridgekit.testing import check_encoder

NAME = "template:statistics"


def picture(path: Path, colour: str, side: int = 100, *, stripes: bool = False) -> Path:
    """A disc, or stripes, on white."""
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    if stripes:
        for left in range(0, side, side // 5):
            draw.rectangle((left, 0, left + side // 10, side), fill=colour)
    else:
        draw.ellipse((side // 4, side // 4, 3 * side // 4, 3 * side // 4), fill=colour)
    image.save(path)
    return path


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_the_encoder_keeps_the_contract(tmp_path: Path) -> None:
    good = [
        picture(tmp_path / "red.png", "red"),
        picture(tmp_path / "blue.jpg", "blue", 300),
        picture(tmp_path / "stripes.png", "red", 64, stripes=True),
    ]
    bad = [
        save(tmp_path / "empty.png", b""),
        save(tmp_path / "words.png", b"this is no picture\n"),
        save(tmp_path / "cut short.png", good[0].read_bytes()[:100]),
        picture(tmp_path / "tiny.png", "red", 5),
        tmp_path / "missing.png",
    ]
    check_encoder(NAME, good, bad)


def test_the_format_and_the_size_of_a_file_do_not_matter(tmp_path: Path) -> None:
    encoder = load_encoder(NAME, "cpu")
    files = [
        picture(tmp_path / "a.png", "red"),
        picture(tmp_path / "b.bmp", "red", 400),
        picture(tmp_path / "c.png", "red", stripes=True),
        picture(tmp_path / "d.png", "green"),
    ]
    one, same, *others = encoder.encode([encoder.prepare(file) for file in files])
    assert torch.dist(one, same) < min(torch.dist(one, other) for other in others) / 2
