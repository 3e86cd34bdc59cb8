"""Speech to image without common pairs: three modalities trained together, one bound later, and two bridges via text.

python benchmarks/binding.py
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from common import encoded_source, spread, table
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit import PRESETS
from bridgekit.evaluation.methods import closed_forms
from bridgekit.evaluation.recall import split_recall
from bridgekit.fusion.adapter import Adapter, project
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.pairs import Pairs
from bridgekit.recipes.fit import train_encoded
from bridgekit.tables.splits import relation_keys

SEEDS = (0, 1)
PRESET = PRESETS["default"]


def columns(encoded: EncodedPairs, split: NDArray[np.str_], *modalities: str) -> tuple[EncodedPairs, NDArray[np.str_]]:
    """The rows of `train` and `val` that have all these modalities, with only these columns."""
    there = np.all([encoded.ids[modality] >= 0 for modality in modalities], axis=0)
    rows = np.flatnonzero(there & np.isin(split, ("train", "val")))
    chosen = encoded.pairs.take(rows)
    pairs = Pairs({modality: chosen.columns[modality] for modality in modalities}, chosen.source, chosen.rows, chosen.split)
    ids = {modality: encoded.ids[modality][rows] for modality in modalities}
    latents = {modality: encoded.latents[modality] for modality in modalities}
    return EncodedPairs(pairs, latents, ids, relation_keys(pairs, ids)), split[rows]


def embeddings(adapters: Mapping[str, Adapter], latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each modality's distinct items in the shared space."""
    return {name: project(adapter, latents[name]) for name, adapter in adapters.items()}


def expected(embedded: Mapping[str, Tensor], query: str, temperature: float, names: Tensor | None = None) -> Tensor:
    """Queries replaced by their expected name, as in `Bridge.expected`; in the space of `names` if given."""
    texts = embedded["text"]
    weights = (embedded[query] @ texts.T / temperature).softmax(1)
    return normalize(weights @ (texts if names is None else names), dim=-1)


def main() -> str:
    """Train and evaluate; return the table."""
    encoded = encoded_source("starter:spoken-pictures", "starter:audio", "starter:text", "starter:image")
    split = np.asarray(encoded.pairs.split)
    latents = {modality: each.matrix for modality, each in encoded.latents.items()}
    figures: dict[tuple[str, str, int], dict[str, list[dict[str, float]]]] = {}
    linear = closed_forms(encoded, split, PRESET, 0, {})["ridge"].embed
    for seed in SEEDS:
        speech, drawn = columns(encoded, split, "audio", "text"), columns(encoded, split, "text", "image")
        both = train_encoded(encoded, split, preset=PRESET, seed=seed)
        audio_text = train_encoded(*speech, preset=PRESET, seed=seed)
        text_image = train_encoded(*drawn, preset=PRESET, seed=seed)
        bound = train_encoded(*drawn, preset=PRESET, seed=seed, fixed={"text": audio_text.adapters["text"]})
        joint = embeddings(both.adapters, latents)
        later = embeddings({**audio_text.adapters, "image": bound.adapters["image"]}, latents)
        for query, answer, first, second in (
            ("audio", "image", audio_text, text_image),
            ("image", "audio", text_image, audio_text),
        ):
            one, other = embeddings(first.adapters, latents), embeddings(second.adapters, latents)
            ends = {
                "three together": joint,
                "three together, via text": {**joint, query: expected(joint, query, both.temperature)},
                "image bound later": later,
                "image bound later, via text": {**later, query: expected(later, query, audio_text.temperature)},
                **{
                    f"two bridges, {how}": {query: expected(one, query, temperature, other["text"]), answer: other[answer]}
                    for how, temperature in (("via text", first.temperature), ("via the nearest name", 1e-6))
                },
                "ridge regression to text": {name: linear(name, latents[name]) for name in (query, answer)},
            }
            for place in ("test-voices", "test-names"):
                rows = np.flatnonzero(split == place)
                for among in ("split", "all"):
                    for method, embedded in ends.items():
                        found = split_recall(encoded, embedded, rows, query, answer, among)
                        key = (place, f"{query} → {answer}", found.candidates)
                        figures.setdefault(key, {}).setdefault(method, []).append(found.as_json())
        for query, answer in (("audio", "text"), ("text", "audio"), ("image", "text"), ("text", "image")):
            trained = audio_text if "audio" in (query, answer) else text_image
            for method, alone in (("three together", both), ("only these two", trained)):
                embedded = embeddings(alone.adapters, latents)
                rows = np.flatnonzero(split == "test-names")
                found = split_recall(encoded, embedded, rows, query, answer)
                key = ("test-names", f"{query} → {answer}", found.candidates)
                figures.setdefault(key, {}).setdefault(method, []).append(found.as_json())
    lines = [
        [
            place,
            direction,
            f"{candidates:,}",
            method,
            *(spread([record[f"recall@{k}"] for record in records]) for k in (1, 10)),
            f"{100 * min(1, 10 / candidates):.1f}",
        ]
        for (place, direction, candidates), methods in figures.items()
        for method, records in methods.items()
    ]
    notes = (
        f"Mean ± standard deviation over seeds {SEEDS}, in %. No training row has both a clip and an image. The names of "
        "test-voices were trained with clips of other voices and with their images, those of test-names with neither. Among "
        "all clips, training clips of the correct name count as wrong for an image, because no row pairs them.\n\n"
    )
    return notes + table(["split", "direction", "among", "method", "@1", "@10", "chance @10"], lines)


if __name__ == "__main__":
    print(main())
