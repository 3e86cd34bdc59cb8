"""Image conditioning: CLIP image embeddings, or those of a loaded IP-Adapter."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from bridgekit.diffusion.pipeline import (
    BATCH_SIZE,
    call_filled,
    call_parameters,
    config_of,
    denoiser_of,
    free_hooks,
    negative_of,
    placed,
    prompt_beside,
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
class ImageConditioning:
    """CLIP image embeddings, passed to the pipeline directly."""

    pipeline: Any
    kind = "image_embeds"
    made_of = IMAGE

    def encode(self, items: Sequence[ConditioningItem]) -> dict[str, Tensor]:
        """n images to `image_embeds` (n, d), by the pipeline's own CLIP encoder.

        Raises:
            BridgekitError: the pipeline has no image encoder.
        """
        if not _has_image_encoder(self.pipeline):
            raise BridgekitError(
                "the pipeline has no image encoder, so it cannot encode images itself",
                where=type(self.pipeline).__name__,
                remedy="use a bridge with a frozen image side by the CLIP model that the pipeline was trained on",
            )
        encoder = self.pipeline.image_encoder
        pixels = _processor(self.pipeline)(images=[_image(item) for item in items], return_tensors="pt").pixel_values
        with torch.no_grad():
            rows = [
                encoder(batch.to(self.pipeline._execution_device, encoder.dtype)).image_embeds.float().cpu()
                for batch in pixels.split(BATCH_SIZE)
            ]
        free_hooks(self.pipeline)
        return {self.kind: torch.cat(rows)}

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """Image embeddings for n images, and a prompt (empty by default) if the pipeline takes one.

        The negative is zeros unless the tensors include `negative_image_embeds`. Pipelines that require it were trained with
        the embedding of a black image, which only the same CLIP model can compute.
        """
        taken = call_parameters(self.pipeline)
        embeds = tensors[self.kind]
        arguments: dict[str, Any] = {self.kind: placed(self.pipeline, embeds)}
        name = negative_of(self.kind)
        if name in taken and (guided or taken[name].default is inspect.Parameter.empty):
            arguments[name] = placed(self.pipeline, rows_of(tensors.get(name, torch.zeros_like(embeds[:1])), len(embeds)))
        return arguments | prompt_beside(self.pipeline, prompt, len(embeds))

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Whether the encoder gives the same vectors as the pipeline's own; without one, whether its width fits."""
        denoiser = config_of(denoiser_of(self.pipeline))
        if _has_image_encoder(self.pipeline):
            return _same_vectors(encoder, self)
        return encoder.modality == IMAGE and encoder.dim == getattr(denoiser, "encoder_hid_dim", None)


def why_no_image_embeds(pipeline: Any) -> str | None:
    """Why a pipeline cannot be conditioned on `image_embeds`; None if it can."""
    if ImageConditioning.kind not in call_parameters(pipeline):
        return "the call does not take it"
    return why_more(pipeline, ImageConditioning.kind)


