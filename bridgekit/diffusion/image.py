"""Image conditioning: CLIP image embeddings, or those of a loaded IP-Adapter."""

from __future__ import annotations

import functools
import inspect
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from bridgekit.diffusion.pipeline import (
    BATCH_SIZE,
    call_defaults,
    call_filled,
    call_parameters,
    denoiser_of,
    denoiser_setting,
    placed,
    rows_of,
    why_more,
)
from bridgekit.encoders import Encoder
from bridgekit.errors import BridgekitError
from bridgekit.image_models import ConditioningItem
from bridgekit.media import read_image

IMAGE = "image"

#: Minimum cosine of two encoders' vectors to consider them the same. Rounding to half precision gives 0.999.
SAME_ENCODER = 0.99


@dataclass(frozen=True)
class _FromImages(ABC):
    """The common part of the two conditionings that are made of images."""

    pipeline: Any
    kind = ""
    made_of = IMAGE

    def encode(self, items: Sequence[ConditioningItem]) -> dict[str, Tensor]:
        """n images to one tensor of n rows, by the pipeline's own image encoder.

        Raises:
            BridgekitError: the pipeline has no image encoder.
        """
        if self._processor() is None:
            raise BridgekitError(
                "the pipeline has no image encoder, so it cannot encode images itself",
                where=type(self.pipeline).__name__,
                remedy="use a bridge with a frozen image side by its CLIP model, or load the IP-Adapter with its image_encoder",
            )
        images = [_image(item) for item in items]
        with torch.no_grad():
            rows = [self._encoded(images[start : start + BATCH_SIZE]) for start in range(0, len(images), BATCH_SIZE)]
        self.pipeline.maybe_free_model_hooks()
        return {self.kind: torch.cat(rows)}

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Whether it gives the pipeline's own image vectors, up to the norm; without an image encoder, of the same width."""
        if encoder.modality != IMAGE:
            return False
        if self._processor() is None:
            return bool(encoder.dim == self._width())
        own = self.encode([_probe_image()])[self.kind]
        if own.shape != (1, encoder.dim):
            return False
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.png"
            _probe_image().save(path)
            latents = encoder.encode([encoder.prepare(path)])
        return float(torch.cosine_similarity(own, latents.float().cpu()).min()) > SAME_ENCODER

    def _processor(self) -> Any:
        """The image encoder's preprocessor; None if the pipeline has no image encoder."""
        parts = self.pipeline.components
        return parts.get("image_encoder") and (parts.get("feature_extractor") or parts.get("image_processor"))

    @abstractmethod
    def _encoded(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """One batch of n images to n rows, float32 on the CPU."""

    @abstractmethod
    def _width(self) -> Any:
        """The width of the vectors that the denoiser takes, if known."""

    def _prompt(self, prompt: str | None, n: int) -> dict[str, Any]:
        """The prompt argument for n images, if the pipeline takes one."""
        if "prompt" in call_parameters(self.pipeline):
            return {"prompt": [prompt or ""] * n}
        if prompt:
            raise BridgekitError(
                "the model takes no prompt in addition to its image embedding",
                where=type(self.pipeline).__name__,
                remedy="omit the prompt, or load an IP-Adapter on a model that takes prompts",
            )
        return {}


class ImageConditioning(_FromImages):
    """CLIP image embeddings, passed to the pipeline directly."""

    kind = "image_embeds"

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """Image embeddings for n images, and a prompt (empty by default) if the pipeline takes one.

        The negative is zeros unless the tensors include `negative_image_embeds`. Pipelines that require it were trained with
        the embedding of a black image, which only the same CLIP model can compute.
        """
        embeds = tensors[self.kind]
        arguments: dict[str, Any] = {self.kind: placed(self.pipeline, embeds)}
        name = f"negative_{self.kind}"
        if name in call_parameters(self.pipeline) and (guided or name not in call_defaults(self.pipeline)):
            arguments[name] = placed(self.pipeline, rows_of(tensors.get(name, torch.zeros_like(embeds[:1])), len(embeds)))
        return arguments | self._prompt(prompt, len(embeds))

    def _encoded(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        encoder = self.pipeline.image_encoder
        pixels = self._processor()(images=list(images), return_tensors="pt").pixel_values
        rows: Tensor = encoder(pixels.to(self.pipeline._execution_device, encoder.dtype)).image_embeds
        return rows.float().cpu()

    def _width(self) -> Any:
        return denoiser_setting(self.pipeline, "encoder_hid_dim")


def why_no_image_embeds(pipeline: Any) -> str | None:
    """Why a pipeline cannot be conditioned on `image_embeds`; None if it can."""
    if ImageConditioning.kind not in call_parameters(pipeline):
        return "the call does not take it"
    return why_more(pipeline, ImageConditioning.kind)


class AdapterConditioning(_FromImages):
    """Input of a loaded IP-Adapter: (n, d) pooled CLIP embeddings, or, for "plus" adapters, (n, tokens, d) hidden states."""

    kind = "ip_adapter_image_embeds"

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """The adapter's embeddings for n images, with negatives if guided, and a prompt (empty by default).

        `guided` must agree with the guidance scale of the call: with guidance, some pipelines expect negatives and positives in
        one tensor.
        """
        embeds = tensors[self.kind]
        if len(embeds) > 1:
            _keep_rows_apart(self.pipeline)
        rows = placed(self.pipeline, embeds)[:, None]
        name = f"negative_{self.kind}"
        apart = name in call_parameters(self.pipeline)
        arguments: dict[str, Any] = {}
        # If not given, a pipeline with a separate argument for negatives encodes a black image, even unguided.
        if guided or apart:
            negative = tensors[name] if name in tensors else self._negative(embeds)
            against = placed(self.pipeline, rows_of(negative, len(embeds)))[:, None]
            arguments = {name: [against]} if apart else {}
            rows = rows if apart else torch.cat([against, rows])
        return arguments | {self.kind: [rows]} | self._prompt(prompt, len(embeds))

    def _encoded(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        return self._with_negatives(images)[-1]

    def _width(self) -> Any:
        [layer] = _adapters(self.pipeline)
        return next((part.in_features for part in layer.modules() if isinstance(part, nn.Linear)), None)

    @torch.no_grad()
    def _with_negatives(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """(2, n, ...) negatives and embeddings of n images; (1, n, ...) embeddings if the pipeline's method has no negative."""
        [both] = call_filled(
            self.pipeline,
            self.pipeline.prepare_ip_adapter_image_embeds,
            ip_adapter_image=[list(images)],
            ip_adapter_image_embeds=None,
            device=self.pipeline._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        rows: Tensor = both.float().cpu()
        return rows

    def _negative(self, embeds: Tensor) -> Tensor:
        """One negative row: the pipeline's own, or zeros if it has no image encoder."""
        if self._processor() is None:
            return torch.zeros_like(embeds[:1])
        negative = self._with_negatives([PIL.Image.new("RGB", (64, 64))])[0]
        self.pipeline.maybe_free_model_hooks()
        return negative


def _keep_rows_apart(pipeline: Any) -> None:
    """Let a call of this pipeline take one embedding per image, rather than one for all its images.

    As of diffusers 0.42, a call repeats the given embeddings for each of its n images even if there are n rows, and every image
    then attends to all n embeddings, without an error. This wrapper passes n rows for n images through unchanged.
    """
    prepare = pipeline.prepare_ip_adapter_image_embeds
    if hasattr(prepare, "keeps_rows_apart"):
        return
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def prepare_rows(*args: Any, **named: Any) -> Any:
        call = signature.bind(*args, **named)
        call.apply_defaults()
        embeds = call.arguments.get("ip_adapter_image_embeds")
        halves = 2 if call.arguments.get("do_classifier_free_guidance") else 1
        images = call.arguments["num_images_per_prompt"]
        if embeds is not None and {len(rows) for rows in embeds} == {halves * images}:
            call.arguments["num_images_per_prompt"] = 1
        return prepare(*call.args, **call.kwargs)

    prepare_rows.keeps_rows_apart = True  # type: ignore[attr-defined]
    pipeline.prepare_ip_adapter_image_embeds = prepare_rows


def why_no_adapter(pipeline: Any) -> str | None:
    """Why a pipeline cannot be conditioned through an IP-Adapter; None if it can."""
    if AdapterConditioning.kind not in call_parameters(pipeline):
        return "the call does not take it"
    adapters = _adapters(pipeline)
    if not adapters or not hasattr(pipeline, "prepare_ip_adapter_image_embeds"):
        return "no IP-Adapter is loaded"
    if len(adapters) > 1:
        return "several IP-Adapters are loaded, and only one is supported"
    return why_more(pipeline, AdapterConditioning.kind)


def _adapters(pipeline: Any) -> list[nn.Module]:
    """The projections of the loaded IP-Adapters."""
    projections = getattr(denoiser_of(pipeline), "encoder_hid_proj", None)
    return list(getattr(projections, "image_projection_layers", ()))


def _image(item: ConditioningItem) -> PIL.Image.Image:
    return item.convert("RGB") if isinstance(item, PIL.Image.Image) else read_image(Path(item))


def _probe_image() -> PIL.Image.Image:
    """An asymmetric image with colours, edges and gradients, so that other models and other crops give other vectors."""
    across, around = PIL.Image.linear_gradient("L").rotate(90), PIL.Image.radial_gradient("L")
    image = PIL.Image.merge("RGB", (across, around, PIL.Image.linear_gradient("L"))).resize((320, 240))
    image.paste((220, 30, 40), (30, 20, 110, 90))
    image.paste((20, 40, 200), (180, 130, 300, 200))
    return image
