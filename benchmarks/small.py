"""Small tables: what is saved, beside its parts, the earlier default and published methods, on the same splits and seeds.

python benchmarks/small.py [240 photographs | emoji | speech | sounds | published ...]
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from common import encode, encoded_source, fusemix, random_split, spread, table
from esc10 import clips, splits, zero_shot
from numpy.typing import NDArray
from openmoji import ridge
from published import METHODS as PUBLISHED

from bridgekit import PRESETS, Pairs
from bridgekit.evaluation.recall import Embed, evaluate_splits
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.recipes.fit import banks_of, solve

FLICKR = Path(__file__).resolve().parents[2] / "shared" / "data" / "flickr8k-train"
SEEDS = (0, 1, 2)
DEFAULT = PRESETS["default"]
#: The default until the strength of the closed form was chosen: it started from this one, on the last layer alone.
BEFORE = replace(DEFAULT, warm_start=0.5)
SAVED, LESS = "what is saved", "what is saved, less it"

Split = NDArray[np.str_]
Measured = dict[str, float]


@dataclass(frozen=True)
class Draw:
    """A table with a split: the latents of all layers, those of the last one, each row's split, and the random seed."""

    encoded: EncodedPairs
    last: EncodedPairs
    split: Split
    seed: int


@cache
def photographs(image: str) -> EncodedPairs:
    """All photographs with their five captions."""
    with (FLICKR / "captions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {"image": tuple(FLICKR / row["image"] for row in rows), "text": tuple(row["text"] for row in rows)}
    return encode(Pairs(columns, str(FLICKR), tuple(range(len(rows)))), image, "starter:text")


def draw_photographs(train: int, captions: int, seed: int, val: int = 300) -> Draw:
    """Photographs to train, validate and test (300) on, the latter two with one caption each."""
    encoded = photographs("starter:image")
    generator = np.random.default_rng(seed)
    photos = generator.permutation(np.unique(encoded.ids["image"]))
    place = {int(photo): at for at, photo in enumerate(photos)}
    own: dict[int, list[int]] = {}
    for row, photo in enumerate(encoded.ids["image"].tolist()):
        own.setdefault(place[photo], []).append(row)
    chosen, names = [], []
    for at in range(300 + val + train):
        name = "test" if at < 300 else "val" if at < 300 + val else "train"
        rows = own[at] if name == "train" and captions == 5 else [own[at][int(generator.integers(5))]]
        chosen += rows
        names += [name] * len(rows)
    order = np.argsort(chosen)
    every = np.asarray(chosen)[order]
    return Draw(encoded.take(every), photographs("starter:image-last").take(every), np.asarray(names)[order], seed)


def draw_emoji(seed: int) -> Draw:
    """`starter:openmoji`, split at random."""
    whole = encoded_source("starter:openmoji", "starter:image", "starter:text")
    last = encoded_source("starter:openmoji", "starter:image-last", "starter:text")
    return Draw(whole, last, random_split(whole, seed), seed)


def draw_speech(seed: int) -> Draw:
    """Spoken names with their own splits: unseen voices and unseen names."""
    encoded = encoded_source("starter:spoken-openmoji", "starter:audio", "starter:text")
    return Draw(encoded, encoded, np.asarray(encoded.pairs.split), seed)


def methods(draw: Draw) -> Iterator[tuple[str, EncodedPairs, Embed, bool]]:
    """Name, table, embedding, and whether hubs count less, of each method."""
    solved = solve(draw.encoded, draw.split, preset=DEFAULT, seed=draw.seed)
    yield SAVED, draw.encoded, solved.solutions[solved.method].embed, True
    yield f"{SAVED}, by cosine alone", draw.encoded, solved.solutions[solved.method].embed, False
    for name, each in solved.solutions.items():
        yield f"{name}, by cosine alone", draw.encoded, each.embed, False
        yield f"{name}, less hubs", draw.encoded, each.embed, True
    yield "scikit-learn's Ridge, by cosine alone", draw.encoded, ridge(draw.encoded, draw.split), False
    yield "default before", draw.last, fusemix(draw.last, draw.split, BEFORE, draw.seed), False


def published(draw: Draw) -> Iterator[tuple[str, EncodedPairs, Embed, bool]]:
    """The published methods, on the latents of all layers. SAIL and the release take hours on large tables: not there."""
    for name, method in PUBLISHED.items():
        if len(draw.split) > 1_000 and name.startswith(("SAIL", "FuseMix")):
            continue
        yield name, draw.encoded, method(draw.encoded, draw.split, draw.seed), False


def measure(draw: Draw, encoded: EncodedPairs, embed: Embed, hubs: bool) -> float:
    """The mean of recall@1, @5 and @10 in both directions over the test splits (of speech, `test-names` alone)."""
    banks = banks_of(encoded, draw.split, embed) if hubs else None
    records = [
        record
        for record in evaluate_splits(encoded, draw.split.tolist(), embed, "", banks=banks)
        if record["among"] == "split" and record["split"] in ("test", "test-names")
    ]
    return float(np.mean([record[f"recall@{k}"] for record in records for k in (1, 5, 10)]))


def run(draws: Sequence[Draw], of: Callable[[Draw], Iterator[tuple[str, EncodedPairs, Embed, bool]]]) -> dict[str, list[float]]:
    """Method to its figure of each draw."""
    figures: dict[str, list[float]] = {}
    for draw in draws:
        for name, encoded, embed, hubs in of(draw):
            figures.setdefault(name, []).append(measure(draw, encoded, embed, hubs))
            print(draw.seed, name, f"{100 * figures[name][-1]:.1f}", file=sys.stderr, flush=True)
    return figures


def sounds() -> dict[str, list[float]]:
    """ESC-10, leave one fold out: accuracy by prompts, the mean over folds, by seed."""
    pairs, labels, folds = clips()
    encoded = encode(pairs, "starter:audio", "starter:text")
    figures: dict[str, list[float]] = {}
    for seed in SEEDS:
        right: dict[str, list[float]] = {}
        for fold in "12345":
            split = splits(folds, fold, seed)
            test = np.flatnonzero(split == "test")
            solved = solve(encoded, split, preset=DEFAULT, seed=seed)
            found = {SAVED: solved.solutions[solved.method].embed, "default before": fusemix(encoded, split, BEFORE, seed)}
            found |= {f"{name}, by cosine alone": each.embed for name, each in solved.solutions.items()}
            for name, embed in found.items():
                right.setdefault(name, []).append(zero_shot(encoded, embed, labels, test))
        for name, each in right.items():
            figures.setdefault(name, []).append(float(np.mean(each)))
        print(seed, {name: round(100 * each[-1], 1) for name, each in figures.items()}, file=sys.stderr, flush=True)
    return figures


def differences(figures: dict[str, list[float]]) -> list[list[str]]:
    """Rows: the method, its figure, and what is saved less it, with a 95 % interval of the mean (Student's t, paired)."""
    from scipy.stats import t

    rows = []
    for name, each in figures.items():
        gain = 100 * (np.asarray(figures[SAVED][: len(each)]) - np.asarray(each))
        shown = "" if name == SAVED else f"{gain.mean():+.1f}"
        if shown and len(gain) > 1:
            half = t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / len(gain) ** 0.5
            shown += f" ({gain.mean() - half:+.1f} to {gain.mean() + half:+.1f})"
        rows.append([name, spread(each), shown])
    return rows


TABLES: dict[str, Callable[[], list[Draw]]] = {
    **{
        f"240 photographs, table {number}": partial(
            lambda number: [draw_photographs(210, 1, 100 * number + seed, val=30) for seed in range(10)], number
        )
        for number in (1, 2, 3)
    },
    **{
        f"{count} photographs": partial(
            lambda count: [draw_photographs(count, 1, seed, val=count // 8) for seed in SEEDS], count
        )
        for count in (80, 800)
    },
    "2,400 photographs, one caption": lambda: [draw_photographs(2_400, 1, seed) for seed in SEEDS],
    "2,400 photographs, five captions": lambda: [draw_photographs(2_400, 5, seed) for seed in SEEDS],
    "emoji": lambda: [draw_emoji(seed) for seed in SEEDS],
    "speech, unseen names": lambda: [draw_speech(seed) for seed in SEEDS],
}
#: Published methods take minutes on larger tables.
PUBLISHED_ON = ("240 photographs, table 1", "2,400 photographs, one caption", "emoji")


def main(wanted: Sequence[str] = ()) -> str:
    """Measure on every table, or on those with one of these words in their names; return the results."""
    if not FLICKR.is_dir():
        return f"Not measured: the photographs are not in {FLICKR}."
    parts = []
    for name, draws in TABLES.items():
        if wanted and not any(each in name for each in wanted):
            continue
        drawn = draws()
        figures = run(drawn, methods)
        if name in PUBLISHED_ON:
            figures |= run(drawn[: len(SEEDS)], published)
        parts.append(f"### {name}\n\n" + table(["method", "mean of the six recalls", LESS], differences(figures)))
    if not wanted or "sounds" in wanted:
        parts.append("### ESC-10 by prompts\n\n" + table(["method", "accuracy", LESS], differences(sounds())))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(main(sys.argv[1:]))
