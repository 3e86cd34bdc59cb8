"""Names of items, and small copies to embed in a page: an MP3 of a clip's beginning, a thumbnail of a picture."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import features

from bridgekit.encoders import Item
from bridgekit.errors import ItemError
from bridgekit.media import read_audio, read_image
from bridgekit.progress import Report, silent

#: Characters of a text that are shown, and of a label on a heat map.
LONGEST_TEXT, LABEL = 240, 24
#: Seconds of a clip that are kept.
CLIP_SECONDS = 10
#: Pixels of a thumbnail's longer side.
THUMBNAIL = 128
#: Bytes of all previews in a page, as data URIs: a phone's browser still opens that.
LIMIT_BYTES = 20_000_000
#: Larger files are not decoded for a preview.
LARGEST_FILE = 64_000_000

_RATE = 16_000
_BARS = 48
_THREADS = 2


class Names:
    """How items are called.

    Arguments:
        items: all that are shown, with their modality. A folder that all files of a modality are in is not part of names.
    """

    def __init__(self, items: Iterable[tuple[str, Item | None]]) -> None:
        folders = {(modality, item.parent) for modality, item in items if isinstance(item, Path)}
        self._many_folders = {modality for modality, count in Counter(modality for modality, _ in folders).items() if count > 1}

    def name(self, modality: str, item: Item) -> str:
        """A file's name, with its folder where folders differ, or the beginning of a text."""
        if isinstance(item, Path):
            return f"{item.parent.name}/{item.name}" if modality in self._many_folders else item.name
        return _shorten(item, LONGEST_TEXT)

    def label(self, modality: str, item: Item) -> str:
        """A short name, without the folder where there is no room for it."""
        name = self.name(modality, item)
        return _shorten(item.name if isinstance(item, Path) and len(name) > LABEL else name, LABEL)


def _shorten(text: str, length: int) -> str:
    return " ".join((text if len(text) <= length else text[: length - 1] + "…").split())


@dataclass(frozen=True)
class Preview:
    """What a page shows of a file.

    Arguments:
        kind: `audio` or `image`.
        uri: its data URI.
        seconds: length of the whole clip; 0 for a picture.
        wave: the clip's outline, as the path of an SVG 48 wide and 16 high.
        number: its position among all previews of a page.
    """

    kind: str
    uri: str
    seconds: float = 0.0
    wave: str = ""
    number: int = 0


def make_previews(
    items: Sequence[tuple[str, Item]], *, limit: int = LIMIT_BYTES, report: Report = silent
) -> dict[tuple[str, Item], Preview]:
    """Previews of these items, in this order, until the limit is reached.

    Arguments:
        items: modality and item, the most important first. Only audio and image items have previews.
        limit: bytes of all data URIs together.
        report: progress.

    Returns:
        modality and item to preview. Files that cannot be read, are very large, or come after the limit, are missing.
    """
    wanted = [(modality, item) for modality, item in dict.fromkeys(items) if modality in _MAKERS and isinstance(item, Path)]
    made: dict[tuple[str, Item], Preview] = {}
    with ThreadPool(_THREADS) as pool:  # leaving it ends the work that is not done yet
        for number, (key, preview) in enumerate(zip(wanted, pool.imap(_preview, wanted), strict=True), 1):
            if preview is None:
                continue
            limit -= len(preview.uri)
            if limit < 0:
                break
            made[key] = replace(preview, number=len(made))
            report("making previews", number, len(wanted))
    return made


def _preview(wanted: tuple[str, Path]) -> Preview | None:
    modality, path = wanted
    try:
        return _MAKERS[modality](path) if path.stat().st_size <= LARGEST_FILE else None
    except (ItemError, OSError, soundfile.LibsndfileError):
        return None  # it could be read when it was encoded; the page does without it


def _clip(path: Path) -> Preview:
    wave = read_audio(path, _RATE)
    start = wave[: CLIP_SECONDS * _RATE]
    data = io.BytesIO()
    # Every browser plays MP3; libsndfile writes it since 2022.
    container, mime = ("MP3", "audio/mpeg") if "MP3" in soundfile.available_formats() else ("WAV", "audio/wav")
    soundfile.write(data, start, _RATE, format=container)
    return Preview("audio", _uri(mime, data), len(wave) / _RATE, outline(start))


def _picture(path: Path) -> Preview:
    picture = read_image(path)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    container = "WEBP" if features.check("webp") else "JPEG"
    picture.save(data, container, quality=80)
    return Preview("image", _uri(f"image/{container.lower()}", data))


_MAKERS = {"audio": _clip, "image": _picture}


def _uri(mime: str, data: io.BytesIO) -> str:
    return f"data:{mime};base64,{base64.b64encode(data.getvalue()).decode()}"


def outline(wave: NDArray[np.float32]) -> str:
    """The loudness of a clip over time as 48 bars: the path of an SVG 48 wide and 16 high.

    Arguments:
        wave: samples of shape (n,), n > 0.
    """
    starts = (np.arange(_BARS) * len(wave)) // _BARS
    width = max(1, len(wave) // _BARS)
    loud = np.array([np.sqrt(np.mean(np.square(wave[start : start + width]))) for start in starts])
    heights = np.maximum(1, np.round(7 * np.sqrt(loud / max(float(loud.max()), 1e-9)))).astype(int)
    return "".join(f"M{at}.5 {8 - height}v{2 * height}" for at, height in enumerate(heights.tolist()))
