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

#: The cosine from which on two encoders are held to be the same. Rounding to half precision leaves 0.999.
SAME_ENCODER = 0.99


@dataclass(frozen=True)
class _FromPictures:
    """What the two conditionings that are made of pictures share."""

    pipeline: Any
    kind = ""
    made_of = IMAGE

    def encode(self, items: Sequence[ConditioningItem]) -> dict[str, Tensor]:
        """n pictures to one tensor of n rows, by the pipeline's own image encoder. Without one, raises BridgekitError."""
        if self._processor() is None:
            raise BridgekitError(
                "this pipeline cannot encode pictures itself: it has no image encoder",
                where=type(self.pipeline).__name__,
                remedy="use a bridge with a frozen image side of its CLIP, or load its IP-Adapter with the image_encoder",
            )
        pictures = [_picture(item) for item in items]
        with torch.no_grad():
            rows = [self._encoded(pictures[start : start + BATCH_SIZE]) for start in range(0, len(pictures), BATCH_SIZE)]
        self.pipeline.maybe_free_model_hooks()
        return {self.kind: torch.cat(rows)}

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Whether a frozen encoder gives the vectors of the pipeline's own image encoder, up to their length.

        Where the pipeline has none, the width has to do.
        """
        if encoder.modality != IMAGE:
            return False
        if self._processor() is None:
            return encoder.dim == self._width()
        own = self.encode([_probe_picture()])[self.kind]
        if own.shape != (1, encoder.dim):
            return False
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.png"
            _probe_picture().save(path)
            latents = encoder.encode([encoder.prepare(path)])
        return float(torch.cosine_similarity(own, latents.float().cpu()).min()) > SAME_ENCODER

    def _processor(self) -> Any:
        """What prepares a picture for the pipeline's image encoder; None where it has none."""
        parts = self.pipeline.components
        return parts.get("image_encoder") and (parts.get("feature_extractor") or parts.get("image_processor"))

    def _encoded(self, pictures: Sequence[PIL.Image.Image]) -> Tensor:
        """One batch of pictures to n rows, float32 on the CPU."""
        raise NotImplementedError

    def _width(self) -> int | None:
        """The width of the vectors that the denoiser takes, as far as that can be told."""
        raise NotImplementedError

    def _prompt(self, prompt: str | None, n: int) -> dict[str, Any]:
        """The prompt for n pictures, by default an empty one, where the pipeline takes one."""
        if "prompt" in call_parameters(self.pipeline):
            return {"prompt": [prompt or ""] * n}
        if prompt:
            raise BridgekitError(
                "this model takes no prompt beside its image embedding",
                where=type(self.pipeline).__name__,
                remedy="leave the prompt out, or load an IP-Adapter on a model that takes prompts",
            )
        return {}


class ImageConditioning(_FromPictures):
    """A CLIP image embedding, handed to the pipeline as it is."""

    kind = "image_embeds"

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """Image embeddings for n pictures, and a prompt (by default an empty one) where the pipeline takes one.

        The negative is zeros unless `negative_image_embeds` are among the tensors. A pipeline that wants them was trained with
        the embedding of an all-black picture there, which only the CLIP that made the others can give.
        """
        taken = call_parameters(self.pipeline)
        embeds = tensors[self.kind]
        arguments: dict[str, Any] = {self.kind: placed(self.pipeline, embeds)}
        name = f"negative_{self.kind}"
        if name in taken and (guided or taken[name].default is inspect.Parameter.empty):
            arguments[name] = placed(self.pipeline, rows_of(tensors.get(name, torch.zeros_like(embeds[:1])), len(embeds)))
        return arguments | self._prompt(prompt, len(embeds))

    def _encoded(self, pictures: Sequence[PIL.Image.Image]) -> Tensor:
        encoder = self.pipeline.image_encoder
        pixels = self._processor()(images=list(pictures), return_tensors="pt").pixel_values
        rows: Tensor = encoder(pixels.to(self.pipeline._execution_device, encoder.dtype)).image_embeds
        return rows.float().cpu()

    def _width(self) -> Any:
        return denoiser_setting(self.pipeline, "encoder_hid_dim")


def why_no_image_embeds(pipeline: Any) -> str | None:
    """What keeps a pipeline from taking `image_embeds`; None if nothing does."""
    if ImageConditioning.kind not in call_parameters(pipeline):
        return "the call does not take it"
    return why_more(pipeline, ImageConditioning.kind)


class AdapterConditioning(_FromPictures):
    """What a loaded IP-Adapter makes of pictures: a pooled CLIP embedding, or, for the "plus" kind, its hidden states.

    Its tensor is (n, d), or (n, tokens, d) for an adapter that wants hidden states.
    """

    kind = "ip_adapter_image_embeds"

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """The adapter's embeddings for n pictures, negatives before them or beside them, and a prompt (by default empty).

        Whether it is guided must agree with the scale of the call: some pipelines halve what they are given if it is.
        """
        embeds = tensors[self.kind]
        if len(embeds) > 1:
            _keep_rows_apart(self.pipeline)
        rows = placed(self.pipeline, embeds)[:, None]
        name = f"negative_{self.kind}"
        apart = name in call_parameters(self.pipeline)
        arguments: dict[str, Any] = {}
        if guided or apart:  # left to themselves, pipelines that take it apart encode a black picture even if it is not used
            negative = tensors[name] if name in tensors else self._nothing(embeds)
            against = placed(self.pipeline, rows_of(negative, len(embeds)))[:, None]
            arguments = {name: [against]} if apart else {}
            rows = rows if apart else torch.cat([against, rows])
        return arguments | {self.kind: [rows]} | self._prompt(prompt, len(embeds))

    def _encoded(self, pictures: Sequence[PIL.Image.Image]) -> Tensor:
        return self._both(pictures)[-1]

    def _width(self) -> int | None:
        [layer] = _adapters(self.pipeline)
        return next((part.in_features for part in layer.modules() if isinstance(part, nn.Linear)), None)

    @torch.no_grad()
    def _both(self, pictures: Sequence[PIL.Image.Image]) -> Tensor:
        """(2, n, ...) negatives and embeddings of n pictures, or (1, n, ...) where the pipeline makes no negatives."""
        [both] = call_filled(
            self.pipeline,
            self.pipeline.prepare_ip_adapter_image_embeds,
            ip_adapter_image=[list(pictures)],
            ip_adapter_image_embeds=None,
            device=self.pipeline._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        rows: Tensor = both.float().cpu()
        return rows

    def _nothing(self, embeds: Tensor) -> Tensor:
        """One row that stands for no picture: the pipeline's own negative, or that of a black picture."""
        if self._processor() is None:
            return torch.zeros_like(embeds[:1])
        negative = self._both([PIL.Image.new("RGB", (64, 64))])[0]
        self.pipeline.maybe_free_model_hooks()
        return negative


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


def _probe_picture() -> PIL.Image.Image:
    """A picture with colour, edges and slopes, off centre, so that another model or another cropping gives another vector."""
    across, around = PIL.Image.linear_gradient("L").rotate(90), PIL.Image.radial_gradient("L")
    picture = PIL.Image.merge("RGB", (across, around, PIL.Image.linear_gradient("L"))).resize((320, 240))
    picture.paste((220, 30, 40), (30, 20, 110, 90))
    picture.paste((20, 40, 200), (180, 130, 300, 200))
    return picture
