"""Pictures on disk: PNG files that say how they were made, and contact sheets."""

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

#: The side of a picture on a contact sheet, and the height of a line below it, in pixels.
TILE, LINE = 160, 18


def write_png(picture: Image, path: Path, story: Mapping[str, Any]) -> None:
    """Write a picture, atomically, with how it was made in its metadata: one JSON text under the key `bridgekit`."""
    write_atomically(path, lambda aside: aside.write_bytes(png(picture, story)))


def png(picture: Image, story: Mapping[str, Any]) -> bytes:
    """The file that `write_png` writes."""
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    # A file's name may hold bytes that are no UTF-8: Python's surrogates for them are escaped as JSON does it.
    text = json.dumps(story, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    about.add_itxt("bridgekit", text)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def made_here(path: Path) -> bool:
    """Whether a picture may be written to this place: nothing is there, or a PNG that `write_png` wrote."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return "bridgekit" in picture.info
    except FileNotFoundError:
        return True
    except Exception:  # whatever it is, it is not ours
        return False


def contact_sheet(pictures: Sequence[Image], labels: Sequence[Sequence[str]], columns: int | None = None) -> Image:
    """Pictures in a grid, each above its lines of text.

    Arguments:
        pictures: n pictures, drawn at one size whatever theirs.
        labels: the lines below each; a line too long for its tile ends in an ellipsis.
        columns: pictures in a row; by default about as many as rows, six at most.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = columns or min(6, max(1, math.ceil(math.sqrt(len(pictures)))))
    lines = max((len(label) for label in labels), default=0)
    height = TILE + LINE * lines + 8
    sheet = Image.new("RGB", (columns * (TILE + 8) + 8, math.ceil(len(pictures) / columns) * height + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = 8 + number % columns * (TILE + 8), 8 + number // columns * height
        sheet.paste(picture.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
        for line, words in enumerate(label):
            # On one line, in characters that can be drawn, and no more than might find room.
            text = " ".join(words.split()).encode("utf-8", "replace").decode()[:TILE]
            while text and pen.textlength(text, font) > TILE:
                text = text.removesuffix("…")[:-1] + "…" if len(text) > 1 else ""
            pen.text((left, top + TILE + LINE * line), text, fill="black" if line == 0 else "#777777", font=font)
    return sheet
