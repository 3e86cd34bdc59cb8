"""`align`: two piles of files become one space. Encode once, fuse, evaluate, save a bridge."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from bridgekit.baselines import linear, untrained
from bridgekit.bridge import Bridge, Side, check_free
from bridgekit.cache import cache_folder
from bridgekit.card import command_line
from bridgekit.encoders import Encoder, Item, resolve_device
from bridgekit.errors import BridgekitError
from bridgekit.evaluation import Embed, EncodedPairs, encode_pairs, evaluate_splits, split_recall, test_splits
from bridgekit.fusion.training import PRESETS, Preset, Trained, preset_as_json, train
from bridgekit.pairs import Pairs, SetAside, read_pairs, split_pairs
from bridgekit.pictures import heat_map, training_curves
from bridgekit.plugins import default_pair_source, encoder_name, load_encoder
from bridgekit.progress import Report, progress_bars, silent

#: Validation looks at this many rows at most, so that it stays a small part of training.
VALIDATION_ROWS = 4_096


@dataclass(frozen=True)
class Alignment:
    """What a run of `align` did.

    Arguments:
        bridge: the saved bridge.
        folder: where it is.
        set_aside: the rows that could not be used.
        example: an item of the first modality that training never saw, to try a search with.
        reused: whether the bridge was already there, made by the same call.
    """

    bridge: Bridge
    folder: Path
    set_aside: Sequence[SetAside]
    example: Item
    reused: bool


def align(
    a: str = "audio",
    b: str = "text",
    pairs: str | Path | Pairs | None = None,
    *,
    out: str | Path | None = None,
    preset: str | Preset = "default",
    frozen: str | None = None,
    seed: int = 0,
    device: str = "auto",
    strict: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> Bridge:
    """Align two modalities with FuseMix and save the bridge.

    Arguments:
        a, b: a modality (its default encoder is taken) or an encoder, `provider:model`.
        pairs: a table (CSV, TSV, JSON Lines, Parquet), a folder of class folders, the name of a plugin's source, or `Pairs`.
            By default the source that a plugin brings for these modalities.
        out: the bridge's folder; by default `bridges/<a>-<b>` here.
        preset: `default`, `paper`, or a `Preset`.
        frozen: a modality whose encoder's own latents are to be the shared space.
        seed: of everything random. The same call gives the same adapters, byte for byte, on the same machine.
        device: a torch device, or `auto`.
        strict: fail where a row would be set aside.
        resume: go on from an interrupted run of the same call, and reuse a finished bridge of the same call.
        overwrite: replace another bridge at `out`.
        progress: show progress bars on standard error.

    Returns:
        the bridge, saved, with `metrics` for every test split: untrained, linear and FuseMix.

    Raises:
        BridgekitError: anything that the caller can mend; the message says how.
    """
    return run_alignment(
        a,
        b,
        pairs,
        out=out,
        preset=preset,
        frozen=frozen,
        seed=seed,
        device=device,
        strict=strict,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    ).bridge


def run_alignment(
    a: str,
    b: str,
    pairs: str | Path | Pairs | None = None,
    *,
    out: str | Path | None = None,
    preset: str | Preset = "default",
    frozen: str | None = None,
    seed: int = 0,
    device: str = "auto",
    strict: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> Alignment:
    """`align`, with an account of what was done. Arguments and errors are the same."""
    started = time.monotonic()
    name, chosen = _preset(preset)
    device = resolve_device(device)
    encoders = _open(a, b, device)
    if frozen is not None and frozen not in encoders:
        raise BridgekitError(f"{frozen!r} cannot be frozen: it is not a side", remedy=f"use one of {', '.join(encoders)}")
    folder = Path(out) if out is not None else Path("bridges") / "-".join(encoders)
    if not (folder / "bridge.json").exists():
        check_free(folder, overwrite)  # before hours of encoding, not after

    table = _table(pairs, tuple(encoders))
    with progress_bars(progress) as report:
        encoded = encode_pairs(table, {modality: encoder for modality, (_, encoder) in encoders.items()}, report, strict=strict)
        split = np.asarray(split_pairs(encoded.pairs, seed, encoded.ids))
        for modality, ids in encoded.ids.items():
            if len(np.unique(ids)) < 2:
                raise BridgekitError(f"every row has the same {modality}: there is nothing to tell apart", where=table.source)
        fingerprint = _fingerprint(encoders, encoded, split, chosen, frozen, seed, device)
        finished = _same_bridge(folder, fingerprint, device) if resume else None
        if not finished:
            check_free(folder, overwrite)
        bridge = finished or _fuse(encoders, encoded, split, chosen, frozen, seed, device, resume, fingerprint, report)

    shown = np.flatnonzero(np.isin(split, test_splits(split.tolist())[:1] or ["val"]))
    example = encoded.pairs.columns[next(iter(encoders))][int(shown[0])]
    assert example is not None
    if finished:
        return Alignment(finished, folder, encoded.pairs.set_aside, example, reused=True)
    provenance = {
        "pairs": encoded.pairs.source,
        "rows": {name: int((split == name).sum()) for name in dict.fromkeys(split.tolist())},
        "set_aside": len(encoded.pairs.set_aside),
        "preset": name,
        "seed": seed,
        "device": device,
        "seconds": round(time.monotonic() - started, 1),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "machine": f"{platform.system()} {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "bridgekit": version("bridgekit"),
        "fingerprint": fingerprint,
        **bridge.provenance,
    }
    bridge = replace(bridge, provenance=provenance)
    pictures = {"training.png": training_curves(bridge.history), "similarity.png": heat_map(bridge, encoded, shown)}
    bridge.save(folder, pictures=pictures, overwrite=overwrite)
    return Alignment(bridge, folder, encoded.pairs.set_aside, example, reused=False)


def train_encoded(
    encoded: EncodedPairs,
    split: NDArray[np.str_],
    *,
    preset: Preset,
    seed: int = 0,
    frozen: str | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    report: Report = silent,
) -> Trained:
    """Train adapters on the `train` rows of an encoded table, choosing the epoch by recall on its `val` rows.

    Arguments:
        encoded: the table with its latents.
        split: (n,) each row's split.
        preset, seed, frozen, device, checkpoint: as for `bridgekit.fusion.training.train`.
        report: progress.
    """
    latents, rows = _training_rows(encoded, split)
    score = validation(encoded, split)

    def validate(adapters: Mapping[str, nn.Module]) -> dict[str, float]:
        return score(lambda modality, matrix: normalize(adapters[modality](matrix.to(device)), dim=-1).cpu())

    return train(
        latents,
        rows,
        torch.from_numpy(encoded.keys[split == "train"]),
        validate=validate,
        preset=preset,
        seed=seed,
        frozen=frozen,
        device=device,
        checkpoint=checkpoint,
        on_epoch=lambda epoch, loss: report("training", epoch, preset.epochs),
    )


def validation(encoded: EncodedPairs, split: NDArray[np.str_]) -> Callable[[Embed], dict[str, float]]:
    """A function that measures embeddings on the `val` rows: recalls both ways, and their mean as `score`."""
    a, b = encoded.latents
    rows = np.flatnonzero(split == "val")
    if len(rows) > VALIDATION_ROWS:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:VALIDATION_ROWS])
    # Only the items that validation needs are embedded each time.
    used = {modality: torch.from_numpy(np.unique(encoded.ids[modality][rows])) for modality in (a, b)}

    def measure(embed: Embed) -> dict[str, float]:
        embedded = {}
        for modality, items in used.items():
            vectors = embed(modality, encoded.latents[modality].matrix[items])
            embedded[modality] = torch.zeros(len(encoded.latents[modality].matrix), vectors.shape[1])
            embedded[modality][items] = vectors
        there, back = (split_recall(encoded, embedded, rows, *pair) for pair in ((a, b), (b, a)))
        figures = {"score": (there.mean + back.mean) / 2}
        for direction, result in ((f"{a} → {b}", there), (f"{b} → {a}", back)):
            figures |= {f"recall@{k} {direction}": result.at[k] for k in (1, 10)}
        return figures

    return measure


def _training_rows(encoded: EncodedPairs, split: NDArray[np.str_]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    latents = {modality: encoded.latents[modality].matrix for modality in encoded.latents}
    rows = {modality: torch.from_numpy(ids[split == "train"]) for modality, ids in encoded.ids.items()}
    return latents, rows


def baselines(
    encoded: EncodedPairs, split: NDArray[np.str_], *, preset: Preset, seed: int = 0, frozen: str | None = None
) -> dict[str, Embed]:
    """Untrained adapters and ridge regression on the same rows."""
    latents, rows = _training_rows(encoded, split)
    score = validation(encoded, split)
    return {
        "untrained": untrained(latents, rows, frozen, preset, seed),
        "linear": linear(latents, rows, lambda embed: score(embed)["score"]),
    }


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
    """Train, and measure untrained adapters, ridge regression and FuseMix on the test splits."""
    checkpoint = cache_folder() / "training" / f"{fingerprint}.safetensors"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    trained = train_encoded(
        encoded, split, preset=preset, seed=seed, frozen=frozen, device=device, checkpoint=checkpoint, report=report
    )
    report("training", preset.epochs, preset.epochs)
    for adapter in trained.adapters.values():
        adapter.to(device)
    sides = {
        modality: Side(name, encoder.revision, encoder.dim, modality == frozen)
        for modality, (name, encoder) in encoders.items()
    }
    opened = {modality: encoder for modality, (_, encoder) in encoders.items()}
    provenance = {"best_epoch": trained.best_epoch, "epochs": preset.epochs}
    bridge = Bridge(sides, trained.adapters, preset, trained.temperature, provenance, (), trained.history, device, {}, opened)
    bridge = measure_gap(bridge, encoded, split)
    methods = {**baselines(encoded, split, preset=preset, seed=seed, frozen=frozen), "FuseMix": bridge.project}
    records = [
        record for method, embed in methods.items() for record in evaluate_splits(encoded, split.tolist(), embed, method)
    ]
    return replace(bridge, metrics=records)


def measure_gap(bridge: Bridge, encoded: EncodedPairs, split: NDArray[np.str_]) -> Bridge:
    """The bridge with the means of its training embeddings, and how far apart its modalities lie (Liang et al., 2022).

    `modality_gap` is the distance between the two means; `pair_cosine` the mean cosine similarity of the pairs in `val`.
    """

    def project(modality: str, rows: str) -> Tensor:
        ids = np.unique(encoded.ids[modality][split == rows]) if rows == "train" else encoded.ids[modality][split == rows]
        return bridge.project(modality, encoded.latents[modality].matrix[torch.from_numpy(ids)])

    means = {modality: project(modality, "train").mean(0) for modality in encoded.latents}
    a, b = means.values()
    pairs = torch.stack([project(modality, "val") for modality in means]).prod(0).sum(1)
    gap = {"modality_gap": round(float((a - b).norm()), 4), "pair_cosine": round(float(pairs.mean()), 4)}
    return replace(bridge, means=means, provenance={**bridge.provenance, **gap})


def _preset(preset: str | Preset) -> tuple[str, Preset]:
    if isinstance(preset, Preset):
        return "custom", preset
    if preset not in PRESETS:
        raise BridgekitError(f"there is no preset {preset!r}", remedy=f"use one of {', '.join(PRESETS)}")
    return preset, PRESETS[preset]


def _open(a: str, b: str, device: str) -> dict[str, tuple[str, Encoder]]:
    opened: dict[str, tuple[str, Encoder]] = {}
    for name in (a, b):
        full = encoder_name(name)
        encoder = load_encoder(full, device)
        if encoder.modality in opened:
            raise BridgekitError(
                f"both sides are {encoder.modality}", where=f"{a}, {b}", remedy="a bridge joins two different modalities"
            )
        opened[encoder.modality] = (full, encoder)
    return opened


def _table(pairs: str | Path | Pairs | None, modalities: tuple[str, ...]) -> Pairs:
    if isinstance(pairs, Pairs):
        missing = [modality for modality in modalities if modality not in pairs.columns]
        if missing:
            raise BridgekitError(f"the table has no column {missing[0]!r}", where=pairs.source)
        return pairs
    return default_pair_source(modalities).build() if pairs is None else read_pairs(pairs, modalities)


def _fingerprint(
    encoders: Mapping[str, tuple[str, Encoder]],
    encoded: EncodedPairs,
    split: NDArray[np.str_],
    preset: Preset,
    frozen: str | None,
    seed: int,
    device: str,
) -> str:
    """A hash over all that the trained adapters depend on; a run may go on from a checkpoint of the same one."""
    whole = hashlib.sha256()
    about = {
        "encoders": [[name, encoder.revision] for name, encoder in encoders.values()],
        "latents": [encoded.latents[modality].fingerprint for modality in encoders],
        "preset": preset_as_json(preset),
        "frozen": frozen,
        "seed": seed,
        "device": device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "bridgekit": version("bridgekit"),
        "split": split.tolist(),
    }
    whole.update(json.dumps(about, sort_keys=True).encode())
    for modality in encoders:
        whole.update(encoded.ids[modality].tobytes())
    whole.update(encoded.keys.tobytes())
    return whole.hexdigest()[:32]


def _same_bridge(folder: Path, fingerprint: str, device: str) -> Bridge | None:
    try:
        bridge = Bridge.load(folder, device)
    except BridgekitError:
        return None
    return bridge if bridge.provenance.get("fingerprint") == fingerprint else None
