"""A bridgekit plugin in one module: an image encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bridgekit.encoders import Encoder, Item
from bridgekit.errors import PluginError
from bridgekit.hookspecs import EncoderProvider, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 64  # pixels, after scaling
CELLS = 4  # along each side
DIRECTIONS = 8  # of edges, over half a turn
LEVELS = 4  # of each colour


class StatisticsEncoder:
    """Two histograms: of the directions of edges in each of CELLS x CELLS cells, and of the colours.

    Arguments:
        device: the torch device to compute on.
    """

    # Yours: the width of the vectors, and an identifier of exactly these vectors. Change `revision` whenever the vectors do;
    # for a model with weights, use `bridgekit.hub.content_revision(files)`.
    modality = "image"
    dim = CELLS**2 * DIRECTIONS + LEVELS**3
    revision = "template:statistics@1"

    def __init__(self, device: str) -> None:
        self.device = device

    def prepare(self, item: Item) -> Tensor:
        """Read an image: bytes of shape (SIDE, SIDE, 3). Yours: return any input for `encode`.

        Raises:
            ItemError: from `read_image`, with the reason: the file is not an image, is cut short, is too small, ...
        """
        import numpy as np
        import torch

        from bridgekit.media import read_image  # imports Pillow, which `bridgekit --help` does not need

        return torch.from_numpy(np.array(read_image(item).resize((SIDE, SIDE))))

    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        """n images to vectors, (n, dim). Yours: run the model here, under `torch.inference_mode()`."""
        import torch

        images = torch.stack(list(batch)).to(self.device)
        return torch.cat([edges(images), colours(images)], dim=1)


def edges(images: Tensor) -> Tensor:
    """The strength of edges by cell and direction, (n, CELLS**2 * DIRECTIONS), in images of shape (n, SIDE, SIDE, 3)."""
    import torch

    grey = torch.nn.functional.pad(images.float().mean(3)[:, None] / 255, (1, 1, 1, 1), mode="replicate")[:, 0]
    across, down = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2], grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]  # (n, SIDE, SIDE)
    direction = (torch.atan2(down, across) / math.pi * DIRECTIONS).round().long() % DIRECTIONS
    strength = torch.hypot(across, down)[..., None] * torch.nn.functional.one_hot(direction, DIRECTIONS)
    cells = strength.reshape(-1, CELLS, SIDE // CELLS, CELLS, SIDE // CELLS, DIRECTIONS).mean((2, 4))
    return cells.flatten(1).sqrt()


def colours(images: Tensor) -> Tensor:
    """The share of pixels of each colour, (n, LEVELS**3), in images of shape (n, SIDE, SIDE, 3)."""
    import torch

    red, green, blue = (images.long() * LEVELS // 256).unbind(3)
    colour = (red * LEVELS + green) * LEVELS + blue  # (n, SIDE, SIDE)
    return torch.nn.functional.one_hot(colour, LEVELS**3).float().mean((1, 2)).sqrt()


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
    return [EncoderProvider(name="template", modalities=("image",), open=open_encoder, models=lambda: ["statistics"])]
