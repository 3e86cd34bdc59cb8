"""The text-to-image contract: a loaded model, and the conditioning it takes in place of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import PIL.Image
from torch import Tensor

from bridgekit.encoders import Encoder

#: A text, or an image as a path or in memory.
ConditioningItem = str | Path | PIL.Image.Image


class Conditioning(Protocol):
    """What a text-to-image model takes in place of a prompt.

    Attributes:
        kind: the pipeline's argument: `prompt_embeds`, `image_embeds` or `ip_adapter_image_embeds`.
        made_of: the modality of the items that `encode` takes: `text` or `image`.
    """

    kind: str
    made_of: str

    def encode(self, items: Sequence[ConditioningItem]) -> dict[str, Tensor]:
        """The model's own conditioning for n > 0 items.

        Returns:
            Argument name to tensor with n rows on the CPU: float32, or bool for masks. For example `prompt_embeds`
            (n, L, d), `pooled_prompt_embeds` (n, p), `prompt_attention_mask` (n, L); `image_embeds` (n, d). If there is a mask,
            L is the length of the longest text, and values at masked positions are meaningless.

        Raises:
            BridgekitError: the pipeline has no encoder for these items.
            ItemError: an item cannot be read.
        """

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """Keyword arguments of a pipeline call for n images.

        Arguments:
            tensors: n rows each, named as in `encode`, with any L. Negatives (`negative_...`, with n rows or one) replace
                the pipeline's own.
            guided: whether to include negatives for classifier-free guidance. The caller sets the scale: see
                `guidance_argument`.
            prompt: a text in addition to image conditioning.

        Raises:
            BridgekitError: the pipeline ignores prompts, or its negatives cannot be encoded.
        """

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Whether this frozen encoder's latents already are this conditioning, so no map is needed."""


@dataclass(frozen=True)
class ImageModel:
    """A loaded text-to-image model.

    Arguments:
        name: the name the user gave.
        pipeline: a diffusers pipeline.
        conditionings: what it takes in place of a prompt, best first.
        steps: default number of denoising steps, or None for the pipeline's default.
        guidance: default guidance scale, 1 for none, or None for the pipeline's default.
        size: the only side length in pixels that it supports, or None if it supports several.
    """

    name: str
    pipeline: Any = field(repr=False)
    conditionings: Sequence[Conditioning] = field(repr=False)
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None
