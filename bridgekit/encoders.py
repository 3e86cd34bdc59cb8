"""The encoder contract: a frozen model that prepares single items and encodes batches of prepared items."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from bridgekit.errors import BridgekitError
from bridgekit.items import TEXT as TEXT
from bridgekit.items import Blob as Blob
from bridgekit.items import Item as Item

if TYPE_CHECKING:
    from torch import Tensor

#: Modality names become parts of column, file and tensor names.
_MODALITY = re.compile(r"\w(?:[\w -]{0,62}\w)?")


class Encoder(Protocol):
    """A frozen, pre-trained, unimodal model: items in, one vector per item out.

    Separating `prepare` from `encode` allows parallel decoding and batching by length, and a bad file affects only its own row.

    Attributes:
        modality: what it encodes: `audio`, `image`, `text`, or a modality added by a plugin.
        dim: the width d of its latents.
        revision: identifies the exact weights and preprocessing. It is part of the key of every stored latent, so it must
            change whenever the vectors would.

    If the name by which the encoder was opened may come to mean other weights, an optional fourth attribute, `pinned`, is a
    `provider:model` that resolves to the same weights on every machine. Bridges record it: see `bridgekit.hub.pinned`.
    """

    modality: str
    dim: int
    revision: str

    def prepare(self, item: Item) -> Any:
        """Read and preprocess one item for `encode`. Runs on the CPU, in worker threads.

        Arguments:
            item: for `text`, the text itself; for other modalities the path of a file, or a `Blob`: bytes without a file, for
                example a cell of a table. `bridgekit.media` reads them: `read_text`, `read_audio`, `read_image`, `open_item`.

        Raises:
            ItemError: the item cannot be used. Only its own row is set aside.
        """

    def encode(self, batch: Sequence[Any]) -> Tensor:
        """One forward pass without gradients: n prepared items to a float32 tensor of shape (n, dim).

        An item's vector must not depend on the rest of its batch.
        """


def is_modality(name: object) -> bool:
    """Whether this is a valid modality name: at most 64 letters, digits and `_`, with `-` and spaces inside."""
    return isinstance(name, str) and _MODALITY.fullmatch(name) is not None


def split_options(model: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Split `name,option=value,...` into the name and its options, a shell-safe syntax for model settings.

    Arguments:
        model: the part after the colon of `provider:model`. A comma that is not followed by `word=` is part of the value.
        known: the options that the provider supports.

    Raises:
        BridgekitError: an option is unknown or given twice.
    """
    name, *parts = re.split(r",(?=[a-z_]+=)", model)
    options: dict[str, str] = {}
    for part in parts:
        option, value = part.split("=", 1)
        if option not in known or option in options:
            what = f"option {option!r} is given twice" if option in options else f"unknown option {option!r}"
            near = difflib.get_close_matches(option, known, n=1) if option not in known else []
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise BridgekitError(what, where=model, remedy=f"{guess}available options: {', '.join(known)}")
        options[option] = value
    return name, options


def chosen_layers(option: str, count: int, where: str) -> tuple[int, ...]:
    """Parse the value of an option `layers=3+last` as (3, count). Layers count from 1; `last` is the model's output.

    Arguments:
        option: the value.
        count: how many layers the model has.
        where: the encoder's name, for the message.

    Raises:
        BridgekitError: there is no such layer, or one is given twice.
    """
    names = option.split("+")
    layers = tuple(count if name == "last" else int(name) if name.isdecimal() else 0 for name in names)
    if not all(1 <= layer <= count for layer in layers) or len(set(layers)) < len(layers):
        raise BridgekitError(
            f"the model has no layers {option}",
            where=where,
            remedy=f"give distinct numbers from 1 to {count}, or last, joined by +, as in layers={max(1, count // 2)}+last",
        )
    return layers


def layers_setting(layers: Sequence[int], count: int) -> str:
    """The layers as a part of the revision: `layers-3+last`."""
    return "layers-" + "+".join("last" if layer == count else str(layer) for layer in layers)


class Concatenated:
    """Two or more encoders of one modality as one, `concat:NAME+NAME`: an item's vector is theirs, one after the other.

    Arguments:
        names: their full names.
        parts: the encoders.

    Raises:
        BridgekitError: fewer than two encoders, or of different modalities.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[Encoder]) -> None:
        modalities = dict.fromkeys(part.modality for part in parts)
        if len(parts) < 2 or len(modalities) > 1:
            what = "only one encoder" if len(parts) < 2 else f"encoders of different modalities, {' and '.join(modalities)},"
            raise BridgekitError(
                f"a concatenation of {what} is not possible",
                where=" and ".join(names),
                remedy="name two or more of one modality, as in concat:PROVIDER:MODEL+PROVIDER:MODEL (see: bridgekit plugins)",
            )
        self.parts = tuple(parts)
        self.modality = parts[0].modality
        self.dim = sum(part.dim for part in parts)
        self.revision = "+".join(part.revision for part in parts)
        self.pinned = f"concat:{'+'.join(names)}"

    def prepare(self, item: Item) -> tuple[Any, ...]:
        """The item as each encoder takes it."""
        return tuple(part.prepare(item) for part in self.parts)

    def encode(self, batch: Sequence[tuple[Any, ...]]) -> Tensor:
        """n prepared items into a float32 tensor of shape (n, dim)."""
        import torch

        inputs = zip(*batch, strict=True)
        return torch.cat([part.encode(own) for part, own in zip(self.parts, inputs, strict=True)], 1)
