"""Open the archives that Debian's packages keep sounds in: `members(path, data)` gives each file inside as (name, bytes).

Samples that are stored bare (SoundFont, GUS patch, DOOM lump) come out as WAV. Layouts are those that the formats' own tools
document; only what reading needs is here. A file that is no archive gives nothing."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import numpy as np
import soundfile

Members = Iterator[tuple[str, bytes]]
_HELD_SECONDS = 2.0  # a looped sample sounds for this long
_LONGEST_LOOP_SECONDS = 0.12


def members(path: str, data: bytes) -> Members:
    """Yield (name, bytes) of every file inside the archive `data`, chosen by what `path` ends in."""
    reader = _READERS.get(PurePosixPath(path).suffix.lower())
    return reader(data) if reader else iter(())


def _zip(data: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            yield name, archive.read(name)


def _rcc(data: bytes) -> Members:
    """Read a Qt binary resource, format 1 to 3."""
    version, tree, payload, names = struct.unpack_from(">4x4I", data)
    node_size = 14 if version == 1 else 22

    def walk(index: int, prefix: str) -> Members:
        at = tree + index * node_size
        name_at, flags = struct.unpack_from(">IH", data, at)
        length = struct.unpack_from(">H", data, names + name_at)[0] if index else 0
        name = prefix + data[names + name_at + 6 : names + name_at + 6 + 2 * length].decode("utf-16-be")
        if flags & 2:
            count, first = struct.unpack_from(">II", data, at + 6)
            for child in range(first, first + count):
                yield from walk(child, f"{name}/" if index else "")
            return
        start = payload + struct.unpack_from(">I", data, at + 10)[0]
        body = data[start + 4 : start + 4 + struct.unpack_from(">I", data, start)[0]]
        if not flags & 4:  # 4: Zstandard, which the standard library cannot read
            yield name, zlib.decompress(body[4:]) if flags & 1 else body

    return walk(0, "")


def _gresource(data: bytes) -> Members:
    """Read a GLib resource bundle (GVDB)."""
    start, end = struct.unpack_from("<II", data, 16)
    bloom, buckets = struct.unpack_from("<II", data, start)
    first = start + 8 + 4 * (bloom & (1 << 27) - 1) + 4 * buckets
    items = [struct.unpack_from("<IIIHBxII", data, at) for at in range(first, end - 23, 24)]

    def full_name(index: int) -> str:
        _, parent, at, size, *_ = items[index]
        return (full_name(parent) if parent < len(items) else "") + data[at : at + size].decode()

    for index, (*_, kind, at, _) in enumerate(items):
        if kind == ord("v"):
            size, flags = struct.unpack_from("<II", data, at)
            yield full_name(index), zlib.decompress(data[at + 8 :]) if flags & 1 else data[at + 8 : at + 8 + size]


def _cat(data: bytes) -> Members:
    """Read OpenTTD's sound set: members are named by their number."""
    count = (struct.unpack_from("<I", data)[0] & 0x7FFFFFFF) // 8
    for index in range(count):
        at, size = struct.unpack_from("<II", data, 8 * index)
        at &= 0x7FFFFFFF
        at += 1 + data[at]  # its title
        yield f"{index:02}.wav", data[at : at + size]


def _xmoto(data: bytes) -> Members:
    """Read X-Moto's XBI3 package: after the header, each file is name, checksum, size, content."""
    at = 37
    while at < len(data) and data[at]:
        name = data[at + 1 : at + 1 + data[at]].decode("latin-1")
        at += 1 + data[at] + 33
        size = struct.unpack_from("<I", data, at)[0]
        yield name, data[at + 4 : at + 4 + size]
        at += 4 + size


