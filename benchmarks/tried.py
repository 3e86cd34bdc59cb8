"""What was tried to make more of small tables: each idea less what it changes, on photographs and emoji, over three seeds.

python benchmarks/tried.py [photographs] [emoji]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from common import fusemix, spread, table
from scipy.stats import t
from small import DEFAULT, FLICKR, SEEDS, Draw, draw_emoji, draw_photographs, measure
from torch.nn.functional import normalize

from bridgekit import Preset
from bridgekit.evaluation.methods import closed_forms, training_rows
from bridgekit.evaluation.recall import Embed
from bridgekit.fusion.adapter import project
from bridgekit.fusion.closed_form import ClosedForm
from bridgekit.fusion.training import initial_adapters
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.recipes.fit import train_encoded

TABLES: dict[str, Callable[[int], Draw]] = {
    "photographs": lambda seed: draw_photographs(2_400, 1, seed),
    "emoji": draw_emoji,
}
#: Name, embedding, whether hubs count less, and the name of what it is compared with.
Idea = tuple[str, EncodedPairs, Embed, bool, str]


def ideas(draw: Draw) -> Iterator[Idea]:
    """The closed form and FuseMix, and what was tried on top of them."""
    encoded, split, seed = draw.encoded, draw.split, draw.seed
    closed = closed_forms(encoded, split, DEFAULT, seed, {})["closed form"]
    strength = closed.preset.warm_start
    yield "closed form", encoded, closed.embed, False, ""
    yield "hubs count less", encoded, closed.embed, True, "closed form"
    last = closed_forms(draw.last, split, DEFAULT, seed, {})["closed form"]
    yield "the last layer alone", draw.last, last.embed, False, "closed form"
    yield "a fixed strength of 0.5", encoded, _at(draw, 0.5), False, "closed form"
    wider = with_random_features(draw)
    yield (
        "2,000 random Fourier features beside each side's latents",
        wider,
        closed_forms(wider, split, DEFAULT, seed, {})["closed form"].embed,
        False,
        "closed form",
    )
    ends = [_at(draw, factor * strength) for factor in (0.5, 2.0)]
    yield "sum of two closed forms, half and twice as strong", encoded, _sum(ends), False, "closed form"
    start = replace(DEFAULT, warm_start=strength)
    trained = fusemix(encoded, split, start, seed)
    yield "FuseMix", encoded, trained, False, "closed form"
    yield "sum of the closed form and FuseMix", encoded, _sum([closed.embed, trained]), False, "closed form"
    for name, preset in {
        "started from strength 0.5": replace(start, warm_start=0.5),
        "without mixup": replace(start, alpha=0.0),
        "a third of the learning rate": replace(start, lr=1e-3),
        "a tenth of the learning rate": replace(start, lr=3e-4),
        "temperature 0.04": replace(start, temperature=0.04),
        "temperature 0.12": replace(start, temperature=0.12),
        "without dropout on the latents": replace(start, input_dropout=0.0),
        "without the residual block": replace(start, blocks=0),
    }.items():
        yield f"FuseMix, {name}", encoded, fusemix(encoded, split, preset, seed), False, "FuseMix"
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
        scaled = normalize((own.matrix - train.mean(0)) / train.std(0), dim=1)
        torch.manual_seed(draw.seed)
        angles = scaled @ torch.randn(scaled.shape[1], 2_000) + 2 * torch.pi * torch.rand(2_000)
        latents[name] = replace(own, matrix=torch.cat([own.matrix, angles.cos()], 1))
    return replace(draw.encoded, latents=latents)


def main(wanted: Sequence[str] = ()) -> str:
    """Try every idea; return a table of each."""
    if not FLICKR.is_dir():
        return f"Not measured: the photographs are not in {FLICKR}."
    parts = []
    for place, draw in TABLES.items():
        if wanted and place not in wanted:
            continue
        figures: dict[str, list[float]] = {}
        beside: dict[str, str] = {}
        for seed in SEEDS:
            for name, encoded, embed, hubs, other in ideas(drawn := draw(seed)):
                figures.setdefault(name, []).append(measure(drawn, encoded, embed, hubs))
                beside[name] = other
                print(seed, name, f"{100 * figures[name][-1]:.1f}", file=sys.stderr, flush=True)
        rows = [[name, spread(each), *_gain(each, figures.get(beside[name])), beside[name]] for name, each in figures.items()]
        parts.append(f"### {place}\n\n" + table(["idea", "mean of the six recalls", "gain", "over"], rows))
    return "\n\n".join(parts)


def _gain(own: Sequence[float], other: Sequence[float] | None) -> list[str]:
    """The mean difference with its 95 % interval over seeds (Student's t, paired)."""
    if other is None:
        return [""]
    gain = 100 * (np.asarray(own) - np.asarray(other))
    half = t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / len(gain) ** 0.5
    return [f"{gain.mean():+.1f} ({gain.mean() - half:+.1f} to {gain.mean() + half:+.1f})"]


if __name__ == "__main__":
    print(main(sys.argv[1:]))
