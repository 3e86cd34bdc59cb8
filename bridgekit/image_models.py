"""A loaded text-to-image model, and what it takes in place of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import PIL.Image
from torch import Tensor

from bridgekit.encoders import Encoder

#: What a picture may be given as, and a text.
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
        """The model's own conditioning of n > 0 items.

        Arguments:
            items: texts, or pictures and paths of pictures.

        Returns:
            Argument name to tensor of n rows on the CPU, float32, masks bool. For example `prompt_embeds` (n, L, d),
            `pooled_prompt_embeds` (n, p), `prompt_attention_mask` (n, L); `image_embeds` (n, d). Where there is a mask and the
            model heeds it, L is the length of the longest text given: two calls may differ in it. What a mask leaves out holds
            nothing of worth.

        Raises:
            BridgekitError: the part of the pipeline that encodes is not there.
            ItemError: an item cannot be read.
        """
        ...

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """Keyword arguments of a pipeline call for n pictures.

        Arguments:
            tensors: n rows each, named as `encode` names them; any L will do. Negative ones (`negative_...`, of n rows or of
                one) are used where they are given, in place of the pipeline's own.
            guided: whether negatives belong to it. The scale is the caller's: see `guidance_argument`.
            prompt: for conditionings made of images, a text beside them.

        Raises:
            BridgekitError: a prompt is given in vain, or the pipeline's negatives cannot be encoded.
        """
        ...

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Whether that frozen encoder's latents are this conditioning already, so that no map is needed."""
        ...


@dataclass(frozen=True)
class ImageModel:
    """A loaded text-to-image model.

    Arguments:
        name: what the user called it.
        pipeline: a diffusers pipeline.
        conditionings: what it takes in place of a prompt, best first.
        steps: how many it wants by default; None leaves it to the pipeline.
        guidance: likewise; 1 is none.
        size: the one side in pixels that it can draw, or None where the pipeline may be asked for others.
    """

    name: str
    pipeline: Any = field(repr=False)
    conditionings: Sequence[Conditioning] = field(repr=False)
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None
