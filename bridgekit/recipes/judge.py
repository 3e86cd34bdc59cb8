"""`eval --generate`: how many generated images an independent image encoder, the judge, matches to their captions."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit.bridge.bridge import Bridge
from bridgekit.diffusion.conditioner import GAPS, close_gap
from bridgekit.diffusion.models import DrawOptions, draw, open_model
from bridgekit.diffusion.painter import open_painter, paint
from bridgekit.encoders import TEXT, Encoder, Item
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.bridges import EvalOptions, leave_out_seen
from bridgekit.latents.encode import encode_items
from bridgekit.latents.encoded import encode_pairs
from bridgekit.plugins import default_pair_source, load_encoder
from bridgekit.progress import Report, progress_bars
from bridgekit.recipes.sides import check_columns, takes
from bridgekit.tables.reading import read_pairs
from bridgekit.tables.splits import split_pairs, test_splits

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Gallery:
    """The reference images that the judge chooses from.

    Arguments:
        names: their distinct captions.
        files: their files.
        vectors: (m, d) the judge's latents of them, centred, of unit length.
        centre: (d,) the mean that was subtracted: latents of an encoder share a large common component.
        judge: the image encoder.
    """

    names: Sequence[str]
    files: Sequence[Path]
    vectors: Tensor
    centre: Tensor
    judge: Encoder

    def ranks(self, pictures: Sequence[Image], names: Sequence[str], among: Sequence[str] | None = None) -> Tensor:
        """The rank, from 1, that the judge gives each image's true reference, among all or some of the gallery."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{number}.png" for number in range(len(pictures))]
            for file, picture in zip(files, pictures, strict=True):
                picture.save(file)  # encoders read files
            latents = encode_items(self.judge, files, folder=Path(folder))
        seen = latents.matrix[torch.from_numpy(latents.ids)]
        place = {name: row for row, name in enumerate(self.names)}
        rows = torch.tensor([place[name] for name in names])
        scores = normalize(seen - self.centre, dim=-1) @ self.vectors.T
        if among is not None:
            left_out = torch.ones(len(self.names), dtype=torch.bool)
            left_out[[place[name] for name in set(among)]] = False
            scores[:, left_out] = -torch.inf
        return (scores >= scores.gather(1, rows[:, None])).sum(1)


def open_gallery(pairs: str | None = None, judge: str = "image", device: str = "auto", *, outside: bool = False) -> Gallery:
    """The images and captions of a table, and an image encoder as the judge.

    Arguments:
        pairs: a table with columns `image` and `text`; the default is a plugin's source.
        judge: an image encoder, `provider:model`, or `image` for the default one.
        device: a torch device, or `auto`.
        outside: let the table refer to files outside its own folder.
    """
    table = read_pairs(pairs, ("image", TEXT), outside=outside) if pairs else default_pair_source(("image", TEXT)).build()
    found: dict[str, Path] = {}
    for name, file in zip(table.columns[TEXT], table.columns["image"], strict=True):
        if name and file:
            found.setdefault(str(name), Path(file))
    encoder = load_encoder(judge, device)
    latents = encode_items(encoder, list(found.values()))
    usable = [row for row in range(len(found)) if latents.ids[row] >= 0]
    vectors = latents.matrix[torch.from_numpy(latents.ids[usable])]
    names, files = list(found), list(found.values())
    centre = vectors.mean(0)
    return Gallery(
        [names[row] for row in usable], [files[row] for row in usable], normalize(vectors - centre, dim=-1), centre, encoder
    )


