"""Decodes audio and images in the calling process. `isolation` runs this in separate processes."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from PIL import Image, ImageOps, UnidentifiedImageError

from bridgekit.decoding import pyav
from bridgekit.decoding.tables import Reply, describe_table, find_blobs, read_cells
from bridgekit.errors import ItemError
from bridgekit.storage.bounded import AGAIN, opened

T = TypeVar("T")

MAX_HOURS = 4
RATES = (100, 1_000_000)  # Hz
MAX_MEGAPIXELS = 100
MIN_SIDE = 8  # pixels

_BLOCK = 1 << 18  # samples, over all channels, decoded at a time
_UNKNOWN_FRAMES = 1 << 62  # libsndfile reports 2^63 - 1 frames for a streamed file of unknown length
_UNKNOWN_BYTES = 0x7FFF0000  # programs that write a WAV to a pipe give it the length 0x7ffff000, 0x7fffffff or 0xffffffff
_MPEG_FRAME = 1152  # samples
_CUT_SHORT = "the file is cut short"
# Bitmaps only. Pillow also opens EPS, for which it would start Ghostscript, and TGA, as which it misreads other files.
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Without ICO, which holds pictures of other formats and which `bridgekit.items.EXTENSIONS` does not name.
_NAMED = tuple(name for name in _FORMATS if name != "ICO")
# Library messages that say nothing useful.
_SAYS_NOTHING = re.compile(
    r"internal error|unknown error|unspecified|decoder error|decoder object|possibly a pipe|cannot load this image|^$",
    re.IGNORECASE,
)


def _because(reason: str) -> str:
    """A library's reason in brackets, if it says anything useful."""
    reason = " ".join(reason.removeprefix("Error : ").split()).rstrip(".")
    return "" if _SAYS_NOTHING.search(reason) else f" ({reason})"


# ---- audio


class _Stream(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """An audio file that is only read forwards. soundfile would seek after each read, which fails on a pipe."""

    def seekable(self) -> bool:
        return False


def decode_audio(path: Path, sample_rate: int) -> Iterator[npt.NDArray[np.float32]]:
    """The samples that `bridgekit.media.read_audio` returns, in blocks, so that memory does not grow with the clip.

    Raises:
        ItemError: as for `read_audio`, possibly after some blocks.
    """
    with opened(path) as file:
        container = pyav.container_of(file)
        track = pyav.sound_track(file, container, str(path)) if container else _libsndfile(file, path)
        with track as (rate, promised, blocks):
            for block in _resampled(_within_bounds(blocks, rate, promised, path), rate, sample_rate):
                # Checked again: large values in a float WAV may overflow when resampled.
                yield _finite(block, path)


@contextlib.contextmanager
def _libsndfile(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, Iterator[npt.NDArray[np.float32]]]]:
    """As `pyav.sound_track`, for the formats of libsndfile."""
    try:
        with _sound_source(file, path) as source, _Stream(source, closefd=False) as sound:
            promised = int(sound.frames)
            yield int(sound.samplerate), promised if promised < _UNKNOWN_FRAMES else 0, _mono_blocks(sound, path)
    except (soundfile.LibsndfileError, TypeError) as error:
        reason = getattr(error, "error_string", str(error))
        if "malloc" in reason:
            raise MemoryError(reason) from None
        what = f"this is not audio that can be read, or it is damaged{_because(reason)}"
        raise ItemError(what, where=str(path), remedy=pyav.CONVERT) from None


