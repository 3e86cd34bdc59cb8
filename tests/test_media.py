"""Files are read whole, whatever their format, or refused with a reason."""

from __future__ import annotations

import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pytest
import soundfile
import soxr
from numpy.typing import NDArray
from PIL import Image, ImageFile

from bridgekit.decoding import decoders
from bridgekit.errors import ItemError
from bridgekit.items import Blob
from bridgekit.media import content_hash, image_size, read_audio, read_image, read_text, size_hint
from tests.torture.bombs import bombs

FORMATS = ("wav", "flac", "ogg", "mp3")


def sound(seconds: float, rate: int, channels: int = 1) -> NDArray[np.float32]:
    """A loud tone of 440 Hz with a little noise, of shape (n,) or (n, channels)."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(time))
    mono = (0.5 * np.sin(2 * np.pi * 440 * time) + 0.02 * noise).astype(np.float32)
    return mono if channels == 1 else np.repeat(mono[:, None], channels, axis=1)


def refusal(read: Callable[[Path], object], path: Path) -> str:
    """What is wrong with a file; the error names the file and says what to do."""
    with pytest.raises(ItemError) as caught:
        read(path)
    assert caught.value.where == str(path)
    assert caught.value.remedy
    return caught.value.what


def audio_refusal(path: Path) -> str:
    return refusal(lambda file: read_audio(file, 16_000), path)


def image_refusal(path: Path) -> str:
    return refusal(read_image, path)


def pitch(samples: NDArray[np.float32], rate: int) -> float:
    """The strongest frequency in Hz."""
    return float(np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples))


# ---- audio


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_audio_of_any_format_rate_and_channels_becomes_mono_at_the_wanted_rate(
    tmp_path: Path, suffix: str, rate: int, channels: int
) -> None:
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, sound(1.0, rate, channels), rate)
    samples = read_audio(path, 16_000)
    assert samples.dtype == np.float32
    assert samples.shape == (16_000,)
    assert pitch(samples, 16_000) == pytest.approx(440, abs=2)
    assert np.abs(samples[1000:-1000]).max() == pytest.approx(0.54, abs=0.06)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_six_channels_are_averaged(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"surround.{suffix}"
    channels = np.zeros((48_000, 6), np.float32)
    channels[:, 2] = sound(1.0, 48_000)
    soundfile.write(path, channels, 48_000)
    samples = read_audio(path, 48_000)
    assert samples.shape == (48_000,)
    assert samples.std() == pytest.approx(channels[:, 2].std() / 6, rel=0.05)


def test_at_its_own_rate_a_float_wav_is_returned_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "exact.wav"
    soundfile.write(path, sound(0.3, 16_000), 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(path, 16_000), sound(0.3, 16_000))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "DOUBLE", "ULAW", "IMA_ADPCM"])
def test_wav_may_hold_any_kind_of_sample(tmp_path: Path, subtype: str) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, sound(1.0, 44_100), 44_100, subtype=subtype)
    assert len(read_audio(path, 16_000)) == pytest.approx(16_000, abs=500)


def test_the_format_is_known_by_the_content_and_not_by_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really a flac.raw"
    soundfile.write(path, sound(0.5, 16_000), 16_000, format="FLAC")
    assert read_audio(path, 16_000).shape == (8_000,)


@pytest.mark.parametrize("name", ["Möwe am Mêer.wav", "犬の鳴き声.flac", "emoji 🐕.ogg", "a" * 200 + ".mp3"])
def test_unicode_and_long_names_work(tmp_path: Path, name: str) -> None:
    soundfile.write(tmp_path / name, sound(0.5, 16_000), 16_000)
    assert len(read_audio(tmp_path / name, 16_000)) == 8_000


def test_a_name_that_is_not_unicode_works(tmp_path: Path) -> None:
    plain = tmp_path / "plain.wav"
    soundfile.write(plain, sound(0.5, 16_000), 16_000)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    try:
        plain.rename(odd)
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    assert len(read_audio(odd, 16_000)) == 8_000


@pytest.mark.parametrize("frames", [1, 2, 10])
@pytest.mark.parametrize("rate", [8_000, 48_000, 192_000])
def test_the_shortest_clip_is_still_a_clip(tmp_path: Path, frames: int, rate: int) -> None:
    path = tmp_path / "short.wav"
    soundfile.write(path, np.full(frames, 0.25), rate)
    samples = read_audio(path, 16_000)
    assert len(samples) >= 1
    assert np.isfinite(samples).all()


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 192_000])
def test_a_clip_resampled_block_by_block_is_the_clip_resampled_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int
) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, sound(2.0, rate), rate, subtype="FLOAT")
    monkeypatch.setattr(decoders, "_BLOCK", 1_000)
    blocks = list(decoders.decode_audio(path, 16_000))
    assert len(blocks) > 10
    np.testing.assert_array_equal(np.concatenate(blocks), soxr.resample(sound(2.0, rate), rate, 16_000))
    np.testing.assert_array_equal(np.concatenate(blocks), read_audio(path, 16_000))


def test_samples_that_overflow_when_they_are_resampled_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "loud.wav"
    square = np.where(np.arange(8_000) // 7 % 2, np.float32(3.4e38), np.float32(-3.4e38))
    soundfile.write(path, square, 44_100, subtype="FLOAT")
    assert "not finite" in audio_refusal(path)


@pytest.mark.parametrize("rate", [1, 99, 1_000_001])
def test_an_absurd_rate_is_refused(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "absurd.wav"
    soundfile.write(path, sound(0.1, 16_000), rate)
    assert f"claims a sample rate of {rate:,} Hz" in audio_refusal(path)


def test_a_thousand_channels_are_averaged(tmp_path: Path) -> None:
    path = tmp_path / "many.wav"
    soundfile.write(path, np.tile(sound(0.5, 16_000)[:, None], (1, 1_000)), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(path, 16_000), sound(0.5, 16_000), atol=1e-6)


def test_silence_is_audio(tmp_path: Path) -> None:
    path = tmp_path / "silence.flac"
    soundfile.write(path, np.zeros(16_000), 16_000)
    assert not read_audio(path, 16_000).any()


def test_many_threads_read_the_same_samples(tmp_path: Path) -> None:
    paths = []
    for index in range(24):
        paths.append(tmp_path / f"{index}.{FORMATS[index % 4]}")
        soundfile.write(paths[-1], sound(0.5, 22_050), 22_050)
    alone = [read_audio(path, 16_000) for path in paths]
    with ThreadPoolExecutor(8) as threads:
        for one, other in zip(alone, threads.map(lambda path: read_audio(path, 16_000), paths), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_file_cut_short_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, sound(4.0, 44_100), 44_100)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "cut short" in (what := audio_refusal(path)) or "damaged" in what


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_cut_short_in_its_header_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, sound(4.0, 44_100), 44_100)
    path.write_bytes(path.read_bytes()[:30])
    audio_refusal(path)


@pytest.mark.parametrize("length", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("whole", [0, 36, 0xFFFFFFFF])
def test_a_streamed_wav_with_no_true_length_in_its_header_is_read_to_its_end(tmp_path: Path, length: int, whole: int) -> None:
    path = tmp_path / "streamed.wav"
    soundfile.write(path, sound(1.0, 16_000), 16_000)
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", whole)
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", length)
    path.write_bytes(data)
    assert len(read_audio(path, 16_000)) == 16_000


def test_a_streamed_flac_that_does_not_know_its_length_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "streamed.flac"
    soundfile.write(path, sound(10.0, 44_100), 44_100)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the total number of samples has 36 bits, here set to 0: unknown
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert len(read_audio(path, 16_000)) == 160_000
    path.write_bytes(data[: len(data) // 2])
    assert "damaged" in audio_refusal(path)


@pytest.mark.parametrize("tag", [b"", b"ID3\x04\x00\x00\x00\x00\x08\x00" + bytes(1024)])
def test_a_streamed_mp3_of_variable_bit_rate_is_read_to_its_end(tmp_path: Path, tag: bytes) -> None:
    path = tmp_path / "streamed.mp3"
    loud = np.random.default_rng(0).uniform(-0.5, 0.5, 10 * 44_100)
    loud[: 44_100 // 2] = 0  # so that a guess of the length from the first frames is far off
    soundfile.write(path, loud, 44_100)
    data = path.read_bytes()
    second = data.index(data[:2], 4)
    assert b"Xing" in data[:second] or b"Info" in data[:second]
    path.write_bytes(tag + data[second:])  # a writer to a pipe cannot go back to write the header frame
    assert len(read_audio(path, 16_000)) == pytest.approx(160_000, abs=2_000)


def test_an_mp3_with_a_cover_picture_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cover.mp3"
    soundfile.write(path, sound(1.0, 44_100), 44_100)
    path.write_bytes(b"ID3\x03\x00\x00\x00\x06\x00\x00" + bytes(6 << 14) + path.read_bytes())
    assert len(read_audio(path, 16_000)) == 16_000


def test_a_wav_may_have_other_chunks_around_its_sound(tmp_path: Path) -> None:
    path = tmp_path / "chunks.wav"
    soundfile.write(path, sound(1.0, 16_000), 16_000)
    data = path.read_bytes()
    junk = b"JUNK" + struct.pack("<I", 7) + bytes(8)
    data = data[:12] + junk + data[12:] + b"LIST" + struct.pack("<I", 4) + b"INFO"
    path.write_bytes(data[:4] + struct.pack("<I", len(data) - 8) + data[8:])
    assert len(read_audio(path, 16_000)) == 16_000


@pytest.mark.parametrize("suffix", ["wav", "ogg"])
def test_a_file_without_a_sample_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"none.{suffix}"
    soundfile.write(path, np.zeros(0), 16_000)
    assert "zero samples" in audio_refusal(path)


def test_a_wav_without_a_sample_may_have_other_chunks_after_it(tmp_path: Path) -> None:
    path = tmp_path / "none.wav"
    soundfile.write(path, np.zeros(0), 16_000)
    data = path.read_bytes() + b"LIST" + struct.pack("<I", 4) + b"INFO"
    path.write_bytes(data[:4] + struct.pack("<I", len(data) - 8) + data[8:])
    assert "zero samples" in audio_refusal(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "nan.wav"
    samples = sound(0.1, 16_000)
    samples[700] = bad
    soundfile.write(path, samples, 16_000, subtype="FLOAT")
    assert "not finite" in audio_refusal(path)


@pytest.mark.parametrize(
    "content", [b"this is a shopping list, not a sound\n" * 100, b"\0" * 5_000, b"\x89PNG\r\n\x1a\n" + b"x" * 999]
)
@pytest.mark.parametrize("suffix", FORMATS)
def test_another_kind_of_file_with_an_audio_suffix_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"list.{suffix}"
    path.write_bytes(content)
    assert "not audio" in audio_refusal(path)


def test_a_clip_of_over_four_hours_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(1), 8_000, subtype="PCM_U8")
    frames = 4 * 3600 * 8_000 + 1
    header = path.read_bytes()[:44]
    path.write_bytes(header[:4] + struct.pack("<I", 36 + frames) + header[8:40] + struct.pack("<I", frames))
    os.truncate(path, 44 + frames)  # sparse: it takes no space on the disk
    assert "4 hours" in audio_refusal(path)
    with pytest.raises(ItemError, match="4 hours"):
        next(decoders.decode_audio(path, 16_000))


def test_a_flac_that_claims_to_last_for_days_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "claim.flac"
    soundfile.write(path, sound(0.5, 44_100), 44_100)
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F
    path.write_bytes(data)
    assert "4 hours" in audio_refusal(path)


# ---- any file


@pytest.mark.parametrize("refused", [audio_refusal, image_refusal])
def test_missing_empty_and_wrong_files_have_different_messages(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    assert "no such file" in refused(tmp_path / "missing.bin")
    (tmp_path / "empty.bin").touch()
    assert "empty" in refused(tmp_path / "empty.bin")
    assert "folder" in refused(tmp_path)
    assert "cannot be read" in refused(Path("a\0b"))
    os.mkfifo(tmp_path / "pipe")
    assert "regular" in refused(tmp_path / "pipe")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.wav"
    soundfile.write(path, sound(0.1, 16_000), 16_000)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "cannot be read" in audio_refusal(path)


# ---- images


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """Four quarters: red, green / blue, yellow."""
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def near(pixel: object, wanted: tuple[int, int, int], slack: int = 12) -> bool:
    assert isinstance(pixel, tuple)
    return all(abs(a - b) <= slack for a, b in zip(pixel, wanted, strict=True))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif", "ppm"])
def test_every_common_format_becomes_rgb(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bild äöü.{suffix}"
    picture().save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert near(image.getpixel((5, 5)), (255, 0, 0), 30)
    assert near(image.getpixel((35, 25)), (255, 255, 0), 30)


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (255, 0, 0)), (2, (0, 255, 0)), (3, (255, 255, 0)), (4, (0, 0, 255)), (6, (0, 0, 255)), (8, (0, 255, 0))],
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_is_turned_upright(tmp_path: Path, suffix: str, orientation: int, corner: tuple[int, int, int]) -> None:
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(80, 60).save(path, exif=exif)
    image = read_image(path)
    assert image.size == ((60, 80) if orientation >= 5 else (80, 60))
    assert near(image.getpixel((5, 5)), corner, 30)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_broken_exif_does_not_spoil_a_picture(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"broken.{suffix}"
    picture().save(path, exif=b"Exif\0\0this is no TIFF header")
    assert read_image(path).size == (40, 30)


def test_transparent_areas_become_white(tmp_path: Path) -> None:
    for mode, clear, solid in [("RGBA", (9, 9, 9, 0), (200, 0, 0, 255)), ("LA", (9, 0), (100, 255))]:
        image = Image.new(mode, (20, 20), clear)
        image.paste(Image.new(mode, (10, 20), solid), (0, 0))
        image.save(tmp_path / f"{mode}.png")
        read = read_image(tmp_path / f"{mode}.png")
        assert read.getpixel((15, 10)) == (255, 255, 255)
        assert read.getpixel((5, 10)) == ((200, 0, 0) if mode == "RGBA" else (100, 100, 100))


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 20), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert near(read_image(tmp_path / "half.png").getpixel((3, 3)), (127, 127, 127), 1)


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0])])
def test_a_palette_is_looked_up(tmp_path: Path, transparency: int | bytes | None) -> None:
    image = Image.new("P", (20, 20), 0)
    image.putpalette([10, 200, 30, 250, 0, 0])
    image.paste(1, (10, 0, 20, 20))
    if transparency is not None:
        image.info["transparency"] = transparency
    image.save(tmp_path / "palette.png")
    read = read_image(tmp_path / "palette.png")
    assert read.getpixel((5, 5)) == (10, 200, 30)
    assert read.getpixel((15, 5)) == ((250, 0, 0) if transparency is None else (255, 255, 255))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    picture().convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert near(read_image(tmp_path / "print.jpg").getpixel((5, 25)), (0, 0, 255), 30)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bit_is_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    levels = np.repeat(np.array([[0, 1000, 32768, 65535]], np.uint16), 10, axis=1).repeat(20, axis=0)
    Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    image = read_image(tmp_path / f"deep.{suffix}")
    assert [image.getpixel((x, 5)) for x in (5, 15, 25, 35)] == [(0,) * 3, (4,) * 3, (128,) * 3, (255,) * 3]


def test_levels_without_an_agreed_white_are_stretched(tmp_path: Path) -> None:
    levels = np.linspace(-3, 5, 400, dtype=np.float32).reshape(20, 20)
    Image.fromarray(levels).save(tmp_path / "float.tif")
    image = read_image(tmp_path / "float.tif")
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((19, 19)) == (255, 255, 255)
    levels[3, 3] = np.nan
    Image.fromarray(levels).save(tmp_path / "nan.tif")
    assert "not finite" in image_refusal(tmp_path / "nan.tif")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_used(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    picture().save(path, save_all=True, append_images=[Image.new("RGB", (40, 30), "black")] * 3)
    assert near(read_image(path).getpixel((35, 5)), (0, 255, 0), 30)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_picture_cut_short_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "cut short" in image_refusal(path)


@pytest.mark.parametrize(
    "content", [b"words, words, words\n" * 50, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", bytes(5_000)]
)
def test_another_kind_of_file_with_an_image_suffix_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "words.png"
    path.write_bytes(content)
    assert "not a picture" in image_refusal(path)


def blank_png(path: Path, width: int, height: int) -> Path:
    """A black PNG of 1 bit a pixel, written without ever holding its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (12_000, 12_000), (10_001, 10_000)])
