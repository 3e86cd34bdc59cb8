"""Mutations of media files: blind ones, and format-aware ones that fix checksums so that decoders continue."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence

#: From a file's content to a broken one.
Mutation = Callable[[random.Random, bytes], bytes]

EXTREMES = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


# ---- blind


def flip_bits(draw: random.Random, data: bytes) -> bytes:
    broken = bytearray(data)
    for _ in range(draw.choice((1, 2, 8, 64, 512))):
        broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
    return bytes(broken)


def flip_head(draw: random.Random, data: bytes) -> bytes:
    """Flip bits in the first 200 bytes, where headers are."""
    broken = bytearray(data)
    for _ in range(draw.choice((1, 2, 4, 8))):
        broken[draw.randrange(min(200, len(broken)))] ^= 1 << draw.randrange(8)
    return bytes(broken)


def cut(draw: random.Random, data: bytes) -> bytes:
    return data[
        : draw.choice((draw.randrange(len(data)), draw.randrange(min(100, len(data))), len(data) - draw.randrange(1, 20)))
    ]


def behead(draw: random.Random, data: bytes) -> bytes:
    return data[draw.randrange(1, min(600, len(data))) :]


def zero(draw: random.Random, data: bytes) -> bytes:
    start, end = _range(draw, data)
    return data[:start] + bytes(end - start) + data[end:]


def scramble(draw: random.Random, data: bytes) -> bytes:
    start, end = _range(draw, data)
    return data[:start] + draw.randbytes(end - start) + data[end:]


def remove(draw: random.Random, data: bytes) -> bytes:
    start, end = _range(draw, data)
    return data[:start] + data[end:]


def duplicate(draw: random.Random, data: bytes) -> bytes:
    start, end = _range(draw, data)
    return data[:end] + data[start:end] * draw.choice((1, 3, 50)) + data[end:]


def shuffle(draw: random.Random, data: bytes) -> bytes:
    size = draw.choice((16, 256, 4096))
    keep = draw.choice((0, 64, 1024))
    blocks = [data[at : at + size] for at in range(keep, len(data), size)]
    draw.shuffle(blocks)
    return data[:keep] + b"".join(blocks)


def overwrite_number(draw: random.Random, data: bytes) -> bytes:
    """Set two or four bytes near the start to an extreme."""
    at, width = draw.randrange(min(256, len(data))), draw.choice((2, 4))
    value = (draw.choice(EXTREMES) & (256**width - 1)).to_bytes(width, draw.choice(("big", "little")))
    return data[:at] + value + data[at + width :]


def append_noise(draw: random.Random, data: bytes) -> bytes:
    return data + draw.randbytes(draw.choice((1, 1_000, 100_000)))


def _range(draw: random.Random, data: bytes) -> tuple[int, int]:
    start = draw.randrange(len(data))
    return start, min(len(data), start + draw.choice((1, 4, 64, 1024, len(data) // 3)))


BLIND: tuple[Mutation, ...] = (
    flip_bits,
    flip_head,
    cut,
    behead,
    zero,
    scramble,
    remove,
    duplicate,
    shuffle,
    overwrite_number,
    append_noise,
)


# ---- format-aware: split a file into parts and change, move, repeat or drop one


def _rearranged(draw: random.Random, parts: Sequence[bytes], change: Callable[[bytes], bytes]) -> list[bytes]:
    parts = list(parts)
    at = draw.randrange(len(parts))
    kind = draw.choice(("change", "change", "change", "change", "drop", "double", "swap", "many"))
    if kind == "change":
        parts[at] = change(parts[at])
    elif kind == "drop":
        del parts[at]
    elif kind == "double":
        parts.insert(at, parts[at])
    elif kind == "many":
        parts[at:at] = [parts[at]] * draw.choice((10, 300))
    else:
        other = draw.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    return parts


def _worse(draw: random.Random, payload: bytes) -> bytes:
    """Break a payload blindly, or set one of its first numbers to an extreme."""
    if not payload:
        return draw.randbytes(8)
    if draw.random() < 0.5:
        width, at = draw.choice((1, 2, 4)), draw.randrange(min(32, len(payload)))
        value = (draw.choice(EXTREMES) & (256**width - 1)).to_bytes(width, draw.choice(("big", "little")))
        return payload[:at] + value + payload[at + width :]
    return draw.choice((flip_bits, flip_head, cut, zero, scramble, remove, duplicate))(draw, payload)


def riff(draw: random.Random, data: bytes) -> bytes:
    """WAV and WebP: chunks with a four-letter type and a length."""
    parts, at = [], 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        parts.append(data[at : at + 8 + size + size % 2])
        at += 8 + size + size % 2
    if not parts:
        return flip_head(draw, data)

    def change(part: bytes) -> bytes:
        if draw.random() < 0.4:
            return part[:4] + struct.pack("<I", draw.choice(EXTREMES)) + part[8:]
        payload = _worse(draw, part[8:])
        return part[:4] + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)

    body = b"".join(_rearranged(draw, parts, change))
    whole = draw.choice(EXTREMES) if draw.random() < 0.1 else len(body) + 4
    return data[:4] + struct.pack("<I", whole & 0xFFFFFFFF) + data[8:12] + body


def flac(draw: random.Random, data: bytes) -> bytes:
    """Metadata blocks; the first (STREAMINFO) has block sizes, sample rate, channels and length."""
    parts, at, last = [], 4, False
    while not last and at + 4 <= len(data):
        size = int.from_bytes(data[at + 1 : at + 4], "big")
        last = bool(data[at] & 0x80)
        parts.append(data[at : at + 4 + size])
        at += 4 + size
    if draw.random() < 0.4:
        info = int.from_bytes(parts[0][4:22], "big")  # 16 + 16 + 24 + 24 + 20 + 3 + 5 + 36 bits
        widths = (36, 5, 3, 20, 24, 24, 16, 16)
        field = draw.randrange(len(widths))
        shift, mask = sum(widths[:field]), (1 << widths[field]) - 1
        value = draw.choice((0, 1, mask, mask - 1, mask >> 1, draw.getrandbits(widths[field])))
        info = info & ~(mask << shift) | value << shift
        parts[0] = parts[0][:4] + info.to_bytes(18, "big") + parts[0][22:]
        return data[:4] + b"".join(parts) + data[at:]

    def change(part: bytes) -> bytes:
        if draw.random() < 0.4:
            return part[:1] + (draw.choice(EXTREMES) & 0xFFFFFF).to_bytes(3, "big") + part[4:]
        payload = _worse(draw, part[4:])
        return part[:1] + len(payload).to_bytes(3, "big") + payload

    frames = data[at:] if draw.random() < 0.7 else _worse(draw, data[at:])
    return data[:4] + b"".join(_rearranged(draw, parts, change)) + frames


def ogg(draw: random.Random, data: bytes) -> bytes:
    """Pages, with correct checksums."""
    pages = [b"OggS" + page for page in data.split(b"OggS")[1:]]
    if not pages:
        return flip_head(draw, data)

    def change(page: bytes) -> bytes:
        kind = draw.choice(("granule", "flags", "serial", "segments", "payload", "payload", "version"))
        start = 27 + page[26]
        broken = bytearray(page)
        if kind == "granule":
            broken[6:14] = struct.pack("<q", draw.choice((0, 1, -1, -2, 2**62, 2**63 - 1, -(2**63), 2**31)))
        elif kind == "flags":
            broken[5] = draw.randrange(256)
        elif kind == "serial":
            broken[14:18] = draw.randbytes(4)
        elif kind == "segments":
            broken[27 + draw.randrange(max(1, page[26]))] = draw.choice((0, 1, 254, 255))
        elif kind == "version":
            broken[4] = draw.randrange(256)
        else:
            broken[start:] = _worse(draw, page[start:])
        return bytes(broken)

    return b"".join(map(with_ogg_checksum, _rearranged(draw, pages, change)))


def with_ogg_checksum(page: bytes) -> bytes:
    if len(page) < 27:
        return page
    blank = page[:22] + bytes(4) + page[26:]
    crc = 0
    for byte in blank:
        crc = (crc << 8 & 0xFFFFFFFF) ^ _OGG_TABLE[crc >> 24 ^ byte]
    return page[:22] + struct.pack("<I", crc) + page[26:]


def _ogg_table() -> list[int]:
    table = []
    for crc in range(256):
        crc <<= 24
        for _ in range(8):
            crc = (crc << 1 & 0xFFFFFFFF) ^ (0x04C11DB7 if crc >> 31 else 0)
        table.append(crc)
    return table


_OGG_TABLE = _ogg_table()


def mp3(draw: random.Random, data: bytes) -> bytes:
    """A frame's header, the ID3 tag, or the Xing frame with the number of frames."""
    broken = bytearray(data)
    kind = draw.choice(("tag", "header", "header", "header", "count"))
    if kind == "tag":
        size = draw.choice((0, 1, 2**14, 2**28 - 1))
        head = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
        return b"ID3" + bytes([draw.choice((2, 3, 4, 255)), 0, draw.choice((0, 0x10, 0x80, 0xFF))]) + head + bytes(64) + data
    if kind == "count":
        at = max(data.find(b"Info"), data.find(b"Xing"), 0)
        broken[at + 4 : at + 12] = struct.pack(">II", draw.choice((1, 3, 15, 0xFFFFFFFF)), draw.choice(EXTREMES))
        return bytes(broken)
    starts = [at for at in range(len(data) - 4) if data[at] == 0xFF and data[at + 1] & 0xE0 == 0xE0]
    for at in draw.sample(starts, min(len(starts), draw.choice((1, 2, 10)))):
        broken[at + draw.randrange(1, 4)] = draw.randrange(256)
    return bytes(broken)


