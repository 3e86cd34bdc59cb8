"""Prompt embeddings as conditioning. What `encode_prompt` returns is found by parsing its signature and source."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
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
    padded,
    placed,
    rows_of,
    why_more,
)
from bridgekit.encoders import TEXT, Encoder
from bridgekit.errors import BridgekitError
from bridgekit.image_models import ConditioningItem
from bridgekit.media import read_text


@dataclass(frozen=True)
class PromptConditioning:
    """A sequence of prompt embeddings, and whatever else the pipeline requires: a pooled vector, a mask, a second sequence."""

    pipeline: Any
    kind = "prompt_embeds"
    made_of = TEXT

    def encode(self, items: Sequence[ConditioningItem]) -> dict[str, Tensor]:
        """n texts to the tensors of the pipeline's own `encode_prompt`. See `Conditioning.encode`.

        For pipelines that use a list of sequences of different lengths instead of a mask, the sequences are padded and a
        `prompt_embeds_mask` is added, which `arguments` reverts. A few pipelines pad to the longest of a batch without a mask;
        shorter batches are then padded with zeros.
        """
        texts = [read_text(_text(item)) for item in items]
        batches = [self._encoded(texts[start : start + BATCH_SIZE]) for start in range(0, len(texts), BATCH_SIZE)]
        self.pipeline.maybe_free_model_hooks()
        together = {name: _concatenated([batch[name] for batch in batches]) for name in batches[0]}
        return {name: tensor.bool() if _is_mask(name) else tensor.float() for name, tensor in self._trimmed(together).items()}

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """Prompt embeddings and related tensors for n images; if guided, with those of an empty text as negatives."""
        if prompt is not None:
            raise BridgekitError(
                "the model takes its conditioning in place of a prompt, not together with one",
                where=type(self.pipeline).__name__,
                remedy="omit the prompt, or mix its encoding into the conditioning",
            )
        positive = {name: tensor for name, tensor in tensors.items() if not name.startswith("negative_")}
        if not guided:
            return self._converted(positive)
        negative = {name: tensor for name, tensor in tensors.items() if name not in positive}
        wanted = {f"negative_{name}" for name in positive}
        if any(name in self._taken and name not in negative for name in wanted):
            negative = self._empty | negative
        rows = len(next(iter(positive.values())))
        negative = {name: rows_of(tensor, rows) for name, tensor in negative.items() if name in wanted}
        arguments = self._converted(_equally_long(positive, negative))
        # Some pipelines default to an empty negative prompt, which they reject together with negative embeddings.
        return arguments | ({"negative_prompt": None} if negative and "negative_prompt" in self._taken else {})

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Never: encoders give one vector per item, not a sequence."""
        return False

    def _encoded(self, texts: Sequence[str], *, negatives: bool = False) -> dict[str, Tensor]:
        """The results of `encode_prompt` by the names of the call's arguments, on the CPU."""
        encoders = {name: part for name, part in self.pipeline.components.items() if name.startswith("text_encoder")}
        if encoders and all(part is None for part in encoders.values()):
            raise BridgekitError(
                "the pipeline has no text encoder, so it cannot encode text",
                where=type(self.pipeline).__name__,
                remedy="load it with its text_encoder, which is needed to fit a conditioner and to draw with guidance",
            )
        # As in the pipeline's own call, not inference mode: tensors that a model caches in it could not be used in training.
        with torch.no_grad():
            values = call_filled(
                self.pipeline,
                self.pipeline.encode_prompt,
                prompt=list(texts),
                device=self.pipeline._execution_device,
                batch_size=len(texts),
                num_images_per_prompt=1,
                num_videos_per_prompt=1,
                do_classifier_free_guidance=negatives,
            )
        values = values if isinstance(values, tuple) else (values,)
        named = dict(zip(_returned_names(self.pipeline), values, strict=False))
        encoded: dict[str, Tensor] = {}
        for name, value in named.items():
            if name in self._taken and value is not None and len(value):
                encoded |= self._in_rows(name, value)
        for name, value in named.items():
            # Some pipelines return None for a mask without masked positions.
            if name in self._taken and value is None and _is_mask(name) and _sequence_of(name) in encoded:
                encoded[name] = torch.ones(encoded[_sequence_of(name)].shape[:2], dtype=torch.long)
        return encoded

    def _in_rows(self, name: str, value: Any) -> dict[str, Tensor]:
        """One argument as a tensor of n rows; a list of sequences as a padded tensor and its mask."""
        if isinstance(value, Tensor):
            return {name: value.detach().cpu()}
        rows = [row.detach().cpu() for row in value]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return {name: nn.utils.rnn.pad_sequence(rows, batch_first=True), f"{name}_mask": mask}

    def _trimmed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop trailing positions that are masked in every row, if the denoiser uses masks."""
        trimmed = dict(tensors)
        denoiser = denoiser_of(self.pipeline)
        if denoiser is None or not any("mask" in name for name in inspect.signature(denoiser.forward).parameters):
            return trimmed
        for name, mask in tensors.items():
            if _is_mask(name) and _sequence_of(name) in tensors:
                length = _longest(mask)
                trimmed[name] = mask[:, :length]
                trimmed[_sequence_of(name)] = tensors[_sequence_of(name)][:, :length]
        return trimmed

    def _converted(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Convert to the pipeline's format, dtype and device."""
        arguments: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if _is_mask(name):
                if name in self._taken:
                    dtype = self._mask_dtypes.get(name.removeprefix("negative_"), torch.long)
                    arguments[name] = tensor.to(self.pipeline._execution_device, dtype)
                continue
            ready = placed(self.pipeline, tensor)
            lengths = tensors.get(f"{name}_mask")
            if lengths is not None and f"{name}_mask" not in self._taken:
                # A learned mask may mask everything, but no pipeline takes an empty sequence.
                rows = zip(ready, lengths.bool().to(ready.device), strict=True)
                arguments[name] = [row[mask] if mask.any() else row[:1] for row, mask in rows]
            else:
                arguments[name] = ready
        return arguments

    @functools.cached_property
    def _taken(self) -> Mapping[str, inspect.Parameter]:
        return call_parameters(self.pipeline)

    @functools.cached_property
    def _empty(self) -> dict[str, Tensor]:
        """The negatives that the pipeline uses without a negative prompt, one row each."""
        encoded = self._encoded([""], negatives=True)
        self.pipeline.maybe_free_model_hooks()
        own = {name: tensor[:1] for name, tensor in encoded.items() if name.startswith("negative_")}
        # If `encode_prompt` returns no negatives, the call encodes the negative prompt like a prompt.
        empty = {f"negative_{name}": tensor for name, tensor in encoded.items() if name not in own}
        return empty | own

    @functools.cached_property
    def _mask_dtypes(self) -> dict[str, torch.dtype]:
        if all(part is None for name, part in self.pipeline.components.items() if name.startswith("text_encoder")):
            return {}
        return {name.removeprefix("negative_"): tensor.dtype for name, tensor in self._empty.items()}