def test_a_picture_of_over_100_megapixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    path = blank_png(tmp_path / "huge.png", width, height)
    told = f"{width * height:,} pixels, over 100 megapixels"
    assert told in image_refusal(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # which decoding here sets
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda picture: pytest.fail("it was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ItemError, match=told):
            decoders.decode_image(path)


def test_the_size_of_a_picture_is_read_from_its_header_however_large(tmp_path: Path) -> None:
    assert image_size(blank_png(tmp_path / "huge.png", 20_000, 30_000)) == (20_000, 30_000)
    picture().save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-100])
    assert image_size(tmp_path / "cut.jpg") == picture().size
    picture().save(tmp_path / "a.ico")
    with pytest.raises(ItemError, match="not a picture that can be read"):
        image_size(tmp_path / "a.ico")


@pytest.mark.parametrize("name", [name for name in bombs() if name.endswith((".png", ".gif", ".jpg", ".webp", ".ico", ".tif"))])
def test_a_small_file_that_unpacks_to_a_large_picture_or_text_is_not_unpacked(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bombs()[name])
    if name.startswith(("pixels", "claims-4294967295-frames")):
        assert max(read_image(path).size) <= 100  # the excess is never read
    elif name == "canvas-16777216x256.webp" and int(PIL.__version__.split(".")[0]) < 13:
        assert "cut short or damaged" in image_refusal(path)  # libwebp refuses it before Pillow is told its size
    else:
        assert re.search(r"over 100 megapixels|over 1 MB", image_refusal(path))


