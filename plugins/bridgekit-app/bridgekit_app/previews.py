"""Previews of images while they are drawn, from the pipeline's intermediate latents."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from bridgekit.image_models import ImageModel


def preview(model: ImageModel, latents: Tensor) -> Image | None:
    """Decode the first of some partly denoised latents.

    If the scheduler keeps its prediction of the final latents (DPM-Solver++ does), that is decoded: a blurred image that gets
    sharper. Otherwise the latents themselves are: an image that emerges from noise.

    Arguments:
        model: the model that is drawing.
        latents: (n, channels, height, width), from its pipeline after a step.

    Returns:
        the image, or None if the pipeline's latents are not in its VAE's plain format.
    """
    pipeline = model.pipeline
    vae: Any = getattr(pipeline, "vae", None)
    if vae is None or latents.ndim != 4 or latents.shape[1] != getattr(vae.config, "latent_channels", None):
        return None
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        return None  # it gives NaN in half precision; pipelines upcast it once, which is too slow for every step
    with suppress(ValueError, TypeError, RuntimeError, AttributeError), torch.inference_mode():
        shown = _expected(pipeline.scheduler, latents)[:1] / vae.config.scaling_factor
        shown = shown + (getattr(vae.config, "shift_factor", None) or 0.0)
        decoded = vae.decode(shown.to(vae.dtype), return_dict=False)[0]
        image: Image = pipeline.image_processor.postprocess(decoded.detach(), output_type="pil")[0]
        return image
    return None  # previews are optional


def _expected(scheduler: Any, latents: Tensor) -> Tensor:
    """The scheduler's last prediction of the final latents, or else the latents themselves."""
    if str(scheduler.config.get("algorithm_type")).endswith("dpmsolver++"):
        outputs = [output for output in getattr(scheduler, "model_outputs", None) or () if output is not None]
        if outputs and outputs[-1].shape == latents.shape:
            expected: Tensor = outputs[-1]
            return expected
    return latents
