"""`starter:image` and `starter:image-last`: EfficientNet-Lite0, a small ImageNet classifier, with or without earlier layers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
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

#: The short side is scaled to 256 pixels, then the central 224 are cropped, as in training.
SHORT_SIDE = 256

#: Maximum aspect ratio of the part that is scaled.
LONGEST = 8

#: Images per forward pass on a CPU. Their largest feature map takes 19 MB. From 32 MB (7 images), glibc returns memory to the
#: system after each pass, and allocating it again takes longer than the convolutions: per image 35 ms at 32 and 17 ms at 4, on
#: one core of a Zen 4.
AT_ONCE = 4

#: Feature maps of earlier layers, as timm counts them, and their widths together: those of `blocks[2]` to `[6]`.
EARLIER, EARLIER_DIM = (3, 4, 5, 6, 7), 40 + 80 + 112 + 192 + 320


class ImageEncoder:
    """EfficientNet-Lite0: means over five earlier feature maps, then the mean over the last, which is the classifier's input.

    Arguments:
        device: a torch device.
        last_only: leave the earlier maps out.

    Raises:
        PluginError: the weights are missing or not the expected ones.
    """

    modality = "image"

    def __init__(self, device: str = "cpu", last_only: bool = False) -> None:
        self.dim = 1280 if last_only else EARLIER_DIM + 1280
        weights = f"starter:image@{EFFICIENTNET_WEIGHTS.sha256[:12]}"
        # The first was named before the second was, and is part of every stored latent's key.
        self.revision = f"{weights}+bicubic-{SIZE}-v2" if last_only else f"{weights}+blocks-2-to-6-and-last-bicubic-{SIZE}-v1"
        model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        stored = torch.load(io.BytesIO(EFFICIENTNET_WEIGHTS.read()), weights_only=True)
        # The file has timm's tensors in timm's order under other names; check the last parts of the names and the shapes.
        names = model.state_dict()
        for (ours, tensor), (theirs, value) in zip(names.items(), stored.items(), strict=True):
            if ours.rpartition(".")[2] != theirs.rpartition(".")[2] or tensor.shape != value.shape:
                raise RuntimeError(f"timm's {ours} {tuple(tensor.shape)} does not match {theirs} {tuple(value.shape)}")
        model.load_state_dict(dict(zip(names, stored.values(), strict=True)))
        self._device = torch.device(device)
        self._model = _without_batch_norm(model.eval()).to(self._device, memory_format=torch.channels_last)

    def prepare(self, item: Item) -> Tensor:
        """The image's central square as a float32 tensor of shape (3, 224, 224), values from -1 to 1.

        Raises:
            ItemError: the file cannot be read as an image.
        """
        image = read_image(item)
        # Crop very long images to their middle before scaling: enlarging all of it could take gigabytes.
        spare = [max(0, (side - LONGEST * min(image.size)) // 2) for side in image.size]
        image = image.crop((spare[0], spare[1], image.width - spare[0], image.height - spare[1]))
        # Scale, then crop, as timm does: a crop half a pixel off changes the features by up to 0.005 in cosine. Bicubic, as
        # these weights were trained (in TensorFlow).
        width, height = (int(SHORT_SIDE * side / min(image.size)) for side in image.size)
        left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
        scaled = image.resize((width, height), Image.Resampling.BICUBIC)
        square = scaled.crop((left, top, left + SIZE, top + SIZE))
        # TensorFlow's weights expect (x - 0.5) / 0.5, not ImageNet's mean and standard deviation. On scikit-learn's photograph
        # of a flower, the probability of "daisy" is 0.33 with this and 0.12, below "lampshade", with ImageNet's.
        pixels = np.asarray(square, dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).permute(2, 0, 1)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        """n tensors of shape (3, 224, 224) into a float32 tensor of shape (n, dim)."""
        if not batch:
            return torch.zeros(0, self.dim)
        return self._features(batch)[:, -self.dim :].contiguous().cpu()

    @torch.inference_mode()
    def classify(self, batch: Sequence[Tensor]) -> Tensor:
        """n tensors of shape (3, 224, 224) into probabilities of the 1000 ImageNet classes: float32, shape (n, 1000)."""
        scores: Tensor = self._model.get_classifier()(self._features(batch)[:, EARLIER_DIM:])
        return scores.softmax(dim=-1).cpu()

    def _features(self, batch: Sequence[Tensor]) -> Tensor:
        step = AT_ONCE if self._device.type == "cpu" else len(batch)
        return torch.cat([self._pass(batch[start : start + step]) for start in range(0, len(batch), step)])

    def _pass(self, batch: Sequence[Tensor]) -> Tensor:
        pixels = torch.stack(list(batch)).to(self._device, memory_format=torch.channels_last)
        features, maps = self._model.forward_intermediates(pixels, indices=EARLIER, extra_blocks=True)
        last = self._model.forward_head(features, pre_logits=True)
        return torch.cat([*(each.mean((2, 3)) for each in maps), last], dim=1)


def _without_batch_norm(model: Any) -> Any:
    """Fold each batch norm into the convolution before it."""
    children = list(model.named_children())
    for (name, convolution), (norm_name, norm) in pairwise(children):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(model, name, fuse_conv_bn_eval(convolution, norm))
            setattr(model, norm_name, norm.act)  # timm's norms include the activation
    for _, child in children:
        _without_batch_norm(child)
    return model