def test_a_picture_just_below_the_limit_is_read_without_a_warning(tmp_path: Path) -> None:
    path = blank_png(tmp_path / "large.png", 10_000, 9_100)  # Pillow warns from 89.5 megapixels on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).size == (10_000, 9_100)


def test_pillows_own_guard_is_left_as_it_was(tmp_path: Path) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "words.png"
    path.write_text("not a picture")
    image_refusal(path)
    picture().save(path)
    read_image(path)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_a_picture_too_small_to_show_anything_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    picture(*size).save(tmp_path / "tiny.png")
    assert "too few to show anything" in image_refusal(tmp_path / "tiny.png")
    picture(8, 8).save(tmp_path / "small.png")
    assert read_image(tmp_path / "small.png").size == (8, 8)


# ---- text and hashes


def test_a_text_is_stripped_and_otherwise_kept() -> None:
    assert read_text("  ein Hund, 犬, 🐕\n") == "ein Hund, 犬, 🐕"
    assert read_text("two\nlines") == "two\nlines"
    assert len(read_text("word " * 200_000)) == 999_999


def test_a_path_is_read_as_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_bytes(b"\xef\xbb\xbf caf\xc3\xa9 \n")
    assert read_text(path) == "café"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ItemError, match="UTF-8"):
        read_text(path)


