"""Generate images from field recordings: python sounds_to_pictures.py ../../shared/data/esc10/clips.csv

The table lists ESC-10, recordings of ten classes, in columns `audio`, `label` and `fold`. The captions are names of emoji.
Four folds train a bridge; images are generated from clips of the fifth.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from bridgekit import Input, align, generate, judge_generation

EMOJI = {
    "dog bark": "dog face",
    "rain": "cloud with rain",
    "sea waves": "water wave",
    "baby cry": "crying face",
    "clock tick": "alarm clock",
    "person sneeze": "sneezing face",
    "helicopter": "helicopter",
    "chainsaw": "carpentry saw",
    "rooster": "rooster",
    "fire crackling": "fire",
}
LEFT_OUT, SHOWN = "5", 3
BRIDGE = Path("bridges/sounds")


def main(table: Path) -> None:
    """Align, generate images from three clips of each class, and rank the fold's images with an image encoder."""
    with table.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] in EMOJI]
    pairs = Path("sounds.csv")
    with pairs.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "text", "split"])
        for number, row in enumerate(rows):
            split = "test" if row["fold"] == LEFT_OUT else "val" if number % 10 == 0 else "train"
            writer.writerow([(table.parent / row["audio"]).absolute(), EMOJI[row["label"]], split])
    align("audio", "text", pairs, out=BRIDGE, overwrite=True, outside=True)

    test = {
        label: [table.parent / row["audio"] for row in rows if (row["label"], row["fold"]) == (label, LEFT_OUT)]
        for label in EMOJI
    }
    done = generate(BRIDGE, [Input("audio", [clip for clips in test.values() for clip in clips[:SHOWN]])], out="drawn")
    for made in done.pictures:
        print(f"{made.file}: nearest caption {made.nearest[0].item}")
    print(f"contact sheet: {done.sheet}")
    for record in judge_generation(BRIDGE, among="queries", outside=True):
        print(
            f"from {record['made_from']}: top-1 {100 * record['top1']:.0f} % of {record['pictures']} images, among ten classes"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
