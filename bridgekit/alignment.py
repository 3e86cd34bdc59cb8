"""`align`: piles of files become one space. Encode once, fuse, evaluate, save a bridge."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bridgekit.bridge import Bridge, Side, check_free
from bridgekit.cache import cache_folder, one_writer
from bridgekit.card import command_line
from bridgekit.distributed import first_process_first, joined_processes, rank
from bridgekit.encoders import TEXT, Encoder, Item, resolve_device
from bridgekit.errors import BridgekitError
from bridgekit.evaluation import EncodedPairs, encode_pairs, refuse_leaks, test_splits
from bridgekit.fitting import measure, measure_gap, train_encoded
from bridgekit.fusion.adapter import Adapter, FrozenSide
from bridgekit.fusion.training import PRESETS, Preset
from bridgekit.pairs import Pairs, SetAside, read_pairs, split_pairs, table_modalities, told_columns
from bridgekit.pictures import heat_map, training_curves
from bridgekit.plugins import default_modalities, default_pair_source, encoder_name, load_encoder, recorded_name
from bridgekit.precision import product_dtype
from bridgekit.progress import Report, progress_bars


@dataclass(frozen=True)
class Alignment:
    """What a run of `align` or `bind` did.

    Arguments:
        bridge: the saved bridge.
        folder: where it is.
        set_aside: the rows that could not be used.
        example: an item that training never saw, to try a search with.
        reused: whether the bridge was already there, made by the same call.
    """

    bridge: Bridge
    folder: Path
    set_aside: Sequence[SetAside]
    example: Item
    reused: bool


def align(
    a: str | None = None,
    b: str | None = None,
    pairs: str | Path | Pairs | None = None,
    *,
    more: Sequence[str] = (),
    out: str | Path | None = None,
    preset: str | Preset = "default",
    frozen: str | None = None,
    seed: int = 0,
    device: str = "auto",
    strict: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    outside: bool = False,
    write_report: bool = True,
    progress: bool = True,
) -> Bridge:
    """Align two or more modalities with FuseMix and save the bridge.

    Arguments:
        a, b: a modality (its default encoder is taken) or an encoder, `provider:model`. Where neither is given, the table's
            columns say which modalities; without a table they are audio and text.
        pairs: a table (CSV, TSV, JSON Lines, Parquet), a folder of class folders, the name of a plugin's source, or `Pairs`.
            By default the source that a plugin brings for these modalities. With three or more modalities, rows may have
            holes, as long as two items are left; rows must join all modalities with each other, be it through others.
        more: further modalities or encoders.
        out: the bridge's folder; by default `bridges/<a>-<b>` here.
        preset: `default`, `paper`, or a `Preset`.
        frozen: a modality whose encoder's own latents are to be the shared space.
        seed: of everything random. The same call gives the same adapters, byte for byte, on the same machine.
        device: a torch device, or `auto`.
        strict: fail where a row would be set aside.
        resume: go on from an interrupted run of the same call, and reuse a finished bridge of the same call.
        overwrite: replace another bridge at `out`.
        outside: let the table name files outside its own folder.
        write_report: put a report beside the bridge, see `bridgekit.report`. One that cannot be made is a warning.
        progress: show progress bars on standard error.

    Returns:
        the bridge, saved, with `metrics` for every test split, of the baselines and of FuseMix. Where training diverged, it is
        the best state before, and `provenance["diverged"]` is the epoch in which that happened.

    Raises:
        BridgekitError: anything that the caller can mend; the message says how.
    """
    return run_alignment(
        a,
        b,
        pairs,
        more=more,
        out=out,
        preset=preset,
        frozen=frozen,
        seed=seed,
        device=device,
        strict=strict,
        resume=resume,
        overwrite=overwrite,
        outside=outside,
        write_report=write_report,
        progress=progress,
    ).bridge


@joined_processes()
def run_alignment(
    a: str | None = None,
    b: str | None = None,
    pairs: str | Path | Pairs | None = None,
    *,
    more: Sequence[str] = (),
    out: str | Path | None = None,
    preset: str | Preset = "default",
    frozen: str | None = None,
    seed: int = 0,
    device: str = "auto",
    strict: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    outside: bool = False,
    write_report: bool = True,
    progress: bool = True,
) -> Alignment:
    """`align`, with an account of what was done. Arguments and errors are the same.

    Where `torchrun` started several processes, they train together; all are given the bridge that the first one saved.
    """
    started = time.monotonic()
    name, chosen = _preset(preset)
    device = resolve_device(device)
    names = choose_sides(a, b, more, pairs)
    progress = progress and rank() == 0
    with progress_bars(progress) as report:
        encoders = open_encoders(names, device, report)
    if frozen is not None and frozen not in encoders:
        raise BridgekitError(f"{frozen!r} cannot be frozen: it is not a side", remedy=f"use one of {', '.join(encoders)}")
    folder = Path(out) if out is not None else Path("bridges") / "-".join(encoders)
    if not (folder / "bridge.json").exists():
        check_free(folder, overwrite)  # before hours of encoding, not after
    # Two runs for one place take turns: of the same call, the second finds what the first has made.
    with one_writer(folder) if rank() == 0 else nullcontext():
        with first_process_first():
            table = open_table(pairs, tuple(encoders), progress, outside)
        with progress_bars(progress) as report:
            opened = {modality: encoder for modality, (_, encoder) in encoders.items()}
            with first_process_first():
                encoded = encode_pairs(table, opened, report, strict=strict)
            split = np.asarray(split_pairs(encoded.pairs, seed, encoded.ids))
            refuse_leaks(encoded, split)
            check_variety(encoded)
            fingerprint = fingerprint_of(
                encoded,
                split,
                encoders={modality: (name, encoder.revision) for modality, (name, encoder) in encoders.items()},
                preset=asdict(chosen),
                frozen=frozen,
                seed=seed,
                device=device,
            )
            finished = _same_bridge(folder, fingerprint, device) if resume else None
            if not finished:
                check_free(folder, overwrite)
            bridge = finished or _fuse(encoders, encoded, split, chosen, frozen, seed, device, resume, fingerprint, report)

        example = unseen_item(encoded, split, next(iter(encoders)))
        if finished:
            return Alignment(finished, folder, encoded.pairs.set_aside, example, reused=True)
        provenance = {
            **story_of(encoded, split, seed, device, started),
            "preset": name,
            "fingerprint": fingerprint,
            **bridge.provenance,
        }
        bridge = replace(bridge, provenance=provenance, training_rows=encoded.training_rows(split))
        with first_process_first():
            if rank() == 0:
                pictures = {"training.png": training_curves(bridge.history), **heat_maps(bridge, encoded, split)}
                if write_report:
                    from bridgekit.report import report_or_warning

                    with progress_bars(progress) as report:
                        pictures |= report_or_warning(bridge, folder.absolute().name, encoded, split, report)
                bridge.save(folder, pictures=pictures, overwrite=overwrite)
            else:
                bridge = Bridge.load(folder, device)
        return Alignment(bridge, folder, encoded.pairs.set_aside, example, reused=False)


def story_of(encoded: EncodedPairs, split: NDArray[np.str_], seed: int, device: str, started: float) -> dict[str, Any]:
    """Where a bridge, or a side bound to one, came from: for its provenance."""
    return {
        "pairs": encoded.pairs.source,
        "modalities": list(encoded.ids),
        "rows": {name: int((split == name).sum()) for name in dict.fromkeys(split.tolist())},
        "set_aside": len(encoded.pairs.set_aside),
        "seed": seed,
        "device": device,
        "seconds": round(time.monotonic() - started, 1),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "machine": f"{platform.system()} {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "bridgekit": version("bridgekit"),
    }


def check_variety(encoded: EncodedPairs) -> None:
    """Raise BridgekitError where all rows have the same item of a modality."""
    for modality, ids in encoded.ids.items():
        if len(np.unique(ids[ids >= 0])) < 2:
            raise BridgekitError(
                f"every row has the same {modality}, or none: there is nothing to tell apart", where=encoded.pairs.source
            )


def unseen_item(encoded: EncodedPairs, split: NDArray[np.str_], modality: str) -> Item:
    """An item of a modality that training never saw; if there is none, any."""
    unseen = np.isin(split, test_splits(split.tolist())[:1] or ["val"])
    there = encoded.ids[modality] >= 0
    row = int(np.flatnonzero(unseen & there if (unseen & there).any() else there)[0])
    item = encoded.pairs.columns[modality][row]
    assert item is not None
    return item


def heat_maps(bridge: Bridge, encoded: EncodedPairs, split: NDArray[np.str_]) -> dict[str, bytes]:
    """For each pair of modalities that held-out rows have in common, the file name and PNG of a heat map."""
    shown = np.isin(split, test_splits(split.tolist())[:1] or ["val"])
    pairs = [
        (a, b, np.flatnonzero(shown & (encoded.ids[a] >= 0) & (encoded.ids[b] >= 0))) for a, b in combinations(encoded.ids, 2)
    ]
    return {f"similarity-{a}-{b}.png": heat_map(bridge, encoded, a, b, rows) for a, b, rows in pairs if len(rows)}


def _fuse(
    encoders: Mapping[str, tuple[str, Encoder]],
    encoded: EncodedPairs,
    split: NDArray[np.str_],
    preset: Preset,
    frozen: str | None,
    seed: int,
    device: str,
    resume: bool,
    fingerprint: str,
    report: Report,
) -> Bridge:
    """Train, and measure the baselines and FuseMix on the test splits."""
    checkpoint = checkpoint_of(fingerprint, resume)
    fixed: dict[str, Adapter] = {frozen: FrozenSide(encoders[frozen][1].dim)} if frozen else {}
    trained = train_encoded(
        encoded, split, preset=preset, seed=seed, fixed=fixed, device=device, checkpoint=checkpoint, report=report
    )
    for adapter in trained.adapters.values():
        adapter.to(device)
    sides = {
        modality: Side(name, encoder.revision, encoder.dim, modality == frozen)
        for modality, (name, encoder) in encoders.items()
    }
    opened = {modality: encoder for modality, (_, encoder) in encoders.items()}
    provenance: dict[str, Any] = {"best_epoch": trained.best_epoch, "epochs": preset.epochs}
    if trained.diverged:
        provenance["diverged"] = trained.diverged
    bridge = Bridge(sides, trained.adapters, preset, trained.temperature, provenance, (), trained.history, device, {}, opened)
    if rank() > 0:
        return bridge  # the first process measures and saves for all
    bridge = measure_gap(bridge, encoded, split)
    return replace(bridge, metrics=measure(bridge, encoded, split, preset=preset, seed=seed, fixed=fixed))


def checkpoint_of(fingerprint: str, resume: bool) -> Path:
    """Where a run's checkpoint lies; an old one is removed unless the run is to go on from it."""
    checkpoint = cache_folder() / "training" / f"{fingerprint}.safetensors"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    return checkpoint


