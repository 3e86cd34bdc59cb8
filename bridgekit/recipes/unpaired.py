"""Piles of unpaired items: what `align --unpaired` is given, as latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bridgekit.encoders import Encoder
from bridgekit.errors import BridgekitError
from bridgekit.latents.encode import encode_items
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.pairs import SetAside
from bridgekit.progress import Report
from bridgekit.recipes.inputs import Inputs, exists, list_items, modalities_in
from bridgekit.recipes.sides import RunOptions


@dataclass(frozen=True)
class Unpaired:
    """Unpaired items with their latents.

    Arguments:
        latents: modality to (u, d), one row for each distinct item that is not in the table.
        fingerprints: modality to a hash over the items.
        set_aside: items that cannot be used.
    """

    latents: Mapping[str, Tensor] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    set_aside: Sequence[SetAside] = ()


def read_unpaired(arguments: Sequence[str | Path], sides: Sequence[str], options: RunOptions) -> dict[str, Inputs]:
    """Modality to its items in folders, tables and .txt files.

    Raises:
        BridgekitError: a path does not exist, cannot be read, or has no items of these sides; or there are not two sides.
    """
    if arguments and len(sides) != 2:
        raise BridgekitError(f"unpaired items need two sides, not {len(sides)}", remedy="omit --unpaired")
    read: dict[str, Inputs] = {}
    for argument in map(str, arguments):
        if not exists(argument):
            raise BridgekitError("there is no such file or folder", where=argument[:200], remedy="check the path of --unpaired")
        for modality in _modalities_in(argument, sides):
            new = list_items(argument, modality, columns=options.columns, outside=options.outside)
            old = read.get(modality, Inputs(modality, (), ()))
            parts = [*old.items, *new.items], [*old.rows, *new.rows], [*old.set_aside, *new.set_aside]
            read[modality] = Inputs(modality, *parts)
    return read


def _modalities_in(argument: str, sides: Sequence[str]) -> list[str]:
    try:
        return modalities_in(argument, sides)
    except BridgekitError as error:
        remedy = f"give a folder, table or .txt file with {' or '.join(sides)}"
        raise BridgekitError(f"no unpaired {' or '.join(sides)} here", where=error.where, remedy=remedy) from None


def encode_unpaired(
    read: Mapping[str, Inputs], encoders: Mapping[str, Encoder], table: EncodedPairs, options: RunOptions, report: Report
) -> Unpaired:
    """Encode unpaired items. Those that are also in the table are left out, so that test items stay unseen.

    Raises:
        BridgekitError: an item cannot be used and `options.strict` is set, or all are in the table.
    """
    latents, fingerprints, set_aside = {}, {}, list[SetAside]()
    for modality, inputs in read.items():
        found = encode_items(encoders[modality], inputs.items, report=report)
        set_aside += inputs.set_aside
        for at, reason in found.failed.items():
            set_aside.append(SetAside(inputs.rows[at] or at + 1, modality, str(inputs.items[at])[:200], reason))
        known = set(table.latents[modality].contents)
        new = [row for row, content in enumerate(found.contents) if content not in known]
        if new:
            latents[modality], fingerprints[modality] = found.matrix[torch.tensor(new)], found.fingerprint
    if options.strict and set_aside:
        first = set_aside[0]
        raise BridgekitError(
            f"an unpaired item cannot be used: {first.reason}",
            where=f"{first.column}: {first.item}",
            remedy="fix or remove it, or omit --strict to have it set aside",
        )
    if read and not latents:
        what = "every unpaired item is in the table, or cannot be used"
        raise BridgekitError(what, where=table.pairs.source, remedy="give others, or omit --unpaired")
    return Unpaired(latents, fingerprints, set_aside)
