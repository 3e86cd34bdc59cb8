"""Reading audio, images and text: a file is read whole, or refused with a reason. See `decoding.isolation` for crashes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from bridgekit.decoding.isolation import decode
from bridgekit.encoders import Item
from bridgekit.errors import ItemError
from bridgekit.storage.bounded import opened, unreadable

#: Characters of a text: a long novel. A tokenizer takes about 60 bytes per character, and no encoder reads that far.
MAX_TEXT = 1_000_000

_BROKEN = re.compile("[\0\ud800-\udfff]")  # NUL, or a lone surrogate


def read_audio(path: Path, sample_rate: int) -> npt.NDArray[np.float32]:
    """Decode an audio file: WAV, FLAC, Ogg, MP3 or another format of libsndfile, with any sample rate and number of channels.

    Arguments:
        path: the file.
        sample_rate: sample rate of the result, in Hz.

    Returns:
        float32 samples of shape (n,) with n > 0, full scale at -1 and 1; channels are averaged.

    Raises:
        ItemError: the file is missing, is not audio, is empty, cut short or damaged, has samples that are not finite, claims
            to last over four hours or to have a sample rate outside 100 Hz to 1 MHz, or crashes the decoder or exceeds its
            time or memory limit (see `bridgekit.decoding.isolation`).
    """
    return decode("audio", Path(path), lambda _, data: np.frombuffer(data, np.float32).copy(), sample_rate=sample_rate)


def audio_seconds(path: Path, most: float) -> float:
    """The duration of an audio file in seconds. Its header may lie, so it is decoded, to a little beyond `most`.

    Raises:
        ItemError: as from `read_audio`.
    """
    return decode("duration", Path(path), lambda facts, _: float(facts["seconds"]), most=most)


def read_image(path: Path) -> Image.Image:
    """Decode an image, or the first frame of an animation.

    Returns:
        An RGB image: rotated by its EXIF orientation, transparency on white, 16-bit grey scaled to 8 bits.

    Raises:
        ItemError: the file is missing, is not an image, is cut short or damaged, has over 100 megapixels or a side below 8
            pixels, or crashes the decoder or exceeds its time or memory limit.
    """
    return decode("image", Path(path), lambda facts, data: Image.frombytes("RGB", tuple(facts["size"]), data, "raw", "RGBX"))


def read_text(item: Item) -> str:
    """A text, stripped of surrounding white space. A path is read as a UTF-8 file.

    Raises:
        ItemError: it is empty, has NUL bytes or lone surrogates, or has over a million characters.
    """
    where = str(item) if isinstance(item, Path) else repr(item.strip()[:60])
    too_long = ItemError(f"the text has over {MAX_TEXT:,} characters", where=where, remedy="cut it into shorter texts")
    if isinstance(item, Path):
        with opened(item) as file:
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
        raise ItemError("the text is empty", where=where, remedy="fill it in, or remove the row")
    if _BROKEN.search(text):
        raise ItemError("the text has NUL bytes or broken characters", where=where, remedy="save it again as UTF-8")
    return text


def size_hint(item: Item) -> int:
    """Roughly how much work an item is, without reading it: bytes of a file (0 if missing) or characters of a text."""
    if isinstance(item, str):
        return len(item)
    try:
        return item.stat().st_size
    except OSError:
        return 0


def content_hash(item: Item) -> bytes:
    """SHA-256 of an item's content, 32 bytes: of a file's bytes, not its name, or of a text stripped of white space.

    Raises:
        ItemError: the file is missing or cannot be read.
    """
    if isinstance(item, str):
        return hashlib.sha256(b"text\0" + item.strip().encode("utf-8", "surrogatepass")).digest()
    digest = hashlib.sha256(b"file\0")
    with opened(item, may_be_empty=True) as file:
        try:
            while block := file.read(1 << 18):
                digest.update(block)
        except OSError as error:
            raise unreadable(item, error) from None
    return digest.digest()