def shares(ranks: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy from 1-based ranks."""
    return {f"top{k}": round(float((ranks <= k).float().mean()), 6) for k in (1, 5)}


@dataclass(frozen=True)
class JudgeOptions(EvalOptions):
    """Options of `judge_generation`.

    Arguments:
        folder: the bridge's folder.
        model: the text-to-image model.
        gallery: a table of images and captions; only rows whose caption it has are used.
        judge: an image encoder that is not part of the conditioning.
        among: `gallery`, or `queries` for only the images of the queries' captions.
        gaps: the gap methods to evaluate, see `conditioner.close_gap`.
        limit: maximum number of rows, sampled at random.
        drawing: drawing options.
        seed: random seed of the sampling and the noise.
        device: a torch device, or `auto`.
        progress: show progress bars on standard error.
        pairs, splits, unseen, outside: see `EvalOptions`.
    """

    folder: str | Path
    _: KW_ONLY
    model: str | None = None
    gallery: str | None = None
    judge: str = "image"
    among: str = "gallery"
    gaps: Sequence[str] = GAPS[:1]
    limit: int = 300
    drawing: DrawOptions = field(default_factory=DrawOptions)
    seed: int = 0
    device: str = "auto"
    progress: bool = True


@takes(JudgeOptions)
def judge_generation(options: JudgeOptions) -> list[dict[str, Any]]:
    """Generate images from held-out items and rank the reference images for each with an image encoder.

    `judge_generation(folder, *, ...)`: takes the fields of `JudgeOptions`. Also measures two bounds, drawn by the same model
    from the same noise: from the true caption by the model's own text encoder (upper), and from another row's caption (lower).

    Returns:
        records: made_from, gap, pictures, candidates, top1, top5.

    Raises:
        BridgekitError: there are no rows to judge, or `pairs` has rows whose item was seen in training.
    """
    if options.among not in ("gallery", "queries"):
        raise BridgekitError(f"unknown candidates {options.among!r}", remedy="use gallery or queries")
    unknown = [gap for gap in options.gaps if gap not in GAPS]
    if unknown:
        raise BridgekitError(f"unknown gap method {unknown[0]!r}", remedy=f"use one of {', '.join(GAPS)}")
    with progress_bars(options.progress) as report:
        bridge = Bridge.load(options.folder, options.device)
        bridge.side(TEXT)
        modality = next(name for name in bridge.sides if name != TEXT)
        if options.pairs is not None:  # before the judge is opened, and the gallery encoded
            check_columns((modality, TEXT), bridge.open_other(options.pairs, options.columns, outside=options.outside))
        gallery = open_gallery(options.gallery, options.judge, options.device, outside=options.outside)
        items, captions = _rows_to_judge(bridge, modality, gallery, options, report)
        embedded = bridge.embed_usable(modality, items, report=report)
        captions = [caption for row, caption in enumerate(captions) if row not in embedded.failed]
        model = open_model(options.model, options.device)
        painter = open_painter(bridge, model, Path(options.folder), outside=options.outside, report=report)
        drawn: list[tuple[str, str | None, list[Image]]] = []
        seeds = [options.seed + number for number in range(len(captions))]
        for gap in options.gaps:
            vectors = close_gap(bridge, painter.conditioner, modality, embedded.vectors, gap)
            drawn.append((modality, gap, paint(painter, vectors, options.drawing, seeds=seeds, report=report)))
        files = dict(zip(gallery.names, gallery.files, strict=True))
        for made_from, names in (("the true caption", captions), ("another caption", _others(captions, options.seed))):
            made_of = names if painter.conditioning.made_of == TEXT else [files[name] for name in names]
            tensors = painter.conditioning.encode(made_of)
            images = draw(model, painter.conditioning, tensors, options.drawing, seeds=seeds, report=report)
            drawn.append((made_from, None, images))
    pool = captions if options.among == "queries" else None
    common = {"pictures": len(captions), "candidates": len(set(captions)) if pool else len(gallery.names)}
    return [
        {"made_from": made_from, "gap": gap, **common, **shares(gallery.ranks(pictures, captions, pool))}
        for made_from, gap, pictures in drawn
    ]


def _rows_to_judge(
    bridge: Bridge, modality: str, gallery: Gallery, options: JudgeOptions, report: Report
) -> tuple[list[Item], list[str]]:
    """Items and captions of the rows to judge. The bridge's own table is split as for training."""
    own = next((table for table in bridge.tables if {modality, TEXT} <= {*table.modalities}), bridge.tables[0])
    foreign = bool(options.pairs) and options.pairs != own.source
    if options.pairs is not None:
        opened = bridge.open_other(options.pairs, options.columns, outside=options.outside)
    else:
        opened = bridge.open_own(own, outside=options.outside)
    split: Sequence[str]
    if foreign:
        table = opened.pairs((modality, TEXT))
        split = table.split or ["all"] * len(table)
    else:
        # All modalities, since splits depend on all items of a row.
        encoders = {name: bridge.encoder(name) for name in own.modalities}
        encoded = encode_pairs(opened.pairs(own.modalities), encoders, report)
        table = encoded.pairs
        split = split_pairs(table, own.seed, encoded.ids)
    wanted = list(options.splits or test_splits(split))
    known = set(gallery.names)
    rows = [
        row
        for row in range(len(table))
        if split[row] in wanted and table.columns[TEXT][row] in known and table.columns[modality][row]
    ]
    if not rows:
        raise BridgekitError(
            "no rows to judge: the gallery has none of these splits' captions",
            where=table.source,
            remedy=f"splits: {', '.join(dict.fromkeys(split))}; give images of their captions with --gallery",
        )
    if foreign:
        rows, _ = leave_out_seen(bridge, table, rows, modality, refuse=not options.unseen)
    chosen = np.sort(np.random.default_rng(options.seed).permutation(rows)[: options.limit]).tolist()
    return [table.columns[modality][row] or "" for row in chosen], [str(table.columns[TEXT][row]) for row in chosen]


def _others(captions: Sequence[str], seed: int) -> list[str]:
    """A different caption for each one; unchanged if all are the same."""
    distinct = sorted(set(captions))
    generator = np.random.default_rng(seed)
    if len(distinct) < 2:
        return list(captions)
    steps = generator.integers(1, len(distinct), len(distinct)).tolist()
    other = {name: distinct[(row + step) % len(distinct)] for row, (name, step) in enumerate(zip(distinct, steps, strict=True))}
    return [other[name] for name in captions]