def why_no_prompt_embeds(pipeline: Any) -> str | None:
    """Why a pipeline cannot be conditioned on prompt embeddings alone; None if it can."""
    taken = call_parameters(pipeline)
    if "prompt_embeds" not in taken:
        return "the call does not take it"
    if not callable(getattr(pipeline, "encode_prompt", None)):
        return "the pipeline has no encode_prompt"
    if "image_embeds" in taken:
        return "the call also requires image_embeds"
    if denoiser_setting(pipeline, "encoder_hid_dim_type") == "ip_image_proj":
        return "with an IP-Adapter loaded, the call also requires ip_adapter_image_embeds"
    names = _returned_names(pipeline)
    beside = [name for name, parameter in taken.items() if "prompt_embeds" in name and parameter.default is None]
    lacking = [name for name in beside if not name.startswith("negative_") and name not in names]
    if lacking:
        return f"encode_prompt does not return {' and '.join(lacking)}"
    return why_more(pipeline, PromptConditioning.kind) or _why_prompt_itself(pipeline)


def _why_prompt_itself(pipeline: Any) -> str | None:
    """A reason if the call passes the prompt to a method that does not get `prompt_embeds`; else None.

    Methods that rewrite the prompt (whose result is the prompt again) are ignored: pipelines skip them without a prompt.
    """
    tree = _source_of(pipeline.__call__)
    rewrites = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and "prompt" in {part.id for part in ast.walk(node.targets[0]) if isinstance(part, ast.Name)}
    }
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)) or id(node) in rewrites:
            continue
        passed = {value.id for value in (*node.args, *(word.value for word in node.keywords)) if isinstance(value, ast.Name)}
        checked = node.func.attr in ("encode_prompt", "check_inputs")
        if "prompt" in passed and "prompt_embeds" not in passed and not checked:
            return f"the call also requires the prompt itself, for {node.func.attr}"
    return None


def _returned_names(pipeline: Any) -> list[str]:
    """The names in `encode_prompt`'s return statement, which diffusers names like the call's arguments."""
    taken = call_parameters(pipeline)
    nodes = ast.walk(_source_of(pipeline.encode_prompt))
    returned = [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
    expressions = [value.elts if isinstance(value, ast.Tuple) else [value] for value in returned]
    # The variable is the first word of an expression: of `x`, `x if guided else None` and `x.to(device)`.
    variables = [[re.split(r"\W", ast.unparse(value), maxsplit=1)[0] for value in values] for values in expressions]
    names = max(variables, key=lambda names: sum(name in taken for name in names), default=[])
    return names if len(names) != 1 else ["prompt_embeds"]


def _source_of(method: Callable[..., Any]) -> ast.AST:
    """The syntax tree of a method, unwrapped; empty if its source is not available."""
    try:
        source = inspect.getsource(method)
    except (OSError, TypeError):
        return ast.Module(body=[], type_ignores=[])
    return ast.parse(textwrap.dedent(source)).body[0]


def _equally_long(positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both, with each negative as long as its positive: padded with a mask, or else cut or padded to the positive's length."""
    both = {**positive, **negative}
    for name, tensor in positive.items():
        against = f"negative_{name}"
        if tensor.ndim < 2 or against not in negative:
            continue
        length = tensor.shape[1]
        for mask in positive:
            if _is_mask(mask) and name in (mask, _sequence_of(mask)) and f"negative_{mask}" in negative:
                length = max(length, _longest(negative[f"negative_{mask}"]))
        both[name], both[against] = padded(tensor, length), padded(negative[against], length)
    return both


def _is_mask(name: str) -> bool:
    return "mask" in name


def _sequence_of(mask: str) -> str:
    """The sequence that a mask belongs to. A second sequence and its mask end in `_2`."""
    stem = "negative_prompt_embeds" if mask.startswith("negative_") else "prompt_embeds"
    return f"{stem}_2" if mask.endswith("_2") else stem


def _longest(mask: Tensor) -> int:
    """The length up to the last unmasked position in any row of an (n, L) mask; at least 1."""
    kept = mask.bool().any(0).nonzero()
    return int(kept[-1]) + 1 if len(kept) else 1


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].ndim < 2:
        return torch.cat(list(parts))
    length = max(part.shape[1] for part in parts)
    return torch.cat([padded(part, length) for part in parts])


def _text(item: ConditioningItem) -> str | Path:
    if isinstance(item, PIL.Image.Image):
        raise BridgekitError("the model's conditioning is made of texts, not images", remedy="give it captions")
    return item
