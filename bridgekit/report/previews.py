"""Names of items, and small copies to embed in a page: an MP3 of the start of a clip, a thumbnail of an image."""

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

from bridgekit.encoders import Item
from bridgekit.errors import ItemError
from bridgekit.items import Blob
from bridgekit.media import read_audio, read_image, size_hint
from bridgekit.progress import Report, silent

#: Maximum number of characters shown of a text.
LONGEST_TEXT = 240
#: Seconds of a clip that are kept.
CLIP_SECONDS = 10
#: Pixels of a thumbnail's longer side.
THUMBNAIL = 128
#: Maximum bytes of all previews in a page, as data URIs: a phone's browser can still open that.
LIMIT_BYTES = 20_000_000
#: Larger files are not decoded for a preview.
LARGEST_FILE = 64_000_000

_RATE = 16_000
_BARS = 48
_THREADS = 2


class Names:
    """Names of items for display.

    Arguments:
        items: all items shown, as (modality, item). If all files of a modality are in one folder, names omit it.
    """

    def __init__(self, items: Iterable[tuple[str, Item | None]]) -> None:
        folders = {(modality, item.parent) for modality, item in items if isinstance(item, Path)}
        self._many_folders = {modality for modality, count in Counter(modality for modality, _ in folders).items() if count > 1}

    def name(self, modality: str, item: Item) -> str:
        """A file's name, with its folder if there are several, or the start of a text."""
        if isinstance(item, Path):
            return f"{item.parent.name}/{item.name}" if modality in self._many_folders else item.name
        return _shorten(item.label if isinstance(item, Blob) else item, LONGEST_TEXT)


def _shorten(text: str, length: int) -> str:
    return " ".join((text if len(text) <= length else text[: length - 1] + "…").split())


@dataclass(frozen=True)
class Preview:
    """A small copy of a file.

    Arguments:
        kind: `audio` or `image`.
        uri: its data URI.
        seconds: length of the whole clip; 0 for an image.
        wave: the clip's loudness as an SVG path, see `outline`.
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
    """Previews of these items, in order, until the limit is reached.

    Arguments:
        items: (modality, item), most important first. Only audio and image files have previews.
        limit: bytes of all data URIs together.

    Returns:
        (modality, item) to preview, without files that cannot be read, are very large, or exceed the limit.
    """
    wanted = [(modality, item) for modality, item in dict.fromkeys(items) if modality in _MAKERS and not isinstance(item, str)]
    made: dict[tuple[str, Item], Preview] = {}
    with ThreadPool(_THREADS) as pool:  # leaving it cancels pending work
        for number, (key, preview) in enumerate(zip(wanted, pool.imap(_preview, wanted), strict=True), 1):
            if preview is None:
                continue
            limit -= len(preview.uri)
            if limit < 0:
                break
            made[key] = replace(preview, number=len(made))
            report("making previews", number, len(wanted))
    return made


def _preview(wanted: tuple[str, Path | Blob]) -> Preview | None:
    modality, item = wanted
    try:
        return _MAKERS[modality](item) if size_hint(item) <= LARGEST_FILE else None
    except (ItemError, OSError, soundfile.LibsndfileError):
        return None  # the file was readable when it was encoded


def _clip(item: Path | Blob) -> Preview:
    wave = read_audio(item, _RATE)
    start = wave[: CLIP_SECONDS * _RATE]
    data = io.BytesIO()
    soundfile.write(data, start, _RATE, format="MP3")
    return Preview("audio", _uri("audio/mpeg", data), len(wave) / _RATE, outline(start))


def _picture(item: Path | Blob) -> Preview:
    picture = read_image(item)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=80)
    return Preview("image", _uri("image/webp", data))


_MAKERS = {"audio": _clip, "image": _picture}


def _uri(mime: str, data: io.BytesIO) -> str:
    return f"data:{mime};base64,{base64.b64encode(data.getvalue()).decode()}"


def outline(wave: NDArray[np.float32]) -> str:
    """The loudness over time of a clip, samples (n,) with n > 0, as 48 bars: the path of an SVG 48 wide and 16 high."""
    starts = (np.arange(_BARS) * len(wave)) // _BARS
    width = max(1, len(wave) // _BARS)
    loud = np.array([np.sqrt(np.mean(np.square(wave[start : start + width]))) for start in starts])
    heights = np.maximum(1, np.round(7 * np.sqrt(loud / max(float(loud.max()), 1e-9)))).astype(int)
    return "".join(f"M{at}.5 {8 - height}v{2 * height}" for at, height in enumerate(heights.tolist()))
