"""A bridge's provenance: the tables that it was trained on, the command that made it, and what is recorded, as text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
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


def installed_version() -> str:
    """The version of bridgekit, to be recorded in the provenance."""
    return version("bridgekit-core")


def command_line() -> str:
    """The command that is running, to be recorded in the provenance."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv and sys.argv[0] else "python"


def provenance_text(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Readable name to readable value of each provenance field.

    Left out are fingerprints, and modalities bound later: each entry of `provenance["bound"]` is a provenance of its own.
    """
    hidden = ("bound", "fingerprint", "modality")
    return {key.replace("_", " "): _text(value) for key, value in provenance.items() if key not in hidden}


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
