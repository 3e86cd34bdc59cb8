"""Data sets of the `datasets` library, and WebDataset shards, as tables of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bridgekit.hookspecs import PairProvider, hookimpl


def _open_dataset(name: str) -> Any:
    from bridgekit_datasets.library import open_dataset  # imports `datasets`, which takes a second

    return open_dataset(name)


def _open_shards(pattern: str) -> Any:
    from bridgekit_datasets.shards import open_shards

    return open_shards(pattern)


@hookimpl
def pair_providers() -> Sequence[PairProvider]:
    """Both kinds."""
    return [
        PairProvider(
            "datasets",
            "what the `datasets` library opens: datasets:org/name,split=train, or a folder; options name=, split=, revision=",
            _open_dataset,
        ),
        PairProvider("webdataset", "WebDataset shards, grouped by key: webdataset:shards/{0000..0099}.tar", _open_shards),
    ]
