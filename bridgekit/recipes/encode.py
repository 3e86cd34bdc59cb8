"""`encode`: a table's items into the latent store, now and perhaps on many machines, to be aligned later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from bridgekit.hardware import resolve_device
from bridgekit.latents.encoded import encode_pairs
from bridgekit.latents.on_ray import on_ray, ray_cluster
from bridgekit.latents.store import Latents
from bridgekit.pairs import Pairs, SetAside
from bridgekit.progress import progress_bars
from bridgekit.recipes.sides import choose_sides, open_encoders, open_table


@dataclass(frozen=True)
class EncodedTable:
    """What `encode_table` did.

    Arguments:
        source: the table.
        rows: how many of its rows can be used.
        encoders: modality to `provider:model`.
        latents: modality to its latents, and how they were computed.
        set_aside: the rows that cannot be used.
    """

    source: str
    rows: int
    encoders: Mapping[str, str]
    latents: Mapping[str, Latents]
    set_aside: Sequence[SetAside]


def encode_table(
    a: str | None = None,
    b: str | None = None,
    pairs: str | Path | Pairs | None = None,
    *,
    more: Sequence[str] = (),
    device: str = "auto",
    strict: bool = False,
    ray: bool = False,
    outside: bool = False,
    progress: bool = True,
) -> EncodedTable:
    """Encode a table's items into the latent store, from where `align` and `bind` take them.

    Arguments:
        a, b, pairs, more, device, strict, outside, progress: as for `align`.
        ray: encode on a Ray cluster, see `bridgekit.latents.on_ray`.

    Raises:
        BridgekitError: anything that the caller can mend; the message says how.
    """
    with progress_bars(progress) as report, ray_cluster() if ray else nullcontext():
        opened = open_encoders(choose_sides(a, b, more, pairs), resolve_device(device), report)
        table = open_table(pairs, tuple(opened), progress, outside)
        encoders = {modality: encoder for modality, (_, encoder) in opened.items()}
        names = {modality: name for modality, (name, _) in opened.items()}
        elsewhere = {modality: on_ray(name, encoder) for modality, (name, encoder) in opened.items()} if ray else {}
        encoded = encode_pairs(table, encoders, report, strict=strict, elsewhere=elsewhere)
    return EncodedTable(table.source, len(encoded.pairs), names, encoded.latents, encoded.pairs.set_aside)
