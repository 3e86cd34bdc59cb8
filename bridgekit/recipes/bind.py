"""`bind`: add a modality to a trained bridge without changing its other sides."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bridgekit.bridge.bridge import Bridge, check_free
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.recall import sides_of
from bridgekit.fusion.distributed import first_process_first, joined_processes, rank
from bridgekit.hardware import resolve_device
from bridgekit.plugins import encoder_name, known_modality, load_encoder, recorded_name
from bridgekit.progress import progress_bars
from bridgekit.recipes.fit import Alignment, Run, encode_and_split, fit, say_set_aside
from bridgekit.recipes.sides import TrainingOptions, check_columns, takes
from bridgekit.report.plots import heat_maps, training_curves
from bridgekit.storage.cache import one_writer
from bridgekit.tables.reading import Table, open_table


@dataclass(frozen=True)
class BindOptions(TrainingOptions):
    """Options of `bind`. The hyperparameters are those the bridge was trained with.

    Arguments:
        bridge: the bridge's folder.
        add: a modality, for its default encoder, or an encoder, `provider:model`.
        pairs: as for `align`: a table with a column for the new modality and one for any of the bridge's.
        out: where to write the larger bridge; by default it replaces the old one, keeping its conditioners, images and report.
        overwrite: bind a modality again that was bound with other pairs, or replace another bridge at `out`.
        seed, half, device, strict, resume, outside, progress: see `TrainingOptions` and `RunOptions`.
    """

    bridge: str | Path
    add: str
    pairs: Any


@takes(BindOptions)
def bind(options: BindOptions) -> Bridge:
    """Add a modality to a trained bridge. Its other adapters stay byte-identical.

    `bind(bridge, add, pairs, *, out=..., seed=...)`: takes the fields of `BindOptions`. An adapter for the new modality is
    trained to match the bridge's embeddings of the paired items. This also connects it to modalities it has no pairs with.

    Returns:
        the larger bridge, saved, with additional metrics for the new modality.

    Raises:
        BridgekitError: anything the caller can fix; the message says how.
    """
    done = run_binding(options)
    if options.progress:
        say_set_aside(done.set_aside)
    return done.bridge


@joined_processes()
def run_binding(options: BindOptions) -> Alignment:
    """`bind`, returning a summary of the run."""
    source, folder = Path(options.bridge), Path(options.out or options.bridge)
    overwrite = options.overwrite or folder == source
    progress = options.progress and rank() == 0
    started = time.monotonic()
    # Runs with the same output folder take turns: the second adds to the bridge that the first has written.
    with one_writer(folder) if rank() == 0 else nullcontext(), progress_bars(progress) as report:
        device = resolve_device(options.device)
        with first_process_first():
            old = Bridge.load(source, device)
            table = open_table(options.pairs, columns=options.columns, outside=options.outside)
        full_name = encoder_name(options.add)
        check_columns([options.add], table)
        _partners(old, known_modality(full_name), table)
        encoder = load_encoder(full_name, device)
        name, new = recorded_name(full_name, encoder), encoder.modality
        bound = _is_bound(old, new, source)
        partners = _partners(old, new, table)
        encoders = {modality: old.encoder(modality) for modality in partners} | {new: encoder}
        encoded, split = encode_and_split(table.pairs((*partners, new)), encoders, options, report, needs=new)
        settings = {
            # Only the sides that it is bound to: binding further modalities does not affect this one.
            "sides": {modality: asdict(old.sides[modality]) for modality in partners},
            "adapters": old.weights_hash(partners),
            "encoder": [name, encoder.revision],
            "preset": asdict(old.preset),
        }
        fixed = {modality: old.adapters[modality] for modality in partners}
        preset = replace(old.preset, temperature=old.temperature, learn_temperature=False)
        run = Run(encoded, split, {new: (name, encoder)}, preset, fixed, options, device, settings)
        finished = _bound_before(folder, run.fingerprint, device) if options.resume else None
        if finished:
            return run.result(finished, folder, reused=True)
        if bound and not options.overwrite:
            raise BridgekitError(
                f"{new} was already bound to this bridge, with other pairs or another seed",
                where=str(source),
                remedy="bind it again with --overwrite; the other sides do not change",
            )
        check_free(folder, overwrite)
        larger, history, provenance = fit(run, _without(new, old), started, report)
        provenance = {"modality": new, **provenance}
        records = [*larger.provenance.get("bound", ()), provenance]
        larger = replace(larger, provenance={**larger.provenance, "bound": records})
        with first_process_first():
            if rank() == 0:
                pictures = {f"training-{new}.png": training_curves(history)} if history else {}
                pictures |= heat_maps(larger, encoded, split)
                larger.save(folder, pictures=pictures, overwrite=overwrite, grown_from=source)
            else:
                larger = Bridge.load(folder, device)
        return run.result(larger, folder, reused=False)


def _is_bound(bridge: Bridge, modality: str, source: Path) -> bool:
    """Whether the modality was already bound to the bridge.

    Raises:
        BridgekitError: the bridge was aligned with it.
    """
    bound = any(record["modality"] == modality for record in bridge.provenance.get("bound", ()))
    if modality in bridge.sides and not bound:
        raise BridgekitError(
            f"the bridge already has a side for {modality}",
            where=str(source),
            remedy=f"add a modality other than {', '.join(bridge.sides)}, or train another bridge with align",
        )
    return bound


def _partners(bridge: Bridge, modality: str | None, table: Table) -> list[str]:
    """The bridge's modalities that the table has columns for, besides the new one, which is None if it is not known yet."""
    known = [name for name in bridge.sides if name != modality]
    partners = [name for name in table.modalities if name in known]
    if not partners:
        raise BridgekitError(
            f"the table has no column for any of the bridge's modalities ({', '.join(known)})",
            where=table.source,
            remedy=f"give pairs of {modality or 'the new modality'} with one of them",
        )
    return partners


def _without(modality: str, bridge: Bridge) -> Bridge:
    """The bridge before the modality was bound to it."""
    bound = [record for record in bridge.provenance.get("bound", ()) if record["modality"] != modality]
    provenance = {**bridge.provenance, "bound": bound}
    for key in ("modality_gap", "pair_cosine"):
        known = provenance.get(key, {})
        provenance[key] = {pair: value for pair, value in known.items() if modality not in pair.split(", ")}
    return replace(
        bridge,
        sides={name: side for name, side in bridge.sides.items() if name != modality},
        adapters={name: adapter for name, adapter in bridge.adapters.items() if name != modality},
        means={name: mean for name, mean in bridge.means.items() if name != modality},
        banks={pair: bank for pair, bank in bridge.banks.items() if modality not in pair.split("/")},
        metrics=[record for record in bridge.metrics if modality not in sides_of(record)],
        provenance=provenance,
    )


def _bound_before(folder: Path, fingerprint: str, device: str) -> Bridge | None:
    if not (folder / "bridge.json").exists():
        return None
    bridge = Bridge.load(folder, device)
    return bridge if any(record["fingerprint"] == fingerprint for record in bridge.provenance.get("bound", ())) else None
