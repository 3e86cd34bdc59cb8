"""Small copies of clips and pictures, to be embedded in a page: an MP3 of a clip's beginning, a thumbnail of a picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import features

from bridgekit.encoders import TEXT, Item
from bridgekit.errors import ItemError
from bridgekit.media import read_audio, read_image
from bridgekit.progress import Report, silent

#: Seconds of a clip that are kept.
CLIP_SECONDS = 10
#: Pixels of a thumbnail's longer side.
THUMBNAIL = 128
#: Of a page's previews in all, as they stand in it. A browser on a phone still opens that.
LIMIT_BYTES = 20_000_000
#: A file larger than this is not decoded for the sake of a preview.
LARGEST_FILE = 64_000_000

_RATE = 16_000
_BARS = 48
_THREADS = 2
_CHUNK = 32


@dataclass(frozen=True)
class Preview:
    """What a page shows of a file.

    Arguments:
        kind: `audio` or `image`.
        uri: a `data:` URI of it.
        seconds: how long the whole clip lasts; 0 for a picture.
        wave: the outline of the clip's sound, as the path of an SVG that is 48 wide and 16 high.
    """

    kind: str
    uri: str
    seconds: float = 0.0
    wave: str = ""

    def as_json(self) -> dict[str, object]:
        """Plain data, for the page's script."""
        return {"kind": self.kind, "uri": self.uri, "seconds": round(self.seconds, 1), "wave": self.wave}


def make_previews(
    items: Sequence[tuple[str, Item]], *, limit: int = LIMIT_BYTES, report: Report = silent
) -> dict[tuple[str, Item], Preview]:
    """Previews of these items, in this order, for as long as there is room.

    Arguments:
        items: pairs of a modality and an item of it, the most wanted first. Of texts, and of modalities other than audio and
            image, there is no preview.
        limit: bytes of all URIs together.
        report: told how it goes on.

    Returns:
        pair to preview. Files that cannot be read, are very large, or came after the limit was reached, are missing.
    """
    wanted = [(modality, item) for modality, item in dict.fromkeys(items) if modality in _MAKERS and isinstance(item, Path)]
    made: dict[tuple[str, Item], Preview] = {}
    room, waiting = limit, iter(wanted)
    with ThreadPool(_THREADS) as pool:
        # In chunks: what is made after the room is used up is made in vain.
        while room > 0 and (chunk := list(islice(waiting, _CHUNK))):
            for key, preview in zip(chunk, pool.map(_preview, chunk), strict=True):
                if preview is not None and len(preview.uri) <= room:
                    made[key] = preview
                room -= len(preview.uri) if preview is not None else 0
            report("making previews", len(made), len(wanted))
    return made


def _preview(wanted: tuple[str, Path]) -> Preview | None:
    modality, path = wanted
    try:
        return _MAKERS[modality](path) if path.stat().st_size <= LARGEST_FILE else None
    except (ItemError, OSError, soundfile.LibsndfileError):
        return None  # it was fine when it was encoded; a page can do without


def _clip(path: Path) -> Preview:
    wave = read_audio(path, _RATE)
    start = wave[: CLIP_SECONDS * _RATE]
    data = io.BytesIO()
    # MP3 is what every browser plays; a libsndfile from before 2022 does not write it.
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
assert TEXT not in _MAKERS


def _uri(mime: str, data: io.BytesIO) -> str:
    return f"data:{mime};base64,{base64.b64encode(data.getvalue()).decode()}"


def outline(wave: NDArray[np.float32]) -> str:
    """The loudness of a clip over its length as 48 bars, in the words of an SVG path that is 48 wide and 16 high.

    Arguments:
        wave: samples of shape (n,), n > 0.
    """
    starts = (np.arange(_BARS) * len(wave)) // _BARS
    width = max(1, len(wave) // _BARS)
    loud = np.array([np.sqrt(np.mean(np.square(wave[start : start + width]))) for start in starts])
    heights = np.maximum(1, np.round(7 * np.sqrt(loud / max(float(loud.max()), 1e-9)))).astype(int)
    return "".join(f"M{at}.5 {8 - height}v{2 * height}" for at, height in enumerate(heights.tolist()))
