"""The starting point of attacks: a small table of images and captions, and a bridge trained on it."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.torture.command import inside

CAPTIONS = (
    "a red apple",
    "a dog barks in the rain",
    "snow on a mountain",
    "two cats on a sofa",
    "a blue car",
    "waves at night",
    "un café à Paris",
    "an old clock",
    "a field of wheat",
    "a train leaves",
    "ein grüner Vogel",
    "a paper boat",
    "stars above a tent",
    "a bowl of soup",
)


@dataclass(frozen=True)
class Ground:
    """A folder with `pairs.csv` (image, text, split), its images, and `bridge`, which was trained on it."""

    folder: Path

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """Path, caption and split of each row."""
        return [(f"pictures/{number}.png", text, _split(number)) for number, text in enumerate(CAPTIONS)]

    def copy(self, to: Path) -> Ground:
        """A copy in another folder."""
        return Ground(Path(shutil.copytree(self.folder, to, symlinks=True)))


@contextlib.contextmanager
def ground_for(name: str) -> Iterator[Ground]:
    """A ground in a temporary folder, which becomes the working directory, with its own cache and encoders kept open."""
    with tempfile.TemporaryDirectory(prefix=f"torture {name} ") as place:
        settings = {"BRIDGEKIT_HOME": str(Path(place) / "home"), "COLUMNS": "200"}
        with inside(Path(place), **settings), encoders_kept_open():
            yield make_ground(Path(place) / "ground")


@contextlib.contextmanager
def encoders_kept_open() -> Iterator[None]:
    """Open the starter's encoders once instead of once per command, which is ten times as fast."""
    from bridgekit_starter import image, text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "TextEncoder", functools.cache(text.TextEncoder))
        patch.setattr(image, "ImageEncoder", functools.cache(image.ImageEncoder))
        yield


def _split(number: int) -> str:
    return "test" if number % 5 == 3 else "val" if number % 5 == 4 else "train"


def make_ground(folder: Path) -> Ground:
    """Draw small images, write the table, and train a small bridge."""
    from bridgekit import PRESETS, align

    (folder / "pictures").mkdir(parents=True)
    for number in range(len(CAPTIONS)):
        picture = Image.new("RGB", (40, 32), (17 * number, 255 - 13 * number, 60 + 7 * number))
        ImageDraw.Draw(picture).ellipse((number, 4, number + 20, 28), fill=(255, 9 * number, 0))
        picture.save(folder / "pictures" / f"{number}.png")
    ground = Ground(folder)
    write_csv(folder / "pairs.csv", [("image", "text", "split"), *ground.rows])
    preset = replace(PRESETS["default"], epochs=2, batch_size=8, shared_dim=16)
    align("starter:image", "starter:text", folder / "pairs.csv", out=folder / "bridge", preset=preset, progress=False)
    metadata = json.loads((folder / "bridge" / "bridge.json").read_text(encoding="utf-8"))
    metadata["provenance"]["pairs"] = "pairs.csv"  # relative to the folder, so that copies use their own table
    (folder / "bridge" / "bridge.json").write_text(json.dumps(metadata, ensure_ascii=False), encoding="utf-8")
    return ground


def write_csv(path: Path, rows: list[tuple[str, ...]]) -> Path:
    """Write a CSV with all cells quoted."""
    lines = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return path
