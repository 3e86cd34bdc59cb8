"""Align OpenMoji images with their names, then search them by text: python find_pictures.py "something to eat" """

from __future__ import annotations

import sys

from bridgekit import align, read_pairs


def main(queries: list[str]) -> None:
    """Train on the starter's images (a few minutes the first time), then search them."""
    bridge = align("image", "text", "starter:openmoji", out="bridges/image-text")
    pairs = read_pairs("starter:openmoji", ["image", "text"])
    names = dict(zip(pairs.columns["image"], pairs.columns["text"], strict=True))
    images = [image for image in pairs.columns["image"] if image is not None]
    for query, hits in zip(queries, bridge.search("text", queries, "image", images, k=5), strict=True):
        print(f"{query}:")
        for hit in hits:
            print(f"  {hit.similarity:.2f}  {names[hit.item]}  {hit.item}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["something to eat", "bad weather"])
