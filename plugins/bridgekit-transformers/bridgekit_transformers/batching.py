"""Grouping items into forward passes, and splitting long clips."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def groups(lengths: Sequence[int], most: int, *, mixed: bool = True) -> Iterator[list[int]]:
    """Group items of similar length into forward passes. Yields their positions.

    Arguments:
        lengths: the length of each item.
        most: maximum total length of a group, padding included; a single item may exceed it.
        mixed: whether lengths may differ within a group, which is only safe if the model masks padding everywhere.
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
    """Split a clip of shape (n,) into the fewest windows of equal length (up to a sample) of at most `longest` samples.

    Full windows plus a remainder would leave remainders that are too short to be useful.
    """
    return torch.split(wave, math.ceil(len(wave) / math.ceil(len(wave) / longest)))
