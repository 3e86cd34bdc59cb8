"""`starter:spoken-words-pictures` and `starter:spoken-pictures`: clips, names and images; only test rows have all three."""

from __future__ import annotations

from bridgekit.encoders import Item
from bridgekit.hookspecs import PairSource
from bridgekit.pairs import Pairs
from bridgekit_starter import openmoji, spoken


def build() -> Pairs:
    """`starter:spoken-openmoji` and `starter:openmoji` in one table; see `_join`."""
    return _join(SOURCE.name, spoken.build(), openmoji.build())


def build_words() -> Pairs:
    """`starter:spoken-words` and the images of its names in one table; see `_join`."""
    return _join(WORDS.name, spoken.build_words(), openmoji.build(openmoji.everyday_names()))


def _join(source: str, speech: Pairs, drawn: Pairs) -> Pairs:
    """The rows of both in one table (columns `audio`, `text` and `image`).

    Rows of `train` and `val` have a name with a clip or an image, never both: audio and images are aligned only through text.
    Rows of `test-voices` and `test-names` have all three. Images of held-out names occur only in test rows.
    """
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
        source=source,
        rows=tuple(range(1, len(rows) + 1)),
        split=splits,
    )


SOURCE = PairSource(
    name="starter:spoken-pictures",
    description="starter:spoken-openmoji and 1,870 images in one table; only test rows have both clip and image",
    modalities=("audio", "text", "image"),
    build=build,
)
WORDS = PairSource(
    name="starter:spoken-words-pictures",
    description="starter:spoken-words and the images of its names in one table; only test rows have both clip and image",
    modalities=("audio", "text", "image"),
    build=build_words,
    default=True,
)