def png(draw: random.Random, data: bytes) -> bytes:
    """Chunks, with correct checksums."""
    parts, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        parts.append(data[at + 4 : at + 8 + size])
        at += 12 + size
    head = parts[0]
    if draw.random() < 0.35:
        fields = list(struct.unpack(">IIBBBBB", head[4:17]))
        field = draw.randrange(7)
        fields[field] = draw.choice(EXTREMES) if field < 2 else draw.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        parts[0] = head[:4] + struct.pack(">IIBBBBB", *fields)
        return data[:8] + b"".join(map(png_chunk, parts))
    if draw.random() < 0.1:
        at = draw.randrange(len(parts))
        broken = [png_chunk(part) for part in parts]
        broken[at] = struct.pack(">I", draw.choice(EXTREMES)) + broken[at][4:]
        return data[:8] + b"".join(broken)

    def change(part: bytes) -> bytes:
        if part[:4] == b"IDAT" and draw.random() < 0.5:  # break the data inside the compressed stream
            try:
                return b"IDAT" + zlib.compress(_worse(draw, zlib.decompress(part[4:])))
            except zlib.error:
                pass
        return part[:4] + _worse(draw, part[4:])

    return data[:8] + b"".join(map(png_chunk, _rearranged(draw, parts, change)))


def png_chunk(part: bytes) -> bytes:
    """A chunk (type and data) with its length and checksum."""
    return struct.pack(">I", max(0, len(part) - 4)) + part + struct.pack(">I", zlib.crc32(part))


