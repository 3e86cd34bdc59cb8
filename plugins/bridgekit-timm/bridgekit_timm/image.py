"""A frozen timm model without its classifier.

`timm:MODEL[,pooling=avg|max|cls][,layers=3+last][,size=PIXELS][,checkpoint=FILE]`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor

from bridgekit.encoders import Item, chosen_layers, layers_setting, split_options
from bridgekit.errors import BridgekitError, ItemError, PluginError, one_line
from bridgekit.hub import content_revision
from bridgekit.media import read_image
from bridgekit_timm.models import PLUGIN, open_model

OPTIONS = ("pooling", "layers", "size", "checkpoint")
POOLINGS = ("avg", "max", "cls")

#: Maximum aspect ratio of images to resize; longer ones are cropped first. No model uses a longer crop.
LONGEST = 8


class ImageEncoder:
    """A timm model. The latents are the input of its own classifier, or its last features with another pooling.

    Arguments:
        name: the part after `timm:`, a model and its options. `pooling` is `avg` or `max`, over the last feature map or the
            patch tokens, or `cls`, the class token; the default is the pooling the model was trained with. `layers` are
            numbers of timm's feature maps from 1 (of a transformer, its blocks), each averaged over its positions, and
            `last`, the latents without this option, which the last number means too; they are concatenated.
        device: a torch device.

    Raises:
        PluginError: there is no such model, its weights cannot be found, downloaded or loaded, or it does not support the
            pooling, size or layers.
        BridgekitError: it has no such layers.
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
        config = resolve_model_data_config(self._model, args=overrides)
        if config["input_size"][0] != 3:
            raise PluginError(
                f"{PLUGIN} supports models of RGB images; this one takes {config['input_size'][0]} channels",
                where=self._name,
            )
        self._center_crop = config["crop_mode"] == "center"
        self._transform = create_transform(**config, is_training=False)
        try:
            self._layers, self._count = self._choose(options.get("layers", "last"), torch.zeros(1, *config["input_size"]))
            self.dim = self.encode([torch.zeros(config["input_size"])]).shape[1]
        except BridgekitError:
            raise
        except Exception as error:  # architectures raise various errors for an unsupported size
            remedy = "change or omit size=" if size else None
            raise PluginError(f"{PLUGIN} cannot run this model: {one_line(error)}", where=self._name, remedy=remedy) from error
        earlier = [layers_setting(self._layers, self._count)] if self._layers else []
        settings = json.dumps([found.arguments, config, self._pooling, *earlier], sort_keys=True)
        self.revision = f"timm:{found.architecture}@{content_revision([found.weights], found.architecture, settings)}-v1"

    def prepare(self, item: Item) -> Tensor:
        """The image resized, cropped and normalised for this model: float32, shape (3, height, width).

        Raises:
            ItemError: the file cannot be read as an image, or is too long and narrow for this model.
        """
        image = read_image(item)
        if self._center_crop:
            image = _middle(image)
        try:
            prepared: Tensor = self._transform(image)
        except (ValueError, MemoryError) as error:
            raise ItemError(f"the image cannot be resized for {self._name} ({one_line(error)})", where=str(item)) from None
        return prepared

    @torch.inference_mode()
    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        """n tensors of shape (3, height, width) to a float32 tensor of shape (n, dim)."""
        if not batch:
            return torch.zeros(0, self.dim)
        pixels = torch.stack(list(batch)).to(self._device, memory_format=torch.channels_last)
        if not self._layers:
            return self._last(self._model.forward_features(pixels)).float().cpu()
        earlier = sorted(layer for layer in self._layers if layer < self._count)  # as timm returns their maps
        features, maps = self._model.forward_intermediates(pixels, indices=[layer - 1 for layer in earlier])
        latents = {layer: each.flatten(2).mean(2) for layer, each in zip(earlier, maps, strict=True)}
        latents[self._count] = self._last(features)
        return torch.cat([latents[layer] for layer in self._layers], dim=1).float().cpu()

    def _last(self, features: Any) -> Tensor:
        """The last features of n images to shape (n, d)."""
        if self._pooling:
            return _pool(features, self._model, self._pooling, self._name)
        latents: Tensor = self._model.forward_head(features, pre_logits=True).flatten(1)
        return latents

    @torch.inference_mode()
    def _choose(self, option: str, pixels: Tensor) -> tuple[tuple[int, ...], int]:
        """The layers of `layers=`, or none if it is `last`, and how many the model has."""
        if option == "last":
            return (), 0
        if not hasattr(self._model, "forward_intermediates"):
            what = f"timm {timm.__version__} does not give the earlier layers of this model"
            raise PluginError(what, where=self._name, remedy="omit layers=")
        count = len(self._model.forward_intermediates(pixels.to(self._device), intermediates_only=True))
        layers = chosen_layers(option, count, self._name)
        return (() if layers == (count,) else layers), count


def _pool(features: Any, model: Any, pooling: str, name: str) -> Tensor:
    """Pool the last features of n images, (n, d, h, w), (n, h, w, d) or (n, tokens, d), to shape (n, d)."""
    width = model.num_features
    shape = tuple(features.shape) if isinstance(features, Tensor) else ()
    has_class_token = len(shape) == 3 and getattr(model, "cls_token", None) is not None
    if pooling == "cls":
        if not has_class_token:
            raise PluginError("the model has no class token", where=name, remedy="use pooling=avg, or omit it")
        token: Tensor = features[:, 0]
        return token
    if len(shape) == 4 and width in (shape[1], shape[3]):
        places = features.movedim(1 if shape[1] == width else 3, 3).flatten(1, 2)
    elif len(shape) == 3 and shape[2] == width:
        places = features[:, getattr(model, "num_prefix_tokens", int(has_class_token)) :]
    else:
        places = torch.zeros(0, 0)
    if not places.shape[1]:  # several feature maps, or only class tokens
        raise PluginError(f"{PLUGIN} cannot pool this model's features", where=name, remedy="omit pooling=")
    pooled: Tensor = places.mean(dim=1) if pooling == "avg" else places.amax(dim=1)
    return pooled


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a very long image; other images unchanged.

    The transform enlarges an image until its short side fits before it crops: 8 x 100,000 pixels would take gigabytes.
    """
    longest = LONGEST * min(image.size)
    # The same amount on both sides, so that the centre stays the same.
    left, top = (max(0, (side - longest) // 2) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def _one_of(pooling: str | None, name: str) -> str | None:
    if pooling not in (None, *POOLINGS):
        raise PluginError(f"unknown pooling {pooling!r}", where=name, remedy=f"use one of {', '.join(POOLINGS)}, or omit it")
    return pooling


def _pixels(size: str | None, name: str) -> int | None:
    if size is None:
        return None
    if not (size.isascii() and size.isdigit() and 0 < int(size) <= 4096):
        raise PluginError(
            f"invalid size {size!r}: expected a number of pixels from 1 to 4096", where=name, remedy="for example size=224"
        )
    return int(size)
