"""A bridge's provenance: the tables it was trained on, the command that made it, and all of it as text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainedOn:
    """A table that a bridge was trained on.

    Arguments:
        source: its path or name, as the user gave it.
        modalities: the columns that were used.
        seed: the random seed of its splits, unless the table defines them.
        bound: the modality that was bound to the bridge with it, or None for the bridge's first table.
        columns: modality to the column that the user named.
    """

    source: str
    modalities: tuple[str, ...]
    seed: int
    bound: str | None
    columns: Mapping[str, str] = field(default_factory=dict)


def installed_version() -> str:
    """The version of bridgekit, for the provenance."""
    return version("bridgekit-core")


def command_line() -> str:
    """The running command, for the provenance."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv and sys.argv[0] else "python"


def provenance_text(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Readable names and values of the fields, without fingerprints and `bound`, whose entries are provenances themselves."""
    hidden = ("bound", "fingerprint", "modality")
    return {key.replace("_", " "): _text(value) for key, value in provenance.items() if key not in hidden}


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
