"""Image embeddings as conditioning: a CLIP embedding, or a loaded IP-Adapter's."""

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

#: The cosine from which on two encoders are held to be the same. Rounding to half precision leaves 0.999.
SAME_ENCODER = 0.99


@dataclass(frozen=True)
class ImageConditioning:
    """A CLIP image embedding, handed to the pipeline as it is."""

    pipeline: Any
    kind = "image_embeds"
    made_of = IMAGE

    def encode(self, items: Sequence[ConditioningItem]) -> dict[str, Tensor]:
        """n pictures to `image_embeds` (n, d), by the pipeline's own CLIP. A decoder without one raises BridgekitError."""
        if not _has_image_encoder(self.pipeline):
            raise BridgekitError(
                "this pipeline cannot encode pictures itself: it has no image encoder",
                where=type(self.pipeline).__name__,
                remedy="use a bridge with a frozen image side of the CLIP that the pipeline was trained on",
            )
        encoder = self.pipeline.image_encoder
        pixels = _processor(self.pipeline)(images=[_picture(item) for item in items], return_tensors="pt").pixel_values
        with torch.no_grad():
            rows = [
                encoder(batch.to(self.pipeline._execution_device, encoder.dtype)).image_embeds.float().cpu()
                for batch in pixels.split(BATCH_SIZE)
            ]
        free_hooks(self.pipeline)
        return {self.kind: torch.cat(rows)}

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """Image embeddings for n pictures, and a prompt (by default an empty one) where the pipeline takes one.

        The negative is zeros unless `negative_image_embeds` are among the tensors. A pipeline that wants them was trained with
        the embedding of an all-black picture there, which only the CLIP that made the others can give.
        """
        taken = call_parameters(self.pipeline)
        embeds = tensors[self.kind]
        arguments: dict[str, Any] = {self.kind: placed(self.pipeline, embeds)}
        name = negative_of(self.kind)
        if name in taken and (guided or taken[name].default is inspect.Parameter.empty):
            arguments[name] = placed(self.pipeline, rows_of(tensors.get(name, torch.zeros_like(embeds[:1])), len(embeds)))
        return arguments | prompt_beside(self.pipeline, prompt, len(embeds))

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Whether it is an image encoder of the same width that sees a picture as the pipeline's own does, if it has one."""
        denoiser = config_of(denoiser_of(self.pipeline))
        if _has_image_encoder(self.pipeline):
            return _sees_alike(encoder, self)
        return encoder.modality == IMAGE and encoder.dim == getattr(denoiser, "encoder_hid_dim", None)


def why_no_image_embeds(pipeline: Any) -> str | None:
    """What keeps a pipeline from taking `image_embeds`; None if nothing does."""
    if ImageConditioning.kind not in call_parameters(pipeline):
        return "the call does not take it"
    return why_more(pipeline, ImageConditioning.kind)


