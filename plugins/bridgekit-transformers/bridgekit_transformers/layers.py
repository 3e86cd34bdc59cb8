"""The option `layers=`: after which of an audio model's layers its states are taken."""

from __future__ import annotations

from bridgekit.errors import BridgekitError
from bridgekit_transformers.loading import Source


def chosen_layers(source: Source, count: int) -> tuple[int, ...]:
    """`3+last` into (3, count): layers from 1 on, of which `last`, the default, is the model's own output.

    Raises:
        BridgekitError: there is no such layer.
    """
    requested = source.options.get("layers", "last")
    names = requested.split("+")
    layers = tuple(count if name == "last" else int(name) if name.isdecimal() else 0 for name in names)
    if not all(1 <= layer <= count for layer in layers) or len(set(layers)) < len(layers):
        raise BridgekitError(
            f"layers={requested} does not name layers of this model",
            where=f"transformers:{source.name}",
            remedy=f"give different numbers from 1 to {count}, or last, joined by +, as in layers={max(1, count // 2)}+last",
        )
    return layers


def layers_setting(layers: tuple[int, ...], count: int) -> str:
    """The layers as a setting for a revision: `layers-3+last`."""
    return "layers-" + "+".join("last" if layer == count else str(layer) for layer in layers)
