"""How the default preset was chosen: variants evaluated on the validation rows of two tables.

python benchmarks/presets.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from common import encoded_source, fusemix, random_split, spread, table, validation, without_mixup
from numpy.typing import NDArray

from bridgekit import PRESETS, Preset
from bridgekit.latents.encoded import EncodedPairs

DEFAULT = PRESETS["default"]
VARIANTS: dict[str, Preset] = {
    "default": DEFAULT,
    "without mixup": without_mixup(DEFAULT),
    "one lambda per batch, halves": replace(DEFAULT, pairing="halves", lambda_per="batch"),
    "random start": replace(DEFAULT, warm_start=0.0),
    "without input dropout": replace(DEFAULT, input_dropout=0.0),
    "without the residual block": replace(DEFAULT, blocks=0),
}
#: The paper's adapters are thirty times as large, so they are measured only on the small table.
PAPER = replace(PRESETS["paper"], batch_size=1_024, min_steps_per_epoch=3, epochs=30)


def main() -> str:
    """Train every variant on both tables; return the table."""
    pictures = encoded_source("starter:openmoji", "starter:image", "starter:text")
    speech = encoded_source("starter:spoken-openmoji", "starter:audio", "starter:text")

    def score(encoded: EncodedPairs, split: NDArray[np.str_], preset: Preset, seed: int) -> float:
        return validation(encoded, split).figures(fusemix(encoded, split, preset, seed))["score"]

    def on_pictures(preset: Preset, seeds: Sequence[int] = (0, 1)) -> str:
        return spread([score(pictures, random_split(pictures, seed), preset, seed) for seed in seeds])

    names = np.asarray(speech.pairs.split)
    rows = [[name, on_pictures(preset), f"{100 * score(speech, names, preset, 0):.1f}"] for name, preset in VARIANTS.items()]
    rows.append(["the paper's adapters and learning rates, 30 epochs (1 split)", on_pictures(PAPER, (0,)), "not measured"])
    head = ["variant", "starter:openmoji (2 splits and seeds)", "starter:spoken-openmoji (held-out names, seed 0)"]
    return "Mean of recall@1, @5 and @10 in both directions on validation rows, in %. Test splits were not used.\n\n" + table(
        head, rows
    )


if __name__ == "__main__":
    print(main())
