"""`bind`: a trained bridge takes in one more modality, and its other sides stay as they are."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bridgekit.alignment import (
    Alignment,
    check_variety,
    checkpoint_of,
    fingerprint_of,
    heat_maps,
    story_of,
    unseen_item,
)
from bridgekit.bridge import Bridge, Side, check_free
from bridgekit.cache import one_writer
from bridgekit.distributed import first_process_first, joined_processes, rank
from bridgekit.encoders import resolve_device
from bridgekit.errors import BridgekitError
from bridgekit.evaluation import EncodedPairs, encode_pairs, refuse_leaks, sides_of
from bridgekit.fitting import measure, measure_gap, train_encoded
from bridgekit.pairs import Pairs, read_pairs, split_pairs, table_modalities
from bridgekit.pictures import training_curves
from bridgekit.plugins import encoder_name, load_encoder, recorded_name
from bridgekit.progress import progress_bars


def bind(
    bridge: str | Path,
    add: str,
    pairs: str | Path | Pairs,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    strict: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    outside: bool = False,
    progress: bool = True,
) -> Bridge:
    """Add a modality to a trained bridge whose other sides stay as they are, byte for byte.

    An adapter for the new modality is trained onto the embeddings that the bridge gives the items beside it. Modalities that
    the new one has no pairs with meet it all the same, through those that it has.

    Arguments:
        bridge: the folder of a bridge.
        add: a modality (its default encoder is taken) or an encoder, `provider:model`.
        pairs: as for `align`: a table with a column for the new modality and one for any of the bridge's.
        out: where to write the larger bridge; by default in place of the old one, whose conditioners, pictures and report stay.
        overwrite: bind a modality anew that was bound before with other pairs, or replace another bridge at `out`.
        seed, device, strict, resume, outside, progress: as for `align`. The hyperparameters are those that the bridge was
            trained with.

    Returns:
        the larger bridge, saved, with figures for the new modality beside those it had.

    Raises:
        BridgekitError: anything that the caller can mend; the message says how.
    """
    return run_binding(
        bridge,
        add,
        pairs,
        out=out,
        seed=seed,
        device=device,
        strict=strict,
        resume=resume,
        overwrite=overwrite,
        outside=outside,
        progress=progress,
    ).bridge


@joined_processes()
def run_binding(
    bridge: str | Path,
    add: str,
    pairs: str | Path | Pairs,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    strict: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    outside: bool = False,
    progress: bool = True,
) -> Alignment:
    """`bind`, with an account of what was done. Arguments and errors are the same."""
    source, folder = Path(bridge), Path(out or bridge)
    # Two runs for one place take turns: the second takes what the first has bound for the bridge that it adds to.
    with one_writer(folder) if rank() == 0 else nullcontext():
        progress = progress and rank() == 0
        started = time.monotonic()
        device = resolve_device(device)
        with first_process_first():
            old = Bridge.load(source, device)
        name = encoder_name(add)
        encoder = load_encoder(name, device)
        name = recorded_name(name, encoder)
        new = encoder.modality
        known = [modality for modality in old.sides if modality != new]
        bound = any(story["modality"] == new for story in old.provenance.get("bound", ()))
        if new in old.sides and not bound:
            raise BridgekitError(
                f"this bridge has a side for {new} already",
                where=str(source),
                remedy=f"add a modality that is none of {', '.join(old.sides)}, or train another bridge with align",
            )
        partners = [modality for modality in table_modalities(pairs) if modality in known]
        if not partners:
            raise BridgekitError(
                f"the table has no column for any of this bridge's modalities ({', '.join(known)})",
                where=pairs.source if isinstance(pairs, Pairs) else str(pairs),
                remedy=f"give pairs of {new} with one of them",
            )
        table = pairs if isinstance(pairs, Pairs) else read_pairs(pairs, (*partners, new), outside=outside)
        encoders = {modality: old.encoder(modality) for modality in partners} | {new: encoder}
        with progress_bars(progress) as report:
            with first_process_first():
                encoded = encode_pairs(table, encoders, report, strict=strict)
            encoded, split = _only_with(new, encoded, np.asarray(split_pairs(encoded.pairs, seed, encoded.ids)))
            refuse_leaks(encoded, split)
            check_variety(encoded)
            fingerprint = fingerprint_of(
                encoded,
                split,
                # Of the sides that it is bound to alone: what else is bound later does not change this one.
                sides={modality: asdict(old.sides[modality]) for modality in partners},
                adapters=old.weights_hash(partners),
                encoder=[name, encoder.revision],
                preset=asdict(old.preset),
                seed=seed,
                device=device,
            )
            example = unseen_item(encoded, split, new)
            finished = _bound_before(folder, fingerprint, device) if resume else None
            if finished:
                return Alignment(finished, folder, encoded.pairs.set_aside, example, reused=True)
            if bound and not overwrite:
                raise BridgekitError(
                    f"{new} was bound to this bridge before, with other pairs or another seed",
                    where=str(source),
                    remedy="bind it anew with --overwrite; the other sides stay as they are",
                )
            check_free(folder, overwrite or folder == source)
            old = _without(new, old)
            fixed = {modality: old.adapters[modality] for modality in partners}
            preset = replace(old.preset, temperature=old.temperature, learn_temperature=False)
            trained = train_encoded(
                encoded,
                split,
                preset=preset,
                seed=seed,
                fixed=fixed,
                device=device,
                checkpoint=checkpoint_of(fingerprint, resume),
                report=report,
            )
            if rank() > 0:  # the first process measures and saves for all
                with first_process_first():
                    return Alignment(Bridge.load(folder, device), folder, encoded.pairs.set_aside, example, reused=False)
            adapter = trained.adapters[new].to(device)
            story = {
                "modality": new,
                **story_of(encoded, split, seed, device, started),
                "fingerprint": fingerprint,
                "best_epoch": trained.best_epoch,
                **({"diverged": trained.diverged} if trained.diverged else {}),
            }
            larger = replace(
                old,
                sides={**old.sides, new: Side(name, encoder.revision, encoder.dim, frozen=False)},
                adapters={**old.adapters, new: adapter},
                provenance={**old.provenance, "bound": [*old.provenance.get("bound", ()), story]},
                _encoders={**old._encoders, new: encoder},
                training_rows=old.training_rows | encoded.training_rows(split),
            )
            larger = measure_gap(larger, encoded, split)
            records = [
                record
                for record in measure(larger, encoded, split, preset=preset, seed=seed, fixed=fixed)
                if new in sides_of(record)
            ]
        larger = replace(larger, metrics=[*old.metrics, *records])
        pictures = {f"training-{new}.png": training_curves(trained.history), **heat_maps(larger, encoded, split)}
        with first_process_first():
            larger.save(folder, pictures=pictures, overwrite=overwrite or folder == source, grown_from=source)
        return Alignment(larger, folder, encoded.pairs.set_aside, example, reused=False)


def _without(modality: str, bridge: Bridge) -> Bridge:
    """The bridge as it was before the modality was bound to it."""
    stories = [story for story in bridge.provenance.get("bound", ()) if story["modality"] != modality]
    provenance = {**bridge.provenance, "bound": stories}
    for key in ("modality_gap", "pair_cosine"):
        known = provenance.get(key, {})
        provenance[key] = {pair: value for pair, value in known.items() if modality not in pair.split(", ")}
    return replace(
        bridge,
        sides={name: side for name, side in bridge.sides.items() if name != modality},
        adapters={name: adapter for name, adapter in bridge.adapters.items() if name != modality},
        means={name: mean for name, mean in bridge.means.items() if name != modality},
        metrics=[record for record in bridge.metrics if modality not in sides_of(record)],
        provenance=provenance,
    )


def _only_with(modality: str, encoded: EncodedPairs, split: NDArray[np.str_]) -> tuple[EncodedPairs, NDArray[np.str_]]:
    """The rows that have an item of the modality: the others have nothing to teach it."""
    rows = np.flatnonzero(encoded.ids[modality] >= 0)
    if not len(rows):
        raise BridgekitError(f"no row has {modality}", where=encoded.pairs.source)
    ids = {name: each[rows] for name, each in encoded.ids.items()}
    return EncodedPairs(encoded.pairs.take(rows), encoded.latents, ids, encoded.keys[rows]), split[rows]


def _bound_before(folder: Path, fingerprint: str, device: str) -> Bridge | None:
    if not (folder / "bridge.json").exists():
        return None
    bridge = Bridge.load(folder, device)
    return bridge if any(story["fingerprint"] == fingerprint for story in bridge.provenance.get("bound", ())) else None