def test_a_text_file_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"a word ")
    os.truncate(path, 20_000_000_000)  # sparse: it takes no space on the disk
    with pytest.raises(ItemError, match="the text has over 1,000,000 characters"):
        read_text(path)


def test_a_text_is_at_most_a_million_characters_wherever_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    for sign in "xü骨🦴":
        path.write_text(sign * 1_000_000, encoding="utf-8")
        assert len(read_text(path)) == len(read_text(f" {sign * 1_000_000}\n")) == 1_000_000
        path.write_text(sign * 1_000_001, encoding="utf-8")
        for item in (path, sign * 1_000_001):
            with pytest.raises(ItemError, match="over 1,000,000 characters") as caught:
                read_text(item)
            assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["", "  \n\t", "\u3000"])
def test_an_empty_text_is_refused(text: str) -> None:
    with pytest.raises(ItemError, match="empty"):
        read_text(text)


@pytest.mark.parametrize("text", ["a\0b", "half \ud83d pair", "\udce9"])
def test_a_broken_text_is_refused_in_a_message_that_can_be_printed(text: str) -> None:
    with pytest.raises(ItemError, match="NUL") as caught:
        read_text(text)
    str(caught.value).encode("utf-8")


def test_the_size_hint_needs_no_file(tmp_path: Path) -> None:
    path = tmp_path / "five"
    path.write_bytes(b"12345")
    assert size_hint(path) == 5
    assert size_hint(tmp_path / "missing") == 0
    assert size_hint("four") == 4


