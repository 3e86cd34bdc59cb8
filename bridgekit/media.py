"""Reading audio, images and text: an item is read whole, or refused with a reason. See `decoding.isolation` for crashes."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from bridgekit.decoding.isolation import decode
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.items import EXTENSIONS, TEXT, Blob, Item
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

    With PyAV installed (the extra `media`), also the sound track of MP4 (m4a, mov, 3gp), AAC, WebM and Matroska files.

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


def image_size(item: Item) -> tuple[int, int]:
    """The width and height of an image by its header, without decoding it.

    Raises:
        ItemError: the file is missing, is not an image of a format that `EXTENSIONS` names, or its header is damaged, crashes
            the decoder or exceeds its time or memory limit.
    """
    return decode("size", _decodable(item), lambda facts, _: (int(facts["size"][0]), int(facts["size"][1])))


def read_opacity(item: Item) -> tuple[int, int]:
    """The lowest and the highest opacity of an image's pixels, from 0 (transparent) to 255; 255 if it has no transparency.

    Raises:
        ItemError: as from `read_image`.
    """
    return decode("opacity", _decodable(item), lambda facts, _: (int(facts["opacity"][0]), int(facts["opacity"][1])))


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
    if isinstance(item, Blob) and item.known is not None:
        return item.known
    digest, size = hashlib.sha256(b"file\0"), 0
    with open_item(item, may_be_empty=True) as file:
        try:
            while block := file.read(1 << 18):
                digest.update(block)
                size += len(block)
        except OSError as error:
            raise unreadable(Path(item), error) from None
    return digest.digest(), size


def modality_of(value: object) -> str:
    """The modality that an object in memory or a path probably has; `text` for any other string."""
    if isinstance(value, str | Path):
        ending = Path(value).suffix[1:].lower() if len(str(value)) < 1_000 else ""
        return next((modality for modality, endings in EXTENSIONS.items() if ending in endings), TEXT)
    if isinstance(value, tuple) or (isinstance(value, dict) and "sampling_rate" in value):
        return "audio"
    return "image"


_TAKEN = {
    TEXT: "a string",
    "image": "a path, a PIL image, an array of shape (height, width) or (height, width, 3) of uint8, or the bytes of a file",
    "audio": "a path, a pair (samples, sample rate), {'array': samples, 'sampling_rate': rate}, or the bytes of a file",
}


def as_item(value: Any, modality: str, name: str) -> Item:
    """An object in memory as an item: its bytes are those of a lossless file, so that it is hashed and decoded like one.

    Arguments:
        value: for `text` a string or number; otherwise a path, the bytes of a file, or Hugging Face's {"bytes": ..., "path":
            ...}; for `image` also a PIL image, or an array of shape (height, width) or (height, width, 3 or 4) of uint8; for
            `audio` also (samples, sample rate), with samples of shape (n,), (channels, n) or (n, channels), or
            {"array": samples, "sampling_rate": rate}.
        modality: the modality.
        name: what to call it in messages.

    Raises:
        BridgekitError: it is none of these.
    """
    if modality == TEXT:
        if isinstance(value, str | int | float | np.number):
            return str(value)
    elif isinstance(value, str | Path):
        return Path(value)
    elif isinstance(value, Blob):
        return value
    elif isinstance(value, bytes):
        return Blob(name, lambda: value)
    elif isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return Blob(name, lambda: value["bytes"])
    elif isinstance(value, dict) and isinstance(value.get("path"), str) and "array" not in value:
        return Path(value["path"])
    elif (modality == "image" and (content := _picture(value)) is not None) or (
        modality == "audio" and (content := _clip(value)) is not None
    ):
        return Blob(name, content)
    taken = _TAKEN.get(modality, "a path or the bytes of a file")
    raise BridgekitError(f"cannot take {_described(value)} as {modality}", where=name, remedy=f"give {taken}")


def _described(value: object) -> str:
    shape = f" of shape {tuple(value.shape)} and type {value.dtype}" if isinstance(value, np.ndarray) else ""
    return f"a {type(value).__name__}{shape}"


def _picture(value: Any) -> Callable[[], bytes] | None:
    """Makes a PNG of a picture in memory; None for any other object."""
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[2] not in (3, 4)):
            return None
        value = Image.fromarray(value)
    if not isinstance(value, Image.Image):
        return None
    picture = value

    def content() -> bytes:
        file = io.BytesIO()
        mode = picture if picture.mode in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA") else picture.convert("RGB")
        mode.save(file, "PNG", compress_level=1, exif=picture.getexif())
        return file.getvalue()

    return content


def _clip(value: Any) -> Callable[[], bytes] | None:
    """Makes a WAV of a clip in memory; None for any other object."""
    if isinstance(value, dict):
        value = value.get("array"), value.get("sampling_rate")
    if not isinstance(value, tuple | list) or len(value) != 2 or not isinstance(value[1], int | float | np.number):
        return None
    samples, rate = np.asarray(value[0]), int(value[1])
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fi" or rate < 1:
        return None
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T

    def content() -> bytes:
        import soundfile

        file = io.BytesIO()
        exact = {"int16": "PCM_16", "int32": "PCM_32"}.get(str(samples.dtype), "FLOAT")
        soundfile.write(file, samples if exact != "FLOAT" else samples.astype(np.float32), rate, format="WAV", subtype=exact)
        return file.getvalue()

    return content
