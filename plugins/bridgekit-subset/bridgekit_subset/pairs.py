"""`subset`: choose the rows of a table to train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bridgekit.encoders import TEXT, Encoder
from bridgekit.errors import BridgekitError
from bridgekit.latents.encode import encode_items
from bridgekit.latents.store import Latents
from bridgekit.pairs import Pairs, SetAside
from bridgekit.plugins import encoder_name, installed_plugins, load_encoder
from bridgekit.progress import Report, progress_bars
from bridgekit.recipes.sides import check_columns
from bridgekit.tables.reading import Table, open_table
from bridgekit.tables.usable import Home
from bridgekit_subset.k_dpp import check_choice, choose_subset
from bridgekit_subset.writing import check_place, write_pairs


@dataclass(frozen=True)
class Subset:
    """The result of `choose_pairs`.

    Arguments:
        pairs: the chosen rows and those of other splits, in the table's order; unusable rows are in `set_aside`.
        encoder: the encoder whose latents were used, `provider:model`.
        modality: the encoder's modality.
        candidates: number of rows to choose from.
        distinct: number of distinct items among them.
        chosen: number of chosen rows.
        kept: other splits to number of rows; empty if the table defines no splits.
    """

    pairs: Pairs
    encoder: str
    modality: str
    candidates: int
    distinct: int
    chosen: int
    kept: Mapping[str, int]

    def leads_outside(self, table: Path) -> bool:
        """Whether a table at this path would refer to files outside its own folder, and so need --outside."""
        home = Home(table.parent)
        return any(isinstance(item, Path) and not home.holds(item) for items in self.pairs.columns.values() for item in items)


def choose_pairs(
    source: str | Path | Pairs,
    k: int,
    *,
    on: str = TEXT,
    method: str = "k-dpp",
    seed: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
    strict: bool = False,
    columns: Mapping[str, str] | None = None,
    outside: bool = False,
    progress: bool = True,
) -> Subset:
    """Choose which rows of a table to train on: see `choose_subset`.

    If the table defines splits, only `train` rows are chosen from; the others are kept, so that evaluation does not change.
    Candidates are rows whose item can be encoded. With k-dpp, rows with the same item add nothing to each other, so each item
    is chosen once before any repeats; the seed decides which of its rows, and which row comes first.

    Arguments:
        source: as for `read_pairs`, or `Pairs`. All columns with an installed encoder are read.
        k: how many rows to train on; if there are no more, all are chosen.
        on: a modality, for its default encoder, or an encoder, `provider:model`: the latents to choose by.
        method: `k-dpp` or `uniform`.
        seed: random seed.
        out: where to write the table: .csv, .tsv, .jsonl, .ndjson or .parquet; None writes none. Paths of files in its folder
            or below are relative, others absolute.
        device: a torch device for the encoder, or `auto`.
        strict: fail if a row would be set aside.
        outside: let the table refer to files outside its own folder.
        progress: show progress bars on standard error.

    Raises:
        BridgekitError: the table cannot be read or written or has no candidates, or the method or encoder does not exist.
    """
    check_choice(method, k)
    if out is not None:
        check_place(Path(out), source)
    name = encoder_name(on)
    opened = open_table(source, columns=columns, outside=outside)
    check_columns([on], opened)
    encoder = load_encoder(name, device)
    modality = encoder.modality
    table = opened.pairs(_columns(opened, modality))
    split = np.asarray(table.split if table.split is not None else ["train"] * len(table))
    free = np.flatnonzero(split == "train")
    if not len(free):
        names = ", ".join(dict.fromkeys(split.tolist()))
        remedy = "write `train` in the column `split` of the rows to choose from, or leave the column out"
        raise BridgekitError(f"no row is in the train split; the splits are {names}", where=table.source, remedy=remedy)

    with progress_bars(progress) as report:
        latents, set_aside = _encode(table, free, encoder, strict, report)
        order = np.flatnonzero(latents.ids >= 0)
        if method == "k-dpp":
            # The first row of each item is taken. In table order, those might all be of one speaker.
            order = np.random.default_rng(seed).permutation(order)
        ids = latents.ids[order]
        picked = choose_subset(latents.matrix[ids], k, method=method, seed=seed, report=report)

    stays = np.flatnonzero(split != "train")
    rows = np.sort(np.concatenate([free[order[picked]], stays]))
    taken = table.take(rows.tolist())
    chosen = Pairs(taken.columns, taken.source, taken.rows, taken.split, taken.group, set_aside)
    if out is not None:
        write_pairs(chosen, Path(out))
    kept = {name: int((split == name).sum()) for name in dict.fromkeys(split[stays].tolist())}
    return Subset(chosen, name, modality, len(order), len(np.unique(ids)), len(picked), kept)


def _encode(
    table: Pairs, rows: NDArray[np.int64], encoder: Encoder, strict: bool, report: Report
) -> tuple[Latents, tuple[SetAside, ...]]:
    """The latents of these rows' items, and all unusable rows: the table's own and those without latents."""
    modality = encoder.modality
    items = [table.columns[modality][row] for row in rows]
    latents = encode_items(encoder, items, report=report)
    missing = np.flatnonzero(latents.ids < 0).tolist()
    bad = [
        SetAside(
            table.rows[rows[position]],
            modality,
            str(items[position] or "")[:200],
            latents.failed.get(position, "no item in the column to choose by"),
        )
        for position in missing
    ]
    set_aside = (*table.set_aside, *bad)
    if set_aside and (strict or len(bad) == len(rows)):
        first = set_aside[0] if strict else bad[0]
        raise BridgekitError(
            f"{len(set_aside):,} rows cannot be used: {first.reason}",
            where=f"{table.source}, row {first.row}, column {first.column}: {first.item}",
            remedy="fix or remove them" + (", or omit --strict to have them set aside" if strict else ""),
        )
    return latents, set_aside


def _columns(table: Table, on: str) -> list[str]:
    """The table's columns with an installed encoder, plus the one to choose by, present or not."""
    known = {modality for plugin in installed_plugins() for provider in plugin.providers for modality in provider.modalities}
    return list(dict.fromkeys([*(name for name in table.modalities if name in known or name == TEXT), on]))
