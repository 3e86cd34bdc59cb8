"""Where a bridge came from: the tables that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainedOn:
    """A table that a bridge was trained on.

    Arguments:
        source: its path or name, as it was given.
        modalities: those of its columns that were used.
        seed: which its rows were split by, where it has no splits of its own.
        bound: the modality that was bound to the bridge with it, or None for the table that the bridge began with.
    """

    source: str
    modalities: tuple[str, ...]
    seed: int
    bound: str | None
