"""A bridge's provenance: the command that is running, and what is recorded as readable text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
