"""The sound track of MP4 (m4a, mov, 3gp), ADTS (aac), WebM and Matroska, which libsndfile does not read, by PyAV (FFmpeg).

PyAV is optional. `decoders` calls this in a decoder process, and checks the rate, the length and the samples as for any audio.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bridgekit.errors import ItemError
from bridgekit.storage.bounded import AGAIN

if TYPE_CHECKING:
    from av import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

#: What to do about audio in a format that cannot be decoded, or is damaged.
CONVERT = "convert it to WAV, FLAC, Ogg or MP3 (ffmpeg -i IN OUT.flac)"

_BLOCK = 1 << 18  # samples; FFmpeg decodes about a thousand at a time
_EBML = 0x1A45DFA3


def container_of(file: BinaryIO) -> str | None:
    """FFmpeg's name of the container, by a file's first bytes, if it is one that PyAV is to read; otherwise None."""
    file.seek(0)
    head = file.read(10).ljust(10, b"\0")
    if head[:3] == b"ID3":  # a tag, which may precede ADTS as it does MP3
        file.seek(id3_length(head))
        head = file.read(10).ljust(10, b"\0")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return "mov"
    if int.from_bytes(head[:4], "big") == _EBML:
        return "matroska"
    return "aac" if head[0] == 0xFF and head[1] & 0xF6 == 0xF0 else None


def id3_length(head: bytes) -> int:
    """The length in bytes of an ID3 tag that starts with these ten."""
    content = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    return content + (20 if head[5] & 0x10 else 10)


@contextlib.contextmanager
def sound_track(file: BinaryIO, container: str, where: str) -> Iterator[tuple[int, int, Iterator[npt.NDArray[np.float32]]]]:
    """Open a file's sound track: the main one, if there are several. Pictures and videos are skipped.

    Arguments:
        file: the file, open for reading.
        container: as from `container_of`.
        where: its name, for messages.

    Returns:
        the sample rate in Hz; how many samples the file claims to have, 0 if it does not say; and float32 blocks of shape (n,),
        channels averaged, full scale at -1 and 1.

    Raises:
        ItemError: there is no sound track, PyAV is not installed, or the file is cut short or damaged. That can not always be
            told: a WebM that a browser recorded does not know its length, and may end after any of its blocks.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise ItemError(
            "MP4, AAC, WebM and Matroska are read by PyAV, which is not installed",
            where=where,
            remedy=f'in bridgekit\'s own folder: pip install ".[media]"; or {CONVERT}',
        ) from None
    _check_whole(file, container, where)
    file.seek(0)
    try:
        with av.open(file, format=container, options=_options(), metadata_errors="replace") as opened:
            track = opened.streams.best("audio")
            if track is None:
                raise ItemError("the file has no sound track", where=where, remedy="give one with sound")
            if track.codec_context is None:
                raise ItemError("its sound track is in a format that PyAV cannot decode", where=where, remedy=CONVERT)
            rate = int(track.codec_context.sample_rate)
            yield rate, int(_claimed_seconds(opened, track) * rate), _blocks(opened, track, rate, where)
    except MemoryError:  # some of FFmpeg's errors are one
        raise
    except av.FFmpegError as error:
        raise ItemError(f"its sound track is cut short or damaged ({error.strerror})", where=where, remedy=AGAIN) from None


def _options() -> dict[str, str]:
    """FFmpeg may open no other file, whatever this one says, and decode nothing but audio."""
    from av import codecs_available
    from av.codec.codec import Codec, UnknownCodecError

    def is_audio(name: str) -> bool:
        try:
            return Codec(name, "r").type == "audio"
        except UnknownCodecError:  # it can only encode
            return False

    return {"protocol_whitelist": "none", "codec_whitelist": ",".join(filter(is_audio, sorted(codecs_available)))}


def _claimed_seconds(opened: InputContainer, track: AudioStream) -> float:
    if opened.format.name == "aac":  # FFmpeg guesses it from the first frames
        return 0.0
    if track.duration and track.time_base:
        return float(track.duration * track.time_base)
    return (opened.duration or 0) / 1e6


def _blocks(opened: InputContainer, track: AudioStream, rate: int, where: str) -> Iterator[npt.NDArray[np.float32]]:
    track.codec_context.thread_count = 1
    pieces: list[npt.NDArray[np.float32]] = []
    gathered = 0
    for packet in opened.demux(track):
        if packet.is_corrupt:
            raise ItemError("the file is cut short: the end of its sound track is missing", where=where, remedy=AGAIN)
        for frame in packet.decode():
            if frame.sample_rate != rate:
                what = f"its sample rate changes from {rate:,} to {frame.sample_rate:,} Hz"
                raise ItemError(what, where=where, remedy=CONVERT)
            pieces.append(_mono(frame))
            gathered += frame.samples
        if gathered > _BLOCK:
            yield np.concatenate(pieces)
            pieces, gathered = [], 0
    if pieces:
        yield np.concatenate(pieces)


def _mono(frame: AudioFrame) -> npt.NDArray[np.float32]:
    """A frame's channels averaged, (n,): planar or packed, of floats or integers."""
    samples: npt.NDArray[Any] = frame.to_ndarray()
    kind = samples.dtype
    samples = samples.reshape(-1, frame.samples) if frame.format.is_planar else samples.reshape(frame.samples, -1).T
    mean = samples.mean(axis=0, dtype=np.float64 if kind.itemsize > 2 and kind.kind == "i" else np.float32)
    if kind.kind == "u":
        mean = (mean - 128) / 128
    elif kind.kind == "i":
        mean = mean / -float(np.iinfo(kind).min)
    return np.asarray(mean, np.float32)


# ---- the structure of the containers, since FFmpeg may silently stop before a part that is not all there


def _check_whole(file: BinaryIO, container: str, where: str) -> None:
    """Refuse a file that ends within one of its outermost parts."""
    size, at = file.seek(0, 2), 0
    while at < size:
        file.seek(at)
        length = {"mov": _box, "matroska": _element, "aac": _frame}[container](file.read(16).ljust(16, b"\0"))
        if not length:
            return
        at += length
        if at > size:
            raise ItemError(f"the file is cut short: it has {size:,} of at least {at:,} bytes", where=where, remedy=AGAIN)


def _box(head: bytes) -> int:
    """The length of an MP4 box that starts with these 16 bytes; 0 if it extends to the end of the file, or is none."""
    length = int.from_bytes(head[:4], "big")
    length = int.from_bytes(head[8:], "big") if length == 1 else length
    return length if length >= 8 else 0


def _element(head: bytes) -> int:
    """The length of a Matroska element, or of its name and length alone, if more elements follow these; 0 if it is none.

    Recorders leave the lengths of the segment and of its clusters unknown: all ones.
    """
    width = 9 - head[0].bit_length()
    length_width = 9 - head[width].bit_length() if width < 5 else 9
    if length_width > 8:
        return 0
    ones = (1 << 7 * length_width) - 1
    length = int.from_bytes(head[width : width + length_width], "big") & ones
    return width + length_width + (0 if length == ones else length)


def _frame(head: bytes) -> int:
    """The length of an ADTS frame or ID3 tag; 0 if it is none."""
    if head[:3] == b"ID3":
        return id3_length(head[:10])
    if head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return 0
    return max(7, (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5)
