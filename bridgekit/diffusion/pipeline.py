"""Inspecting a loaded diffusers pipeline: call parameters, denoiser, guidance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

#: Items per forward pass of a pipeline's own encoder.
BATCH_SIZE = 32


def guidance_argument(pipeline: Any) -> str | None:
    """The call argument that scales classifier-free guidance; None if the pipeline has no negatives.

    Distilled models use `guidance_scale` for an input of the model, and `true_cfg_scale` for this. Values above 1 enable
    guidance; 0 disables it in every pipeline, 1 not in all.
    """
    taken = call_parameters(pipeline)
    negatives = any(name.startswith("negative_") for name in taken)
    if not negatives or denoiser_setting(pipeline, "time_cond_proj_dim") is not None:
        return None
    return next((name for name in ("true_cfg_scale", "guidance_scale") if name in taken), None)


def call_parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the pipeline's call."""
    return inspect.signature(pipeline.__call__).parameters if callable(pipeline) else {}


def why_more(pipeline: Any, kind: str) -> str | None:
    """A reason if the call requires anything besides this kind of conditioning, its negative and a prompt; else None."""
    ours = (kind, f"negative_{kind}", "prompt", *call_defaults(pipeline))
    needed = [
        name
        for name, parameter in call_parameters(pipeline).items()
        if name not in ours and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return f"the call also requires {' and '.join(needed)}" if needed else None


def call_defaults(pipeline: Any) -> dict[str, Any]:
    """The defaults of those parameters of the pipeline's call that have one."""
    parameters = call_parameters(pipeline).items()
    return {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty}


def call_filled(pipeline: Any, method: Callable[..., Any], **values: Any) -> Any:
    """Call a pipeline's method with these values, and with the defaults of the pipeline's call for other parameters."""
    known = call_defaults(pipeline) | values
    return method(**{name: known[name] for name in inspect.signature(method).parameters if name in known})


def denoiser_of(pipeline: Any) -> Any:
    """The denoising network, or None."""
    parts = (getattr(pipeline, name, None) for name in ("transformer", "unet"))
    return next((part for part in parts if part is not None), None)


def denoiser_setting(pipeline: Any, name: str) -> Any:
    """A value of the denoiser's configuration, or None."""
    return getattr(getattr(denoiser_of(pipeline), "config", None), name, None)


def placed(pipeline: Any, tensor: Tensor) -> Tensor:
    """On the pipeline's device, in its denoiser's dtype."""
    denoiser = denoiser_of(pipeline)
    return tensor.to(pipeline._execution_device, pipeline.dtype if denoiser is None else denoiser.dtype)


def rows_of(tensor: Tensor, n: int) -> Tensor:
    """Expand one row to n; n rows stay unchanged."""
    return tensor.expand(n, *tensor.shape[1:])


def padded(tensor: Tensor, length: int) -> Tensor:
    """(n, L, ...) cut or zero-padded to a length L."""
    missing = max(0, length - tensor.shape[1])
    return torch.cat([tensor[:, :length], tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1)
