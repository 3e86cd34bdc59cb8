"""The starter kit: small pre-trained encoders, pair sources and a text-to-image model. None of them needs a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bridgekit.errors import PluginError
from bridgekit.hookspecs import EncoderProvider, ImageGenerator, PairSource, hookimpl

if TYPE_CHECKING:
    import typer

    from bridgekit.encoders import Encoder
    from bridgekit.image_models import ImageModel

MODELS = ("text", "image", "image-last", "audio", "speech", "speech-30s", "sound")


def open_encoder(model: str, device: str) -> Encoder:
    """One of the starter's encoders.

    Raises:
        PluginError: there is no such model, or its weights are missing or not the expected ones.
    """
    # Imported here to keep `bridgekit --help` fast: each module imports torch and a model library.
    if model == "text":
        from bridgekit_starter.text import TextEncoder

        return TextEncoder(device)
    if model in ("image", "image-last"):
        from bridgekit_starter.image import ImageEncoder

        return ImageEncoder(device, last_only=model == "image-last")
    if model == "audio":
        from bridgekit_starter.audio import AudioEncoder

        return AudioEncoder(device)
    if model in ("speech", "speech-30s", "audio-30s"):  # audio-30s: its name in older bridges
        from bridgekit_starter.speech import SpeechEncoder

        return SpeechEncoder(device, padded=model != "speech")
    if model == "sound":
        from bridgekit_starter.sound import SoundEncoder

        return SoundEncoder(device)
    raise PluginError(
        f"the starter has no model {model!r}", where=f"starter:{model}", remedy=f"choose one of: {', '.join(MODELS)}"
    )


@hookimpl
def encoder_providers() -> Sequence[EncoderProvider]:
    """The starter's encoders: `starter:text`, `starter:image` and `starter:audio` are the defaults for their modalities."""
    return [
        EncoderProvider(
            name="starter",
            modalities=("text", "image", "audio"),
            open=open_encoder,
            models=lambda: MODELS,
            defaults={"text": "text", "image": "image", "audio": "audio"},
            # `starter:speech` was `starter:audio` before YAMNet stood beside it, and `starter:image-last` was `starter:image`
            # before earlier layers did.
            renamed={
                "starter:audio@d01c3014881c+layer-3-and-last-own-length-v1": "speech",
                "starter:image@579344248a93+bicubic-224-v2": "image-last",
            },
        )
    ]


@hookimpl
def pair_sources() -> Sequence[PairSource]:
    """Images with their names, spoken names, and both in one table; the latter two also for everyday names only."""
    from bridgekit_starter import openmoji, spoken, spoken_pictures

    return [
        openmoji.SOURCE,
        openmoji.EVERYDAY_SOURCE,
        spoken.WORDS,
        spoken.SOURCE,
        spoken_pictures.WORDS,
        spoken_pictures.SOURCE,
    ]


def open_generator(device: str) -> ImageModel:
    """`starter:openmoji-64` on a torch device."""
    from bridgekit_starter import generator

    return generator.open_generator(device)


@hookimpl
def image_generators() -> Sequence[ImageGenerator]:
    """`starter:openmoji-64`, the default text-to-image model."""
    return [
        ImageGenerator(
            "starter:openmoji-64",
            "64 x 64 images in the style of OpenMoji, trained on 1,866 of them (weights CC BY-SA 4.0)",
            open_generator,
        )
    ]


@hookimpl
def bundled_bridge() -> Path | None:
    """The bridge that hears everyday sounds and spoken names; see its README.md."""
    folder = Path(__file__).with_name("hearing")
    return folder if (folder / "bridge.json").exists() else None


@hookimpl
def register_commands(app: typer.Typer) -> None:
    """`bridgekit starter-export`."""
    from bridgekit_starter import export

    app.command("starter-export", help=export.command.__doc__, no_args_is_help=True)(export.command)
