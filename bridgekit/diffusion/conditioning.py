"""What a loaded diffusers pipeline takes in place of a prompt, found by asking it: its signatures, its source, its parts.

No class is named here. A pipeline whose `__call__` takes `prompt_embeds` gets its own `encode_prompt` asked what belongs to
them; one that takes `image_embeds`, or has an IP-Adapter loaded, takes what its CLIP image encoder gives.
"""

from __future__ import annotations

import ast
import functools
import inspect
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import PIL.Image
import torch
from torch import Tensor, nn

from bridgekit.encoders import TEXT, Encoder
from bridgekit.errors import BridgekitError
from bridgekit.media import read_image, read_text

IMAGE = "image"

#: What a picture may be given as, and a text.
ConditioningItem = str | Path | PIL.Image.Image

#: Items in one forward pass of a pipeline's own encoder.
BATCH_SIZE = 32

#: The cosine from which on two encoders are held to be the same. Rounding to half precision leaves 0.999.
SAME_ENCODER = 0.99


class Conditioning(Protocol):
    """What a text-to-image model takes in place of a prompt.

    Attributes:
        kind: the pipeline's argument: `prompt_embeds`, `image_embeds` or `ip_adapter_image_embeds`.
        made_of: the modality of the items that `encode` takes: `text` or `image`.
    """

    kind: str
    made_of: str

    def encode(self, items: Sequence[ConditioningItem]) -> dict[str, Tensor]:
        """The model's own conditioning of n > 0 items.

        Arguments:
            items: texts, or pictures and paths of pictures.

        Returns:
            Argument name to tensor of n rows on the CPU, float32, masks bool. For example `prompt_embeds` (n, L, d),
            `pooled_prompt_embeds` (n, p), `prompt_attention_mask` (n, L); `image_embeds` (n, d). Where there is a mask and the
            model heeds it, L is the length of the longest text given: two calls may differ in it. What a mask leaves out holds
            nothing of worth.

        Raises:
            BridgekitError: the part of the pipeline that encodes is not there.
            ItemError: an item cannot be read.
        """
        ...

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """Keyword arguments of a pipeline call for n pictures.

        Arguments:
            tensors: n rows each, named as `encode` names them; any L will do. Negative ones (`negative_...`, of n rows or of
                one) are used where they are given, in place of the pipeline's own.
            guided: whether negatives belong to it. The scale is the caller's: see `guidance_argument`.
            prompt: for conditionings made of images, a text beside them.

        Raises:
            BridgekitError: a prompt is given in vain, or the pipeline's negatives cannot be encoded.
        """
        ...

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Whether that frozen encoder's latents are this conditioning already, so that no map is needed."""
        ...


def find_conditionings(pipeline: Any) -> list[Conditioning]:
    """What a pipeline offers in place of a prompt, best first: a loaded IP-Adapter, image embeddings, prompt embeddings.

    Arguments:
        pipeline: a loaded diffusers pipeline. It is asked, and not run.

    Raises:
        BridgekitError: it offers nothing of the kind. The message says what was looked for.
    """
    asked: list[tuple[Conditioning, str | None]] = [
        (AdapterConditioning(pipeline), _why_no_adapter(pipeline)),
        (ImageConditioning(pipeline), _why_no_image_embeds(pipeline)),
        (PromptConditioning(pipeline), _why_no_prompt_embeds(pipeline)),
    ]
    found = [conditioning for conditioning, reason in asked if reason is None]
    if found:
        return found
    looked_for = "; ".join(f"{conditioning.kind} ({reason})" for conditioning, reason in asked)
    raise BridgekitError(
        f"{type(pipeline).__name__} offers nothing that could stand in for a prompt. Looked for: {looked_for}",
        remedy="use a pipeline whose call takes one of these",
    )


def guidance_argument(pipeline: Any) -> str | None:
    """The argument of a call that scales classifier-free guidance, or None where the pipeline knows no negatives.

    Distilled models keep `guidance_scale` for a scale that is their own input and call this one `true_cfg_scale`. Above 1 is
    guidance; 0 is none for every pipeline, whereas 1 is still guidance for some.
    """
    taken = _parameters(pipeline)
    negatives = any(name.startswith("negative_") for name in taken)
    if not negatives or getattr(_config(_denoiser(pipeline)), "time_cond_proj_dim", None) is not None:
        return None
    return next((name for name in ("true_cfg_scale", "guidance_scale") if name in taken), None)


