"""Unpaired items: what self-training adds to the closed form, and whether it harms where the piles are of another subject.

python benchmarks/unpaired.py [photographs] [emoji]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from common import spread, table
from small import DEFAULT, FLICKR, SEEDS, Draw, draw_emoji, measure, photographs
from torch import Tensor
from tried import gain

from bridgekit.evaluation.methods import closed_forms, self_training
from bridgekit.fusion import self_training as module
from bridgekit.latents.encoded import EncodedPairs

#: Pairs to train on, of which an eighth choose the strength and whether unpaired items are used.
PAIRS = {"photographs": (100, 240, 1_000), "emoji": (100, 240, 700)}


def pile(encoded: EncodedPairs, rows: Sequence[int]) -> dict[str, Tensor]:
    """The images of the first half of these rows and the texts of the second: no image has its text among them."""
    half = len(rows) // 2
    parts = {"image": rows[:half], "text": rows[half:]}
    return {name: encoded.latents[name].matrix[torch.from_numpy(encoded.ids[name][own])] for name, own in parts.items()}


def draw(kind: str, pairs: int, seed: int) -> tuple[Draw, dict[str, Tensor]]:
    """A table of so many pairs with test rows, and the unpaired items that are left."""
    generator = np.random.default_rng(seed)
    if kind == "emoji":
        whole = draw_emoji(seed).encoded
        rows = generator.permutation(len(whole.pairs))
    else:  # one caption of each photograph
        whole = photographs("starter:image")
        _, first = np.unique(whole.ids["image"], return_index=True)
        rows = generator.permutation(first + generator.integers(5, size=len(first)))
    tests = 300 if kind == "photographs" else 187
    chosen = np.sort(rows[: tests + pairs])
    val = set(rows[tests : tests + pairs // 8].tolist())
    test = set(rows[:tests].tolist())
    split = np.array(["test" if row in test else "val" if row in val else "train" for row in chosen.tolist()])
    small = whole.take(chosen)
    return Draw(small, small, split, seed), pile(whole, rows[tests + pairs :].tolist())


def by_optimal_transport(queries: Tensor, embedded: Tensor, penalty: Tensor, candidates: Tensor) -> Tensor:
    """Partners by a plan with uniform marginals (Sinkhorn and Knopp, 1967; Cuturi, 2013), in place of a softmax."""
    plan = (queries @ embedded.T - penalty) / module.TEMPERATURE
    for _ in range(20):
        plan = plan - plan.logsumexp(0, keepdim=True)
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan.exp() @ candidates


def figures(drawn: Draw, piles: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """The closed form of the pairs, and self-training with each of the piles; `saved` is what validation prefers of the two."""
    encoded, split, seed = drawn.encoded, drawn.split, drawn.seed
    closed = closed_forms(encoded, split, DEFAULT, seed, {})["closed form"]
    found = {"the closed form": measure(drawn, encoded, closed.embed, True)}
    for name, each in piles.items():
        more = self_training(encoded, split, closed, seed, each)
        found[name] = measure(drawn, encoded, more.embed, True)
        found[f"{name}: saved"] = found[name] if more.score > closed.score else found["the closed form"]
    original = module._likely_partners
    module._likely_partners = by_optimal_transport
    more = self_training(encoded, split, closed, seed, piles["images and texts"])
    module._likely_partners = original
    found["images and texts, by optimal transport"] = measure(drawn, encoded, more.embed, True)
    return found


def main(wanted: Sequence[str] = ()) -> str:
    """Measure on both tables, or those wanted; return the results."""
    if not FLICKR.is_dir():
        return f"Not measured: the photographs are not in {FLICKR}."
    parts = []
    for kind in wanted or PAIRS:
        for pairs in PAIRS[kind]:
            runs: dict[str, list[float]] = {}
            for seed in SEEDS:
                drawn, own = draw(kind, pairs, seed)
                _, foreign = draw(next(other for other in PAIRS if other != kind), 100, seed)
                piles = {
                    "images and texts": own,
                    "images": {"image": own["image"]},
                    "texts": {"text": own["text"]},
                    "images and texts of the other table": foreign,
                }
                for name, figure in figures(drawn, piles).items():
                    runs.setdefault(name, []).append(figure)
                print(kind, pairs, seed, {name: round(100 * each[-1], 1) for name, each in runs.items()}, file=sys.stderr)
            closed = runs["the closed form"]
            rows = [[name, spread(each), *(gain(each, closed) if each is not closed else [""])] for name, each in runs.items()]
            counts = f"{len(own['image']):,} images and {len(own['text']):,} texts unpaired"
            title = f"### {kind}: {pairs:,} pairs; {counts}"
            parts.append(f"{title}\n\n{table(['unpaired', 'mean of the six recalls', 'gain'], rows)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(main(sys.argv[1:]))
