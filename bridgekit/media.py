"""Reading audio, images and text: an item is read whole, or refused with a reason. See `decoding.isolation` for crashes."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from bridgekit.decoding.isolation import decode
from bridgekit.errors import ItemError
from bridgekit.items import Blob, Item
from bridgekit.storage.bounded import AGAIN, opened, unreadable

#: Characters of a text: a long novel. A tokenizer takes about 60 bytes per character, and no encoder reads that far.
MAX_TEXT = 1_000_000

_BROKEN = re.compile("[\0\ud800-\udfff]")  # NUL, or a lone surrogate


@contextmanager
def open_item(item: Path | Blob, *, may_be_empty: bool = False) -> Iterator[BinaryIO]:
    """An item that is not a text, open for reading.

    Raises:
        ItemError: it is missing, empty, not a regular file, or cannot be read.
    """
    if isinstance(item, Path):
        with opened(item, may_be_empty=may_be_empty) as file:
            yield file
        return
    content = item.read()
    if not content and not may_be_empty:
        raise ItemError("the item is empty (0 bytes)", where=item.name, remedy=AGAIN)
    yield io.BytesIO(content)


def item_name(item: Item) -> str:
    """An item's name for messages: the path of a file, where other bytes are, or the beginning of a text in quotes."""
    return repr(item.strip()[:60]) if isinstance(item, str) else str(item)


def _decodable(item: Item) -> Path | Blob:
    return item if isinstance(item, Blob) else Path(item)


def read_audio(item: Item, sample_rate: int) -> npt.NDArray[np.float32]:
    """Decode audio: WAV, FLAC, Ogg, MP3 or another format of libsndfile, with any sample rate and number of channels.

    Arguments:
        item: a file, or the bytes of one.
        sample_rate: sample rate of the result, in Hz.

    Returns:
        float32 samples of shape (n,) with n > 0, full scale at -1 and 1; channels are averaged.

    Raises:
        ItemError: the file is missing, is not audio, is empty, cut short or damaged, has samples that are not finite, claims
            to last over four hours or to have a sample rate outside 100 Hz to 1 MHz, or crashes the decoder or exceeds its
            time or memory limit (see `bridgekit.decoding.isolation`).
    """
    return decode("audio", _decodable(item), lambda _, data: np.frombuffer(data, np.float32).copy(), sample_rate=sample_rate)


def audio_seconds(item: Item, most: float) -> float:
    """The duration of audio in seconds. Its header may lie, so it is decoded, to a little beyond `most`.

    Raises:
        ItemError: as from `read_audio`.
    """
    return decode("duration", _decodable(item), lambda facts, _: float(facts["seconds"]), most=most)


def read_image(item: Item) -> Image.Image:
    """Decode an image, or the first frame of an animation.

    Returns:
        An RGB image: rotated by its EXIF orientation, transparency on white, 16-bit grey scaled to 8 bits.

    Raises:
        ItemError: the file is missing, is not an image, is cut short or damaged, has over 100 megapixels or a side below 8
            pixels, or crashes the decoder or exceeds its time or memory limit.
    """
    return decode(
        "image", _decodable(item), lambda facts, data: Image.frombytes("RGB", tuple(facts["size"]), data, "raw", "RGBX")
    )


def read_text(item: Item) -> str:
    """A text, stripped of surrounding white space. Files and other bytes are read as UTF-8.

    Raises:
        ItemError: it is empty, has NUL bytes or lone surrogates, or has over a million characters.
    """
    where = item_name(item)
    too_long = ItemError(f"the text has over {MAX_TEXT:,} characters", where=where, remedy="cut it into shorter texts")
    if not isinstance(item, str):
        with open_item(item) as file:
            data = file.read(4 * MAX_TEXT + 1)
        if len(data) > 4 * MAX_TEXT:  # a character has at most four bytes
            raise too_long
        try:
            item = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ItemError("this is not text in UTF-8", where=where, remedy="save it as UTF-8") from None
    text = item.strip()
    if len(text) > MAX_TEXT:
        raise too_long
    if not text:
        raise ItemError("the text is empty", where=where, remedy="fill it in")
    if _BROKEN.search(text):
        raise ItemError("the text has NUL bytes or broken characters", where=where, remedy="save it again as UTF-8")
    return text


def size_hint(item: Item) -> int:
    """Roughly how much work an item is: its bytes (0 if missing), read only if it has no file, or characters of a text."""
    if isinstance(item, str):
        return len(item)
    try:
        return len(item.read()) if isinstance(item, Blob) else item.stat().st_size
    except (OSError, ItemError):
        return 0


def content_hash(item: Item) -> bytes:
    """SHA-256 of an item's content, 32 bytes: of its bytes, not its name, or of a text stripped of white space.

    Raises:
        ItemError: the item is missing or cannot be read.
    """
    return hash_and_size(item)[0]


def hash_and_size(item: Item) -> tuple[bytes, int]:
    """`content_hash` and `size_hint`, reading the item once."""
    if isinstance(item, str):
        return hashlib.sha256(b"text\0" + item.strip().encode("utf-8", "surrogatepass")).digest(), len(item)
    digest, size = hashlib.sha256(b"file\0"), 0
    with open_item(item, may_be_empty=True) as file:
        try:
            while block := file.read(1 << 18):
                digest.update(block)
                size += len(block)
        except OSError as error:
            raise unreadable(Path(item), error) from None
    return digest.digest(), size
