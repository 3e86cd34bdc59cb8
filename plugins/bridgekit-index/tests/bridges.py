"""Untrained bridges and small collections to index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from bridgekit import PRESETS, Bridge, load_encoder
from bridgekit.bridge.bridge import Side
from bridgekit.fusion.adapter import FusionAdapter
from tests.toys import LetterEncoder, ToneEncoder

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = {"circle": 60, "square": 4, "triangle": 3, "hexagon": 6}  # name to corners


@cache
def real_bridge(seed: int = 0, modalities: Sequence[str] = ("image", "text")) -> Bridge:
    """The starter's encoders, opened once, with untrained adapters: an index works the same however good they are."""
    pytest.importorskip("bridgekit_starter")
    preset = replace(PRESETS["default"], shared_dim=64)
    sides, adapters, encoders = {}, {}, {}
    for modality in modalities:
        encoder = encoders[modality] = load_encoder(f"starter:{modality}", "cpu")
        torch.manual_seed(seed)
        sides[modality] = Side(f"starter:{modality}", encoder.revision, encoder.dim, False)
        adapters[modality] = FusionAdapter(encoder.dim, 64, preset.blocks, preset.expansion, preset.dropout).eval()
    return Bridge(sides, adapters, preset, 0.07, _encoders=encoders)


def pictures(folder: Path) -> Path:
    """A table of 24 pictures with captions, splits and years."""
    (folder / "pictures").mkdir(parents=True)
    lines = ["image,text,split,Year,code"]
    for number, (colour, shape) in enumerate((colour, shape) for colour in COLOURS for shape in SHAPES):
        picture = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(picture).regular_polygon((48, 48, 36), SHAPES[shape], fill=colour)
        picture.save(folder / "pictures" / f"{colour} {shape}.png")
        split = "test" if number % 4 == 0 else "train"
        lines.append(f"pictures/{colour} {shape}.png,a {colour} {shape},{split},{1990 + number},{number:03}")
    (folder / "pictures.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "pictures.csv"


def words(count: int, start: int = 0) -> list[str]:
    return [f"{COLOURS[n % 6]} {list(SHAPES)[n % 4]} number {n}" for n in range(start, start + count)]


def toy_bridge(seed: int = 0) -> Bridge:
    """Fast: letters hashed to 48 numbers, for tests that need no real encoder."""
    torch.manual_seed(seed)
    preset = replace(PRESETS["default"], shared_dim=8)
    sides = {"text": Side("toy:letters", "toy:letters@1", 48, False), "audio": Side("toy:tone", "toy:tone@1", 64, False)}
    adapters = {name: FusionAdapter(side.dim, 8, 1, preset.expansion, preset.dropout).eval() for name, side in sides.items()}
    return Bridge(sides, adapters, preset, 0.07, _encoders={"text": LetterEncoder(), "audio": ToneEncoder()})
