"""Align OpenMoji pictures with their names and find pictures by words: python find_pictures.py "something to eat" """

from __future__ import annotations

import sys

from bridgekit import align, read_pairs


def main(words: list[str]) -> None:
    """Train on the starter's pictures (a few minutes the first time), then search them."""
    bridge = align("image", "text", "starter:openmoji", out="bridges/image-text")
    pairs = read_pairs("starter:openmoji", ["image", "text"])
    names = dict(zip(pairs.columns["image"], pairs.columns["text"], strict=True))
    pictures = [picture for picture in pairs.columns["image"] if picture is not None]
    for word, hits in zip(words, bridge.search("text", words, "image", pictures, k=5), strict=True):
        print(f"{word}:")
        for hit in hits:
            print(f"  {hit.similarity:.2f}  {names[hit.item]}  {hit.item}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["something to eat", "bad weather"])
