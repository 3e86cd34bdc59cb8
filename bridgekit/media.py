"""Reading audio, images and text from disk, so that a file is either read whole or refused with a reason."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from PIL import Image, ImageOps, UnidentifiedImageError

from bridgekit.encoders import Item
from bridgekit.errors import ItemError

MAX_HOURS = 4
MAX_MEGAPIXELS = 100
MIN_SIDE = 8  # pixels

_BLOCK = 1 << 18  # frames decoded at a time, and bytes hashed at a time
_UNKNOWN_FRAMES = 1 << 62  # libsndfile gives a streamed file, which does not say how long it is, 2^63 - 1 frames
_UNKNOWN_BYTES = 0x7FFF0000  # what writers to a pipe put for a WAV's length lies above: 0x7ffff000, 0x7fffffff, 0xffffffff
_MPEG_FRAME = 1152  # samples
_CUT_SHORT = "the file is cut short"
_AGAIN = "copy or download it again, or remove the row"
# Bitmaps only. Pillow also opens EPS, for which it would start Ghostscript, and TGA, which it takes other files for.
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_BROKEN = re.compile("[\0\ud800-\udfff]")  # NUL, or half a surrogate pair
_pixel_guard = threading.Lock()


# ---- audio


class _Stream(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """A sound file that is only read onwards. soundfile seeks after each read otherwise, and not all files allow that."""

    def seekable(self) -> bool:
        return False


def read_audio(path: Path, sample_rate: int) -> npt.NDArray[np.float32]:
    """Decode a sound file: WAV, FLAC, Ogg, MP3 and whatever else libsndfile knows, at any rate, with any channels.

    Arguments:
        path: the file.
        sample_rate: samples a second of the result.

    Returns:
        float32 samples of shape (n,) with n > 0, full scale at -1 and 1; channels are averaged.

    Raises:
        ItemError: there is no such file; it is not audio, is empty, is cut short or damaged, holds samples that are no
            numbers, or claims to last over four hours.
    """
    path = Path(path)
    with _opened(path) as file:
        try:
            with _sound_source(file, path) as source, _Stream(source, closefd=False) as sound:
                rate = int(sound.samplerate)
                mono = _decode(sound, path)
        except (soundfile.LibsndfileError, TypeError) as error:
            reason = getattr(error, "error_string", str(error)).strip().rstrip(".")
            raise ItemError(
                f"this is not audio that can be read, or it is damaged ({reason})",
                where=str(path),
                remedy="convert it to WAV, FLAC, Ogg or MP3 (ffmpeg -i IN OUT.flac), or remove the row",
            ) from None
    if rate == sample_rate:
        return mono
    resampled: npt.NDArray[np.float32] = soxr.resample(mono, rate, sample_rate)
    # A clip shorter than half a sample of the new rate rounds to none; it is still a clip.
    return resampled if len(resampled) else mono.mean(keepdims=True)


def _decode(sound: _Stream, path: Path) -> npt.NDArray[np.float32]:
    """All frames of an open sound file, averaged to mono."""
    promised, limit = int(sound.frames), MAX_HOURS * 3600 * int(sound.samplerate)
    too_long = ItemError(
        f"the clip lasts over {MAX_HOURS} hours, or claims to",
        where=str(path),
        remedy="cut it into shorter clips, or, if it is short, write its header anew (ffmpeg -i IN OUT.flac)",
    )
    if limit < promised < _UNKNOWN_FRAMES:
        raise too_long
    blocks: list[npt.NDArray[np.float32]] = []
    decoded = 0
    while True:
        block = sound.read(_BLOCK, dtype="float32", always_2d=True)
        if not len(block):
            break
        decoded += len(block)
        if decoded > limit:
            raise too_long
        blocks.append(block.mean(axis=1))
        if not np.isfinite(blocks[-1]).all():
            raise ItemError("some samples are not numbers (NaN or infinity)", where=str(path), remedy="write the file anew")
    if not decoded:
        raise ItemError("the file holds no sound: zero samples", where=str(path), remedy=_AGAIN)
    # MP3 encoders differ by a frame or two in what they count, so only a larger gap says that something is missing.
    # Compressed WAVs only estimate; a WAV's bytes are counted before.
    slack = 2 * _MPEG_FRAME if sound.format == "MP3" else 0
    if decoded + slack < promised < _UNKNOWN_FRAMES and not sound.format.startswith("WAV"):
        seconds = (promised / sound.samplerate, decoded / sound.samplerate)
        raise ItemError(f"{_CUT_SHORT}: {seconds[1]:.1f} s of {seconds[0]:.1f} s are there", where=str(path), remedy=_AGAIN)
    return np.concatenate(blocks)


@contextlib.contextmanager
def _sound_source(file: BinaryIO, path: Path) -> Iterator[int | BinaryIO]:
    """What to hand libsndfile for this file, once the lengths that libsndfile takes on trust are checked."""
    head = file.read(12)
    file.seek(0)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE" and _wav_length_is_missing(file, path):
        yield _with_wav_length(file)
    elif _is_mp3(head) and (start := _mp3_without_length(file)) is not None:
        with _piped(file, start) as pipe:
            yield pipe
    else:
        if head[:4] == b"OggS":
            _check_last_ogg_page(file, path)
        os.lseek(file.fileno(), 0, os.SEEK_SET)  # file.seek may only move within Python's buffer
        yield file.fileno()


def _wav_data_chunk(file: BinaryIO) -> tuple[int, int] | None:
    """Where a WAV's samples begin and how many bytes of them its header promises, or None if it has none."""
    at = 12
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            return None
        size = int.from_bytes(head[4:], "little")
        if head[:4] == b"data":
            return at + 8, size
        at += 8 + size + size % 2