def test_the_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    one, other = tmp_path / "one.wav", tmp_path / "two.mp3"
    one.write_bytes(b"a" * 1_000_000)
    other.write_bytes(b"a" * 1_000_000)
    assert content_hash(one) == content_hash(other)
    assert len(content_hash(one)) == 32
    other.write_bytes(b"a" * 999_999 + b"b")
    assert content_hash(one) != content_hash(other)


def test_texts_and_files_never_share_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_bytes(b"a dog")
    assert content_hash("a dog") == content_hash(" a dog\n")
    assert content_hash("a dog") != content_hash("a cat")
    assert content_hash("a dog") != content_hash(path)
    content_hash("half \ud83d pair")  # refused when it is read, not here


def test_a_missing_file_has_no_hash(tmp_path: Path) -> None:
    assert "no such file" in refusal(content_hash, tmp_path / "missing")


# ---- bytes without a file


def blob_of(path: Path, name: str = "clips.parquet, row 7, column audio") -> Blob:
    return Blob(name, path.read_bytes)


@pytest.mark.parametrize("suffix", FORMATS)
def test_bytes_decode_to_the_same_samples_as_their_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, sound(1.0, 44_100), 44_100)
    np.testing.assert_array_equal(read_audio(blob_of(path), 16_000), read_audio(path, 16_000))
    assert content_hash(blob_of(path)) == content_hash(path)
    assert size_hint(blob_of(path)) == size_hint(path)


