"""`timm:MODEL[,pooling=avg|max|cls][,size=PIXELS][,checkpoint=FILE]`: a frozen timm model, read before its classifier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor

from bridgekit.encoders import Item, split_options
from bridgekit.errors import ItemError, PluginError
from bridgekit.hub import content_revision
from bridgekit.media import read_image
from bridgekit_timm.models import PLUGIN, open_model, reason

OPTIONS = ("pooling", "size", "checkpoint")
POOLINGS = ("avg", "max", "cls")

#: The longest side of a picture over its shortest, of what is resized. No model looks at a longer middle.
LONGEST = 8


class ImageEncoder:
    """A timm model: what its own classifier reads, or, where a pooling is asked for, its last features pooled so.

    Arguments:
        name: what stands after `timm:`, a model and its options. `pooling` is `avg` or `max`, over the last feature map or
            the patch tokens, or `cls`, the class token; without it, it is whatever the model was trained with.
        device: a torch device.

    Raises:
        PluginError: there is no such model, its weights cannot be found, fetched or loaded, or it has no such pooling or size.
    """

    modality = "image"

    def __init__(self, name: str, device: str = "cpu") -> None:
        model_name, options = split_options(name, OPTIONS)
        self._name = f"timm:{name}"
        self._pooling = _one_of(options.get("pooling"), self._name)
        size = _pixels(options.get("size"), self._name)
        found = open_model(model_name, checkpoint=options.get("checkpoint"), size=size)
        self.pinned = f"timm:{found.pinned}{name[len(model_name) :]}"
        self._model = found.model.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        overrides = {"input_size": (3, size, size)} if size else None
        config = resolve_model_data_config(self._model, args=overrides)  # type: ignore[no-untyped-call]  # timm has no types here
        if config["input_size"][0] != 3:
            raise PluginError(
                f"{PLUGIN} can use models of pictures in colour; this one takes {config['input_size'][0]} channels",
                where=self._name,
            )
        self._cuts_the_middle = config["crop_mode"] == "center"
        self._transform = create_transform(**config, is_training=False)
        try:
            self.dim = self.encode([torch.zeros(config["input_size"])]).shape[1]
        except PluginError:
            raise
        except Exception as error:  # each architecture has its own way to refuse a size
            remedy = "give another size=, or none" if size else None
            raise PluginError(f"{PLUGIN} cannot run this model: {reason(error)}", where=self._name, remedy=remedy) from error
        settings = json.dumps([found.arguments, config, self._pooling], sort_keys=True)
        self.revision = f"timm:{found.architecture}@{content_revision([found.weights], found.architecture, settings)}-v1"

    def prepare(self, item: Item) -> Tensor:
        """The picture as this model wants it: resized, cut and normalised. float32, shape (3, height, width).

        Raises:
            ItemError: the file cannot be read as a picture, or is too long and narrow for this model.
        """
        picture = read_image(Path(item))
        if self._cuts_the_middle:
            picture = _middle(picture)
        try:
            prepared: Tensor = self._transform(picture)
        except (ValueError, MemoryError) as error:
            raise ItemError(f"the picture cannot be resized for {self._name} ({reason(error)})", where=str(item)) from None
        return prepared

    @torch.inference_mode()
    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        """n tensors of shape (3, height, width) into a float32 tensor of shape (n, dim)."""
        if not batch:
            return torch.zeros(0, self.dim)
        pixels = torch.stack(list(batch)).to(self._device, memory_format=torch.channels_last)
        features = self._model.forward_features(pixels)
        if self._pooling:
            latents = _pool(features, self._model, self._pooling, self._name)
        else:
            latents = self._model.forward_head(features, pre_logits=True).flatten(1)
        return latents.float().cpu()


def _pool(features: Any, model: Any, pooling: str, name: str) -> Tensor:
    """The last features of n pictures, as (n, d, h, w), (n, h, w, d) or (n, tokens, d), into shape (n, d)."""
    width = model.num_features
    shape = tuple(features.shape) if isinstance(features, Tensor) else ()
    has_class_token = len(shape) == 3 and getattr(model, "cls_token", None) is not None
    if pooling == "cls":
        if not has_class_token:
            raise PluginError("this model has no class token", where=name, remedy="use pooling=avg, or leave it out")
        token: Tensor = features[:, 0]
        return token
    if len(shape) == 4 and width in (shape[1], shape[3]):
        places = features.movedim(1 if shape[1] == width else 3, 3).flatten(1, 2)
    elif len(shape) == 3 and shape[2] == width:
        places = features[:, getattr(model, "num_prefix_tokens", int(has_class_token)) :]
    else:
        places = torch.zeros(0, 0)
    if not places.shape[1]:  # several maps, or class tokens alone
        raise PluginError(f"{PLUGIN} cannot pool this model's features", where=name, remedy="leave out pooling=")
    pooled: Tensor = places.mean(dim=1) if pooling == "avg" else places.amax(dim=1)
    return pooled


def _middle(picture: Image.Image) -> Image.Image:
    """The middle of a very long picture, the picture itself otherwise.

    The transform enlarges a picture until its short side fits and only then cuts off its middle: a strip of 8 x 100,000
    pixels would take gigabytes.
    """
    longest = LONGEST * min(picture.size)
    # As much is cut off on either side, so that the middle stays where it is.
    left, top = (max(0, (side - longest) // 2) for side in picture.size)
    return picture.crop((left, top, picture.width - left, picture.height - top)) if left or top else picture


def _one_of(pooling: str | None, name: str) -> str | None:
    if pooling not in (None, *POOLINGS):
        raise PluginError(f"there is no pooling {pooling!r}", where=name, remedy=f"use one of {', '.join(POOLINGS)}, or none")
    return pooling


def _pixels(size: str | None, name: str) -> int | None:
    if size is None:
        return None
    if not (size.isascii() and size.isdigit() and 0 < int(size) <= 4096):
        raise PluginError(
            f"the size {size!r} is not a number of pixels from 1 to 4096", where=name, remedy="for example size=224"
        )
    return int(size)