def _c4group(data: bytes) -> Members:
    """Read an OpenClonk group (a gzip stream with a magic of its own, a masked header, groups within groups)."""
    if data[:2] == b"\x1e\x8c":
        data = zlib.decompress(b"\x1f\x8b" + data[2:], 31)
    head = bytearray(byte ^ 237 for byte in data[:204])
    for at in range(0, 202, 3):
        head[at], head[at + 2] = head[at + 2], head[at]
    count = struct.unpack_from("<i", head, 36)[0]
    for index in range(count):
        at = 204 + 316 * index
        name = data[at : at + 260].split(b"\0")[0].decode("latin-1")
        child, size, _, offset = struct.unpack_from("<iiii", data, at + 264)
        body = data[204 + 316 * count + offset :][:size]
        if child:
            yield from ((f"{name}/{inner}", content) for inner, content in _c4group(body))
        else:
            yield name, body


def _sf2(data: bytes) -> Members:
    """Read a SoundFont's samples at their own pitch, looped ones held."""
    chunks: dict[bytes, bytes] = {}
    at = 12
    while at + 8 <= len(data):
        tag, size = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        if tag == b"LIST":
            at += 12
            continue
        chunks[tag] = data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    wave = np.frombuffer(chunks[b"smpl"], "<i2")
    for header in struct.iter_unpack("<20s5IBbHH", chunks[b"shdr"]):
        start, end, loop, loop_end, rate = header[1:6]
        if end - start > 1000 and rate:
            name = header[0].split(b"\0")[0].decode("latin-1").strip()
            yield name, _wav(_hold(wave[start:end], loop - start, loop_end - start, rate), rate)


def _pat(data: bytes) -> Members:
    """Read a GUS patch's samples, looped ones held; they are named by number."""
    at = 239
    for index in range(data[198]):
        size, loop, loop_end, rate = struct.unpack_from("<IIIH", data, at + 8)
        modes = data[at + 55]
        width, unsigned = 2 if modes & 1 else 1, modes & 2
        raw = data[at + 96 : at + 96 + size - size % width]
        wave = np.frombuffer(raw, f"<{'u' if unsigned else 'i'}{width}").astype(np.int32)
        wave = (wave - (128 << 8 * (width - 1) if unsigned else 0)) * (256 if width == 1 else 1)
        first, last = (loop // width, loop_end // width) if modes & 4 else (0, 0)
        yield f"{index}", _wav(_hold(wave.astype(np.int16), first, last, rate), rate)
        at += 96 + size


def _wad(data: bytes) -> Members:
    """Read the sound lumps of a DOOM archive."""
    count, directory = struct.unpack_from("<II", data, 4)
    for index in range(count):
        start, size, name = struct.unpack_from("<II8s", data, directory + 16 * index)
        if name.startswith(b"DS") and size > 1000 and data[start] == 3:
            rate = struct.unpack_from("<H", data, start + 2)[0]
            wave = np.frombuffer(data[start + 24 : start + size - 16], "u1").astype(np.int16)
            yield name.rstrip(b"\0").decode(), _wav((wave - 128) * 256, rate)


def _hold(wave: np.ndarray, loop: int, loop_end: int, rate: int) -> np.ndarray:
    """Sustain a note by its loop. A long loop is left alone: sound effects have one over their whole length."""
    if not 0 <= loop < loop_end <= len(wave) or not 8 <= loop_end - loop <= rate * _LONGEST_LOOP_SECONDS:
        return wave
    times = int(np.ceil((rate * _HELD_SECONDS - loop) / (loop_end - loop)))
    held = np.concatenate([wave[:loop], np.tile(wave[loop:loop_end], max(times, 1))]).astype(np.float64)
    fade = min(len(held), rate // 2)
    held[-fade:] *= np.linspace(1, 0, fade)
    return held.astype(np.int16)


def _wav(wave: np.ndarray, rate: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


_READERS: dict[str, Callable[[bytes], Members]] = {
    ".zip": _zip,
    ".wz": _zip,
    ".pk3": _zip,
    ".rcc": _rcc,
    ".gresource": _gresource,
    ".cat": _cat,
    ".bin": _xmoto,
    ".ocd": _c4group,
    ".ocf": _c4group,
    ".ocg": _c4group,
    ".sf2": _sf2,
    ".pat": _pat,
    ".wad": _wad,
}
