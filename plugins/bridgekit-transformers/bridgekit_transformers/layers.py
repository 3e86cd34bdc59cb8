"""The option `layers=`: which layers of an audio model provide the latents."""

from __future__ import annotations

from bridgekit import encoders
from bridgekit.encoders import layers_setting as layers_setting
from bridgekit_transformers.loading import Source


def chosen_layers(source: Source, count: int) -> tuple[int, ...]:
    """Parse `3+last` as (3, count). Layers count from 1; `last`, the default, is the model's output.

    Raises:
        BridgekitError: there is no such layer.
    """
    return encoders.chosen_layers(source.options.get("layers", "last"), count, f"transformers:{source.name}")
