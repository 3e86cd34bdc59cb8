"""Pictures while they form: what a pipeline's latents look like before its last step."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from bridgekit.image_models import ImageModel


def preview(model: ImageModel, latents: Tensor) -> Image | None:
    """The first of some half-denoised latents as a picture.

    Where the scheduler keeps what it expects the latents to become (DPM-Solver++ does), that is shown: a blurred picture that
    sharpens. Elsewhere the latents are shown as they are: a picture that rises out of noise.

    Arguments:
        model: the model that is drawing.
        latents: (n, channels, height, width), as its pipeline has them after a step.

    Returns:
        the picture, or None where the pipeline's latents are not plainly its VAE's.
    """
    pipeline = model.pipeline
    vae: Any = getattr(pipeline, "vae", None)
    if vae is None or latents.ndim != 4 or latents.shape[1] != getattr(vae.config, "latent_channels", None):
        return None
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        return None  # such a one gives NaN in half precision; pipelines cast it for the last step, which would cost more here
    with suppress(ValueError, TypeError, RuntimeError, AttributeError), torch.inference_mode():
        shown = _expected(pipeline.scheduler, latents)[:1] / vae.config.scaling_factor
        shown = shown + (getattr(vae.config, "shift_factor", None) or 0.0)
        decoded = vae.decode(shown.to(vae.dtype), return_dict=False)[0]
        picture: Image = pipeline.image_processor.postprocess(decoded.detach(), output_type="pil")[0]
        return picture
    return None  # a model without previews is still a model


def _expected(scheduler: Any, latents: Tensor) -> Tensor:
    """What the scheduler last expected the finished latents to be, or else the latents."""
    if str(scheduler.config.get("algorithm_type")).endswith("dpmsolver++"):
        outputs = [output for output in getattr(scheduler, "model_outputs", None) or () if output is not None]
        if outputs and outputs[-1].shape == latents.shape:
            expected: Tensor = outputs[-1]
            return expected
    return latents
