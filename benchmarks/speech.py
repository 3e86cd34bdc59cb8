"""Starter speech: held-out voices and held-out names, with and without mixup.

python benchmarks/speech.py
"""

from __future__ import annotations

import numpy as np
from common import encoded_source, fusemix, spread, table, without_mixup
from openmoji import ridge

from bridgekit import PRESETS
from bridgekit.evaluation.recall import evaluate_splits

SEEDS = (0, 1)


def main() -> str:
    """Train and evaluate; return the table."""
    encoded = encoded_source("starter:spoken-openmoji", "starter:audio", "starter:text")
    split = np.asarray(encoded.pairs.split)
    preset = PRESETS["default"]
    figures: dict[tuple[str, str, int], dict[str, list[dict[str, float]]]] = {}
    for seed in SEEDS:
        methods = {
            "FuseMix": fusemix(encoded, split, preset, seed),
            "without mixup": fusemix(encoded, split, without_mixup(preset), seed),
        }
        if seed == SEEDS[0]:
            methods["ridge regression"] = ridge(encoded, split)
        for name, embed in methods.items():
            for record in evaluate_splits(encoded, split.tolist(), embed, name):
                key = (record["split"], record["direction"], record["candidates"])
                figures.setdefault(key, {}).setdefault(name, []).append(record)
    rows = [
        [
            place,
            direction,
            f"{candidates:,}",
            name,
            *(spread([record[f"recall@{k}"] for record in records]) for k in (1, 5, 10)),
        ]
        for (place, direction, candidates), by_method in figures.items()
        for name, records in by_method.items()
    ]
    return f"Mean ± standard deviation over seeds {SEEDS}, in %.\n\n" + table(
        ["split", "direction", "among", "method", "@1", "@5", "@10"], rows
    )


if __name__ == "__main__":
    print(main())