def test_large_bytes_decode_like_their_file(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (2_500, 2_500, 3), np.uint8)).save(path, compress_level=0)
    assert path.stat().st_size > 1 << 24  # more than a piece of a request
    assert np.array_equal(np.asarray(read_image(blob_of(path))), np.asarray(read_image(path)))


def test_bytes_that_cannot_be_decoded_are_named_by_their_place(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    Image.new("RGB", (64, 64), "red").save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ItemError, match="cut short or damaged") as caught:
        read_image(blob_of(path, "shards/3.tar, 0007.png"))
    assert caught.value.where == "shards/3.tar, 0007.png"
    path.write_bytes(b"")
    with pytest.raises(ItemError, match=r"empty \(0 bytes\)") as caught:
        read_audio(blob_of(path, "shards/3.tar, 0008.wav"), 16_000)
    assert caught.value.where == "shards/3.tar, 0008.wav"
    with pytest.raises(ItemError, match="is not text in UTF-8"):
        read_text(Blob("3.tar, 9.txt", lambda: b"\xff\xfe"))


def test_a_library_that_asks_bytes_for_their_path_is_told_what_to_use_instead() -> None:
    with pytest.raises(ItemError, match="no file") as caught:
        Path(Blob("3.tar, 9.png", bytes))
    assert "bridgekit.media.open_item" in str(caught.value.remedy)


def test_no_item_is_told_to_remove_a_row(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(ItemError) as caught:
        read_image(tmp_path / "x.png")
    assert "row" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("/data/train.parquet, row 7, column image (photos/a cat.png)", "a cat.png"),
        ("/data/train.parquet, row 7, column image", "train.parquet, row 7, column image"),
        ("shards/0003.tar, dogs/0007.png", "0007.png"),
        ("row 3, column audio", "row 3, column audio"),
    ],
)
def test_bytes_are_shown_without_the_folders_they_are_in(name: str, label: str) -> None:
    assert Blob(name, bytes).label == label
