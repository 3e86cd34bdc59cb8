"""`starter:image`: EfficientNet-Lite0, a small ImageNet classifier. 1280 numbers an image, taken before the classifier."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bridgekit.encoders import Item
from bridgekit.media import read_image
from bridgekit_starter.weights import EFFICIENTNET_WEIGHTS

SIZE = 224

#: What the image's short side is scaled to. The middle 224 of these 256 pixels are looked at, as in training.
SHORT_SIDE = 256

#: The longest side of a picture over its shortest, of what is scaled.
LONGEST = 8

#: Pictures in one pass on a CPU. The widest feature map of 4 takes 19 MB. From 32 MB on (7 pictures) glibc asks the system for
#: memory again each time, which takes longer than the convolutions: 35 ms a picture at 32, 17 ms at 4, on one core of a Zen 4.
AT_ONCE = 4


class ImageEncoder:
    """EfficientNet-Lite0: the mean over the last feature map, which is what its classifier reads.

    Arguments:
        device: a torch device.

    Raises:
        PluginError: the weights are missing or are not the expected ones.
    """

    modality = "image"
    dim = 1280
    revision = f"starter:image@{EFFICIENTNET_WEIGHTS.sha256[:12]}+bicubic-{SIZE}-v2"

    def __init__(self, device: str = "cpu") -> None:
        model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        stored = torch.load(io.BytesIO(EFFICIENTNET_WEIGHTS.read()), weights_only=True)
        # The file has timm's tensors in timm's order under names of its own; the names' last parts and the shapes are checked.
        names = model.state_dict()
        for (ours, tensor), (theirs, value) in zip(names.items(), stored.items(), strict=True):
            if ours.rpartition(".")[2] != theirs.rpartition(".")[2] or tensor.shape != value.shape:
                raise RuntimeError(f"timm's {ours} {tuple(tensor.shape)} does not match {theirs} {tuple(value.shape)}")
        model.load_state_dict(dict(zip(names, stored.values(), strict=True)))
        self._device = torch.device(device)
        self._model = _without_batch_norm(model.eval()).to(self._device, memory_format=torch.channels_last)

    def prepare(self, item: Item) -> Tensor:
        """The image's middle as a float32 tensor of shape (3, 224, 224), values from -1 to 1.

        Raises:
            ItemError: the file cannot be read as an image.
        """
        image = read_image(Path(item))
        # All but the middle of a very long picture goes first: scaling it up whole could take gigabytes.
        spare = [max(0, (side - LONGEST * min(image.size)) // 2) for side in image.size]
        image = image.crop((spare[0], spare[1], image.width - spare[0], image.height - spare[1]))
        # Scaled whole and then cut, as timm does: cut half a pixel beside that, a vector moves by up to 0.005 in cosine.
        # Bicubic, as the weights were trained (TensorFlow's own are).
        width, height = (int(SHORT_SIDE * side / min(image.size)) for side in image.size)
        left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
        scaled = image.resize((width, height), Image.Resampling.BICUBIC)
        square = scaled.crop((left, top, left + SIZE, top + SIZE))
        # These weights want (x - 0.5) / 0.5, as TensorFlow's do, not ImageNet's mean and deviation. Tried on scikit-learn's two
        # photographs: the daisy's probability is 0.33 with this and 0.12 with those, which put a lampshade above it.
        pixels = np.asarray(square, dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).permute(2, 0, 1)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        """n tensors of shape (3, 224, 224) into a float32 tensor of shape (n, 1280)."""
        if not batch:
            return torch.zeros(0, self.dim)
        return self._features(batch).cpu()

    @torch.inference_mode()
    def classify(self, batch: Sequence[Tensor]) -> Tensor:
        """n tensors of shape (3, 224, 224) into probabilities of the 1000 ImageNet classes: float32, shape (n, 1000)."""
        scores: Tensor = self._model.get_classifier()(self._features(batch))
        return scores.softmax(dim=-1).cpu()

    def _features(self, batch: Sequence[Tensor]) -> Tensor:
        step = AT_ONCE if self._device.type == "cpu" else len(batch)
        return torch.cat([self._pass(batch[start : start + step]) for start in range(0, len(batch), step)])

    def _pass(self, batch: Sequence[Tensor]) -> Tensor:
        pixels = torch.stack(list(batch)).to(self._device, memory_format=torch.channels_last)
        features: Tensor = self._model.forward_head(self._model.forward_features(pixels), pre_logits=True)
        return features


def _without_batch_norm(model: Any) -> Any:
    """The same function, with each batch norm's scale and shift in the convolution before it."""
    children = list(model.named_children())
    for (name, convolution), (norm_name, norm) in pairwise(children):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(model, name, fuse_conv_bn_eval(convolution, norm))
            setattr(model, norm_name, norm.act)  # timm's norms have the activation in them
    for _, child in children:
        _without_batch_norm(child)
    return model
