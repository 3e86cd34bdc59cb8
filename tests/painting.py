"""What tests of picture making share: a toy image encoder, a toy text-to-image model, and bridges trained once a session.

The toy model paints eight patches whose colours are a fixed function of a caption's letters, and the true pictures of the
names are those very patches: a judge should recognise every one of them. It tests the machinery, not how well a bridge hears.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit import PRESETS, align, plugins
from bridgekit.encoders import Encoder, Item
from bridgekit.hookspecs import EncoderProvider, ImageGenerator, hookimpl
from bridgekit.image_models import ImageModel
from bridgekit.media import read_image
from tests.shared import made_once
from tests.toys import NAMES, LetterEncoder, ToyPlugin, install, tone_table

QUICK = replace(PRESETS["default"], epochs=8, batch_size=32, shared_dim=32)
#: Eight patches of three colours: the width of the toy image encoder, and of the tiny Kandinsky's image embeddings.
PATCHES = (2, 4, 3)


@dataclass
class PatchEncoder:
    """The mean colours of eight patches of a picture."""

    modality: str = "image"
    dim: int = 24
    revision: str = "toy:patches@1"

    def prepare(self, item: Item) -> Tensor:
        small = read_image(Path(item)).resize((PATCHES[1], PATCHES[0]), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(small, np.float32) / 255).flatten()

    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(batch))


class LetterConditioning:
    """The letter vector of a caption, as the toy model takes it: that of the bridge's toy text encoder, at unit length."""

    kind = "letters"
    made_of = "text"

    def encode(self, items: Sequence[Any]) -> dict[str, Tensor]:
        encoder = LetterEncoder()
        return {self.kind: normalize(encoder.encode([encoder.prepare(item) for item in items]), dim=-1)}

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        return dict(tensors)

    def takes_latents_of(self, encoder: Encoder) -> bool:
        return encoder.revision == LetterEncoder.revision


class PatchPipeline:
    """Letters in, patches out, with the few things that are asked of a diffusers pipeline."""

    def __call__(self, letters: Tensor, num_inference_steps: int = 2, generator: Any = None, output_type: str = "pil") -> Any:
        return SimpleNamespace(images=[patches(vector) for vector in letters])

    def set_progress_bar_config(self, **options: object) -> None:
        pass


def patches(letters: Tensor) -> Image.Image:
    """The picture of one letter vector."""
    colours = normalize(letters, dim=-1) @ torch.randn(48, 24, generator=torch.Generator().manual_seed(0))
    pixels = (colours.sigmoid() * 255).round().to(torch.uint8).reshape(PATCHES).numpy()
    return Image.fromarray(pixels).resize((32, 16), Image.Resampling.NEAREST)


class PicturePlugin(ToyPlugin):
    """The toy encoders of the other tests, one for pictures, and a text-to-image model."""

    @hookimpl
    def encoder_providers(self) -> list[EncoderProvider]:
        pictures = EncoderProvider(
            "patch", ("image",), lambda model, device: PatchEncoder(), lambda: ["mean"], {"image": "mean"}
        )
        return [*super().encoder_providers(), pictures]

    @hookimpl
    def image_generators(self) -> list[ImageGenerator]:
        def opened(device: str) -> ImageModel:
            return ImageModel("toy:patches", PatchPipeline(), [LetterConditioning()], steps=2)

        return [ImageGenerator("toy:patches", "eight patches of colour a caption", opened)]


@pytest.fixture
def picture_toys(monkeypatch: pytest.MonkeyPatch) -> object:
    """The picture plugin is the only one installed. The workshop's bridges are one's own, and their tables elsewhere."""
    monkeypatch.setenv("BRIDGEKIT_OUTSIDE", "yes")
    yield install(monkeypatch, PicturePlugin())
    plugins.forget_plugins()


@dataclass
class Workshop:
    """A folder of clips and true pictures of the names, and bridges between them, trained when first asked for.

    Tables: `pairs.csv` (audio, text), `seen.csv` (audio, image), `gallery.csv` (image, text).
    """

    folder: Path
    factory: pytest.TempPathFactory

    def clip(self, name: str, copy: int = 0) -> Path:
        return self.folder / "clips" / f"{name} {copy}.wav"

    def bridge(self, out: Path, a: str = "audio", b: str = "text", frozen: str = "") -> Path:
        """A copy of the bridge, so that a test may do with it what it likes."""

        def train(folder: Path) -> None:
            table = self.folder / ("pairs.csv" if b == "text" else "seen.csv")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("BRIDGEKIT_HOME", str(self.folder / "home"))
                install(patch, PicturePlugin())
                align(a, b, table, out=folder / "bridge", preset=QUICK, frozen=frozen or None, progress=False)

        trained = made_once(self.factory, "-".join(("bridge", a, b, frozen)), train)
        return Path(shutil.copytree(trained / "bridge", out))


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    def fill(folder: Path) -> None:
        tone_table(folder)
        encoder = LetterEncoder()
        (folder / "seen").mkdir()
        for name in NAMES:
            patches(encoder.prepare(name)).save(folder / "seen" / f"{name}.png")
        clips = [f"clips/{name} {copy}.wav,seen/{name}.png" for name in NAMES for copy in range(6)]
        (folder / "seen.csv").write_text("\n".join(["audio,image", *clips]))
        (folder / "gallery.csv").write_text("\n".join(["image,text", *(f"seen/{name}.png,{name}" for name in NAMES)]))

    yield Workshop(made_once(tmp_path_factory, "workshop", fill), tmp_path_factory)
    plugins.forget_plugins()
