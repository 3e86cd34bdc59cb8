"""Align your own clips and captions from Python: python own_pairs.py clips.csv

The table needs a column `audio` (paths, relative to the table) and a column `text`.
"""

from __future__ import annotations

import sys

from bridgekit import Bridge, align, read_pairs


def main(table: str) -> None:
    """Train a bridge, load it, and search the captions for the first three clips."""
    bridge = align("audio", "text", table, out="bridges/own-pairs")
    for record in bridge.metrics:
        print(record["split"], record["direction"], record["method"], f"recall@1 {record['recall@1']:.3f}")

    bridge = Bridge.load("bridges/own-pairs")
    pairs = read_pairs(table, ["audio", "text"])
    clips = [clip for clip in pairs.columns["audio"][:3] if clip is not None]
    captions = list(dict.fromkeys(caption for caption in pairs.columns["text"] if caption is not None))
    for clip, hits in zip(clips, bridge.search("audio", clips, "text", captions, k=3), strict=True):
        print(clip, "→", ", ".join(f"{hit.item} ({hit.similarity:.2f})" for hit in hits))


if __name__ == "__main__":
    main(sys.argv[1])
