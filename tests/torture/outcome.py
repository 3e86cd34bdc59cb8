"""The result of a kind of attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcome:
    """The result of a kind of attack.

    Arguments:
        name: name of the attack.
        tried: number of attempts.
        held: number of attempts in which the promise held.
        failures: one line per failure, with the seed that reproduces it.
        figures: other measurements: name to formatted value.
        messages: distinct error messages without numbers and paths, each with an example.
    """

    name: str
    tried: int
    held: int
    failures: Sequence[str] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    messages: Mapping[str, str] = field(default_factory=dict)