def choose_sides(a: str | None, b: str | None, more: Sequence[str], pairs: str | Path | Pairs | None) -> list[str]:
    """The modalities or encoders to align: the named ones, or those of the table's columns that have a default encoder.

    Of a table with fewer than two such columns, reading it will tell what is missing.
    """
    if a or b or more or pairs is None:
        return [a or "audio", b or TEXT, *more]
    columns = table_modalities(pairs)
    known = [column for column in columns if column in default_modalities() and column != TEXT]
    if columns and not known and TEXT not in columns:
        raise BridgekitError(
            f"no column of the table is a modality; its columns are {told_columns(columns)}",
            where=pairs.source if isinstance(pairs, Pairs) else str(pairs),
            remedy=f"rename headers to {', '.join(sorted(default_modalities()))}, or say with --a and --b what the columns are",
        )
    return [*(known or ["audio"]), *([TEXT] if len(known) < 2 or TEXT in columns else [])]


def _preset(preset: str | Preset) -> tuple[str, Preset]:
    if isinstance(preset, Preset):
        return "custom", preset
    if preset not in PRESETS:
        raise BridgekitError(f"there is no preset {preset!r}", remedy=f"use one of {', '.join(PRESETS)}")
    return preset, PRESETS[preset]


def open_encoders(names: Sequence[str], device: str, report: Report) -> dict[str, tuple[str, Encoder]]:
    """Modality to the full name and the opened encoder of each side."""
    opened: dict[str, tuple[str, Encoder]] = {}
    for number, name in enumerate(names):
        full = encoder_name(name)
        report("opening encoders", number, len(names))
        encoder = load_encoder(full, device)
        if encoder.modality in opened:
            raise BridgekitError(
                f"two sides are {encoder.modality}", where=", ".join(names), remedy="name different modalities"
            )
        opened[encoder.modality] = (recorded_name(full, encoder), encoder)
    return opened


