"""The index of the latent store finds what a dictionary finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit.latents.store import ShardIndex

# Few values, and zeros at both ends, so that hashes repeat and differ in their zeros alone.
hashes = st.lists(st.sampled_from(b"\0\1\xff"), min_size=4, max_size=4).map(bytes)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.lists(hashes, min_size=1, max_size=6), max_size=5), st.lists(hashes, max_size=8))
def test_the_row_that_was_added_last_is_found_and_nothing_else(shards: list[list[bytes]], asked: list[bytes]) -> None:
    index, expected = ShardIndex(), dict[bytes, tuple[Path, int]]()
    for number, shard in enumerate(shards):
        path = Path(str(number))
        index.add(path, np.frombuffer(b"".join(shard), np.uint8).reshape(len(shard), 4))
        expected |= {digest: (path, row) for row, digest in enumerate(shard)}
        for digest in (*asked, *shard):
            assert index.get(digest) == expected.get(digest)
