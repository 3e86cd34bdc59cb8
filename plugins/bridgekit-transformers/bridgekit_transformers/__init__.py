"""Encoders from Hugging Face transformers. The model's config determines its modality and how it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bridgekit.hookspecs import EncoderProvider, hookimpl

if TYPE_CHECKING:
    from bridgekit.encoders import Encoder

#: Some good models to start with.
MODELS = (
    "sentence-transformers/all-MiniLM-L6-v2",
    "BAAI/bge-base-en-v1.5",
    "intfloat/multilingual-e5-base",
    "Alibaba-NLP/gte-modernbert-base",
    "Qwen/Qwen3-Embedding-0.6B",
    "openai/whisper-base,layers=3+last",
    "openai/whisper-large-v2",
    "facebook/wav2vec2-large-960h-lv60-self",
    "microsoft/wavlm-large",
    "MIT/ast-finetuned-audioset-10-10-0.4593",
    "laion/clap-htsat-unfused,modality=audio",
    "laion/clap-htsat-unfused,modality=text",
    "facebook/dinov2-base",
    "facebook/dinov3-vits16-pretrain-lvd1689m",
    "google/siglip2-base-patch16-224,modality=image",
    "openai/clip-vit-base-patch32,modality=image",
    "openai/clip-vit-base-patch32,modality=text",
)


def open_encoder(model: str, device: str) -> Encoder:
    """Open `org/model`, `org/model@revision` or `/path/folder`, with options after commas, on a torch device.

    Raises:
        PluginError: there is no such model, its files are missing or damaged, or its kind is not supported.
        BridgekitError: an option is unknown, or the model does not support its value.
    """
    # Imported here, since these import torch and transformers, which `bridgekit --help` does not need.
    from bridgekit_transformers.loading import find_source

    source = find_source(model, device)
    if source.family.kind == "text":
        from bridgekit_transformers.text import TextEncoder

        return TextEncoder(source)
    if source.family.kind == "image":
        from bridgekit_transformers.image import ImageEncoder

        return ImageEncoder(source)
    if source.family.kind == "whisper":
        from bridgekit_transformers.whisper import WhisperEncoder

        return WhisperEncoder(source)
    from bridgekit_transformers.audio import SpectrogramEncoder, WaveEncoder

    return WaveEncoder(source) if source.family.kind == "waves" else SpectrogramEncoder(source)


@hookimpl
def encoder_providers() -> Sequence[EncoderProvider]:
    """`transformers:org/model` and `transformers:/path/folder`. None is a default."""
    return [
        EncoderProvider(name="transformers", modalities=("text", "audio", "image"), open=open_encoder, models=lambda: MODELS)
    ]
