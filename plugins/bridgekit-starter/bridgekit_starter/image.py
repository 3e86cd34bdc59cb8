"""`starter:image`: EfficientNet-Lite0, a small ImageNet classifier. 1280 numbers an image, taken before the classifier."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

from bridgekit.encoders import Item
from bridgekit.media import read_image
from bridgekit_starter.weights import EFFICIENTNET_WEIGHTS

SIZE = 224

#: The side of the square that is looked at, over the image's short side: 224 of 256, as in training.
CROP = 0.875


class ImageEncoder:
    """EfficientNet-Lite0: the mean over the last feature map, which is what its classifier reads.

    Arguments:
        device: a torch device.

    Raises:
        PluginError: the weights are missing or are not the expected ones.
    """

    modality = "image"
    dim = 1280
    revision = f"starter:image@{EFFICIENTNET_WEIGHTS.sha256[:12]}+bicubic-{SIZE}-v1"

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
        self._model = model.eval().to(self._device)

    def prepare(self, item: Item) -> Tensor:
        """The image's middle as a float32 tensor of shape (3, 224, 224), values from -1 to 1.

        Raises:
            ItemError: the file cannot be read as an image.
        """
        image = read_image(Path(item))
        side = CROP * min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        # Cutting and resizing in one step; bicubic, as the weights were trained (TensorFlow's own are).
        square = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
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
        pixels = torch.stack(list(batch)).to(self._device, memory_format=torch.channels_last)
        features: Tensor = self._model.forward_head(self._model.forward_features(pixels), pre_logits=True)
        return features
