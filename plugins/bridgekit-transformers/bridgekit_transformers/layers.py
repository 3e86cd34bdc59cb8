"""The option `layers=`: which layers of an audio model provide the latents."""

from __future__ import annotations

from bridgekit.errors import BridgekitError
from bridgekit_transformers.loading import Source


def chosen_layers(source: Source, count: int) -> tuple[int, ...]:
    """Parse `3+last` as (3, count). Layers count from 1; `last`, the default, is the model's output.

    Raises:
        BridgekitError: there is no such layer.
    """
    option = source.options.get("layers", "last")
    names = option.split("+")
    layers = tuple(count if name == "last" else int(name) if name.isdecimal() else 0 for name in names)
    if not all(1 <= layer <= count for layer in layers) or len(set(layers)) < len(layers):
        raise BridgekitError(
            f"the model has no layers {option}",
            where=f"transformers:{source.name}",
            remedy=f"give distinct numbers from 1 to {count}, or last, joined by +, as in layers={max(1, count // 2)}+last",
        )
    return layers


def layers_setting(layers: tuple[int, ...], count: int) -> str:
    """The layers as a part of the revision: `layers-3+last`."""
    return "layers-" + "+".join("last" if layer == count else str(layer) for layer in layers)