def jpeg(draw: random.Random, data: bytes) -> bytes:
    """Segments with a marker and a length, then the scan."""
    parts, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        parts.append(data[at : at + 2 + size])
        at += 2 + size
    if not parts:
        return flip_head(draw, data)
    frame = next((number for number, part in enumerate(parts) if part[1] in (0xC0, 0xC1, 0xC2)), None)
    if frame is not None and draw.random() < 0.35:
        part = bytearray(parts[frame])
        field = draw.choice((4, 5, 7, 9, *range(10, len(part))))
        width = 2 if field in (5, 7) else 1
        part[field : field + width] = (draw.choice(EXTREMES) & (256**width - 1)).to_bytes(width, "big")
        parts[frame] = bytes(part)
        return data[:2] + b"".join(parts) + data[at:]

    def change(part: bytes) -> bytes:
        if draw.random() < 0.3:
            return part[:2] + struct.pack(">H", draw.choice(EXTREMES) & 0xFFFF) + part[4:]
        payload = _worse(draw, part[4:])[:65_000]
        return part[:2] + struct.pack(">H", len(payload) + 2) + payload

    scan = data[at:] if draw.random() < 0.7 else _worse(draw, data[at:])
    return data[:2] + b"".join(_rearranged(draw, parts, change)) + scan


def gif(draw: random.Random, data: bytes) -> bytes:
    """The screen size, a frame's position and size, the colour tables, the code size, or the block lengths."""
    broken = bytearray(data)
    frames = [at for at in range(13, len(data) - 10) if data[at] == 0x2C and data[at + 9] & 0x18 == 0]
    kind = draw.choice(("screen", "frame", "code", "table", "blocks"))
    frame = draw.choice(frames[:4]) if frames else 13
    size = struct.pack("<H", draw.choice(EXTREMES) & 0xFFFF)
    if kind == "screen":
        at = draw.choice((6, 8))
        broken[at : at + 2] = size
    elif kind == "frame":
        at = frame + draw.choice((1, 3, 5, 7))
        broken[at : at + 2] = size
    elif kind == "code":
        broken[min(frame + 10, len(broken) - 1)] = draw.choice((0, 1, 2, 9, 12, 13, 255))
    elif kind == "table":
        broken[draw.choice((10, 11, 12))] = draw.randrange(256)
    else:
        at = min(frame + 11 + draw.choice((0, 256, 512)), len(broken) - 1)
        broken[at] = draw.choice((0, 1, 255))
    return bytes(broken)


BY_FORMAT: Mapping[str, Mutation] = {
    "wav": riff,
    "flac": flac,
    "ogg": ogg,
    "mp3": mp3,
    "png": png,
    "jpg": jpeg,
    "webp": riff,
    "gif": gif,
}
