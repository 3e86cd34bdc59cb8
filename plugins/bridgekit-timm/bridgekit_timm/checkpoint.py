"""Loading a local checkpoint into a timm model: by name, after timm's conversion, or by position if names differ."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from timm.models import load_state_dict
from torch import Tensor

from bridgekit.errors import PluginError, one_line
from bridgekit.storage.bounded import check_stored

#: Batch norm's batch counter, which older checkpoints lack and inference does not use.
_COUNT = "num_batches_tracked"

Tensors = Mapping[str, Tensor]


def load_checkpoint(model: Any, path: Path, classifier: str | Sequence[str] | None, *, where: str) -> None:
    """Load a `.safetensors` file, or a `.pth` or `.bin` of tensors only (no code is run), into a timm model.

    Tensors are matched by name; else by name after timm's conversion of foreign checkpoints for this architecture; else by
    position, if order, shapes and the last parts of the names agree (not for safetensors files, whose tensors are sorted). A
    classifier that is missing or has another size is ignored, since latents are taken before it.

    Arguments:
        model: the model, as built by timm.
        path: the checkpoint. The keys `state_dict`, `model` and their `_ema` variants are unwrapped, as in timm.
        classifier: timm's names of the classifier modules.
        where: the encoder's name, for messages.

    Raises:
        PluginError: the file is missing, is not a checkpoint, or does not match. The message names the first mismatch.
    """
    tensors = _read(path)
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_COUNT)}
    by_name = _by_name(wanted, tensors, heads)
    by_position = "" if path.suffix == ".safetensors" else _by_position(wanted, tensors, heads)
    for attempt in (by_name, _by_name(wanted, _converted(tensors, model), heads), by_position):
        if isinstance(attempt, dict):
            model.load_state_dict(attempt, strict=False)
            return
    shares_names = any(name in tensors and not _is_head(name, heads) for name in wanted)
    mismatch = by_name if shares_names or not by_position else by_position
    raise PluginError(
        f"the checkpoint does not match {where}: {mismatch}",
        where=str(path),
        remedy="use the architecture that it was trained with",
    )


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise PluginError("there is no such checkpoint", where=str(path), remedy="check the path after checkpoint=")
    try:
        check_stored(path)
        found = load_state_dict(str(path), weights_only=True)
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor) and not name.endswith(_COUNT)}
    except Exception as error:  # torch and safetensors may raise anything for unexpected bytes
        raise PluginError(
            f"the file cannot be read as a checkpoint: {type(error).__name__}: {one_line(error)}",
            where=str(path),
            remedy="give a .safetensors file, or a .pth or .bin file with tensors and no code",
        ) from None
    if not tensors:
        raise PluginError("the checkpoint has no tensors", where=str(path))
    return tensors


def _converted(tensors: Tensors, model: Any) -> Tensors:
    """The tensors after timm's conversion for this architecture, which changes names, layouts and sizes; {} without one."""
    convert: Callable[..., Tensors] | None = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return {}
    try:
        return convert(dict(tensors), model)
    except Exception:  # not a checkpoint for this conversion
        return {}


def _by_name(wanted: Tensors, tensors: Tensors, heads: Sequence[str]) -> dict[str, Tensor] | str:
    """The tensors to load, or the first mismatch."""
    for name, tensor in wanted.items():
        if _is_head(name, heads):
            continue
        if name not in tensors:
            return f"it has no {_describe(name, tensor)}"
        if tensors[name].shape != tensor.shape:
            return f"its {_describe(name, tensors[name])} should be {tuple(tensor.shape)}"
    for name, tensor in tensors.items():
        if name not in wanted and not _is_head(name, heads) and not name.endswith(_COUNT):
            return f"the model has no {_describe(name, tensor)}"
    return {name: tensor for name, tensor in tensors.items() if name in wanted and tensor.shape == wanted[name].shape}


def _by_position(wanted: Tensors, tensors: Tensors, heads: Sequence[str]) -> dict[str, Tensor] | str:
    """The same by position: only the last parts of the names must agree."""
    ours = list(wanted.items())
    if len(tensors) < len(ours):  # it may have been saved without its classifier
        ours = [(name, tensor) for name, tensor in ours if not _is_head(name, heads)]
    taken: dict[str, Tensor] = {}
    for pair, other in zip_longest(ours, tensors.items()):
        if pair is None:
            return f"the model has no counterpart of its {_describe(*other)}"
        if other is None:
            return f"it has no counterpart of the model's {_describe(*pair)}"
        (name, tensor), (their_name, their_tensor) = pair, other
        elsewhere = their_name in wanted and their_name != name  # the model has a tensor with this exact name
        same_kind = name.rpartition(".")[2] == their_name.rpartition(".")[2] and not elsewhere
        if same_kind and tensor.shape == their_tensor.shape:
            taken[name] = their_tensor
        elif not same_kind or not _is_head(name, heads):
            return f"where the model has {_describe(name, tensor)}, it has {_describe(their_name, their_tensor)}"
    return taken


def _is_head(name: str, heads: Sequence[str]) -> bool:
    return name.startswith(tuple(f"{head}." for head in heads))


def _describe(name: str, tensor: Tensor) -> str:
    return f"{name} {tuple(tensor.shape)}"
