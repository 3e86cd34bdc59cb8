"""Images generated from names, speech and field recordings, ranked by an independent image encoder (the judge).

python benchmarks/generation.py (trains the speech bridge, or reuses it)
"""

from __future__ import annotations

import csv
import os
import random
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from common import ESC10, table

from bridgekit import align, judge_generation
from bridgekit.diffusion.models import draw, open_model
from bridgekit.recipes.judge import open_gallery, shares

NAMES, SEED = 300, 0
#: Ten classes of sound and the names of their emoji, as in examples/sounds_to_pictures.py.
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
GAPS = ("captions", "mean", "none")


def from_names() -> str:
    """The text-to-image model alone: a random sample of names, and those of the split `test`, which it was trained on too."""
    from bridgekit_starter.openmoji import split_of

    gallery = open_gallery(device="cpu")
    model = open_model("starter:openmoji-64", "cpu")
    conditioning = model.conditionings[0]
    drawn = random.Random(SEED).sample(list(gallery.names), NAMES)
    test = [name for name in gallery.names if split_of(name) == "test"]
    rows = []
    for label, names in (("random sample", drawn), ("split test", test)):
        started = time.monotonic()
        pictures = draw(model, conditioning, conditioning.encode(names), seeds=list(range(len(names))))
        seconds = time.monotonic() - started
        found = shares(gallery.ranks(pictures, names))
        rows.append([label, str(len(names)), percent(found["top1"]), percent(found["top5"]), f"{seconds / len(names):.2f} s"])
    return table(["names", "images", "top-1", "top-5", "time per image"], rows)


def from_speech(work: Path) -> str:
    """Clips of the starter's speech in held-out voices."""
    align("audio", "text", "starter:spoken-openmoji", out=work / "speech")
    return records(judge_generation(work / "speech", splits=["test-voices"], gaps=GAPS, limit=NAMES, seed=SEED))


@patch.dict(os.environ, BRIDGEKIT_OUTSIDE="yes")  # the tables are not inside the bridges' folders
def from_sounds(work: Path) -> str:
    """ESC-10 with each fold held out in turn: images for all its clips, ranked among ten classes. Means over the folds."""
    with (ESC10 / "clips.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    folds = []
    for fold in "12345":
        pairs = work / f"fold{fold}.csv"
        with pairs.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["audio", "text", "split"])
            for number, row in enumerate(rows):
                split = "test" if row["fold"] == fold else "val" if number % 10 == 0 else "train"
                writer.writerow([ESC10 / row["audio"], EMOJI[row["label"]], split])
        align("audio", "text", pairs, out=work / f"fold{fold}", outside=True)
        folds.append(judge_generation(work / f"fold{fold}", gaps=GAPS, among="queries", seed=SEED, outside=True))
    means = [
        {**same[0], "pictures": sum(record["pictures"] for record in same)}
        | {name: sum(record[name] for record in same) / len(same) for name in ("top1", "top5")}
        for same in zip(*folds, strict=True)
    ]
    each = ", ".join(percent(records[0]["top1"]) for records in folds)
    return f"{records(means)}\n\nTop-1 of the five folds with `--gap captions`: {each}."


def records(found: list[dict[str, object]]) -> str:
    """Records of `judge_generation` as a table."""
    rows = [
        [
            str(r["made_from"]),
            str(r["gap"] or ""),
            str(r["pictures"]),
            str(r["candidates"]),
            percent(r["top1"]),
            percent(r["top5"]),
        ]
        for r in found
    ]
    return table(["made from", "gap", "images", "candidates", "top-1", "top-5"], rows)


def percent(share: object) -> str:
    """A fraction in percent."""
    assert isinstance(share, float)
    return f"{100 * share:.1f} %"


def main() -> str:
    """Measure all three; return the tables."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [
            "From names, text-to-image model only:\n\n" + from_names(),
            "From speech in held-out voices:\n\n" + from_speech(Path(folder)),
        ]
        parts += ["From ESC-10, leave one fold out:\n\n" + from_sounds(Path(folder))] if ESC10.is_dir() else []
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(main())
