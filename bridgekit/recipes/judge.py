"""How many pictures made from sounds does an independent judge recognise? The judge sees only pixels."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit.bridge.bridge import Bridge
from bridgekit.diffusion.conditioner import GAPS, close_gap
from bridgekit.diffusion.models import draw, open_model
from bridgekit.diffusion.painter import Painter, open_painter, paint
from bridgekit.encoders import TEXT, Encoder, Item
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.bridges import leave_out_seen
from bridgekit.latents.encode import encode_items
from bridgekit.latents.encoded import encode_pairs
from bridgekit.plugins import default_pair_source, load_encoder
from bridgekit.progress import Report, silent
from bridgekit.tables.reading import read_pairs
from bridgekit.tables.splits import split_pairs, test_splits

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Gallery:
    """The pictures that a judge chooses among.

    Arguments:
        names: their captions, each once.
        files: their files.
        vectors: (m, d) the judge's own latents of them, at unit length and centred.
        centre: (d,) what was taken away: latents of one encoder share a large common part.
        judge: the image encoder.
    """

    names: Sequence[str]
    files: Sequence[Path]
    vectors: Tensor
    centre: Tensor
    judge: Encoder

    def ranks(self, pictures: Sequence[Image], names: Sequence[str], among: Sequence[str] | None = None) -> Tensor:
        """At which place, from 1, the judge puts each picture's true one, among all or some of the gallery."""
        with tempfile.TemporaryDirectory() as folder:
            prepared = []
            for number, picture in enumerate(pictures):
                file = Path(folder) / f"{number}.png"  # encoders read files: the very ones that a user gets
                picture.save(file)
                prepared.append(self.judge.prepare(file))
        with torch.inference_mode():
            parts = [self.judge.encode(prepared[start : start + 8]).float().cpu() for start in range(0, len(prepared), 8)]
        seen = torch.cat(parts)
        place = {name: row for row, name in enumerate(self.names)}
        rows = torch.tensor([place[name] for name in names])
        scores = normalize(seen - self.centre, dim=-1) @ self.vectors.T
        if among is not None:
            left_out = torch.ones(len(self.names), dtype=torch.bool)
            left_out[[place[name] for name in set(among)]] = False
            scores[:, left_out] = -torch.inf
        return (scores >= scores.gather(1, rows[:, None])).sum(1)


