"""`starter:spoken-pictures`: spoken names, names and pictures in one table with holes; only its test rows have all three."""

from __future__ import annotations

from bridgekit.encoders import Item
from bridgekit.hookspecs import PairSource
from bridgekit.pairs import Pairs
from bridgekit_starter import openmoji, spoken


def build() -> Pairs:
    """The rows of `starter:spoken-openmoji` and of `starter:openmoji` in one table (columns `audio`, `text` and `image`).

    In `train` and `val` a clip has its name and a picture has its name, and no row has both a clip and a picture: the two meet
    through the names. The rows of `test-voices` and `test-names` have all three. Pictures of names that are held out are in
    the test rows alone.
    """
    speech, drawn = spoken.build(), openmoji.build()
    assert speech.split
    assert drawn.split
    picture = dict(zip(drawn.columns["text"], drawn.columns["image"], strict=True))
    rows: list[tuple[Item | None, Item | None, Item | None, str]] = [
        (clip, name, picture[name] if split.startswith("test") else None, split)
        for clip, name, split in zip(speech.columns["audio"], speech.columns["text"], speech.split, strict=True)
    ]
    rows += [
        (None, name, image, split)
        for image, name, split in zip(drawn.columns["image"], drawn.columns["text"], drawn.split, strict=True)
        if split != "test"
    ]
    clips, names, images, splits = zip(*rows, strict=True)
    return Pairs(
        columns={"audio": clips, "text": names, "image": images},
        source=SOURCE.name,
        rows=tuple(range(1, len(rows) + 1)),
        split=splits,
    )


SOURCE = PairSource(
    name="starter:spoken-pictures",
    description="16,000 spoken names and 1,870 pictures in one table: they meet through the names, together only in test rows",
    modalities=("audio", "text", "image"),
    build=build,
)
