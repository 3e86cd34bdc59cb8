"""`align`: train a shared space for two or more modalities. Encode once, fuse, evaluate, save a bridge."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bridgekit.bridge.bridge import Bridge, check_free
from bridgekit.errors import BridgekitError
from bridgekit.fusion.adapter import FrozenSide
from bridgekit.fusion.distributed import first_process_first, joined_processes, rank
from bridgekit.fusion.training import PRESETS, Preset
from bridgekit.hardware import resolve_device
from bridgekit.progress import progress_bars
from bridgekit.recipes.fit import Alignment, Run, encode_and_split, fit, say_set_aside
from bridgekit.recipes.sides import TrainingOptions, check_columns, choose_sides, open_encoders, select_pairs, takes
from bridgekit.recipes.unpaired import encode_unpaired, read_unpaired
from bridgekit.report.plots import heat_maps, training_curves
from bridgekit.storage.cache import one_writer
from bridgekit.tables.reading import open_table


@dataclass(frozen=True)
class AlignOptions(TrainingOptions):
    """Options of `align`.

    Arguments:
        a, b: a modality, for its default encoder, or an encoder, `provider:model`. The default is the table's columns, or
            audio and text without a table.
        pairs: the path of a table or folder, the name of a plugin's table, `Pairs`, a DataFrame, a `datasets.Dataset`, or
            another table in memory: see `bridgekit.tables.reading.open_table`.
            The default is a plugin's source for these modalities. With three or more modalities, rows may lack items but must
            have at least two, and must connect all modalities, directly or through others.
        more: further modalities or encoders.
        preset: `default`, `paper`, or a `Preset`.
        frozen: a modality whose latents become the shared space.
        unpaired: folders, tables and .txt files with items of the two sides that are not paired, for self-training: see
            `bridgekit.fusion.self_training`.
        write_report: write a report into the bridge's folder, see `bridgekit.report`. Failure to do so is only a warning.
        out: the bridge's folder; the default is `bridges/<a>-<b>`.
        seed, half, device, strict, resume, overwrite, outside, progress: see `TrainingOptions` and `RunOptions`.
    """

    a: str | None = None
    b: str | None = None
    pairs: Any = None
    _: KW_ONLY
    more: Sequence[str] = ()
    preset: str | Preset = "default"
    frozen: str | None = None
    unpaired: Sequence[str | Path] = ()
    write_report: bool = True


@takes(AlignOptions)
def align(options: AlignOptions) -> Bridge:
    """Align two or more modalities and save the bridge.

    `align(a, b, pairs, *, out=..., seed=...)`: takes the fields of `AlignOptions`.

    Returns:
        the saved bridge, with `metrics` of every method for every test split. If training diverged, it has the
        best weights before that, and `provenance["diverged"]` is the epoch in which it happened.

    Raises:
        BridgekitError: anything the caller can fix; the message says how.
    """
    done = run_alignment(options)
    if options.progress:
        say_set_aside(done.set_aside)
    return done.bridge


@joined_processes()
def run_alignment(options: AlignOptions) -> Alignment:
    """`align`, returning a summary of the run.

    Processes started by `torchrun` train together, and all return the bridge that the first one saved.
    """
    started = time.monotonic()
    preset_name, preset = _preset(options.preset)
    device = resolve_device(options.device)
    progress = options.progress and rank() == 0
    with first_process_first():
        table = None if options.pairs is None else open_table(options.pairs, columns=options.columns, outside=options.outside)
    names = choose_sides((options.a, options.b, *options.more), table)
    check_columns(names, table)
    with progress_bars(progress) as report:
        encoders = open_encoders(names, device, report)
    if options.frozen is not None and options.frozen not in encoders:
        raise BridgekitError(
            f"cannot freeze {options.frozen!r}: it is not one of the sides", remedy=f"use one of {', '.join(encoders)}"
        )
    if options.frozen is not None and options.unpaired:
        raise BridgekitError("unpaired items are of no use with a frozen side", remedy="omit --unpaired")
    piles = read_unpaired(options.unpaired, tuple(encoders), options)
    folder = Path(options.out) if options.out is not None else Path("bridges") / "-".join(encoders)
    if not (folder / "bridge.json").exists():
        check_free(folder, options.overwrite)  # before hours of encoding, not after
    # Runs with the same output folder take turns, so the second of two identical runs reuses the first one's bridge.
    with one_writer(folder) if rank() == 0 else nullcontext():
        with first_process_first():
            pairs = select_pairs(table, tuple(encoders), progress)
        with progress_bars(progress) as report:
            opened = {modality: encoder for modality, (_, encoder) in encoders.items()}
            encoded, split = encode_and_split(pairs, opened, options, report)
            with first_process_first():
                unpaired = encode_unpaired(piles, opened, encoded, options, report)
            encoded = encoded.with_set_aside(unpaired.set_aside)
            settings = {
                "encoders": {modality: (name, encoder.revision) for modality, (name, encoder) in encoders.items()},
                "preset": asdict(preset),
                "frozen": options.frozen,
                **({"unpaired": unpaired.fingerprints} if unpaired.fingerprints else {}),
            }
            fixed = {options.frozen: FrozenSide(opened[options.frozen].dim)} if options.frozen else {}
            run = Run(encoded, split, encoders, preset, fixed, options, device, settings, unpaired.latents)
            finished = _same_bridge(folder, run.fingerprint, device) if options.resume else None
            if finished:
                return run.result(finished, folder, reused=True)
            check_free(folder, options.overwrite)
            empty = Bridge({}, {}, preset, preset.temperature, {}, (), (), device)
            bridge, history, provenance = fit(run, empty, started, report)
            provenance |= {"preset": preset_name, "epochs": preset.epochs, **bridge.provenance}
            bridge = replace(bridge, history=history, provenance=provenance)
        with first_process_first():
            if rank() == 0:
                pictures = {"training.png": training_curves(bridge.history)} if bridge.history else {}
                pictures |= heat_maps(bridge, encoded, split)
                if options.write_report:
                    from bridgekit.report import report_or_warning

                    with progress_bars(progress) as report:
                        pictures |= report_or_warning(bridge, folder.absolute().name, encoded, split, report)
                bridge.save(folder, pictures=pictures, overwrite=options.overwrite)
            else:
                bridge = Bridge.load(folder, device)
        return run.result(bridge, folder, reused=False)


def _preset(preset: str | Preset) -> tuple[str, Preset]:
    if isinstance(preset, Preset):
        return "custom", preset
    if preset not in PRESETS:
        raise BridgekitError(f"unknown preset {preset!r}", remedy=f"use one of {', '.join(PRESETS)}")
    return preset, PRESETS[preset]


def _same_bridge(folder: Path, fingerprint: str, device: str) -> Bridge | None:
    try:
        bridge = Bridge.load(folder, device)
    except BridgekitError:
        return None
    return bridge if bridge.provenance.get("fingerprint") == fingerprint else None
