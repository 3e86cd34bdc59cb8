"""ESC-10, leave one fold out: zero-shot classification from text prompts, compared with a linear probe on the same latents.

python benchmarks/esc10.py
"""

from __future__ import annotations

import csv
from itertools import count

import numpy as np
import torch
from common import ESC10, encode, spread, table, without_mixup
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bridgekit import PRESETS, Pairs, Preset, load_encoder
from bridgekit.evaluation.methods import training_rows
from bridgekit.evaluation.recall import Embed
from bridgekit.fusion.adapter import project
from bridgekit.fusion.training import train
from bridgekit.latents.encode import encode_items
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.retrieval import class_embeddings, search

#: Training clips get one of these captions each; at test time, all are prompts.
TEMPLATES = ("the sound of a {}", "{}", "a recording of a {}", "I hear a {}", "this is the sound of {}")
SEEDS = (0, 1, 2)


def clips() -> tuple[Pairs, NDArray[np.str_], NDArray[np.str_]]:
    """Every clip with one of the captions, cyclically; the group is the class. Also returns labels and folds."""
    with (ESC10 / "clips.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    captions = [TEMPLATES[number % len(TEMPLATES)].format(row["label"]) for number, row in enumerate(rows)]
    pairs = Pairs(
        columns={"audio": tuple(ESC10 / row["audio"] for row in rows), "text": tuple(captions)},
        source=str(ESC10 / "clips.csv"),
        rows=tuple(range(len(rows))),
        group=tuple(row["label"] for row in rows),
    )
    return pairs, np.array([row["label"] for row in rows]), np.array([row["fold"] for row in rows])


def last_epoch(encoded: EncodedPairs, split: NDArray[np.str_], preset: Preset, seed: int) -> Embed:
    """Train without early stopping: recall among ten classes saturates too early to select an epoch."""
    keys, later = torch.from_numpy(encoded.keys[split == "train"]), count()
    validate = lambda _: {"score": float(next(later))}  # noqa: E731
    trained = train(*training_rows(encoded, split), keys, validate=validate, preset=preset, seed=seed)
    return lambda modality, matrix: project(trained.adapters[modality], matrix)


def zero_shot(encoded: EncodedPairs, embed: Embed, labels: NDArray[np.str_], test: NDArray[np.int64]) -> float:
    """Zero-shot accuracy on the test clips."""
    text = load_encoder("starter:text", "cpu")

    def embed_texts(texts: list[str]) -> object:
        latents = encode_items(text, texts)
        return embed("text", latents.matrix[latents.ids])

    classes = sorted(set(labels.tolist()))
    prompts = class_embeddings(embed_texts, classes, TEMPLATES)  # type: ignore[arg-type]
    sounds = embed("audio", encoded.latents["audio"].matrix[encoded.ids["audio"][test]])
    predicted = search(sounds, prompts, 1)[1][:, 0].numpy()
    return float((np.asarray(classes)[predicted] == labels[test]).mean())


def probe(encoded: EncodedPairs, labels: NDArray[np.str_], train: NDArray[np.int64], test: NDArray[np.int64]) -> float:
    """Accuracy of logistic regression on standardised latents."""
    latents = encoded.latents["audio"].matrix[encoded.ids["audio"]].numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(latents[train], labels[train])
    return float(model.score(latents[test], labels[test]))


def splits(folds: NDArray[np.str_], left_out: str, seed: int) -> NDArray[np.str_]:
    """The held-out fold is the test split; 10 % of the other clips are for validation."""
    split = np.where(folds == left_out, "test", "train")
    train = np.random.default_rng(seed).permutation(np.flatnonzero(split == "train"))
    split[train[: len(train) // 10]] = "val"
    return split


def main() -> str:
    """Train and evaluate; return the table, or why there is none."""
    if not ESC10.is_dir():
        return f"Not measured: the recordings are not in {ESC10}."
    pairs, labels, folds = clips()
    methods = {"zero-shot, FuseMix": PRESETS["default"], "zero-shot, without mixup": without_mixup(PRESETS["default"])}
    rows = []
    for encoder in ("starter:audio", "starter:speech", "starter:speech-30s"):
        encoded = encode(pairs, encoder, "starter:text")
        for name, preset in methods.items():
            by_seed = []
            for seed in SEEDS:
                right = []
                for fold in "12345":
                    split = splits(folds, fold, seed)
                    embed = last_epoch(encoded, split, preset, seed)
                    right.append(zero_shot(encoded, embed, labels, np.flatnonzero(split == "test")))
                by_seed.append(float(np.mean(right)))
            rows.append([encoder, name, spread(by_seed)])
        probes = [probe(encoded, labels, np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in "12345"]
        rows.append([encoder, "linear probe on latents", f"{100 * np.mean(probes):.1f}"])
    return f"Mean of five folds, in %; ± standard deviation over seeds {SEEDS}.\n\n" + table(
        ["latents", "method", "accuracy"], rows
    )


if __name__ == "__main__":
    print(main())
