"""Decompression bombs: small files that claim to be large or decompress to much data. They must be refused early."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
import soundfile
from PIL import Image

from tests.torture.mutations import png_chunk, with_ogg_checksum

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@functools.cache
def bombs() -> dict[str, bytes]:
    """File name, which describes the bomb, to content."""
    return {
        "white-30000x30000.png": blank_png(30_000, 30_000),
        "claims-2147483647x2147483647.png": png_of(2**31 - 1, 2**31 - 1, zlib.compress(bytes(100))),
        "text-of-300-megabytes.png": with_chunk(b"zTXtComment\0\0" + zlib.compress(bytes(300_000_000), 9)),
        "100-texts-of-a-megabyte.png": with_chunk(*[b"zTXtComment\0\0" + zlib.compress(bytes(1_000_000), 9)] * 100),
        "international-text-of-300-megabytes.png": with_chunk(b"iTXtTitle\0\1\0\0\0" + zlib.compress(bytes(300_000_000), 9)),
        "profile-of-300-megabytes.png": with_chunk(b"iCCPicc\0\0" + zlib.compress(bytes(300_000_000), 9)),
        "pixels-of-300-megabytes-in-100x100.png": png_of(100, 100, zlib.compress(bytes(300_000_000), 9)),
        "claims-4294967295-frames.png": with_chunk(b"acTL" + struct.pack(">II", 0xFFFFFFFF, 0)),
        "screen-65535x65535.gif": gif(65_535, 65_535, 8, 8),
        "frame-65535x65535.gif": gif(16, 16, 65_535, 65_535),
        "claims-65535x65535.jpg": jpeg(65_535, 65_535),
        "canvas-16777216x256.webp": webp(1 << 24, 256),
        "canvas-16384x16384.webp": webp(16_384, 16_384),
        "png-of-12000x12000.ico": ico(blank_png(12_000, 12_000)),
        "claims-60000x60000.tif": tiff(60_000, 60_000),
        "one-hertz.wav": wav(rate=1, seconds=3_000),
        "four-gigahertz.wav": wav(rate=4_000_000_000, seconds=0),
        "1024-channels.wav": wav(rate=8_000, seconds=0.1, channels=1_024),
        "65535-channels.wav": wav(rate=8_000, seconds=0, channels=65_535),
        "claims-4-gigabytes.wav": wav(rate=8_000, seconds=1, claim=0x7FFE0000),
        "claims-years.flac": flac_claim((1 << 36) - 1),
        "silence-of-five-hours.flac": sound_of_silence("FLAC", "PCM_16"),
        "claims-years.ogg": ogg_claim(2**62),
        "claims-years.mp3": mp3_claim(0xFFFFFFFF),
        "claims-years.au": au_claim(),
    }


def png_of(width: int, height: int, packed: bytes) -> bytes:
    """A PNG with 1 bit per pixel."""
    header = png_chunk(b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return SIGNATURE + header + png_chunk(b"IDAT" + packed) + png_chunk(b"IEND")


def blank_png(width: int, height: int) -> bytes:
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    return png_of(width, height, b"".join(packer.compress(row) for _ in range(height)) + packer.flush())


def with_chunk(*parts: bytes) -> bytes:
    whole = blank_png(32, 32)
    return whole[:33] + b"".join(map(png_chunk, parts)) + whole[33:]


def gif(width: int, height: int, frame_width: int, frame_height: int) -> bytes:
    data = io.BytesIO()
    Image.new("P", (16, 16)).save(data, "GIF")
    whole = bytearray(data.getvalue())
    whole[6:10] = struct.pack("<HH", width, height)
    frame = whole.index(b"\x2c", 13)
    whole[frame + 5 : frame + 9] = struct.pack("<HH", frame_width, frame_height)
    return bytes(whole)


def jpeg(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 64)).save(data, "JPEG")
    whole = bytearray(data.getvalue())
    frame = whole.index(b"\xff\xc0")
    whole[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(whole)


def webp(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 64)).save(data, "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")])
    whole = bytearray(data.getvalue())
    canvas = whole.index(b"VP8X") + 12
    whole[canvas : canvas + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(whole)


def ico(picture: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


def tiff(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (64, 64)).save(data, "TIFF", tiffinfo={256: 64, 257: 64})
    whole = bytearray(data.getvalue())
    directory = int.from_bytes(whole[4:8], "little")
    for entry in range(int.from_bytes(whole[directory : directory + 2], "little")):
        at = directory + 2 + 12 * entry
        tag = int.from_bytes(whole[at : at + 2], "little")
        if tag in (256, 257, 278):
            whole[at : at + 12] = struct.pack("<HHII", tag, 4, 1, width if tag == 256 else height)
    return bytes(whole)


def wav(rate: int, seconds: float, channels: int = 1, claim: int | None = None) -> bytes:
    """8-bit silence."""
    samples = b"\x80" * (int(rate * seconds) or 10) * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels & 0xFFFFFFFF, channels, 8)
    size = len(samples) if claim is None else claim
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def sound_of_silence(container: str, subtype: str) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, np.zeros(5 * 3600 * 1_000, np.int16), 1_000, format=container, subtype=subtype)
    return data.getvalue()


def flac_claim(samples: int) -> bytes:
    data = bytearray(_second("FLAC", "PCM_16"))
    data[21] = data[21] & 0xF0 | samples >> 32
    data[22:26] = struct.pack(">I", samples & 0xFFFFFFFF)
    return bytes(data)


def ogg_claim(samples: int) -> bytes:
    data = _second("OGG", "VORBIS")
    last = data.rindex(b"OggS")
    return data[:last] + with_ogg_checksum(data[last : last + 6] + struct.pack("<q", samples) + data[last + 14 :])


def mp3_claim(frames: int) -> bytes:
    data = bytearray(_second("MP3", "MPEG_LAYER_III"))
    at = max(data.find(b"Info"), data.find(b"Xing"))
    data[at + 8 : at + 12] = struct.pack(">I", frames)
    return bytes(data)


def au_claim() -> bytes:
    data = bytearray(_second("AU", "PCM_16"))
    data[8:12] = struct.pack(">I", 0x7FFFFFFE)
    return bytes(data)


def _second(container: str, subtype: str) -> bytes:
    data = io.BytesIO()
    tone = 0.3 * np.sin(np.arange(8_000) * 0.3)
    soundfile.write(data, tone, 8_000, format=container, subtype=subtype)
    return data.getvalue()