@dataclass(frozen=True)
class AdapterConditioning:
    """Input of a loaded IP-Adapter: pooled CLIP embeddings, or, for "plus" adapters, hidden states."""

    pipeline: Any
    kind = "ip_adapter_image_embeds"
    made_of = IMAGE

    def encode(self, items: Sequence[ConditioningItem]) -> dict[str, Tensor]:
        """n images to `ip_adapter_image_embeds`: (n, d), or (n, tokens, d) for an adapter of hidden states."""
        images = [_image(item) for item in items]
        rows = [self._prepared(images[start : start + BATCH_SIZE])[1] for start in range(0, len(images), BATCH_SIZE)]
        free_hooks(self.pipeline)
        return {self.kind: torch.cat(rows)}

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """The adapter's embeddings for n images, with negatives if guided, and a prompt (empty by default).

        `guided` must agree with the guidance scale of the call: with guidance, some pipelines expect negatives and positives in
        one tensor.
        """
        embeds = tensors[self.kind]
        if len(embeds) > 1:
            _keep_rows_apart(self.pipeline)
        rows = placed(self.pipeline, embeds)[:, None]
        name = negative_of(self.kind)
        apart = name in call_parameters(self.pipeline)
        arguments: dict[str, Any] = {}
        if (
            guided or apart
        ):  # without an explicit negative, pipelines with a separate argument encode a black image even unguided
            negative = tensors[name] if name in tensors else self._negative(embeds)
            against = placed(self.pipeline, rows_of(negative, len(embeds)))[:, None]
            arguments = {name: [against]} if apart else {}
            rows = rows if apart else torch.cat([against, rows])
        return arguments | {self.kind: [rows]} | prompt_beside(self.pipeline, prompt, len(embeds))

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Whether the encoder gives the same vectors as the pipeline's own; without one, whether its width fits the adapter."""
        if _has_image_encoder(self.pipeline):
            return _same_vectors(encoder, self)
        [layer] = _adapters(self.pipeline)
        width = next((part.in_features for part in layer.modules() if isinstance(part, nn.Linear)), None)
        return encoder.modality == IMAGE and encoder.dim == width

    def _prepared(self, images: Sequence[PIL.Image.Image]) -> tuple[Tensor, Tensor]:
        """Negatives and embeddings of n images, (n, d) or (n, tokens, d) each, by the pipeline's own method."""
        if not _has_image_encoder(self.pipeline):
            raise BridgekitError(
                "the pipeline has no image encoder, so it cannot encode images itself",
                where=type(self.pipeline).__name__,
                remedy="load the IP-Adapter with its image_encoder, or use a bridge with a frozen image side by that CLIP",
            )
        method = self.pipeline.prepare_ip_adapter_image_embeds
        with torch.no_grad():
            [both] = call_filled(
                self.pipeline,
                method,
                ip_adapter_image=[list(images)],
                ip_adapter_image_embeds=None,
                device=self.pipeline._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
        rows = both.detach().float().cpu()
        if "do_classifier_free_guidance" in inspect.signature(method).parameters:
            return rows[0], rows[1]
        return rows[0], rows[0]

    def _negative(self, embeds: Tensor) -> Tensor:
        """One negative row: the pipeline's own, or zeros if it has no image encoder."""
        if _has_image_encoder(self.pipeline):
            negative = self._prepared([PIL.Image.new("RGB", (64, 64))])[0]
            free_hooks(self.pipeline)
            return negative
        return torch.zeros_like(embeds[:1])


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


def _processor(pipeline: Any) -> Any:
    """The image encoder's preprocessor."""
    parts = pipeline.components
    return parts.get("feature_extractor") or parts.get("image_processor")


def _has_image_encoder(pipeline: Any) -> bool:
    return getattr(pipeline, "image_encoder", None) is not None and _processor(pipeline) is not None


def _same_vectors(encoder: Encoder, conditioning: ImageConditioning | AdapterConditioning) -> bool:
    """Whether a frozen encoder gives the same vectors as the pipeline's own image encoder, up to their norm."""
    if encoder.modality != IMAGE:
        return False
    own = conditioning.encode([_probe_image()])[conditioning.kind]
    if own.shape != (1, encoder.dim):
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.png"
        _probe_image().save(path)
        latents = encoder.encode([encoder.prepare(path)])
    return float(torch.cosine_similarity(own, latents.float().cpu()).min()) > SAME_ENCODER


def _probe_image() -> PIL.Image.Image:
    """An asymmetric image with colours, edges and gradients, so that other models and other crops give other vectors."""
    across, around = PIL.Image.linear_gradient("L").rotate(90), PIL.Image.radial_gradient("L")
    image = PIL.Image.merge("RGB", (across, around, PIL.Image.linear_gradient("L"))).resize((320, 240))
    image.paste((220, 30, 40), (30, 20, 110, 90))
    image.paste((20, 40, 200), (180, 130, 300, 200))
    return image
