"""What runs share: options, opening the encoders of the sides, and opening the table of pairs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

from bridgekit.encoders import TEXT, Encoder
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.methods import METHODS, Method
from bridgekit.pairs import Pairs
from bridgekit.plugins import (
    default_modalities,
    default_pair_source,
    encoder_name,
    known_modality,
    load_encoder,
    recorded_name,
)
from bridgekit.progress import Report
from bridgekit.tables.columns import listed_columns
from bridgekit.tables.reading import Table, source_table
from bridgekit.terminal import say

#: The method of `TrainingOptions` that leaves the choice to validation.
AUTO: Literal["auto"] = "auto"

P = ParamSpec("P")
O = TypeVar("O")  # noqa: E741
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options common to all runs.

    Arguments:
        device: a torch device, or `auto`.
        columns: modality to the name of its column in the table, where that is not the modality's.
        strict: fail if a row would be set aside.
        outside: let tables refer to files outside their own folders.
        progress: show progress bars on standard error.
    """

    device: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    outside: bool = False
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(RunOptions):
    """Options of runs that train and save a bridge.

    Arguments:
        out: the bridge's folder.
        seed: random seed. The same call trains byte-identical adapters on the same machine.
        method: `auto` takes what validation prefers of ridge regression, the closed form, self-training and FuseMix; or one of
            `ridge`, `closed form`, `self-training` and `FuseMix`.
        half: keep latents in half precision (float16), which takes half of the memory. Each batch is converted to float32.
        resume: continue an interrupted run of the same call, or reuse its finished bridge.
        overwrite: replace another bridge at `out`.
    """

    out: str | Path | None = None
    seed: int = 0
    method: Literal["auto"] | Method = AUTO
    half: bool = False
    resume: bool = True
    overwrite: bool = False


def known_method(name: str) -> Literal["auto"] | Method:
    """The method of this name, in any capitals, with a hyphen or a space.

    Raises:
        BridgekitError: there is no such method.
    """
    known: list[Literal["auto"] | Method] = [AUTO, *METHODS]
    found = next((method for method in known if _plain(method) == _plain(name)), None)
    if found is None:
        names = ", ".join(method.lower().replace(" ", "-") for method in known)
        raise BridgekitError(f"unknown method {name!r}", remedy=f"use one of {names}")
    return found


def _plain(name: str) -> str:
    return name.casefold().replace("-", " ")


def takes(options: Callable[P, O]) -> Callable[[Callable[[O], R]], Callable[P, R]]:
    """Decorator for a function of one options object: callers pass the object's fields as arguments."""

    def decorate(run: Callable[[O], R]) -> Callable[P, R]:
        @wraps(run)
        def call(*arguments: P.args, **named: P.kwargs) -> R:
            return run(options(*arguments, **named))

        call.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]
        return call

    return decorate


def choose_sides(names: Sequence[str | None], table: Table | None) -> list[str]:
    """The modalities or encoders of a run: the given ones, or the table's columns that have a default encoder.

    Arguments:
        names: the user's first side, second side, and any others; None if not given.
        table: the opened table; None if no table was given.
    """
    a, b, *more = names
    if a or b or more or table is None:
        return [a or "audio", b or TEXT, *filter(None, more)]
    columns = table.modalities
    known = [column for column in columns if column in default_modalities() and column != TEXT]
    if columns and not known and TEXT not in columns:
        raise BridgekitError(
            f"no column of the table is named after a modality; its columns are {listed_columns(columns)}",
            where=table.source,
            remedy="name the columns with the items, for example --column image=NAME --column text=NAME",
        )
    # With fewer than two such columns, selecting them raises an error that names the missing one.
    return [*(known or ["audio"]), *([TEXT] if len(known) < 2 or TEXT in columns else [])]


def check_columns(names: Sequence[str], table: Table | None) -> None:
    """Raise BridgekitError if the table lacks a side's column, before encoders are opened, which takes seconds.

    Arguments:
        names: the sides: modalities or encoders. Sides whose modality their names do not tell are left out.
        table: the opened table; None if no table was given.
    """
    known = [modality for modality in map(known_modality, names) if modality]
    missing = [] if table is None else [modality for modality in known if modality not in table.modalities]
    if table is None or not missing:
        return
    every = len(known) == len(names) > 1
    if every or Path(table.source).is_file():  # the columns of a folder or a list may depend on all sides together
        table.pairs(known if every else missing)


def open_encoders(names: Sequence[str], device: str, report: Report) -> dict[str, tuple[str, Encoder]]:
    """Modality to full name and opened encoder, for each side."""
    opened: dict[str, tuple[str, Encoder]] = {}
    for number, name in enumerate(names):
        full = encoder_name(name)
        report("opening encoders", number, len(names))
        encoder = load_encoder(full, device)
        if encoder.modality in opened:
            raise BridgekitError(f"two sides are {encoder.modality}", where=", ".join(names), remedy="use different modalities")
        opened[encoder.modality] = (recorded_name(full, encoder), encoder)
    report("opening encoders", len(names), len(names))
    return opened


def select_pairs(table: Table | None, modalities: Sequence[str], announce: bool) -> Pairs:
    """The usable rows of the given table, or of a plugin's default source for these modalities."""
    if table is None:
        source = default_pair_source(modalities)
        if announce:  # it may be large, and its files may have to be generated first
            say(f"Pairs: {source.name} ({source.description}), since no table was given", sys.stderr)
        table = source_table(source.name, source.modalities, source.build, {})
    return table.pairs(modalities)
