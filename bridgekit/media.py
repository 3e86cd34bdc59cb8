"""Reading audio, images and text from disk, so that a file is either read whole or refused with a reason.

Sounds and pictures are decoded in separate processes (`decoding.isolation`): a file that crashes a decoder costs one item.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from bridgekit.decoding.files import file_size, opened, unreadable
from bridgekit.decoding.isolation import decode
from bridgekit.encoders import Item
from bridgekit.errors import ItemError

#: Characters of a text: a long novel. A tokenizer holds some sixty bytes a character, and no encoder reads so far.
MAX_TEXT = 1_000_000

_BLOCK = 1 << 18  # bytes hashed at a time
_BROKEN = re.compile("[\0\ud800-\udfff]")  # NUL, or half a surrogate pair


def read_audio(path: Path, sample_rate: int) -> npt.NDArray[np.float32]:
    """Decode a sound file: WAV, FLAC, Ogg, MP3 and whatever else libsndfile knows, at any rate, with any channels.

    Arguments:
        path: the file.
        sample_rate: samples a second of the result.

    Returns:
        float32 samples of shape (n,) with n > 0, full scale at -1 and 1; channels are averaged.

    Raises:
        ItemError: there is no such file; it is not audio, is empty, is cut short or damaged, holds samples that are no
            numbers, claims to last over four hours or to have less than 100 or over 1,000,000 samples a second; or it
            takes a decoder too long, or too much memory, or crashes it (see `bridgekit.decoding.isolation`).
    """
    return decode("audio", Path(path), lambda _, data: np.frombuffer(data, np.float32).copy(), sample_rate=sample_rate)


def audio_seconds(path: Path, most: float) -> float:
    """How long a sound file is, in seconds. It is decoded, little further than `most`, since its header may lie.

    Raises:
        ItemError: as from `read_audio`.
    """
    return decode("duration", Path(path), lambda told, _: float(told["seconds"]), most=most)


def read_image(path: Path) -> Image.Image:
    """Decode a picture, upright, as people see it.

    Arguments:
        path: the file. Of an animation the first frame is taken.

    Returns:
        An RGB picture: turned as its EXIF says, transparent parts on white, 16 bit grey scaled to 8 bit.

    Raises:
        ItemError: there is no such file; it is not a picture, is cut short or damaged, has over 100 megapixels, or a side
            of less than 8 pixels; or it takes a decoder too long, or too much memory, or crashes it.
    """
    return decode("image", Path(path), lambda told, data: Image.frombytes("RGB", tuple(told["size"]), data, "raw", "RGBX"))


def read_text(item: Item) -> str:
    """A text, stripped of the white space around it. A path is read as a UTF-8 file.

    Raises:
        ItemError: there is nothing in it, or something that is no text (NUL bytes, half a surrogate pair), or over a million
            characters.
    """
    if isinstance(item, Path):
        if file_size(item) > 4 * MAX_TEXT:  # bytes of UTF-8
            raise _too_long(str(item))
        with opened(item) as file:
            try:
                text = file.read().decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                raise ItemError("this is not text in UTF-8", where=str(item), remedy="save it as UTF-8") from None
        where = str(item)
    else:
        text = item.strip()
        where = repr(text[:60])
    if len(text) > MAX_TEXT:
        raise _too_long(where)
    if not text:
        raise ItemError("the text is empty", where=where, remedy="write a text, or remove the row")
    if _BROKEN.search(text):
        raise ItemError("the text holds NUL bytes or broken characters", where=where, remedy="save it anew as UTF-8")
    return text


def _too_long(where: str) -> ItemError:
    return ItemError(f"the text has over {MAX_TEXT:,} characters", where=where, remedy="cut it into shorter texts")


def size_hint(item: Item) -> int:
    """About how much work an item is, without reading it: bytes of a file (0 if it is missing), characters of a text."""
    if isinstance(item, str):
        return len(item)
    try:
        return item.stat().st_size
    except OSError:
        return 0


def content_hash(item: Item) -> bytes:
    """SHA-256 of what an item holds, 32 bytes: of a file's bytes, whatever its name, or of a text without outer white space.

    Raises:
        ItemError: the file is missing or cannot be read.
    """
    if isinstance(item, str):
        return hashlib.sha256(b"text\0" + item.strip().encode("utf-8", "surrogatepass")).digest()
    digest = hashlib.sha256(b"file\0")
    with opened(item, may_be_empty=True) as file:
        try:
            while block := file.read(_BLOCK):
                digest.update(block)
        except OSError as error:
            raise unreadable(item, error) from None
    return digest.digest()