def open_table(pairs: str | Path | Pairs | None, modalities: tuple[str, ...], tell: bool, outside: bool = False) -> Pairs:
    """The named table, or the one that a plugin brings for these modalities."""
    if isinstance(pairs, Pairs):
        missing = [modality for modality in modalities if modality not in pairs.columns]
        if missing:
            raise BridgekitError(f"the table has no column {missing[0]!r}", where=pairs.source)
        return pairs
    if pairs is not None:
        return read_pairs(pairs, modalities, outside=outside)
    source = default_pair_source(modalities)
    if tell:  # it may be large, and its files may have to be made first
        print(f"Pairs: {source.name} ({source.description}), as no table was named", file=sys.stderr)
    return source.build()


def fingerprint_of(encoded: EncodedPairs, split: NDArray[np.str_], **settings: Any) -> str:
    """A hash over all that trained adapters depend on; a run may go on from a checkpoint of the same one.

    Arguments:
        encoded: the table.
        split: each row's split.
        settings: everything else, as plain data.
    """
    about = {
        **settings,
        "latents": {modality: latents.fingerprint for modality, latents in encoded.latents.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "products": str(product_dtype(settings["device"])),
        "bridgekit": version("bridgekit"),
        "split": split.tolist(),
    }
    whole = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for ids in encoded.ids.values():
        whole.update(ids.tobytes())
    whole.update(encoded.keys.tobytes())
    return whole.hexdigest()[:32]


def _same_bridge(folder: Path, fingerprint: str, device: str) -> Bridge | None:
    try:
        bridge = Bridge.load(folder, device)
    except BridgekitError:
        return None
    return bridge if bridge.provenance.get("fingerprint") == fingerprint else None
