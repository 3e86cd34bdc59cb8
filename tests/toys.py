"""A toy plugin for tests: two tiny encoders that really look at the file, so that whole runs take seconds.

No published number rests on them: the real encoders are tested with the starter plugin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bridgekit import plugins
from bridgekit.encoders import Item
from bridgekit.hookspecs import EncoderProvider, hookimpl
from bridgekit.media import read_audio, read_text
from bridgekit.plugins import Plugin


@dataclass
class ToneEncoder:
    """The spectrum of a clip in 64 bands."""

    modality: str = "audio"
    dim: int = 64
    revision: str = "toy:tone@1"
    encoded: list[int] = field(default_factory=list)

    def prepare(self, item: Item) -> Tensor:
        wave = read_audio(item, 16_000)
        spectrum = np.abs(np.fft.rfft(wave, 16_000))[:8_000].reshape(64, 125).sum(1)
        return torch.from_numpy(np.log1p(spectrum).astype(np.float32))

    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        self.encoded.append(len(batch))
        return torch.stack(list(batch))


@dataclass
class LetterEncoder:
    """Hashed letter trigrams of a text."""

    modality: str = "text"
    dim: int = 48
    revision: str = "toy:letters@1"

    def prepare(self, item: Item) -> Tensor:
        text = f"  {read_text(item)} "
        vector = torch.zeros(48)
        for start in range(len(text) - 2):
            digest = hashlib.sha256(text[start : start + 3].encode()).digest()
            vector[digest[0] % 48] += 1 if digest[1] % 2 else -1
        return vector

    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(batch))


class ToyPlugin:
    @hookimpl
    def encoder_providers(self) -> list[EncoderProvider]:
        openers = {"tone": ToneEncoder, "letters": LetterEncoder}
        return [
            EncoderProvider(
                "toy",
                ("audio", "text"),
                lambda model, device: openers[model](),
                lambda: list(openers),
                {"audio": "tone", "text": "letters"},
            )
        ]


def install(monkeypatch: pytest.MonkeyPatch, *modules: object, names: Sequence[str] = ()) -> tuple[Plugin, ...]:
    """Make these plugins the installed ones for a test, found by entry point as real ones are."""

    class Point:
        group, value, dist = plugins.GROUP, "toy", None

        def __init__(self, number: int, module: object) -> None:
            self.name = names[number] if names else f"toy{number}" if number else "toy"
            self.module = module

        def load(self) -> object:
            if isinstance(self.module, BaseException):
                raise self.module
            return self.module

    points = [Point(number, module) for number, module in enumerate(modules)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    plugins.forget_plugins()
    return plugins.installed_plugins()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> object:
    """The toy plugin is the only one installed."""
    yield install(monkeypatch, ToyPlugin())
    plugins.forget_plugins()


NAMES = [
    "ant",
    "bee",
    "cat",
    "dog",
    "elk",
    "fox",
    "gnu",
    "hen",
    "ibis",
    "jay",
    "kiwi",
    "lark",
    "mole",
    "newt",
    "owl",
    "pig",
    "quail",
    "rat",
    "seal",
    "toad",
]


def tone_table(folder: Path, copies: int = 6) -> Path:
    """A CSV of real clips: each name has its own pitch, and every clip another length."""
    from tests.conftest import tone

    lines = ["audio,text"]
    for number, name in enumerate(NAMES):
        for copy in range(copies):
            path = tone(folder / "clips" / f"{name} {copy}.wav", 150 * 1.19**number, 0.2 + 0.03 * copy + 0.001 * number)
            lines.append(f"clips/{path.name},{name}")
    table = folder / "pairs.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table
