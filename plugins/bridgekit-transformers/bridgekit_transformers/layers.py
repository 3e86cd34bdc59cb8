"""The option `layers=`: which layers of a model provide the latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bridgekit import encoders
from bridgekit.encoders import layers_setting as layers_setting
from bridgekit_transformers.loading import Source


def chosen_layers(source: Source, count: int) -> tuple[int, ...]:
    """Parse `3+last` as (3, count). Layers count from 1; `last`, the default, is the model's output.

    Raises:
        BridgekitError: there is no such layer.
    """
    return encoders.chosen_layers(source.options.get("layers", "last"), count, f"transformers:{source.name}")


def counted_layers(source: Source, outputs: Callable[[], Any]) -> tuple[tuple[int, ...], int]:
    """The chosen layers and the number of the last, for models that do not say how many they have.

    Arguments:
        source: the located model.
        outputs: a forward pass with hidden states, the embeddings first. Not called if only the model's output is chosen.

    Raises:
        PluginError: the model gives none.
        BridgekitError: there is no such layer.
    """
    if source.options.get("layers", "last") == "last":
        return (1,), 1
    states = getattr(outputs(), "hidden_states", None)
    if not states:
        raise source.error(f"gets no earlier layers of models of type {source.model_type}", "omit layers=")
    return chosen_layers(source, len(states) - 1), len(states) - 1


def join_layers(layers: Sequence[int], count: int, last: Tensor, earlier: Callable[[int], Tensor]) -> Tensor:
    """Concatenate the chosen layers along the last dimension: `last`, and `earlier(layer)` for those before it."""
    return torch.cat([last if layer == count else earlier(layer) for layer in layers], dim=-1)
