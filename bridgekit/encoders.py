"""What an encoder is: a frozen model that prepares one item on its own and encodes a batch of prepared items."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bridgekit.errors import BridgekitError

if TYPE_CHECKING:
    from torch import Tensor

#: One thing to encode: the path of a file, or, in the modality `text`, the text itself.
Item = Path | str

#: The modality whose items are strings rather than files.
TEXT = "text"
#: What a modality may be called: its name stands in names of columns, files and tensors.
_MODALITY = re.compile(r"\w(?:[\w -]{0,62}\w)?")


class Encoder(Protocol):
    """A frozen, pre-trained, unimodal model: items in, one vector per item out.

    The split in two is what buys parallel decoding, batches by length, and one bad file costing one row.

    Attributes:
        modality: what it encodes: `audio`, `image`, `text`, or a modality of a plugin's own.
        dim: the width d of its latents.
        revision: names the exact weights and preprocessing. It is part of every latent's key, so it must change
            whenever the vectors would.

    An encoder may have a fourth, `pinned`: the full name, `provider:model`, that finds these very weights on every machine,
    where the name that it was opened by may come to mean others. Bridges record it: see `bridgekit.hub.pinned`.
    """

    modality: str
    dim: int
    revision: str

    def prepare(self, item: Item) -> Any:
        """Read and preprocess one item into what `encode` takes. Runs on the CPU, in worker threads.

        Raises:
            ItemError: this item cannot be used. Only its own row is set aside.
        """
        ...

    def encode(self, batch: Sequence[Any]) -> Tensor:
        """One forward pass without gradients: n prepared items into a float32 tensor of shape (n, dim).

        An item's vector must not depend on what else is in its batch.
        """
        ...


def is_modality(name: object) -> bool:
    """Whether this can be a modality's name: letters, digits, `_`, and, within it, `-` and spaces; at most 64 of them."""
    return isinstance(name, str) and _MODALITY.fullmatch(name) is not None


def split_options(model: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """`name,option=value,...` into the name and its options: how a plugin's model takes settings, safe in any shell.

    Arguments:
        model: what stands after the colon of `provider:model`. A comma that no `word=` follows belongs to what is before it.
        known: the options that the provider has.

    Raises:
        BridgekitError: there is an option of another name, or one is given twice.
    """
    name, *parts = re.split(r",(?=[a-z_]+=)", model)
    options: dict[str, str] = {}
    for part in parts:
        option, value = part.split("=", 1)
        if option not in known or option in options:
            wrong = "is given twice" if option in options else "is none that this provider knows"
            near = difflib.get_close_matches(option, known, n=1) if option not in known else []
            guess = f"did you mean {near[0]!r}? " if near else ""
            remedy = f"{guess}its options are {', '.join(known)}"
            raise BridgekitError(f"the option {option!r} {wrong}", where=model, remedy=remedy)
        options[option] = value
    return name, options
