"""How the default preset was chosen: variants of it, measured on validation rows of two tables.

python benchmarks/presets.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from common import encoded_source, fusemix, random_split, table, without_mixup

from bridgekit import PRESETS, Preset
from bridgekit.alignment import validation

DEFAULT = PRESETS["default"]
VARIANTS: dict[str, Preset] = {
    "default": DEFAULT,
    "without mixup": without_mixup(DEFAULT),
    "from a random start": replace(DEFAULT, warm_start=0.0),
    "without dropout on the input": replace(DEFAULT, input_dropout=0.0),
    "input dropout 0.5": replace(DEFAULT, input_dropout=0.5),
    "no residual block": replace(DEFAULT, blocks=0),
    "learning rate 1e-3": replace(DEFAULT, lr=1e-3),
    "one lambda a batch, halves": replace(DEFAULT, pairing="halves", lambda_per="batch"),
    "paper's adapters and lr, 30 epochs of 1,024": replace(
        PRESETS["paper"], batch_size=1_024, min_steps_per_epoch=3, epochs=30, patience=15
    ),
}


def main() -> str:
    """Train every variant on both tables; gives the table."""
    pictures = encoded_source("starter:openmoji", "starter:image", "starter:text")
    speech = encoded_source("starter:spoken-openmoji", "starter:audio", "starter:text")
    rows = []
    for name, preset in VARIANTS.items():
        scores = []
        for seed in (0, 1):
            split = random_split(pictures, seed)
            scores.append(validation(pictures, split)(fusemix(pictures, split, preset, seed))["score"])
        split = np.asarray(speech.pairs.split)
        score = validation(speech, split)(fusemix(speech, split, preset, 0))["score"]
        rows.append([name, f"{100 * np.mean(scores):.1f}", f"{100 * score:.1f}"])
        print(rows[-1], flush=True)
    head = ["variant", "starter:openmoji (mean of 2 splits)", "starter:spoken-openmoji (unseen names)"]
    return "Mean of recall@1, @5 and @10 both ways on validation rows, in %. Test splits took no part.\n\n" + table(head, rows)


if __name__ == "__main__":
    print(main())
