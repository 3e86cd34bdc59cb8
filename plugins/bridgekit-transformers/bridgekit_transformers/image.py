"""Image encoders: ViT, DINOv2, DINOv3, ConvNeXt and others, and the image towers of CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bridgekit.encoders import Item
from bridgekit.errors import PluginError
from bridgekit.media import read_image
from bridgekit_transformers.layers import counted_layers, join_layers, layers_setting
from bridgekit_transformers.loading import Source, load_model, load_part, output_of, vector_width


class ImageEncoder:
    """An image model with its repository's preprocessing, pooled to one vector.

    With `layers=`, hidden states before the last are averaged over the patches or the map, and concatenated with that vector.

    Preprocessing uses Pillow if the family supports it, so that vectors do not depend on whether torchvision is installed;
    DINOv3 requires torchvision.

    Arguments:
        source: a model of the kind `image`.

    Raises:
        PluginError: files are missing or damaged, or the preprocessing needs a package that is not installed.
        BridgekitError: the model does not support this `pooling`, or has no such layers.
    """

    modality = "image"

    def __init__(self, source: Source) -> None:
        self._source, self.pinned = source, source.pinned
        pooling, self._head = source.head()
        unused = () if self._head.output == "pooler_output" else ("pooler.",)
        self._model = load_model(source, self._head.model, unused=unused)
        # Register tokens, between the class token and the patches, are not features of the image.
        self._before = source.family.before + int(getattr(self._model.config, "num_register_tokens", 0) or 0)
        self._processor = _processor(source)
        blank = self._inputs(Image.new("RGB", (64, 64)))
        self._layers, self._count = counted_layers(source, lambda: self._outputs([blank], earlier=True)[1])
        self._earlier = self._layers != (self._count,)
        self.dim = vector_width(source, self._vectors([blank]))
        layers = [layers_setting(self._layers, self._count)] if self._earlier else []
        self.revision = source.revision(pooling, *layers, _backend(self._processor))

    def prepare(self, item: Item) -> dict[str, Tensor]:
        """The model's arguments for an image.

        Raises:
            ItemError: the file cannot be read as an image.
        """
        return self._inputs(read_image(item))

    def _inputs(self, image: Image.Image) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self._processor(images=image, return_tensors="pt").items()}

    @torch.inference_mode()
    def encode(self, batch: Sequence[dict[str, Tensor]]) -> Tensor:
        """n prepared images to a float32 tensor of shape (n, dim)."""
        vectors = torch.zeros(len(batch), self.dim)
        by_shape: dict[tuple[torch.Size, ...], list[int]] = {}  # some preprocessors keep the aspect ratio
        for place, inputs in enumerate(batch):
            by_shape.setdefault(tuple(value.shape for value in inputs.values()), []).append(place)
        for places in by_shape.values():
            vectors[places] = self._vectors([batch[place] for place in places]).cpu()
        return vectors

    @torch.inference_mode()
    def _vectors(self, batch: Sequence[dict[str, Tensor]]) -> Tensor:
        """Images of one shape to vectors of shape (n, dim)."""
        inputs, outputs = self._outputs(batch, earlier=self._earlier)
        last = self._last(inputs, outputs)
        return join_layers(self._layers, self._count, last, lambda layer: self._mean(inputs, outputs.hidden_states[layer]))

    @torch.inference_mode()
    def _outputs(self, batch: Sequence[dict[str, Tensor]], *, earlier: bool) -> tuple[dict[str, Tensor], Any]:
        """One forward pass: the model's arguments, and its outputs."""
        inputs = {name: torch.stack([one[name] for one in batch]).to(self._source.device) for name in batch[0]}
        return inputs, self._model(**inputs, **({"output_hidden_states": True} if earlier else {}))

    def _last(self, inputs: dict[str, Tensor], outputs: Any) -> Tensor:
        """The vectors that the head selects, (n, d)."""
        if self._head.output not in ("cls", "mean"):
            # Convolutional models keep a height and width of 1 after pooling.
            return output_of(self._source, outputs, self._head.output).flatten(1)
        states = output_of(self._source, outputs, "last_hidden_state")
        return states[:, 0] if self._head.output == "cls" else self._mean(inputs, states)

    def _mean(self, inputs: dict[str, Tensor], states: Tensor) -> Tensor:
        """The mean over a map, (n, d, h, w), or over the patches of (n, t, d): shape (n, d)."""
        if states.ndim == 4:
            return states.mean((2, 3))
        own = inputs.get("pixel_attention_mask")  # of models that take images of any shape as a padded list of patches
        if own is not None:
            return (states * own[..., None]).sum(1) / own.sum(1, keepdim=True)
        return states[:, self._before :].mean(1)


def _processor(source: Source) -> Any:
    if find_spec("transformers.image_processing_backends") is not None:
        return load_part(source, "AutoImageProcessor", backend="pil")  # falls back to torchvision if that is all there is
    # Older transformers: `use_fast` instead of `backend`, without the fallback.
    try:
        return load_part(source, "AutoImageProcessor", use_fast=False)
    except PluginError as error:
        if "slow version" not in str(error):
            raise
        return load_part(source, "AutoImageProcessor", use_fast=True)


def _backend(processor: Any) -> str:
    """The library that resizes images; results differ slightly between libraries."""
    return str(getattr(processor, "backend", "torchvision" if type(processor).__name__.endswith("Fast") else "pil"))