@dataclass(frozen=True)
class AdapterConditioning:
    """What a loaded IP-Adapter makes of pictures: a pooled CLIP embedding, or, for the "plus" kind, its hidden states."""

    pipeline: Any
    kind = "ip_adapter_image_embeds"
    made_of = IMAGE

    def encode(self, items: Sequence[ConditioningItem]) -> dict[str, Tensor]:
        """n pictures to `ip_adapter_image_embeds`: (n, d), or (n, tokens, d) for an adapter that wants hidden states."""
        pictures = [_picture(item) for item in items]
        rows = [self._prepared(pictures[start : start + BATCH_SIZE])[1] for start in range(0, len(pictures), BATCH_SIZE)]
        free_hooks(self.pipeline)
        return {self.kind: torch.cat(rows)}

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """The adapter's embeddings for n pictures, negatives before them or beside them, and a prompt (by default empty).

        Whether it is guided must agree with the scale of the call: some pipelines halve what they are given if it is.
        """
        embeds = tensors[self.kind]
        if len(embeds) > 1:
            _keep_rows_apart(self.pipeline)
        rows = placed(self.pipeline, embeds)[:, None]
        name = negative_of(self.kind)
        apart = name in call_parameters(self.pipeline)
        arguments: dict[str, Any] = {}
        if guided or apart:  # left to themselves, pipelines that take it apart encode a black picture even if it is not used
            negative = tensors[name] if name in tensors else self._nothing(embeds)
            against = placed(self.pipeline, rows_of(negative, len(embeds)))[:, None]
            arguments = {name: [against]} if apart else {}
            rows = rows if apart else torch.cat([against, rows])
        return arguments | {self.kind: [rows]} | prompt_beside(self.pipeline, prompt, len(embeds))

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Whether it is an image encoder whose vectors fit the adapter and match those of the pipeline's own, if it has one."""
        if _has_image_encoder(self.pipeline):
            return _sees_alike(encoder, self)
        [layer] = _adapters(self.pipeline)
        width = next((part.in_features for part in layer.modules() if isinstance(part, nn.Linear)), None)
        return encoder.modality == IMAGE and encoder.dim == width

    def _prepared(self, pictures: Sequence[PIL.Image.Image]) -> tuple[Tensor, Tensor]:
        """Negatives and embeddings of n pictures, (n, d) or (n, tokens, d) each: the pipeline knows what its adapter wants."""
        if not _has_image_encoder(self.pipeline):
            raise BridgekitError(
                "this pipeline cannot encode pictures itself: it has no image encoder",
                where=type(self.pipeline).__name__,
                remedy="load the IP-Adapter with its image_encoder, or use a bridge with a frozen image side of that CLIP",
            )
        method = self.pipeline.prepare_ip_adapter_image_embeds
        with torch.no_grad():
            [both] = call_filled(
                self.pipeline,
                method,
                ip_adapter_image=[list(pictures)],
                ip_adapter_image_embeds=None,
                device=self.pipeline._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
        rows = both.detach().float().cpu()
        if "do_classifier_free_guidance" in inspect.signature(method).parameters:
            return rows[0], rows[1]
        return rows[0], rows[0]

    def _nothing(self, embeds: Tensor) -> Tensor:
        """One row that stands for no picture: the pipeline's own negative, or that of a black picture."""
        if _has_image_encoder(self.pipeline):
            negative = self._prepared([PIL.Image.new("RGB", (64, 64))])[0]
            free_hooks(self.pipeline)
            return negative
        return torch.zeros_like(embeds[:1])


def _keep_rows_apart(pipeline: Any) -> None:
    """Let one call of this pipeline take an embedding a picture, rather than one for all its pictures.

    As of diffusers 0.42 a call repeats what it is given once for each of its n pictures, even if it is given n rows. Every
    picture then attends to all n embeddings, and no error tells. So n rows for n pictures are passed through as they are.
    """
    prepare = pipeline.prepare_ip_adapter_image_embeds
    if hasattr(prepare, "keeps_rows_apart"):
        return
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def prepare_rows(*args: Any, **named: Any) -> Any:
        given = signature.bind(*args, **named)
        given.apply_defaults()
        embeds = given.arguments.get("ip_adapter_image_embeds")
        halves = 2 if given.arguments.get("do_classifier_free_guidance") else 1
        pictures = given.arguments["num_images_per_prompt"]
        if embeds is not None and {len(rows) for rows in embeds} == {halves * pictures}:
            given.arguments["num_images_per_prompt"] = 1
        return prepare(*given.args, **given.kwargs)

    prepare_rows.keeps_rows_apart = True  # type: ignore[attr-defined]
    pipeline.prepare_ip_adapter_image_embeds = prepare_rows


def why_no_adapter(pipeline: Any) -> str | None:
    """What keeps a pipeline from being driven through an IP-Adapter; None if nothing does."""
    if AdapterConditioning.kind not in call_parameters(pipeline):
        return "the call does not take it"
    adapters = _adapters(pipeline)
    if not adapters or not hasattr(pipeline, "prepare_ip_adapter_image_embeds"):
        return "no IP-Adapter is loaded"
    if len(adapters) > 1:
        return "several IP-Adapters are loaded, and only one can be driven"
    return why_more(pipeline, AdapterConditioning.kind)


def _adapters(pipeline: Any) -> list[nn.Module]:
    """The projections of the loaded IP-Adapters."""
    projections = getattr(denoiser_of(pipeline), "encoder_hid_proj", None)
    return list(getattr(projections, "image_projection_layers", ()))


def _picture(item: ConditioningItem) -> PIL.Image.Image:
    return item.convert("RGB") if isinstance(item, PIL.Image.Image) else read_image(Path(item))


def _processor(pipeline: Any) -> Any:
    """What readies a picture for the image encoder."""
    parts = pipeline.components
    return parts.get("feature_extractor") or parts.get("image_processor")


def _has_image_encoder(pipeline: Any) -> bool:
    return getattr(pipeline, "image_encoder", None) is not None and _processor(pipeline) is not None


def _sees_alike(encoder: Encoder, conditioning: ImageConditioning | AdapterConditioning) -> bool:
    """Whether a frozen encoder gives the very vectors that the pipeline's own image encoder does, whatever their length."""
    if encoder.modality != IMAGE:
        return False
    own = conditioning.encode([_probe_picture()])[conditioning.kind]
    if own.shape != (1, encoder.dim):
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.png"
        _probe_picture().save(path)
        latents = encoder.encode([encoder.prepare(path)])
    return float(torch.cosine_similarity(own, latents.float().cpu()).min()) > SAME_ENCODER


def _probe_picture() -> PIL.Image.Image:
    """A picture with colour, edges and slopes, off centre, so that another model or another cropping gives another vector."""
    across, around = PIL.Image.linear_gradient("L").rotate(90), PIL.Image.radial_gradient("L")
    picture = PIL.Image.merge("RGB", (across, around, PIL.Image.linear_gradient("L"))).resize((320, 240))
    picture.paste((220, 30, 40), (30, 20, 110, 90))
    picture.paste((20, 40, 200), (180, 130, 300, 200))
    return picture
