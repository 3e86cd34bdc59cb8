"""`subset`: choose the rows of a table to train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bridgekit.encoders import TEXT, Encoder
from bridgekit.errors import BridgekitError
from bridgekit.pairs import Pairs, SetAside
from bridgekit.progress import Report, progress_bars
from bridgekit.tables.reading import Home, Table, open_table

if TYPE_CHECKING:
    from bridgekit.latents.store import Latents

from bridgekit.fusion.subsets import check_choice, choose_subset
from bridgekit.tables.writing import check_place, write_pairs


@dataclass(frozen=True)
class Subset:
    """What `choose_pairs` chose.

    Arguments:
        pairs: the chosen rows and those that were kept, in the table's order. Its `set_aside` tells of rows left out.
        encoder: by whose latents, `provider:model`.
        modality: of that encoder.
        candidates: how many rows there were to choose among.
        distinct: how many different items these have.
        chosen: how many were chosen.
        kept: other splits to how many rows they have; empty where the table names no splits.
    """

    pairs: Pairs
    encoder: str
    modality: str
    candidates: int
    distinct: int
    chosen: int
    kept: Mapping[str, int]

    def leads_outside(self, table: Path) -> bool:
        """Whether a table at this place names files outside its own folder, so that reading it has to be allowed."""
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
    outside: bool = False,
    progress: bool = True,
) -> Subset:
    """Choose which rows of a table to train on: see `choose_subset`.

    Where the table names splits, only its `train` rows are thinned; the others stay, so that a bridge is measured on what it
    would have been measured on. Candidates are the rows whose item could be encoded. Rows with the same item are alike to the
    kernel: until every item has been taken once, only one of them is. Which one, the seed decides, and which row comes first,
    as all are equally good then.

    Arguments:
        source: as for `read_pairs`, or `Pairs`. Read are the columns that some plugin has an encoder for.
        k: how many rows to train on; where there are no more than that, all are.
        on: a modality (its default encoder is taken) or an encoder, `provider:model`: whose latents decide.
        method: `k-dpp` or `uniform`.
        seed: of everything random.
        out: where to write the table, if anywhere: .csv, .tsv, .jsonl, .ndjson or .parquet. Its paths are relative to its
            folder for files below it, and absolute for others.
        device: a torch device for the encoder, or `auto`.
        strict: fail where a row would be set aside.
        outside: let the table name files outside its own folder.
        progress: show progress bars on standard error.

    Raises:
        BridgekitError: the table cannot be read or written, has nothing to choose among, or there is no such method or encoder.
    """
    from bridgekit.plugins import encoder_name, load_encoder

    check_choice(method, k)
    if out is not None:
        check_place(Path(out), source)
    name = encoder_name(on)
    encoder = load_encoder(name, device)
    modality = encoder.modality
    opened = open_table(source, outside=outside)
    table = opened.pairs(_columns(opened, modality))
    split = np.asarray(table.split if table.split is not None else ["train"] * len(table))
    free = np.flatnonzero(split == "train")
    if not len(free):
        names = ", ".join(dict.fromkeys(split.tolist()))
        raise BridgekitError(f"no row is in the train split; the splits are {names}", where=table.source)

    with progress_bars(progress) as report:
        latents, set_aside = _encode(table, free, encoder, strict, report)
        order = np.flatnonzero(latents.ids >= 0)
        if method == "k-dpp":
            # Of many rows with one item the first is taken. Those of a table may all be one speaker's, so it is by the seed.
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
    """The latents of some rows' items, and all rows that cannot be used: the table's own, and those without a latent."""
    from bridgekit.latents.encode import encode_items

    modality = encoder.modality
    items = [table.columns[modality][row] for row in rows]
    latents = encode_items(encoder, items, report=report)
    missing = np.flatnonzero(latents.ids < 0).tolist()
    bad = [
        SetAside(
            table.rows[rows[position]],
            modality,
            str(items[position] or "")[:200],
            latents.failed.get(position, "no item in this column to choose by"),
        )
        for position in missing
    ]
    set_aside = (*table.set_aside, *bad)
    if set_aside and (strict or len(bad) == len(rows)):
        first = set_aside[0] if strict else bad[0]
        raise BridgekitError(
            f"{len(set_aside):,} rows cannot be used: {first.reason}",
            where=f"{table.source}, row {first.row}, column {first.column}: {first.item}",
            remedy="mend or remove them" + (", or leave out --strict to have them set aside" if strict else ""),
        )
    return latents, set_aside


def _columns(table: Table, on: str) -> list[str]:
    """A table's columns that some plugin has an encoder for, and the one to choose by, whether it is there or not."""
    from bridgekit.plugins import installed_plugins

    known = {modality for plugin in installed_plugins() for provider in plugin.providers for modality in provider.modalities}
    return list(dict.fromkeys([*(name for name in table.modalities if name in known or name == TEXT), on]))
