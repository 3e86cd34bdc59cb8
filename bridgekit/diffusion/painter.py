"""A bridge, a text-to-image model and the conditioner between them: from embeddings to images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit.bridge.bridge import Bridge
from bridgekit.diffusion.conditioner import (
    Conditioner,
    Fit,
    direct_conditioner,
    fit_conditioner,
    load_conditioner,
    same_weights,
    save_conditioner,
)
from bridgekit.diffusion.models import DrawOptions, Watch, draw
from bridgekit.diffusion.pipeline import padded
from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError
from bridgekit.image_models import Conditioning, ImageModel
from bridgekit.progress import Report, silent
from bridgekit.tables.reading import read_items

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Painter:
    """A bridge and a text-to-image model, with the conditioner from the bridge's space to one of the model's conditionings.

    `fitted` tells whether the conditioner was just fitted, rather than read from the bridge's folder.
    """

    bridge: Bridge
    model: ImageModel
    conditioning: Conditioning
    conditioner: Conditioner
    fitted: bool


def open_painter(
    bridge: Bridge,
    model: ImageModel,
    folder: Path | None = None,
    *,
    captions: str | Path | None = None,
    refit: bool = False,
    outside: bool = False,
    columns: Mapping[str, str] | None = None,
    report: Report = silent,
) -> Painter:
    """Load or fit the conditioner between a bridge and a model.

    Arguments:
        folder: the bridge's folder, where conditioners are stored; None or a read-only folder stores none.
        captions: what to fit it on, as for `read_items`; by default the distinct items of the bridge's own pairs.
        refit: fit it again even if one is stored.
        outside: let the table of captions refer to files outside its own folder.
        columns: modality to the name of its column in `captions`, where that is not the modality's.

    Raises:
        BridgekitError: the bridge has no modality for the model's conditioning, or its pairs cannot be read.
    """
    slug = re.sub(r"[^\w.-]|_", "-", model.name).strip("-.")[-80:]
    file = folder / "conditioners" / f"{slug}.safetensors" if folder else None
    frozen = {modality: bridge.encoder(modality) for modality, side in bridge.sides.items() if side.frozen}
    for conditioning in model.conditionings:
        direct = [modality for modality, encoder in frozen.items() if conditioning.takes_latents_of(encoder)]
        if not direct and conditioning.made_of not in bridge.sides:
            continue
        modality = direct[0] if direct else conditioning.made_of
        own = read_items(captions, modality, columns=columns, outside=outside) if captions is not None else None
        kept = load_conditioner(file) if file and not refit else None
        if (
            kept is not None
            and (kept.net is None) == bool(direct)
            and (own is None or _fitted_on(kept, own))
            and kept.adapter == bridge.weights_hash([modality])  # the bridge may have been replaced since
            and same_weights(kept, conditioning)
        ):
            return Painter(bridge, model, conditioning, kept, fitted=False)
        items = own or _own_items(bridge, modality, outside)
        if direct:
            conditioner = direct_conditioner(bridge, conditioning, modality, items)
        else:
            conditioner = fit_conditioner(bridge, conditioning, items, report=report)
        if file:
            with suppress(BridgekitError):  # read-only bridge: fitted again next time
                save_conditioner(conditioner, file)
        return Painter(bridge, model, conditioning, conditioner, fitted=True)
    wanted = " or ".join(sorted({conditioning.made_of for conditioning in model.conditionings}))
    raise BridgekitError(
        f"the bridge has {' and '.join(bridge.sides)}, but the conditioning of {model.name} is made of {wanted}",
        remedy=f"train a bridge with {wanted}, or use another --model",
    )


def _fitted_on(conditioner: Conditioner, items: Sequence[Item]) -> bool:
    """Whether a conditioner was fitted on these items, or on a sample of them."""
    return len(conditioner.items) == min(len(items), Fit().captions) and set(conditioner.items) <= set(map(str, items))


def _own_items(bridge: Bridge, modality: str, outside: bool) -> list[Item]:
    try:
        return bridge.own_items(modality, outside=outside)
    except BridgekitError as error:
        raise BridgekitError(
            f"cannot read the bridge's own {modality} items to fit the conditioner: {error.what}",
            where=bridge.table_of(modality) or None,
            remedy="run this where the table is, or give a text file with --captions",
        ) from error


def mix(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The normalised weighted sum of embeddings, each (n, dim) or (1, dim)."""
    return normalize(sum((vector * weight for vector, weight in zip(vectors, weights, strict=True)), torch.zeros(1)), dim=-1)


def paint(
    painter: Painter,
    embeddings: Tensor,
    options: DrawOptions = DrawOptions(),  # noqa: B008  (frozen)
    *,
    seeds: Sequence[int] | int = 0,
    report: Report = silent,
    watch: Watch | None = None,
) -> list[Image]:
    """Draw images from embeddings whose modality gap is already closed (see `close_gap`).

    Arguments:
        embeddings: (n, dim) of unit length.
        options: drawing options; `gap` is ignored.
        seeds: one per image, or one for all. An image depends only on its own seed, up to rounding.
        watch: called with the latents after each step. An exception stops the drawing.

    Returns:
        n images.
    """
    tensors = painter.conditioner(embeddings)
    if options.prompt and painter.conditioning.made_of == TEXT:
        tensors = blend(tensors, painter.conditioning.encode([options.prompt]), options.prompt_weight)
    return draw(painter.model, painter.conditioning, tensors, options, seeds=seeds, report=report, watch=watch)


def blend(tensors: Mapping[str, Tensor], other: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """A weighted mean of two conditionings, for example of two prompts.

    Sequences are padded to the longer one and masks are combined. At positions that only one of them has unmasked, its values
    are used.
    """
    both: dict[str, tuple[Tensor, Tensor]] = {}
    for name in tensors.keys() & other.keys():
        this, that = tensors[name], other[name].to(tensors[name].dtype).expand(len(tensors[name]), *other[name].shape[1:])
        length = max(this.shape[1], that.shape[1])
        both[name] = (padded(this, length), padded(that, length))
    blended = dict(tensors)
    masks = [pair for pair in both.values() if pair[0].dtype == torch.bool]
    for name, (this, that) in both.items():
        if this.dtype == torch.bool:
            blended[name] = this | that
            continue
        share = torch.tensor(weight)
        for mine, theirs in masks:
            if this.ndim == 3 and mine.shape == this.shape[:2]:
                share = torch.where(mine & theirs, weight, theirs.float())[..., None]
        blended[name] = this.lerp(that, share)
    return blended
