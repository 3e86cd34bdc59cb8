"""Held-out emoji: FuseMix with and without mixup, and linear methods on the same latents, over five seeds.

python benchmarks/openmoji.py
"""

from __future__ import annotations

import numpy as np
import torch
from common import encoded_source, fusemix, random_split, spread, table, validation, without_mixup
from numpy.typing import NDArray
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit import PRESETS
from bridgekit.evaluation.methods import closed_forms
from bridgekit.evaluation.recall import Embed, evaluate_splits
from bridgekit.latents.encoded import EncodedPairs

SEEDS = range(5)
#: Strengths of scikit-learn's Ridge; the best on the validation rows is taken.
RIDGE_ALPHAS = (1.0, 10.0, 100.0, 1_000.0, 10_000.0, 100_000.0)
PRESET = PRESETS["default"]


def ridge(encoded: EncodedPairs, split: NDArray[np.str_]) -> Embed:
    """scikit-learn's Ridge from images to names, with alpha selected on validation rows."""
    a, b = encoded.ids
    rows = {m: encoded.latents[m].matrix[torch.from_numpy(ids[split == "train"])] for m, ids in encoded.ids.items()}
    scale = {m: StandardScaler().fit(each.double().numpy()) for m, each in rows.items()}
    x, y = (scale[m].transform(rows[m].double().numpy()) for m in (a, b))

    def embed_with(model: Ridge) -> Embed:
        def embed(modality: str, matrix: Tensor) -> Tensor:
            scaled = scale[modality].transform(matrix.double().numpy())
            return normalize(torch.from_numpy(model.predict(scaled) if modality == a else scaled).float(), dim=-1)

        return embed

    fitted = [embed_with(Ridge(alpha=alpha).fit(x, y)) for alpha in RIDGE_ALPHAS]
    return max(fitted, key=lambda embed: validation(encoded, split).figures(embed)["score"])


def cca(encoded: EncodedPairs, split: NDArray[np.str_]) -> Embed:
    """scikit-learn's CCA after PCA, with both dimensions selected on validation rows."""
    score = validation(encoded, split).figures
    a, b = encoded.latents
    train = {m: encoded.latents[m].matrix[torch.from_numpy(encoded.ids[m][split == "train"])].double().numpy() for m in (a, b)}
    best: tuple[float, Embed] | None = None
    for width in (32, 64, 128):
        steps = {m: make_pipeline(StandardScaler(), PCA(width, random_state=0)).fit(train[m]) for m in (a, b)}
        model = CCA(n_components=width // 2, max_iter=1_000).fit(steps[a].transform(train[a]), steps[b].transform(train[b]))

        def embed(modality: str, matrix: Tensor, steps: dict[str, object] = steps, model: CCA = model) -> Tensor:
            reduced = steps[modality].transform(matrix.double().numpy())  # type: ignore[attr-defined]
            if modality == a:
                return normalize(torch.from_numpy(model.transform(reduced)).float(), dim=-1)
            stand_in = np.zeros((len(reduced), reduced.shape[1]))
            return normalize(torch.from_numpy(model.transform(stand_in, reduced)[1]).float(), dim=-1)

        value = score(embed)["score"]
        best = (value, embed) if best is None or value > best[0] else best
    assert best is not None
    return best[1]


def main() -> str:
    """Train and evaluate; return the table."""
    encoded = encoded_source("starter:openmoji", "starter:image", "starter:text")
    figures: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in SEEDS:
        split = random_split(encoded, seed)
        closed = closed_forms(encoded, split, PRESET, seed, {})["closed form"]
        methods = {
            "FuseMix": fusemix(encoded, split, PRESET, seed),
            "without mixup": fusemix(encoded, split, without_mixup(PRESET), seed),
            "closed form (regularised CCA)": closed.embed,
            "ridge regression (scikit-learn)": ridge(encoded, split),
            "PCA + CCA (scikit-learn)": cca(encoded, split),
        }
        for name, embed in methods.items():
            for record in evaluate_splits(encoded, split.tolist(), embed, name):
                if record["among"] == "split":
                    figures.setdefault((name, record["direction"]), []).append(record)
    rows = []
    for name in dict.fromkeys(method for method, _ in figures):
        cells = [
            spread([record[f"recall@{k}"] for record in figures[name, direction]])
            for direction in ("image → text", "text → image")
            for k in (1, 5, 10)
        ]
        mean = spread(
            [
                sum(figures[name, d][seed][f"recall@{k}"] for d in ("image → text", "text → image") for k in (1, 5, 10)) / 6
                for seed in SEEDS
            ]
        )
        rows.append([name, *cells, mean])
    queries = figures["FuseMix", "image → text"][0]
    head = ["method", *(f"{way} @{k}" for way in ("image → text", "text → image") for k in (1, 5, 10)), "mean of the six"]
    about = f"{queries['queries']:.0f} held-out emoji among {queries['candidates']:.0f}"
    return f"{about}; mean ± standard deviation over 5 splits and seeds, in %.\n\n" + table(head, rows)


if __name__ == "__main__":
    print(main())
