"""Which items go through the model together, and how a long clip is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def groups(lengths: Sequence[int], most: int, *, mixed: bool = True) -> Iterator[list[int]]:
    """Positions of items of like length that are encoded in one forward pass.

    Arguments:
        lengths: each item's.
        most: what a group's items may have together, padding included; a single item may have more.
        mixed: whether lengths may differ within a group: only where the model masks padding wherever it could leak in.
    """
    group: list[int] = []
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[position]
        if group and ((len(group) + 1) * length > most or (not mixed and length != lengths[group[0]])):
            yield group
            group = []
        group.append(position)
    if group:
        yield group


def equal_windows(wave: Tensor, longest: int) -> Sequence[Tensor]:
    """A clip of shape (n,) in as few windows of equal length, up to a sample, as make none longer than `longest` samples.

    A window of 30 s and a rest would leave rests that are too short to hear anything in.
    """
    return torch.split(wave, math.ceil(len(wave) / math.ceil(len(wave) / longest)))
