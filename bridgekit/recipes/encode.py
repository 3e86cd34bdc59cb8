"""`encode`: encode a table into the latent store before aligning it, optionally on a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any

from bridgekit.hardware import resolve_device
from bridgekit.latents.encode import EncodedSide
from bridgekit.latents.encoded import check_usable, encode_pairs
from bridgekit.pairs import SetAside
from bridgekit.plugins import ours
from bridgekit.progress import progress_bars
from bridgekit.recipes.sides import RunOptions, check_columns, choose_sides, open_encoders, select_pairs, takes
from bridgekit.tables.reading import Table, open_table


@dataclass(frozen=True)
class EncodedTable:
    """Summary of an `encode_table` run.

    Arguments:
        source: the table.
        rows: number of usable rows.
        sides: modality to what was done.
        set_aside: the other rows.
    """

    source: str
    rows: int
    sides: Mapping[str, EncodedSide]
    set_aside: Sequence[SetAside]


@dataclass(frozen=True)
class EncodeOptions(RunOptions):
    """Options of `encode_table`.

    Arguments:
        a, b, pairs, more: as for `align`. With `ray`, `pairs` may also be the URL of Parquet files or WebDataset shards.
        ray: encode on a Ray cluster; needs the plugin bridgekit-ray.
        device, strict, outside, progress: see `RunOptions`.
    """

    a: str | None = None
    b: str | None = None
    pairs: Any = None
    _: KW_ONLY
    more: Sequence[str] = ()
    ray: bool = False


@takes(EncodeOptions)
def encode_table(options: EncodeOptions) -> EncodedTable:
    """Encode a table's items into the latent store, which `align` and `bind` read. Takes the fields of `EncodeOptions`.

    Raises:
        BridgekitError: anything the caller can fix; the message says how.
    """
    cluster: AbstractContextManager[Any] = ours("ray", "cluster")() if options.ray else nullcontext()
    with progress_bars(options.progress) as report, cluster as on_cluster:
        remote = ours("ray", "open_on_cluster")(options.pairs, options.columns) if options.ray else None
        if remote is not None:
            table: Table | None = remote.table
        else:
            table = (
                None if options.pairs is None else open_table(options.pairs, columns=options.columns, outside=options.outside)
            )
        names = choose_sides((options.a, options.b, *options.more), table)
        check_columns(names, table)
        opened = open_encoders(names, resolve_device(options.device), report)
        if remote is not None:  # workers read the table
            rows, sides, set_aside = ours("ray", "encode_on_cluster")(remote, opened, report)
            check_usable(str(options.pairs), rows, set_aside, strict=options.strict)
            return EncodedTable(str(options.pairs), rows, sides, set_aside)
        pairs = select_pairs(table, tuple(opened), options.progress)
        runs = {modality: on_cluster(*side) for modality, side in opened.items()} if options.ray else {}
        encoders = {modality: encoder for modality, (_, encoder) in opened.items()}
        encoded = encode_pairs(pairs, encoders, report, strict=options.strict, runs=runs)
    sides = {modality: EncodedSide.of(name, encoded.latents[modality]) for modality, (name, _) in opened.items()}
    return EncodedTable(pairs.source, len(encoded.pairs), sides, encoded.pairs.set_aside)
