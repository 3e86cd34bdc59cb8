"""`check`: find problems of a table before training on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from bridgekit.checks.findings import Finding, TableReport
from bridgekit.checks.table import check_table
from bridgekit.encoders import TEXT, Encoder, is_modality
from bridgekit.errors import BridgekitError
from bridgekit.hardware import resolve_device
from bridgekit.pairs import EXTENSIONS
from bridgekit.plugins import default_modalities, encoder_name, load_encoder
from bridgekit.progress import progress_bars
from bridgekit.recipes.sides import check_columns, choose_sides, takes
from bridgekit.tables.reading import Table, open_table


@dataclass(frozen=True)
class CheckOptions:
    """Options of `check_pairs`.

    Arguments:
        pairs: a table, folder, source or `Pairs`, as for `align`.
        a, b, more: modalities or encoders, as for `align`; by default all columns that are modalities. If no encoder for a
            modality is installed, its latents are not checked.
        latents: encode the items and check their latents. They are stored, so `align` will not encode them again.
        device, outside, columns, progress: see `RunOptions`.
    """

    pairs: Any
    a: str | None = None
    b: str | None = None
    _: KW_ONLY
    more: Sequence[str] = ()
    latents: bool = True
    device: str = "auto"
    outside: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    progress: bool = True


@takes(CheckOptions)
def check_pairs(options: CheckOptions) -> TableReport:
    """Check the rows, files, splits and latents of a table before training on it.

    `check_pairs(pairs, a, b, *, ...)`: takes the fields of `CheckOptions`.

    Raises:
        BridgekitError: the table cannot be read, has no usable row, or a named encoder is not installed.
    """
    with progress_bars(options.progress) as report:
        table = open_table(options.pairs, columns=options.columns, outside=options.outside)
        names = [name for name in (options.a, options.b, *options.more) if name]
        encoders, findings = _open_sides(table, names, options.device if options.latents else None)
        return check_table(table.pairs(tuple(encoders)), encoders, report, findings)


def _open_sides(table: Table, names: Sequence[str], device: str | None) -> tuple[dict[str, Encoder | None], list[Finding]]:
    """Modality to its encoder; None if none is installed or no device is given."""
    if not names:
        known = {*EXTENSIONS, TEXT, *default_modalities()}
        names = [name for name in table.modalities if name in known]
        names = names if len(names) > 1 else choose_sides((None, None), table)
    check_columns(names, table)
    encoders: dict[str, Encoder | None] = {}
    findings = []
    for name in names:
        encoder = None
        try:
            if device or not is_modality(name):
                encoder = load_encoder(encoder_name(name), resolve_device(device or "cpu"))
        except BridgekitError as error:
            if not is_modality(name):
                raise
            what = f"the latents of {name} were not checked: {error.what}"
            findings.append(Finding("encoder", "note", what, error.remedy or "install a plugin with an encoder for it"))
        encoders[encoder.modality if encoder else name] = encoder if device else None
    return encoders, findings