# ---- prompt embeddings


@dataclass(frozen=True)
class PromptConditioning:
    """A sequence of prompt embeddings with what the pipeline wants beside it: a pooled vector, a mask, a second sequence."""

    pipeline: Any
    kind = "prompt_embeds"
    made_of = TEXT

    def encode(self, items: Sequence[ConditioningItem]) -> dict[str, Tensor]:
        """n texts to the tensors of the pipeline's own `encode_prompt`. See `Conditioning.encode`.

        Some pipelines take a list of sequences of different lengths instead of a mask: theirs come padded, with a
        `prompt_embeds_mask` that `arguments` undoes. A few pad without any mask, to the longest of a batch; if batches differ,
        the shorter are filled up with zeros.
        """
        texts = [read_text(_text(item)) for item in items]
        batches = [self._encoded(texts[start : start + BATCH_SIZE]) for start in range(0, len(texts), BATCH_SIZE)]
        _free(self.pipeline)
        together = {name: _concatenated([batch[name] for batch in batches]) for name in batches[0]}
        return {name: tensor.bool() if _is_mask(name) else tensor.float() for name, tensor in self._trimmed(together).items()}

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """Prompt embeddings and their like for n pictures; where guided, those of no text at all as negatives."""
        if prompt is not None:
            raise BridgekitError(
                "this model takes its conditioning in place of a prompt and cannot take a prompt beside it",
                where=type(self.pipeline).__name__,
                remedy="leave the prompt out, or mix its encoding into the conditioning",
            )
        positive = {name: tensor for name, tensor in tensors.items() if not name.startswith("negative_")}
        if not guided:
            return self._handed_over(positive)
        negative = {name: tensor for name, tensor in tensors.items() if name not in positive}
        wanted = {_negative(name) for name in positive}
        if any(name in self._taken and name not in negative for name in wanted):
            negative = self._nothing | negative
        rows = len(next(iter(positive.values())))
        negative = {name: _rows(tensor, rows) for name, tensor in negative.items() if name in wanted}
        arguments = self._handed_over(_equally_long(positive, negative))
        # Some pipelines have an empty negative prompt by default and refuse negatives beside it.
        return arguments | ({"negative_prompt": None} if negative and "negative_prompt" in self._taken else {})

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Never: no encoder gives a vector an item that is a sequence of prompt embeddings."""
        return False

    def _encoded(self, texts: Sequence[str], *, negatives: bool = False) -> dict[str, Tensor]:
        """What `encode_prompt` gives for some texts, under the names of the call's arguments, on the CPU."""
        encoders = {name: part for name, part in self.pipeline.components.items() if name.startswith("text_encoder")}
        if encoders and all(part is None for part in encoders.values()):
            raise BridgekitError(
                "the pipeline has no text encoder, so it cannot encode a text",
                where=type(self.pipeline).__name__,
                remedy="load it with its text_encoder, at least to fit a conditioner and to draw with guidance",
            )
        # As a pipeline's own call does. What a model caches in inference mode could not be trained with later.
        with torch.no_grad():
            values = _filled(
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
            # A mask that leaves nothing out is left out by some pipelines.
            if name in self._taken and value is None and _is_mask(name) and _sequence_of(name) in encoded:
                encoded[name] = torch.ones(encoded[_sequence_of(name)].shape[:2], dtype=torch.long)
        return encoded

    def _in_rows(self, name: str, value: Any) -> dict[str, Tensor]:
        """One argument as a tensor of n rows; a list of sequences as one padded tensor and the mask of what is not padding."""
        if isinstance(value, Tensor):
            return {name: value.detach().cpu()}
        if not all(isinstance(row, Tensor) and row.ndim == 2 for row in value):
            raise BridgekitError(
                f"encode_prompt gives {name} in a form that is not known here: {type(value).__name__}",
                where=type(self.pipeline).__name__,
                remedy="use another model",
            )
        rows = [row.detach().cpu() for row in value]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return {name: nn.utils.rnn.pad_sequence(rows, batch_first=True), f"{name}_mask": mask}

    def _trimmed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without the columns that every row's mask leaves out, if the denoiser heeds masks."""
        trimmed = dict(tensors)
        denoiser = _denoiser(self.pipeline)
        if denoiser is None or not any("mask" in name for name in inspect.signature(denoiser.forward).parameters):
            return trimmed
        for name, mask in tensors.items():
            if _is_mask(name) and _sequence_of(name) in tensors:
                length = _longest(mask)
                trimmed[name] = mask[:, :length]
                trimmed[_sequence_of(name)] = tensors[_sequence_of(name)][:, :length]
        return trimmed

    def _handed_over(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """In the form, dtype and place that the pipeline wants."""
        arguments: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if _is_mask(name):
                if name in self._taken:
                    arguments[name] = tensor.to(self.pipeline._execution_device, self._mask_dtypes.get(name, torch.long))
                continue
            ready = _placed(self.pipeline, tensor)
            lengths = tensors.get(f"{name}_mask")
            if lengths is not None and f"{name}_mask" not in self._taken:
                # A learned mask may leave out all, but no pipeline takes a sequence of nothing.
                rows = zip(ready, lengths.bool().to(ready.device), strict=True)
                arguments[name] = [row[mask] if mask.any() else row[:1] for row, mask in rows]
            else:
                arguments[name] = ready
        return arguments

    @functools.cached_property
    def _taken(self) -> Mapping[str, inspect.Parameter]:
        return _parameters(self.pipeline)

    @functools.cached_property
    def _nothing(self) -> dict[str, Tensor]:
        """The negatives that the pipeline uses when no negative prompt is given, one row each."""
        encoded = self._encoded([""], negatives=True)
        _free(self.pipeline)
        own = {name: tensor[:1] for name, tensor in encoded.items() if name.startswith("negative_")}
        # Where `encode_prompt` knows no negatives, the call itself encodes the negative prompt as it does a prompt.
        empty = {_negative(name): tensor for name, tensor in encoded.items() if name not in own}
        return empty | own

    @functools.cached_property
    def _mask_dtypes(self) -> dict[str, torch.dtype]:
        if all(part is None for name, part in self.pipeline.components.items() if name.startswith("text_encoder")):
            return {}
        return {
            name: tensor.dtype
            for negative, tensor in self._nothing.items()
            for name in (negative, negative.removeprefix("negative_"))
        }


def _why_no_prompt_embeds(pipeline: Any) -> str | None:
    """What keeps a pipeline from being driven by prompt embeddings alone; None if nothing does."""
    taken = _parameters(pipeline)
    if "prompt_embeds" not in taken:
        return "the call does not take it"
    if not callable(getattr(pipeline, "encode_prompt", None)):
        return "the pipeline has no encode_prompt"
    if "image_embeds" in taken:
        return "the call wants image_embeds with it"
    if getattr(_config(_denoiser(pipeline)), "encoder_hid_dim_type", None) == "ip_image_proj":
        return "with an IP-Adapter loaded the call wants ip_adapter_image_embeds with it"
    names = _returned_names(pipeline)
    beside = [name for name, parameter in taken.items() if "prompt_embeds" in name and parameter.default is None]
    lacking = [name for name in beside if not name.startswith("negative_") and name not in names]
    if lacking:
        return f"encode_prompt does not give {' and '.join(lacking)}"
    return _why_more(pipeline, PromptConditioning.kind) or _why_prompt_itself(pipeline)


def _why_prompt_itself(pipeline: Any) -> str | None:
    """Whether the call does more with the prompt than encode it: give it to a method that does not get `prompt_embeds`.

    A method whose result is the prompt again (one that rewrites it) is skipped by pipelines when there is no prompt.
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
        given = {value.id for value in (*node.args, *(word.value for word in node.keywords)) if isinstance(value, ast.Name)}
        checked = node.func.attr in ("encode_prompt", "check_inputs")
        if "prompt" in given and "prompt_embeds" not in given and not checked:
            return f"the call needs the prompt itself too, for its {node.func.attr}"
    return None


def _returned_names(pipeline: Any) -> list[str]:
    """The names of what `encode_prompt` returns, read off its `return`: diffusers names them like the call's arguments."""
    taken = _parameters(pipeline)
    returned = [
        [_name_of(value) for value in (node.value.elts if isinstance(node.value, ast.Tuple) else [node.value])]
        for node in _own_returns(_source_of(pipeline.encode_prompt))
        if node.value is not None
    ]
    names = max(returned, key=lambda names: sum(name in taken for name in names), default=[])
    return names if len(names) != 1 else ["prompt_embeds"]


def _own_returns(node: ast.AST) -> Iterator[ast.Return]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield child
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _own_returns(child)


def _name_of(value: ast.expr) -> str:
    """The variable behind an expression: `x`, `x if guided else None` and `x.to(device)` are all x."""
    while not isinstance(value, ast.Name):
        if isinstance(value, ast.IfExp):
            value = value.body
        elif isinstance(value, ast.Call):
            value = value.func
        elif isinstance(value, ast.Attribute | ast.Subscript):
            value = value.value
        else:
            return ""
    return value.id


def _source_of(method: Callable[..., Any]) -> ast.AST:
    """The syntax tree of a method, through its wrappers; empty where there is no source."""
    try:
        source = inspect.getsource(method)
    except (OSError, TypeError):
        return ast.Module(body=[], type_ignores=[])
    return ast.parse(textwrap.dedent(source)).body[0]


def _equally_long(positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both, with every negative as long as what it stands against: with a mask neither loses anything, without it follows."""
    both = {**positive, **negative}
    for name in positive:
        against = _negative(name)
        if positive[name].ndim < 2 or against not in negative:
            continue
        masks = [other for other in positive if _is_mask(other) and name in (other, _sequence_of(other))]
        length = positive[name].shape[1]
        if masks and _negative(masks[0]) in negative:
            length = max(length, _longest(negative[_negative(masks[0])]))
        both[name] = _padded(positive[name], length)
        both[against] = _padded(negative[against], length)
    return both


def _negative(name: str) -> str:
    return f"negative_{name}"


def _is_mask(name: str) -> bool:
    return "mask" in name


def _sequence_of(mask: str) -> str:
    """What a mask is of. Pipelines with a second sequence number both."""
    stem = "negative_prompt_embeds" if mask.startswith("negative_") else "prompt_embeds"
    return f"{stem}_2" if mask.endswith("_2") else stem


def _longest(mask: Tensor) -> int:
    """The columns up to the last that some row of an (n, L) mask keeps; at least one."""
    kept = mask.bool().any(0).nonzero()
    return int(kept[-1]) + 1 if len(kept) else 1


def _padded(tensor: Tensor, length: int) -> Tensor:
    """Cut to a length, or filled up with zeros."""
    missing = length - tensor.shape[1]
    if missing <= 0:
        return tensor[:, :length]
    return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1)


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].ndim < 2:
        return torch.cat(list(parts))
    length = max(part.shape[1] for part in parts)
    return torch.cat([_padded(part, length) for part in parts])


# ---- image embeddings


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
        _free(self.pipeline)
        return {self.kind: torch.cat(rows)}

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """Image embeddings for n pictures, and a prompt (by default an empty one) where the pipeline takes one.

        The negative is zeros unless `negative_image_embeds` are among the tensors. A pipeline that wants them was trained with
        the embedding of an all-black picture there, which only the CLIP that made the others can give.
        """
        taken = _parameters(self.pipeline)
        embeds = tensors[self.kind]
        arguments: dict[str, Any] = {self.kind: _placed(self.pipeline, embeds)}
        name = _negative(self.kind)
        if name in taken and (guided or taken[name].default is inspect.Parameter.empty):
            arguments[name] = _placed(self.pipeline, _rows(tensors.get(name, torch.zeros_like(embeds[:1])), len(embeds)))
        return arguments | _beside(self.pipeline, prompt, len(embeds))

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Whether it is an image encoder of the same width that sees a picture as the pipeline's own does, if it has one."""
        denoiser = _config(_denoiser(self.pipeline))
        if _has_image_encoder(self.pipeline):
            return _sees_alike(encoder, self)
        return encoder.modality == IMAGE and encoder.dim == getattr(denoiser, "encoder_hid_dim", None)


def _why_no_image_embeds(pipeline: Any) -> str | None:
    if ImageConditioning.kind not in _parameters(pipeline):
        return "the call does not take it"
    return _why_more(pipeline, ImageConditioning.kind)


# ---- IP-Adapter


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
        _free(self.pipeline)
        return {self.kind: torch.cat(rows)}

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """The adapter's embeddings for n pictures, negatives before them or beside them, and a prompt (by default empty).

        Whether it is guided must agree with the scale of the call: some pipelines halve what they are given if it is.
        """
        embeds = tensors[self.kind]
        if len(embeds) > 1:
            _keep_rows_apart(self.pipeline)
        rows = _placed(self.pipeline, embeds)[:, None]
        name = _negative(self.kind)
        apart = name in _parameters(self.pipeline)
        arguments: dict[str, Any] = {}
        if guided or apart:  # left to themselves, pipelines that take it apart encode a black picture even if it is not used
            negative = tensors[name] if name in tensors else self._nothing(embeds)
            against = _placed(self.pipeline, _rows(negative, len(embeds)))[:, None]
            arguments = {name: [against]} if apart else {}
            rows = rows if apart else torch.cat([against, rows])
        return arguments | {self.kind: [rows]} | _beside(self.pipeline, prompt, len(embeds))

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
            [both] = _filled(
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
            _free(self.pipeline)
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


def _why_no_adapter(pipeline: Any) -> str | None:
    if AdapterConditioning.kind not in _parameters(pipeline):
        return "the call does not take it"
    adapters = _adapters(pipeline)
    if not adapters or not hasattr(pipeline, "prepare_ip_adapter_image_embeds"):
        return "no IP-Adapter is loaded"
    if len(adapters) > 1:
        return "several IP-Adapters are loaded, and only one can be driven"
    return _why_more(pipeline, AdapterConditioning.kind)


def _adapters(pipeline: Any) -> list[nn.Module]:
    """The projections of the loaded IP-Adapters."""
    projections = getattr(_denoiser(pipeline), "encoder_hid_proj", None)
    return list(getattr(projections, "image_projection_layers", ()))


# ---- what all kinds ask of a pipeline


def _parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """What a call of the pipeline takes."""
    return inspect.signature(pipeline.__call__).parameters if callable(pipeline) else {}


def _why_more(pipeline: Any, kind: str) -> str | None:
    """What else a call cannot do without, besides one kind of conditioning, its negative and a prompt: a picture, say."""
    ours = (kind, _negative(kind), "prompt")
    needed = [
        name
        for name, parameter in _parameters(pipeline).items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in ours
    ]
    return f"the call wants {' and '.join(needed)} with it" if needed else None


def _filled(pipeline: Any, method: Callable[..., Any], **values: Any) -> Any:
    """Call a pipeline's method with values by name, and else with the defaults that a call would hand on to it."""
    defaults = {name: par.default for name, par in _parameters(pipeline).items() if par.default is not inspect.Parameter.empty}
    known = defaults | values
    return method(**{name: known[name] for name in inspect.signature(method).parameters if name in known})


def _denoiser(pipeline: Any) -> Any:
    """The part that the conditioning ends in, or None."""
    parts = (getattr(pipeline, name, None) for name in ("transformer", "unet"))
    return next((part for part in parts if part is not None), None)


def _config(part: Any) -> Any:
    return getattr(part, "config", None)


def _placed(pipeline: Any, tensor: Tensor) -> Tensor:
    """On the pipeline's device, in its denoiser's dtype."""
    denoiser = _denoiser(pipeline)
    return tensor.to(pipeline._execution_device, pipeline.dtype if denoiser is None else denoiser.dtype)


def _free(pipeline: Any) -> None:
    """Off the accelerator with the encoders, where CPU offload is on: nobody knows when the next call comes."""
    pipeline.maybe_free_model_hooks()


def _rows(tensor: Tensor, n: int) -> Tensor:
    """n rows from one, or from n."""
    return tensor.expand(n, *tensor.shape[1:])


def _beside(pipeline: Any, prompt: str | None, n: int) -> dict[str, Any]:
    """The prompt for n pictures, where the pipeline takes one."""
    if "prompt" in _parameters(pipeline):
        return {"prompt": [prompt or ""] * n}
    if prompt:
        raise BridgekitError(
            "this model takes no prompt beside its image embedding",
            where=type(pipeline).__name__,
            remedy="leave the prompt out, or load an IP-Adapter on a model that takes prompts",
        )
    return {}


def _text(item: ConditioningItem) -> str | Path:
    if isinstance(item, PIL.Image.Image):
        raise BridgekitError("this model's conditioning is made of texts, not of pictures", remedy="give it captions")
    return item


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
