"""What was tried to make more of small tables: each idea less what it changes, on photographs, emoji, spoken names and sounds.

python benchmarks/tried.py [photographs] [emoji] [speech] [sounds]

A gain has its 95 % interval over splits (Student's t, paired): three random ones, five folds of sounds, and one for speech.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import encode, fusemix, spread, table
from esc10 import clips, splits, zero_shot
from PIL import Image, ImageOps
from published import divergence
from scipy.stats import t
from small import DEFAULT, FLICKR, SEEDS, Draw, draw_emoji, draw_photographs, draw_speech, measure
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit import Preset, load_encoder
from bridgekit.evaluation.methods import closed_forms, training_rows
from bridgekit.evaluation.recall import Embed
from bridgekit.fusion import training
from bridgekit.fusion.adapter import project
from bridgekit.fusion.closed_form import ClosedForm
from bridgekit.fusion.fusemix import fusemix as mix
from bridgekit.fusion.training import initial_adapters
from bridgekit.latents.encode import encode_items
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.recipes.fit import train_encoded
from bridgekit.retrieval import TEMPLATES

#: Name, embedding, whether hubs count less, and the name of what it is compared with.
Idea = tuple[str, EncodedPairs, Embed, bool, str]


def draw_sounds() -> list[Draw]:
    """ESC-10, each fold left out once."""
    pairs, _, folds = clips()
    encoded = encode(pairs, "starter:audio", "starter:text")
    return [Draw(encoded, encoded, splits(folds, fold, 0), int(fold)) for fold in "12345"]


TABLES: dict[str, Callable[[], list[Draw]]] = {
    "photographs": lambda: [draw_photographs(2_400, 1, seed) for seed in SEEDS],
    "emoji": lambda: [draw_emoji(seed) for seed in SEEDS],
    "sounds": draw_sounds,
    "speech": lambda: [draw_speech(0)],
}


def figure(place: str, draw: Draw, encoded: EncodedPairs, embed: Embed, hubs: bool) -> float:
    """The mean of the six recalls; of sounds, the accuracy by prompts."""
    if place != "sounds":
        return measure(draw, encoded, embed, hubs)
    return zero_shot(encoded, embed, clips()[1], np.flatnonzero(draw.split == "test"))


def ideas(draw: Draw) -> Iterator[Idea]:
    """The closed form and FuseMix, and what was tried on top of them."""
    encoded, split, seed = draw.encoded, draw.split, draw.seed
    solutions = closed_forms(encoded, split, DEFAULT, seed, {})
    closed, strength = solutions["closed form"], solutions["closed form"].preset.warm_start
    yield "closed form", encoded, closed.embed, False, ""
    yield "hubs count less", encoded, closed.embed, True, "closed form"
    yield "a fixed strength of 0.5", encoded, _at(draw, 0.5), False, "closed form"
    for name, other in {
        "the last layer alone": draw.last,
        "the mean of two or more views: pictures mirrored, names in templates": with_views(encoded),
        "2,000 random Fourier features beside each side's latents": with_random_features(draw),
    }.items():
        yield name, other, closed_forms(other, split, DEFAULT, seed, {})["closed form"].embed, False, "closed form"
    ends = [_at(draw, factor * strength) for factor in (0.5, 2.0)]
    yield "sum of two closed forms, half and twice as strong", encoded, _sum(ends), False, "closed form"
    yield "sum with ridge regression", encoded, _sum([closed.embed, solutions["ridge"].embed]), False, "closed form"
    start = replace(DEFAULT, warm_start=strength)
    trained = fusemix(encoded, split, start, seed)
    yield "FuseMix", encoded, trained, False, "closed form"
    yield "sum with FuseMix", encoded, _sum([closed.embed, trained]), False, "closed form"
    for name, preset in {
        "started from strength 0.5": replace(start, warm_start=0.5),
        "started from random weights": replace(start, warm_start=0.0),
        "without mixup": replace(start, alpha=0.0),
        "a third of the learning rate": replace(start, lr=1e-3),
        "a tenth of the learning rate": replace(start, lr=3e-4),
        "temperature 0.04": replace(start, temperature=0.04),
        "temperature 0.12": replace(start, temperature=0.12),
        "without dropout on the latents": replace(start, input_dropout=0.0),
        "without the residual block": replace(start, blocks=0),
    }.items():
        yield f"FuseMix, {name}", encoded, fusemix(encoded, split, preset, seed), False, "FuseMix"
    with with_structure(3 * 30):
        yield "FuseMix, with the STRUCTURE regulariser", encoded, fusemix(encoded, split, start, seed), False, "FuseMix"
    with related_as_positives():
        yield "FuseMix, related rows as positives", encoded, fusemix(encoded, split, start, seed), False, "FuseMix"
    yield "FuseMix, weights averaged over three seeds", encoded, _soup(draw, start), False, "FuseMix"


def _at(draw: Draw, strength: float) -> Embed:
    """The closed form of a strength."""
    rows = training_rows(draw.encoded, draw.split)
    adapters = initial_adapters(*rows, replace(DEFAULT, warm_start=0.0), draw.seed, {})
    ClosedForm(adapters, *rows).set_adapters(strength)
    return lambda name, matrix: project(adapters[name], matrix)


def _sum(parts: Sequence[Embed]) -> Embed:
    """Embeddings whose cosine is the mean of those of the parts."""
    return lambda name, matrix: torch.cat([part(name, matrix) for part in parts], 1) / len(parts) ** 0.5


def _soup(draw: Draw, preset: Preset) -> Embed:
    """The mean of the weights of FuseMix with three seeds."""
    runs = [train_encoded(draw.encoded, draw.split, preset=preset, seed=seed).adapters for seed in SEEDS]
    for name, adapter in runs[0].items():
        states = [run[name].state_dict() for run in runs]
        adapter.load_state_dict({key: torch.stack([each[key] for each in states]).mean(0) for key in states[0]})
    return lambda name, matrix: project(runs[0][name], matrix)


def with_random_features(draw: Draw) -> EncodedPairs:
    """The table with random Fourier features (Rahimi and Recht, 2007) beside the standardised latents."""
    latents = {}
    for name, own in draw.encoded.latents.items():
        train = own.matrix[torch.from_numpy(draw.encoded.ids[name][draw.split == "train"])]
        scaled = normalize((own.matrix - train.mean(0)) / train.std(0).clamp_min(1e-6), dim=1)
        torch.manual_seed(draw.seed)
        angles = scaled @ torch.randn(scaled.shape[1], 2_000) + 2 * torch.pi * torch.rand(2_000)
        latents[name] = replace(own, matrix=torch.cat([own.matrix, angles.cos()], 1))
    return replace(draw.encoded, latents=latents)


def with_views(encoded: EncodedPairs) -> EncodedPairs:
    """The table with the mean latents of a picture and its mirror image, and of a name in `TEMPLATES`; captions have one."""
    latents = dict(encoded.latents)
    for name, own in encoded.latents.items():
        ids = encoded.ids[name]
        first = [int(np.flatnonzero(ids == row)[0]) for row in range(len(own.matrix)) if (ids == row).any()]
        items = [encoded.pairs.columns[name][row] for row in first]
        rows = ids[first]
        matrix = own.matrix.clone()
        if name == "image":
            with tempfile.TemporaryDirectory() as folder:
                views = [[_mirrored(Path(str(item)), Path(folder) / f"{at}.png") for at, item in enumerate(items)]]
                found = [encode_items(load_encoder("starter:image"), view) for view in views]
        elif name == "text" and not any(str(item).endswith(".") for item in items):
            views_of = [[template.format(item) for item in items] for template in TEMPLATES[1:]]
            found = [encode_items(load_encoder("starter:text"), view) for view in views_of]
        else:
            continue
        matrix[torch.from_numpy(rows)] += sum((each.matrix[torch.from_numpy(each.ids)] for each in found), torch.zeros(()))
        latents[name] = replace(own, matrix=matrix / (1 + len(found)))
    return replace(encoded, latents=latents)


def _mirrored(path: Path, to: Path) -> Path:
    with Image.open(path) as image:
        ImageOps.mirror(image).save(to)
    return to


@contextmanager
def with_structure(steps: int, weight: float = 10.0) -> Iterator[None]:
    """FuseMix with the STRUCTURE regulariser on the mixed latents, ramped in over a third of at least so many steps."""
    embed, loss, seen, done = training._embed, training._loss, list[Tensor](), [0]

    def embed_and_keep(run: Any, first: Tensor, second: Tensor, lam: Tensor) -> list[Tensor]:
        seen.append(lam)  # of each piece, in order
        return embed(run, first, second, lam)

    def regularised(run: Any, first: Tensor, second: Tensor, bounds: Any, embedded: Sequence[Tensor]) -> Tensor:
        done[0] += 1
        lam = torch.cat(seen)
        seen.clear()
        kept = torch.zeros(())
        for side, (latents, own) in enumerate(zip(run.latents, embedded, strict=True)):
            mixed = mix(latents[run.index[first, side]], latents[run.index[second, side]], lam)
            kept = kept + divergence(mixed, own.float()) / len(embedded)
        return loss(run, first, second, bounds, embedded) + weight * min(1.0, 3 * done[0] / steps) * kept

    training._embed, training._loss = embed_and_keep, regularised
    try:
        yield
    finally:
        training._embed, training._loss = embed, loss


@contextmanager
def related_as_positives() -> Iterator[None]:
    """InfoNCE with rows that share an item as further positives, each with the same weight (Khosla et al., 2020)."""
    patch = pytest.MonkeyPatch()

    def dense(x: Tensor, y: Tensor, scale: Tensor, keys: Tensor | None = None, **_: Any) -> Tensor:
        right = torch.eye(len(x), dtype=torch.bool)
        if keys is not None:
            for column in keys.unbind(1):
                same = (column[:, None, :, None] == column[None, :, None, :]) & (column >= 0)[:, None, :, None]
                right |= same.any(-1).any(-1)
        share = right / right.sum(1, keepdim=True)
        logits = (x @ y.T).float() * scale
        return -((share * logits.log_softmax(1)).sum() + (share.T * logits.log_softmax(0)).sum()) / (2 * len(x))

    patch.setattr(training, "info_nce", dense)
    try:
        yield
    finally:
        patch.undo()


def main(wanted: Sequence[str] = ()) -> str:
    """Try every idea; return a table of each."""
    if not FLICKR.is_dir():
        return f"Not measured: the photographs are not in {FLICKR}."
    parts = []
    for place, draws in TABLES.items():
        if wanted and place not in wanted:
            continue
        figures: dict[str, list[float]] = {}
        beside: dict[str, str] = {}
        for draw in draws():
            for name, encoded, embed, hubs, other in ideas(draw):
                if place == "sounds" and widths(encoded) != widths(draw.encoded):
                    continue  # its prompts are encoded without what was added
                figures.setdefault(name, []).append(figure(place, draw, encoded, embed, hubs))
                beside[name] = other
                print(place, draw.seed, name, f"{100 * figures[name][-1]:.1f}", file=sys.stderr, flush=True)
        rows = [[name, spread(each), *gain(each, figures.get(beside[name])), beside[name]] for name, each in figures.items()]
        what = "accuracy" if place == "sounds" else "mean of the six recalls"
        parts.append(f"### {place}\n\n" + table(["idea", what, "gain", "over"], rows))
    return "\n\n".join(parts)


def widths(encoded: EncodedPairs) -> list[int]:
    """The widths of a table's latents."""
    return [each.matrix.shape[1] for each in encoded.latents.values()]


def gain(own: Sequence[float], other: Sequence[float] | None) -> list[str]:
    """The mean difference with its 95 % interval over seeds (Student's t, paired)."""
    if other is None:
        return [""]
    more = 100 * (np.asarray(own) - np.asarray(other))
    if len(more) < 2:
        return [f"{more.mean():+.1f}"]
    half = t.ppf(0.975, len(more) - 1) * more.std(ddof=1) / len(more) ** 0.5
    return [f"{more.mean():+.1f} ({more.mean() - half:+.1f} to {more.mean() + half:+.1f})"]


if __name__ == "__main__":
    print(main(sys.argv[1:]))