def _wav_length_is_missing(file: BinaryIO, path: Path) -> bool:
    """Whether a WAV was streamed with its length left at 0, which libsndfile reads as no sound.

    Raises:
        ItemError: the header promises more bytes than there are. libsndfile would return what is left without a word.
    """
    chunk = _wav_data_chunk(file)
    if chunk is None:
        return False
    start, promised = chunk
    size = file.seek(0, os.SEEK_END)
    if size - start < promised < _UNKNOWN_BYTES:
        raise ItemError(
            f"{_CUT_SHORT}: {size - start:,} of {promised:,} bytes of sound are there", where=str(path), remedy=_AGAIN
        )
    file.seek(4)
    whole = int.from_bytes(file.read(4), "little") + 8
    # A header that agrees with the file's size tells the truth: the sound really is empty.
    return promised == 0 and start < size and whole != size


def _with_wav_length(file: BinaryIO) -> BinaryIO:
    """The same WAV in memory, its length said to be unknown in the way that libsndfile understands."""
    chunk = _wav_data_chunk(file)
    assert chunk is not None
    file.seek(0)
    data = bytearray(file.read())
    data[chunk[0] - 4 : chunk[0]] = b"\xff\xff\xff\xff"
    return io.BytesIO(data)


def _is_mp3(head: bytes) -> bool:
    return head[:3] == b"ID3" or (len(head) > 2 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2)


def _mp3_without_length(file: BinaryIO) -> int | None:
    """Where the sound starts in an MP3 that has no Xing header with its number of frames, or None where it has one.

    libsndfile guesses the length of such a file from its first frames and never reads past its guess: of a VBR file
    written to a pipe it would silently return a third.
    """
    file.seek(0)
    tag = file.read(10)
    start = 0
    if tag[:3] == b"ID3" and len(tag) == 10:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        start += 10 if tag[5] & 0x10 else 0
    file.seek(start)
    frame = file.read(2048)
    for mark in (b"Xing", b"Info"):
        at = frame.find(mark)
        if at >= 0 and len(frame) > at + 7 and frame[at + 7] & 1:
            return None
    return start


@contextlib.contextmanager
def _piped(file: BinaryIO, start: int) -> Iterator[int]:
    """The file from a byte on, through a pipe, where libsndfile reads to the end for lack of a length to believe in."""
    file.seek(start)
    reading, writing = os.pipe()

    def pump() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as pipe:
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
    """Refuse an Ogg file whose last page is not all there: libsndfile takes the page before it for the end."""
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
        raise ItemError(f"{_CUT_SHORT}: its last page of sound is incomplete", where=str(path), remedy=_AGAIN)


# ---- images


