"""A bridgekit plugin in one module: a text encoder."""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bridgekit.encoders import Encoder, Item
from bridgekit.errors import PluginError
from bridgekit.hookspecs import EncoderProvider, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS = (2, 3, 4)  # characters of an n-gram
BUCKETS = 512
MOST = 10_000  # characters; the rest of a text is ignored


class StatisticsEncoder:
    """How often sequences of 2 to 4 characters occur, hashed into BUCKETS numbers.

    Arguments:
        device: the torch device to compute on.
    """

    # Yours: the width of the vectors, and an identifier of exactly these vectors. Change `revision` whenever the vectors do;
    # for a model with weights, use `bridgekit.hub.content_revision(files)`.
    modality = "text"
    dim = BUCKETS
    revision = "template:statistics@1"

    def __init__(self, device: str) -> None:
        self.device = device

    def prepare(self, item: Item) -> list[int]:
        """Read a text and hash its n-grams. Yours: return any input for `encode`, for example the ids of tokens.

        Raises:
            ItemError: from `read_text`, with the reason: the text is empty, has broken characters, ...
        """
        from bridgekit.media import read_text  # imports numpy, which `bridgekit --help` does not need

        text = f" {unicodedata.normalize('NFKC', read_text(item)[:MOST]).casefold()} "
        grams = (text[start : start + length] for length in LENGTHS for start in range(len(text) - length + 1))
        return [zlib.crc32(gram.encode()) for gram in grams]

    def encode(self, batch: Sequence[list[int]]) -> Tensor:
        """n texts to vectors, (n, dim). Yours: run the model here, under `torch.inference_mode()`."""
        import torch

        return torch.stack([describe(hashes) for hashes in batch]).to(self.device)


def describe(hashes: list[int]) -> Tensor:
    """The hashes of n-grams to one vector of shape (BUCKETS,) and length 1. A bit of the hash is the sign."""
    import torch

    found = torch.tensor(hashes)
    signs = (found >> 31).float() * 2 - 1
    counts = torch.bincount(found % BUCKETS, signs, minlength=BUCKETS)
    return torch.nn.functional.normalize(counts.float().sign() * counts.float().abs().log1p(), dim=0)


def open_encoder(model: str, device: str) -> Encoder:
    """Open an encoder by name. Yours: import heavy packages and load weights here, not at the top of the module.

    Raises:
        PluginError: there is no such model.
    """
    if model != "statistics":
        raise PluginError(f"there is no model {model!r}", where=f"template:{model}", remedy="use template:statistics")
    return StatisticsEncoder(device)


@hookimpl
def encoder_providers() -> Sequence[EncoderProvider]:
    """Yours: users write `name:model`, as in `--a template:statistics`."""
    return [EncoderProvider(name="template", modalities=("text",), open=open_encoder, models=lambda: ["statistics"])]
