"""Where a bridge came from: the tables that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainedOn:
    """A table that a bridge was trained on.

    Arguments:
        source: its path or name, as it was given.
        modalities: the columns that were used.
        seed: the random seed of its splits, where the table has none of its own.
        bound: the modality that was bound to the bridge with it, or None for the bridge's first table.
    """

    source: str
    modalities: tuple[str, ...]
    seed: int
    bound: str | None


def trained_on(provenance: Mapping[str, Any], modalities: Sequence[str]) -> list[TrainedOn]:
    """The tables that a bridge was trained on: the first one, and one for each modality that was bound to it later.

    Arguments:
        provenance: the bridge's.
        modalities: all of the bridge's, for a table that does not say which it has.
    """
    return [
        TrainedOn(
            str(table.get("pairs", "")),
            tuple(table.get("modalities", modalities)),
            int(table.get("seed", 0)),
            table.get("modality"),
        )
        for table in (provenance, *provenance.get("bound", ()))
    ]
