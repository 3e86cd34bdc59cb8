"""LAION-CLAP's audio and text towers as frozen encoders: `clap:630k-audioset-best.pt` or `clap:/path/checkpoint.pt`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bridgekit.encoders import split_options
from bridgekit.errors import PluginError
from bridgekit.hookspecs import EncoderProvider, hookimpl

if TYPE_CHECKING:
    from bridgekit.encoders import Encoder

OPTIONS = ("modality", "tokenizer")
MODALITIES = ("audio", "text")
EXAMPLES = (
    "630k-audioset-best.pt",
    "630k-audioset-best.pt,modality=text",
    "music_audioset_epoch_15_esc_90.14.pt",
)


def open_encoder(model: str, device: str) -> Encoder:
    """Open one tower of a LAION-CLAP checkpoint on a torch device.

    Arguments:
        model: the path of a checkpoint or the name of a published one, followed by `,modality=audio` (the default) or
            `,modality=text`, and for text optionally `,tokenizer=` with the folder of roberta-base's tokenizer.
        device: a torch device.

    Raises:
        PluginError: the checkpoint or tokenizer cannot be found or is wrong, or a package is missing.
        BridgekitError: an option is unknown.
    """
    checkpoint, options = split_options(model, OPTIONS)
    modality = options.get("modality", "audio")
    if modality not in MODALITIES:
        raise PluginError(
            f"bridgekit-clap does not support modality {modality!r}",
            where=f"clap:{model}",
            remedy=f"choose one of {', '.join(MODALITIES)}",
        )
    if "tokenizer" in options and modality != "text":
        raise PluginError(
            "bridgekit-clap uses a tokenizer only for text",
            where=f"clap:{model}",
            remedy="add modality=text, or omit tokenizer=",
        )
    # Imported here, since these import torch, which `bridgekit --help` and `bridgekit plugins` do not need.
    if modality == "text":
        from bridgekit_clap.text import TextEncoder

        return TextEncoder(checkpoint, device, tokenizer=options.get("tokenizer"))
    from bridgekit_clap.audio import AudioEncoder

    return AudioEncoder(checkpoint, device)


@hookimpl
def encoder_providers() -> Sequence[EncoderProvider]:
    """`clap:CHECKPOINT`, for audio and text; not a default for either."""
    return [EncoderProvider(name="clap", modalities=MODALITIES, open=open_encoder, models=lambda: EXAMPLES)]
