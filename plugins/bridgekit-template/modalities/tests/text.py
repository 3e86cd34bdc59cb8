"""The plugin satisfies bridgekit's contract, and gives similar words similar vectors."""

from __future__ import annotations

from bridgekit import load_encoder
from bridgekit.testing import check_encoder

NAME = "template:statistics"


def test_the_encoder_keeps_the_contract() -> None:
    good = ["a dog barks", "Der Hund bellt.", "犬が吠える", "x", "a long text " * 500]
    bad = ["", " \n", "half\0way", "a lone surrogate \ud800"]
    check_encoder(NAME, good, bad)


def test_words_that_share_letters_are_near() -> None:
    encoder = load_encoder(NAME, "cpu")
    one, near, far = encoder.encode([encoder.prepare(text) for text in ("two kittens", "Kitten", "locomotive")])
    assert one @ near > 0.4 > 0.2 > one @ far
