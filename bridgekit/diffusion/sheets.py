"""Writing images: PNG files with metadata about their generation, and contact sheets."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridgekit.storage.cache import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

#: Side of an image on a contact sheet, and height of a line of text, in pixels.
TILE, LINE = 160, 18


def write_png(image: Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write an image atomically, with metadata as one JSON text under the key `bridgekit`."""
    write_atomically(path, lambda aside: aside.write_bytes(png(image, metadata)))


def png(image: Image, metadata: Mapping[str, Any]) -> bytes:
    """The file that `write_png` writes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    # File names may contain bytes that are not UTF-8: Python's surrogates for them are escaped as in JSON.
    text = json.dumps(metadata, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    info.add_itxt("bridgekit", text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def made_here(path: Path) -> bool:
    """Whether an image may be written to this path: it is free, or a PNG by `write_png`."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return "bridgekit" in image.info
    except FileNotFoundError:
        return True
    except Exception:  # not an image: not ours
        return False


def contact_sheet(images: Sequence[Image], labels: Sequence[Sequence[str]]) -> Image:
    """Images in a roughly square grid of at most six columns, each above its lines of text.

    Arguments:
        images: n images, resized to the same size.
        labels: the lines below each image; lines that are too long are cut with an ellipsis.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(6, max(1, math.ceil(math.sqrt(len(images)))))
    lines = max((len(label) for label in labels), default=0)
    height = TILE + LINE * lines + 8
    sheet = Image.new("RGB", (columns * (TILE + 8) + 8, math.ceil(len(images) / columns) * height + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = 8 + number % columns * (TILE + 8), 8 + number // columns * height
        sheet.paste(image.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
        for line, words in enumerate(label):
            # One line of encodable characters, cut to a length that could possibly fit.
            text = " ".join(words.split()).encode("utf-8", "replace").decode()[:TILE]
            while text and pen.textlength(text, font) > TILE:
                text = text.removesuffix("…")[:-1] + "…" if len(text) > 1 else ""
            pen.text((left, top + TILE + LINE * line), text, fill="black" if line == 0 else "#777777", font=font)
    return sheet
