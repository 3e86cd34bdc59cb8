"""Questions to a loaded diffusers pipeline: its parameters, its denoiser, its guidance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

#: Items in one forward pass of a pipeline's own encoder.
BATCH_SIZE = 32


def guidance_argument(pipeline: Any) -> str | None:
    """The argument of a call that scales classifier-free guidance, or None where the pipeline knows no negatives.

    Distilled models keep `guidance_scale` for a scale that is their own input and call this one `true_cfg_scale`. Above 1 is
    guidance; 0 is none for every pipeline, whereas 1 is still guidance for some.
    """
    taken = call_parameters(pipeline)
    negatives = any(name.startswith("negative_") for name in taken)
    if not negatives or denoiser_setting(pipeline, "time_cond_proj_dim") is not None:
        return None
    return next((name for name in ("true_cfg_scale", "guidance_scale") if name in taken), None)


def call_parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """What a call of the pipeline takes."""
    return inspect.signature(pipeline.__call__).parameters if callable(pipeline) else {}


def why_more(pipeline: Any, kind: str) -> str | None:
    """What else a call cannot do without, besides one kind of conditioning, its negative and a prompt: a picture, say."""
    ours = (kind, f"negative_{kind}", "prompt")
    needed = [
        name
        for name, parameter in call_parameters(pipeline).items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in ours
    ]
    return f"the call wants {' and '.join(needed)} with it" if needed else None


def call_filled(pipeline: Any, method: Callable[..., Any], **values: Any) -> Any:
    """Call a pipeline's method with values by name, and else with the defaults that a call would hand on to it."""
    defaults = {
        name: par.default for name, par in call_parameters(pipeline).items() if par.default is not inspect.Parameter.empty
    }
    known = defaults | values
    return method(**{name: known[name] for name in inspect.signature(method).parameters if name in known})


def denoiser_of(pipeline: Any) -> Any:
    """The part that the conditioning ends in, or None."""
    parts = (getattr(pipeline, name, None) for name in ("transformer", "unet"))
    return next((part for part in parts if part is not None), None)


def denoiser_setting(pipeline: Any, name: str) -> Any:
    """A value of the denoiser's configuration; None where there is none."""
    return getattr(getattr(denoiser_of(pipeline), "config", None), name, None)


def placed(pipeline: Any, tensor: Tensor) -> Tensor:
    """On the pipeline's device, in its denoiser's dtype."""
    denoiser = denoiser_of(pipeline)
    return tensor.to(pipeline._execution_device, pipeline.dtype if denoiser is None else denoiser.dtype)


def rows_of(tensor: Tensor, n: int) -> Tensor:
    """n rows from one, or from n."""
    return tensor.expand(n, *tensor.shape[1:])


def padded(tensor: Tensor, length: int) -> Tensor:
    """(n, L, ...) cut to a length, or filled up with zeros."""
    missing = max(0, length - tensor.shape[1])
    return torch.cat([tensor[:, :length], tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1)