def _within_bounds(
    blocks: Iterator[npt.NDArray[np.float32]], rate: int, promised: int, path: Path
) -> Iterator[npt.NDArray[np.float32]]:
    """The blocks, checked: the sample rate, the duration, promised and real, and that there are samples and all are finite."""
    if not RATES[0] <= rate <= RATES[1]:  # at 1 Hz, resampling would turn a kilobyte into a gigabyte
        raise ItemError(
            f"the file claims a sample rate of {rate:,} Hz; {RATES[0]:,} to {RATES[1]:,} can be read",
            where=str(path),
            remedy="rewrite its header with its true rate (ffmpeg -i IN OUT.flac)",
        )
    limit, decoded = MAX_HOURS * 3600 * rate, 0
    too_long = ItemError(
        f"the clip lasts over {MAX_HOURS} hours, or claims to",
        where=str(path),
        remedy="cut it into shorter clips, or, if it is short, rewrite its header (ffmpeg -i IN OUT.flac)",
    )
    if promised > limit:
        raise too_long
    for block in blocks:
        decoded += len(block)
        if decoded > limit:
            raise too_long
        yield _finite(block, path)
    if not decoded:
        raise ItemError("the file has no audio: zero samples", where=str(path), remedy=AGAIN)


def _mono_blocks(sound: _Stream, path: Path) -> Iterator[npt.NDArray[np.float32]]:
    """All frames of an open sound file, channels averaged."""
    decoded, promised, rate = 0, int(sound.frames), int(sound.samplerate)
    while len(block := sound.read(max(1, _BLOCK // sound.channels), dtype="float32", always_2d=True)):
        decoded += len(block)
        yield block.mean(axis=1)
    # MP3 encoders disagree by a frame or two on the count, so only a larger gap means that audio is missing. A compressed WAV's
    # header is an estimate, and its bytes have been counted already.
    slack = 2 * _MPEG_FRAME if sound.format == "MP3" else 0
    if 0 < decoded < promised - slack and promised < _UNKNOWN_FRAMES and not sound.format.startswith("WAV"):
        what = f"{_CUT_SHORT}: {decoded / rate:.1f} s of {promised / rate:.1f} s are there"
        raise ItemError(what, where=str(path), remedy=AGAIN)


def _resampled(blocks: Iterator[npt.NDArray[np.float32]], rate: int, wanted: int) -> Iterator[npt.NDArray[np.float32]]:
    """Blocks at another sample rate: together bit-identical to resampling the whole clip at once."""
    if rate == wanted:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, wanted, 1, dtype="float32")
    first, given = np.zeros(0, np.float32), 0
    for block in blocks:
        first = first if len(first) else block
        piece = stream.resample_chunk(block)
        given += len(piece)
        yield piece
    rest = stream.resample_chunk(np.zeros(0, np.float32), last=True)
    # A clip shorter than half a sample at the new rate would become empty; it keeps one sample.
    yield rest if given + len(rest) else first.mean(keepdims=True)


def _finite(samples: npt.NDArray[np.float32], path: Path) -> npt.NDArray[np.float32]:
    if not np.isfinite(samples).all():
        raise ItemError("some samples are not finite (NaN or infinity)", where=str(path), remedy="export it again")
    return samples


@contextlib.contextmanager
def _sound_source(file: BinaryIO, path: Path) -> Iterator[int]:
    """A descriptor for libsndfile to read a file from, after checking lengths that libsndfile does not check."""
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE" and (header := _wav_header_with_length(file, path)):
        with _piped(file, len(header), header) as pipe:
            yield pipe
    elif (start := _mp3_without_length(file)) is not None:
        with _piped(file, start) as pipe:
            yield pipe
    else:
        if head[:4] == b"OggS":
            _check_last_ogg_page(file, path)
        os.lseek(file.fileno(), 0, os.SEEK_SET)  # file.seek may only move within Python's buffer
        yield file.fileno()


def _wav_header_with_length(file: BinaryIO, path: Path) -> bytes | None:
    """The header of a WAV that was streamed with its length left at 0, with the length filled in; None for any other WAV.

    libsndfile would find no audio in such a file.

    Raises:
        ItemError: the header promises more bytes than there are. libsndfile would silently return what is left.
    """
    size, start, name, promised = file.seek(0, os.SEEK_END), 12, b"", 0
    while name != b"data":  # skip the chunks before the samples
        file.seek(start)
        head = file.read(8)
        if len(head) < 8:
            return None
        name, promised = head[:4], int.from_bytes(head[4:], "little")
        start += 8 if name == b"data" else 8 + promised + promised % 2
    if size - start < promised < _UNKNOWN_BYTES:
        raise ItemError(
            f"{_CUT_SHORT}: {size - start:,} of {promised:,} bytes of audio are there", where=str(path), remedy=AGAIN
        )
    file.seek(4)
    whole = int.from_bytes(file.read(4), "little") + 8
    if promised or size <= start or whole == size:  # a length of 0 that agrees with the file's size is true
        return None
    file.seek(0)
    return file.read(start - 4) + min(size - start, 0xFFFFFFFF).to_bytes(4, "little")


def _mp3_without_length(file: BinaryIO) -> int | None:
    """Where the audio starts in an MP3 without a Xing header that counts its frames; None for any other file.

    libsndfile guesses the length of such a file from its first frames and never reads further: of a VBR file written to a pipe
    it would silently return a third.
    """
    file.seek(0)
    head = file.read(10).ljust(10, b"\0")
    start = 0
    if head[:3] == b"ID3":
        start = pyav.id3_length(head)
    elif head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return None
    file.seek(start)
    frame = file.read(2048)
    places = (frame.find(mark) + 7 for mark in (b"Xing", b"Info") if mark in frame)
    return None if any(at < len(frame) and frame[at] & 1 for at in places) else start


@contextlib.contextmanager
def _piped(file: BinaryIO, start: int, header: bytes = b"") -> Iterator[int]:
    """A header and the file from `start` through a pipe, which libsndfile reads to its end since a pipe has no length."""
    file.seek(start)
    reading, writing = os.pipe()

    def pump() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as pipe:
            pipe.write(header)
            while block := file.read(_BLOCK):
                pipe.write(block)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield reading
    finally:
        os.close(reading)
        thread.join()


def _check_last_ogg_page(file: BinaryIO, path: Path) -> None:
    """Refuse an Ogg file whose last page is incomplete: libsndfile would silently stop at the page before."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - (1 << 17))  # a page has at most 65,307 bytes
    file.seek(start)
    tail = file.read()
    page = tail.rfind(b"OggS")
    if page < 0:
        return
    head = tail[page : page + 27]
    segments = tail[page + 27 : page + 27 + head[26]] if len(head) == 27 else b""
    if len(head) < 27 or len(segments) < head[26] or page + 27 + len(segments) + sum(segments) > len(tail):
        raise ItemError(f"{_CUT_SHORT}: its last page is incomplete", where=str(path), remedy=AGAIN)


# ---- images


def decode_image(path: Path) -> Image.Image:
    """An image as `bridgekit.media.read_image` returns it. Sets Pillow's limit on pixels for the whole process.

    Raises:
        ItemError: as for `read_image`.
    """
    return _read_picture(path, _to_rgb)


def decode_opacity(path: Path) -> tuple[int, int]:
    """The lowest and the highest opacity of an image's pixels, as `bridgekit.media.read_opacity` returns them.

    Raises:
        ItemError: as for `read_image`.
    """
    return _read_picture(path, _opacity)


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of an image, however large, as `bridgekit.media.image_size` returns them. Decodes nothing.

    Raises:
        ItemError: as for `image_size`.
    """
    with _opened_picture(path, _NAMED, None) as picture:
        return picture.size


def _read_picture(path: Path, finish: Callable[[Image.Image], T]) -> T:
    # Pillow warns above this, and refuses above twice as many.
    with _opened_picture(path, _FORMATS, MAX_MEGAPIXELS * 1_000_000 // 2) as picture:
        if min(picture.size) >= MIN_SIDE:
            picture.load()
            with contextlib.suppress(Exception):  # a broken EXIF block affects no pixel
                ImageOps.exif_transpose(picture, in_place=True)
            return finish(picture)
    width, height = picture.size
    raise ItemError(
        f"the picture has {width:,} x {height:,} pixels: too few to show anything",
        where=str(path),
        remedy=f"use one with at least {MIN_SIDE} pixels on each side",
    )


@contextlib.contextmanager
def _opened_picture(path: Path, formats: Sequence[str], pixels: int | None) -> Iterator[Image.Image]:
    """An image of one of these formats with its header read, and any error as an ItemError."""
    Image.init()
    Image.MAX_IMAGE_PIXELS = pixels
    with opened(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield Image.open(file, formats=[name for name in formats if name in Image.OPEN])
        except MemoryError:
            raise
        except Exception as error:  # decoders may raise anything on unexpected bytes
            raise _refused_picture(path, error) from None


def _refused_picture(path: Path, error: Exception) -> ItemError:
    reason = str(error)
    if isinstance(error, UnidentifiedImageError):
        what, remedy = "this is not a picture that can be read", "convert it to PNG or JPEG"
    elif isinstance(error, Image.DecompressionBombError):
        pixels = int((re.findall(r"\d+", reason) or ["0"])[0])
        what = f"the picture has {pixels:,} pixels, over {MAX_MEGAPIXELS} megapixels"
        remedy = "scale it down: no encoder uses more than about 1,000 pixels on a side"
    elif "MAX_TEXT" in reason:
        what = "a text or a colour profile in the picture unpacks to over 1 MB, or all of them together to over 64 MB"
        remedy = "save the picture without them"
    else:
        what, remedy = f"the picture is cut short or damaged{_because(reason)}", AGAIN
    return ItemError(what, where=str(path), remedy=remedy)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bit(picture)).convert("RGB")
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    rgb = Image.new("RGB", picture.size)
    for band in bands(picture):  # to avoid several copies of a large picture in memory
        clear = picture.crop(band).convert("RGBA")
        rgb.paste(Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB"), band)
    return rgb


def _opacity(picture: Image.Image) -> tuple[int, int]:
    if not picture.has_transparency_data:
        return 255, 255
    parts = [np.asarray(picture.crop(band).convert("RGBA").getchannel("A")) for band in bands(picture)]
    return min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)


def bands(picture: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes (left, upper, right, lower) of whole rows that together cover the picture: one, unless it is large."""
    rows = max(1, (1 << 22) // picture.width)
    for top in range(0, picture.height, rows):
        yield 0, top, picture.width, min(top + rows, picture.height)


def _to_8_bit(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Grey levels of more than 8 bits, (height, width), scaled to 0..255. Pillow itself would clip them."""
    levels = np.asarray(picture).astype(np.float32)
    if not np.isfinite(levels).all():
        raise ValueError("some of its levels are not finite")
    low, high = np.float32(0), np.float32(65535)
    # 32-bit integers and floats have no fixed range, so the picture's own is used. In PNG and PGM they hold 16 bits.
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
        low, high = levels.min(), levels.max()
    levels -= low
    levels *= 255 / max(high - low, np.float32(1e-12))
    return np.rint(levels, out=levels).astype(np.uint8)


# ---- the operations of `isolation.decode`


def _audio(path: Path, sample_rate: int) -> Reply:
    return {}, (block.data.cast("B") for block in decode_audio(path, sample_rate) if len(block))


def _duration(path: Path, most: float) -> Reply:
    rate, frames = 16_000, 0
    for block in decode_audio(path, rate):
        frames += len(block)
        if frames > most * rate:
            break
    return {"seconds": frames / rate}, iter(())


def _image(path: Path) -> Reply:
    picture = decode_image(path)
    boxes = list(bands(picture))
    pieces = ((picture if len(boxes) == 1 else picture.crop(box)).tobytes("raw", "RGBX") for box in boxes)
    return {"size": picture.size}, pieces


def _image_size(path: Path) -> Reply:
    return {"size": picture_size(path)}, iter(())


def _image_opacity(path: Path) -> Reply:
    return {"opacity": decode_opacity(path)}, iter(())


OPERATIONS: dict[str, Callable[..., Reply]] = {
    "audio": _audio,
    "duration": _duration,
    "image": _image,
    "size": _image_size,
    "opacity": _image_opacity,
    "table": describe_table,
    "cells": read_cells,
    "places": find_blobs,
}