def open_gallery(pairs: str | None = None, judge: str = "image", device: str = "auto", *, outside: bool = False) -> Gallery:
    """The pictures and names of a table, and an image encoder to judge by.

    Arguments:
        pairs: a table with columns `image` and `text`; by default the one that a plugin brings.
        judge: an image encoder, `provider:model`; by default the default one.
        device: a torch device, or `auto`.
        outside: let the table name files outside its own folder.
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
    """Top-1 and top-5 of ranks that count from 1."""
    return {f"top{k}": round(float((ranks <= k).float().mean()), 6) for k in (1, 5)}


def judge_generation(
    folder: str | Path,
    *,
    model: str | None = None,
    pairs: str | None = None,
    splits: Sequence[str] | None = None,
    gallery: str | None = None,
    judge: str = "image",
    among: str = "gallery",
    gaps: Sequence[str] = GAPS[:1],
    limit: int = 300,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: str = "auto",
    unseen: bool = False,
    outside: bool = False,
    report: Report = silent,
) -> list[dict[str, Any]]:
    """Make pictures from held-out items and let an image encoder find them among the true pictures.

    Two bounds come with it, drawn by the same model from the same noise: from the true caption, by the model's own text
    encoder (ceiling), and from another row's caption (floor).

    Arguments:
        folder: the bridge's.
        model: the text-to-image model.
        pairs: a table of items and captions; by default the bridge's own, of which only test splits are asked.
        splits: which splits.
        gallery: a table of pictures and captions; a row is asked if its caption stands there.
        judge: an image encoder that has had no part in the conditioning.
        among: `gallery`, or `asked`: only the pictures of captions that are asked for.
        gaps: the ways of closing the gap to measure, see `conditioner.close_gap`.
        limit: at most so many rows, drawn at random.
        steps, guidance: the sampler's.
        seed: of the draw of rows and of the noise.
        device: a torch device, or `auto`.
        unseen: pass over those rows of `pairs` whose item training saw, instead of refusing them.
        outside: let tables name files outside their own folders.
        report: progress.

    Returns:
        records: made_from, gap, pictures, candidates, top1, top5.

    Raises:
        BridgekitError: no row can be asked, or `pairs` has rows whose item training saw.
    """
    if among not in ("gallery", "asked"):
        raise BridgekitError(f"the judge cannot choose among {among!r}", remedy="use one of gallery, asked")
    unknown = [gap for gap in gaps if gap not in GAPS]
    if unknown:
        raise BridgekitError(f"there is no way {unknown[0]!r} to close the gap", remedy=f"use one of {', '.join(GAPS)}")
    bridge = Bridge.load(folder, device)
    bridge.side(TEXT)
    modality = next(name for name in bridge.sides if name != TEXT)
    shown = open_gallery(gallery, judge, device, outside=outside)
    items, captions = _asked(bridge, modality, pairs, splits, shown, limit, seed, unseen, report, outside)
    embedded = bridge.embed_usable(modality, items, report=report)
    kept = [row for row in range(len(items)) if row not in embedded.failed]
    captions = [captions[row] for row in kept]
    painter = open_painter(bridge, open_model(model, device), Path(folder), outside=outside, report=report)
    seeds = [seed + number for number in range(len(captions))]
    pool = captions if among == "asked" else None
    common = {"pictures": len(captions), "candidates": len(set(captions)) if pool else len(shown.names)}
    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "seeds": seeds, "report": report}
    records = []
    for gap in gaps:
        vectors = close_gap(bridge, painter.conditioner, modality, embedded.vectors, gap)
        ranks = shown.ranks(paint(painter, vectors, **options), captions, pool)
        records.append({"made_from": modality, "gap": gap, **common, **shares(ranks)})
    others = _others(captions, seed)
    for made_from, texts in (("the true caption", captions), ("another caption", others)):
        ranks = shown.ranks(draw_captions(painter, shown, texts, options), captions, pool)
        records.append({"made_from": made_from, "gap": None, **common, **shares(ranks)})
    return records


def draw_captions(painter: Painter, gallery: Gallery, captions: Sequence[str], options: Mapping[str, Any]) -> list[Image]:
    """Pictures by the model alone: from captions, or from their pictures where its conditioning is made of those."""
    files = dict(zip(gallery.names, gallery.files, strict=True))
    texts = painter.conditioning.made_of == TEXT
    tensors = painter.conditioning.encode([caption if texts else files[caption] for caption in captions])
    return draw(painter.model, painter.conditioning, tensors, **options)


def _asked(
    bridge: Bridge,
    modality: str,
    pairs: str | None,
    splits: Sequence[str] | None,
    gallery: Gallery,
    limit: int,
    seed: int,
    unseen: bool,
    report: Report,
    outside: bool,
) -> tuple[list[Item], list[str]]:
    """Items and captions of the rows to ask. The bridge's own table is split as it was for training, by content."""
    own = next((table for table in bridge.tables if {modality, TEXT} <= {*table.modalities}), bridge.tables[0])
    known = set(gallery.names)
    split: Sequence[str]
    if pairs and pairs != own.source:
        table = read_pairs(pairs, (modality, TEXT), outside=outside)
        split = table.split or ["all"] * len(table)
    else:
        # Whole, since the rows' splits depend on all of their items.
        encoded = encode_pairs(
            read_pairs(pairs or bridge.followed(own.source), own.modalities, outside=outside),
            {name: bridge.encoder(name) for name in own.modalities},
            report,
        )
        table = encoded.pairs
        split = split_pairs(table, own.seed, encoded.ids)
    wanted = list(splits or test_splits(split))
    rows = [
        row
        for row in range(len(table))
        if split[row] in wanted and table.columns[TEXT][row] in known and table.columns[modality][row]
    ]
    if not rows:
        raise BridgekitError(
            "no row can be judged: none of the asked splits has a caption that stands in the gallery",
            where=table.source,
            remedy=f"splits: {', '.join(dict.fromkeys(split))}; give pictures of these captions with --gallery",
        )
    if pairs and pairs != own.source:
        rows, _ = leave_out_seen(bridge, table, rows, modality, refuse=not unseen)
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:limit]).tolist()
    return [table.columns[modality][row] or "" for row in chosen], [str(table.columns[TEXT][row]) for row in chosen]


def _others(captions: Sequence[str], seed: int) -> list[str]:
    """For each caption one of another row, as far as there is one that differs."""
    distinct = sorted(set(captions))
    generator = np.random.default_rng(seed)
    if len(distinct) < 2:
        return list(captions)
    steps = generator.integers(1, len(distinct), len(distinct)).tolist()
    other = {name: distinct[(row + step) % len(distinct)] for row, (name, step) in enumerate(zip(distinct, steps, strict=True))}
    return [other[name] for name in captions]