def read_image(path: Path) -> Image.Image:
    """Decode a picture, upright, as people see it.

    Arguments:
        path: the file. Of an animation the first frame is taken.

    Returns:
        An RGB picture: turned as its EXIF says, transparent parts on white, 16 bit grey scaled to 8 bit.

    Raises:
        ItemError: there is no such file; it is not a picture, is cut short or damaged, has over 100 megapixels, or a side
            of less than 8 pixels.
    """
    path = Path(path)
    with _opened(path) as file:
        try:
            picture = _open_picture(file)
        except UnidentifiedImageError:
            picture = None
        except Exception as error:  # decoders raise anything on bytes that they do not expect
            raise _damaged(path, error) from None
        if picture is None:
            raise ItemError("this is not a picture that can be read", where=str(path), remedy="convert it to PNG or JPEG")
        width, height = picture.size
        if width * height > MAX_MEGAPIXELS * 1_000_000:
            raise ItemError(
                f"the picture has {width:,} x {height:,} pixels, over {MAX_MEGAPIXELS} megapixels",
                where=str(path),
                remedy="scale it down: no encoder looks at more than about 1,000 pixels a side",
            )
        if min(width, height) < MIN_SIDE:
            raise ItemError(
                f"the picture has {width:,} x {height:,} pixels: too few to show anything",
                where=str(path),
                remedy=f"give a picture of at least {MIN_SIDE} pixels a side, or remove the row",
            )
        try:
            picture.load()
            return _to_rgb(_upright(picture))
        except Exception as error:
            raise _damaged(path, error) from None


def _open_picture(file: BinaryIO) -> Image.Image:
    """Read a picture's header, without Pillow's own guard against large ones: it warns where ours refuses."""
    Image.init()
    with _pixel_guard:  # the guard is one number for the whole process, so it is lifted for the header alone
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _damaged(path: Path, error: Exception) -> ItemError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ItemError(f"the picture is cut short or damaged ({reason})", where=str(path), remedy=_AGAIN)


def _upright(picture: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # a broken EXIF block spoils no pixel
        return ImageOps.exif_transpose(picture)
    return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bit(picture)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _to_8_bit(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Grey levels of more than 8 bit, of shape (height, width), scaled to 0..255. Pillow's own conversion clips them."""
    levels = np.asarray(picture).astype(np.float32)
    if not np.isfinite(levels).all():
        raise ValueError("some of its levels are not numbers")
    low, high = np.float32(0), np.float32(65535)
    # Integers of 32 bit and floats have no agreed white, so theirs is the brightest there is. PNG and PGM mean 16 bit.
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
        low, high = levels.min(), levels.max()
    scaled: npt.NDArray[np.uint8] = np.rint((levels - low) * (255 / max(high - low, np.float32(1e-12)))).astype(np.uint8)
    return scaled


# ---- text


def read_text(item: Item) -> str:
    """A text, stripped of the white space around it. A path is read as a UTF-8 file.

    Raises:
        ItemError: there is nothing in it, or something that is no text (NUL bytes, half a surrogate pair).
    """
    if isinstance(item, Path):
        with _opened(item) as file:
            try:
                text = file.read().decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                raise ItemError("this is not text in UTF-8", where=str(item), remedy="save it as UTF-8") from None
        where = str(item)
    else:
        text = item.strip()
        where = repr(text[:60])
    if not text:
        raise ItemError("the text is empty", where=where, remedy="write a text, or remove the row")
    if _BROKEN.search(text):
        raise ItemError("the text holds NUL bytes or broken characters", where=where, remedy="save it anew as UTF-8")
    return text


# ---- any item


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
    with _opened(item, may_be_empty=True) as file:
        try:
            while block := file.read(_BLOCK):
                digest.update(block)
        except OSError as error:
            raise _unreadable(item, error) from None
    return digest.digest()


@contextlib.contextmanager
def _opened(path: Path, *, may_be_empty: bool = False) -> Iterator[BinaryIO]:
    """A file open for reading, or the reason why it cannot be."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ItemError("this is a folder, not a file", where=str(path), remedy="name a file in it")
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise ItemError("this is not a regular file", where=str(path), remedy="name a file")
        if status.st_size == 0 and not may_be_empty:
            raise ItemError("the file is empty (0 bytes)", where=str(path), remedy=_AGAIN)
        file = path.open("rb")
    except FileNotFoundError:
        raise ItemError("there is no such file", where=str(path), remedy="check the path, or remove the row") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(path, error) from None
    with file:
        yield file


def _unreadable(path: Path, error: Exception) -> ItemError:
    reason = getattr(error, "strerror", None) or str(error)
    return ItemError(f"the file cannot be read ({reason})", where=str(path), remedy="check its name and permissions")
