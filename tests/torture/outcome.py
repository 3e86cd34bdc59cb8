"""What a kind of attack found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcome:
    """What a kind of attack found.

    Arguments:
        name: the attack's.
        tried: how many times.
        held: how many times the promise held.
        failures: what went wrong, a line each, with the seed that makes it again.
        figures: what else was measured, name to a readable value.
        messages: distinct messages that were given, with numbers and paths taken out, to an example.
    """

    name: str
    tried: int
    held: int
    failures: Sequence[str] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    messages: Mapping[str, str] = field(default_factory=dict)
