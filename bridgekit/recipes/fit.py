"""What `align` and `bind` share: encode and split a table, train on it, measure, and save the bridge."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridgekit.bridge.bridge import Bridge, Side
from bridgekit.bridge.provenance import command_line, installed_version
from bridgekit.encoders import TEXT, Blob, Encoder, Item
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.leaks import refuse_leaks
from bridgekit.evaluation.methods import (
    Choice,
    Method,
    Solution,
    Validation,
    bank_latents,
    choose,
    closed_forms,
    self_training,
    training_rows,
)
from bridgekit.evaluation.recall import Embed, evaluate_splits, sides_of
from bridgekit.fusion.adapter import Adapter, project
from bridgekit.fusion.closed_form import joining_order
from bridgekit.fusion.distributed import first_process_first, rank
from bridgekit.fusion.training import Preset, Trained, initial_adapters, train
from bridgekit.hardware import product_dtype
from bridgekit.latents.encoded import EncodedPairs, encode_pairs
from bridgekit.pairs import Pairs, SetAside
from bridgekit.progress import Report, say, silent
from bridgekit.recipes.sides import AUTO, TrainingOptions
from bridgekit.storage.cache import cache_folder
from bridgekit.tables.splits import count_rows, split_pairs, test_splits


@dataclass(frozen=True)
class Alignment:
    """Summary of an `align` or `bind` run.

    Arguments:
        bridge: the saved bridge.
        folder: its folder.
        set_aside: the rows that were not used.
        example: an item not seen in training, to try a search with.
        reused: whether the bridge already existed, from an identical call.
    """

    bridge: Bridge
    folder: Path
    set_aside: Sequence[SetAside]
    example: Item
    reused: bool


def say_set_aside(set_aside: Sequence[SetAside]) -> None:
    """A notice for callers in Python, if rows were set aside. The command line lists them."""
    if set_aside:
        first, count = set_aside[0], f"{len(set_aside):,} row{'s were' if len(set_aside) > 1 else ' was'}"
        say(f"{count} set aside, the first: row {first.row}, {first.column}: {first.item}: {first.reason}")


@dataclass(frozen=True)
class Run:
    """A table to train on, and everything that the trained adapters depend on.

    Arguments:
        encoded: the table with its latents.
        split: (n,) each row's split.
        sides: the new sides: modality to full name and encoder.
        preset: hyperparameters.
        fixed: modality to an adapter that is not trained.
        options: random seed, and whether to resume.
        device: a torch device.
        unpaired: modality to the latents of unpaired items.
        settings: everything else that the adapters depend on, as plain data.
    """

    encoded: EncodedPairs
    split: NDArray[np.str_]
    sides: Mapping[str, tuple[str, Encoder]]
    preset: Preset
    fixed: Mapping[str, Adapter]
    options: TrainingOptions
    device: str
    settings: Mapping[str, Any]
    unpaired: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """A hash over everything that trained adapters depend on. Runs with the same fingerprint share checkpoints."""
        inputs = {
            **self.settings,
            "seed": self.options.seed,
            "method": self.options.method,
            **({"half": True} if self.options.half else {}),
            "device": self.device,
            "latents": {modality: latents.fingerprint for modality, latents in self.encoded.latents.items()},
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "products": str(product_dtype(self.device)),
            "bridgekit": installed_version(),
            "split": self.split.tolist(),
        }
        whole = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
        for ids in self.encoded.ids.values():
            whole.update(ids.tobytes())
        whole.update(self.encoded.keys.tobytes())
        return whole.hexdigest()[:32]

    def result(self, bridge: Bridge, folder: Path, *, reused: bool) -> Alignment:
        """The summary of the run, with an item of the first new side that was not seen in training, if there is one."""
        columns = {modality: self.encoded.pairs.column(modality) for modality in self.encoded.ids}
        # One that can be typed: a file, or a text.
        named = [name for name in (*self.sides, TEXT) if name in columns and not isinstance(columns[name].value(0), Blob)]
        modality = next(iter([*named, *self.sides]))
        unseen = np.isin(self.split, test_splits(self.split.tolist())[:1] or ["val"])
        there = self.encoded.ids[modality] >= 0
        row = int(np.flatnonzero(unseen & there if (unseen & there).any() else there)[0])
        example = self.encoded.pairs.columns[modality][row]
        assert example is not None
        return Alignment(bridge, folder, self.encoded.pairs.set_aside, example, reused)


def encode_and_split(
    pairs: Pairs, encoders: Mapping[str, Encoder], options: TrainingOptions, report: Report, needs: str | None = None
) -> tuple[EncodedPairs, NDArray[np.str_]]:
    """Encode a table and split its rows, and check that it can be trained on.

    Arguments:
        pairs: the table.
        encoders: modality to its encoder.
        options: seed, strictness and precision.
        report: progress.
        needs: drop rows without an item of this modality.

    Raises:
        BridgekitError: rows are duplicated across splits, or all rows have the same item of a modality.
    """
    with first_process_first():
        encoded = encode_pairs(pairs, encoders, report, strict=options.strict, half=options.half)
    split = np.asarray(split_pairs(encoded.pairs, options.seed, encoded.ids))
    if needs:
        rows = np.flatnonzero(encoded.ids[needs] >= 0)
        if not len(rows):
            raise BridgekitError(f"no row has {needs}", where=pairs.source)
        # Not `take`, which renumbers the ids: the fingerprints of bridges made before would change.
        kept = {modality: ids[rows] for modality, ids in encoded.ids.items()}
        encoded = EncodedPairs(encoded.pairs.take(rows.tolist()), encoded.latents, kept, encoded.keys[rows])
        split = split[rows]
    refuse_leaks(encoded, split)
    for modality, ids in encoded.ids.items():
        if len(np.unique(ids[ids >= 0])) < 2:
            raise BridgekitError(f"every row has the same {modality}, or none: there is nothing to learn", where=pairs.source)
    return encoded, split


def fit(run: Run, base: Bridge, started: float, report: Report) -> tuple[Bridge, Sequence[Mapping[str, float]], dict[str, Any]]:
    """Make the new sides of a bridge by the method that validation prefers and, in the first process, measure it beside others.

    Arguments:
        run: what to train on.
        base: the bridge that the sides are added to; it may have none.
        started: when the run began, by `time.monotonic`.
        report: progress.

    Returns:
        the larger bridge, the history of training, and the provenance of the new sides.
    """
    encoded, split, seed, fixed = run.encoded, run.split, run.options.seed, run.fixed
    checkpoint = cache_folder() / "training" / f"{run.fingerprint}.safetensors"
    if not run.options.resume:
        checkpoint.unlink(missing_ok=True)
    solved = solve(
        encoded,
        split,
        preset=run.preset,
        seed=seed,
        fixed=fixed,
        method=run.options.method,
        device=run.device,
        checkpoint=checkpoint,
        unpaired=run.unpaired,
        report=report,
    )
    chosen, trained = solved.solutions[solved.method], solved.trained
    bridge = replace(
        base,
        sides={**base.sides, **{m: Side(name, new.revision, new.dim, m in fixed) for m, (name, new) in run.sides.items()}},
        adapters={**base.adapters, **{modality: chosen.adapters[modality].to(run.device) for modality in run.sides}},
        preset=base.preset if base.sides else chosen.preset,
        temperature=base.temperature if base.sides else solved.temperature,
        training_rows=base.training_rows | encoded.training_rows(split),
        _encoders={**base._encoders, **{modality: encoder for modality, (_, encoder) in run.sides.items()}},
    )
    if rank() == 0:
        bridge = measure_gap(bridge, encoded, split)
        random = initial_adapters(*training_rows(encoded, split), replace(run.preset, warm_start=0.0), seed, fixed)
        methods = {"random": Solution(random, run.preset), **{str(name): each for name, each in solved.solutions.items()}}
        records = [
            record
            for name, each in methods.items()
            for record in evaluate_splits(
                encoded, split.tolist(), each.embed, name, banks={**banks_of(encoded, split, each.embed), **base.banks}
            )
            if sides_of(record) & set(run.sides)
        ]
        bridge = replace(bridge, metrics=[*base.metrics, *records])
    provenance = {
        "pairs": encoded.pairs.source,
        "modalities": list(encoded.ids),
        **({"columns": dict(run.options.columns)} if run.options.columns else {}),
        "rows": count_rows(split),
        **({"unpaired": {name: len(each) for name, each in run.unpaired.items()}} if run.unpaired else {}),
        "set_aside": len(encoded.pairs.set_aside),
        "method": solved.method,
        **({"choice": {**asdict(solved.choice), "interval": list(solved.choice.interval)}} if solved.choice else {}),
        "strength": chosen.preset.warm_start,
        "seed": seed,
        **({"half": True} if run.options.half else {}),
        "device": run.device,
        "seconds": round(time.monotonic() - started, 1),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "machine": f"{platform.system()} {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "bridgekit": installed_version(),
        "fingerprint": run.fingerprint,
        **({"best_epoch": trained.best_epoch} if trained else {}),
        **({"diverged": trained.diverged} if trained and trained.diverged else {}),
    }
    return bridge, solved.history, provenance


@dataclass(frozen=True)
class Solved:
    """What the methods gave on a table.

    Arguments:
        solutions: by method, those that were asked for.
        method: the one to save.
        choice: how it was chosen, or None if it was asked for.
        trained: the result of training, if there was any.
        history: its validations, after that of the closed form that it started from.
    """

    solutions: Mapping[Method, Solution]
    method: Method
    choice: Choice | None = None
    trained: Trained | None = None
    history: Sequence[Mapping[str, float]] = ()

    @property
    def temperature(self) -> float:
        """The temperature of the method to save. Only training learns one."""
        return (
            self.trained.temperature
            if self.trained and self.method == "FuseMix"
            else self.solutions["ridge"].preset.temperature
        )


def solve(
    encoded: EncodedPairs,
    split: NDArray[np.str_],
    *,
    preset: Preset,
    seed: int = 0,
    fixed: Mapping[str, Adapter] | None = None,
    method: Literal["auto"] | Method = AUTO,
    device: str = "cpu",
    checkpoint: Path | None = None,
    unpaired: Mapping[str, Tensor] | None = None,
    report: Report = silent,
) -> Solved:
    """Ridge regression, the closed form, self-training if there are unpaired items, and FuseMix; and the choice among them.

    If one of them is asked for, those that take longer are left out.

    Arguments:
        encoded: the table with its latents.
        split: (n,) each row's split.
        method: `auto`, or the one to save.
        preset, seed, fixed, device, checkpoint: as for `bridgekit.fusion.training.train`. If the preset starts from the closed
            form, training starts from the strength that was chosen for that.
        unpaired: modality to the latents of unpaired items, of a table with two modalities.
        report: progress.

    Raises:
        BridgekitError: the training rows do not join all modalities, training diverged before its first validation, or there is
            no such method with fixed sides or without unpaired items.
    """
    fixed = fixed or {}
    check_joined(encoded, split, fixed)
    report("closed form", 0, 1)
    solutions = closed_forms(encoded, split, preset, seed, fixed)
    report("closed form", 1, 1)
    if unpaired:
        report("self-training", 0, 1)
        solutions["self-training"] = self_training(encoded, split, solutions["closed form"], seed, unpaired)
        report("self-training", 1, 1)
    if method not in (AUTO, "FuseMix"):
        if method == "self-training" and not unpaired:
            raise BridgekitError("self-training needs unpaired items", remedy="name some with --unpaired")
        if method not in solutions:
            raise BridgekitError("with a fixed side, the closed form is ridge regression onto it", remedy="use --method ridge")
        return Solved(solutions, method)
    start = solutions.get("closed form", solutions["ridge"])
    if preset.warm_start:
        preset = replace(preset, warm_start=start.preset.warm_start)
    trained = train_encoded(
        encoded, split, preset=preset, seed=seed, fixed=fixed, device=device, checkpoint=checkpoint, report=report
    )
    solutions["FuseMix"] = Solution(trained.adapters, preset)
    validation = Validation.of_split(encoded, split, fixed)
    history: list[Mapping[str, float]] = [*trained.history]
    if preset.warm_start:
        at_start = {"epoch": 0, "temperature": preset.temperature, "lr": 0.0, **validation.figures(start.embed)}
        history.insert(0, at_start)
    choice = choose(solutions, validation, seed) if method == AUTO else None
    return Solved(solutions, choice.method if choice else "FuseMix", choice, trained, history)


def check_joined(encoded: EncodedPairs, split: NDArray[np.str_], fixed: Mapping[str, Adapter]) -> None:
    """Raise BridgekitError if the training rows do not join all modalities."""
    rows = training_rows(encoded, split)[1]
    start = list(fixed or list(rows)[:1])
    lost = set(rows) - {*start, *(name for name, _ in joining_order(start, rows))}
    if lost:
        raise BridgekitError(
            f"no row to train on joins {' or '.join(sorted(lost))} with the other modalities", where=encoded.pairs.source
        )


def train_encoded(
    encoded: EncodedPairs,
    split: NDArray[np.str_],
    *,
    preset: Preset,
    seed: int = 0,
    fixed: Mapping[str, Adapter] | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    report: Report = silent,
) -> Trained:
    """Train adapters on the `train` rows of an encoded table, choosing the epoch by recall on its `val` rows.

    Arguments:
        encoded: the table with its latents.
        split: (n,) each row's split.
        preset, seed, fixed, device, checkpoint: as for `bridgekit.fusion.training.train`.
        report: progress.

    Raises:
        BridgekitError: training diverged before its first validation.
    """
    validation = Validation.of_split(encoded, split, fixed or ())
    trained = train(
        *training_rows(encoded, split),
        torch.from_numpy(encoded.keys[split == "train"]),
        validate=lambda adapters: validation.figures(lambda modality, matrix: project(adapters[modality], matrix)),
        preset=preset,
        seed=seed,
        fixed=fixed,
        device=device,
        checkpoint=checkpoint,
        on_epoch=lambda epoch, loss: report("training", epoch, preset.epochs),
    )
    report("training", preset.epochs, preset.epochs)
    return trained


def banks_of(encoded: EncodedPairs, split: NDArray[np.str_], embed: Embed) -> dict[str, Tensor]:
    """The embeddings by which a bridge knows hubs: see `bank_latents`."""
    # Rounded as they are saved, so that a saved bridge finds the same.
    latents = bank_latents(encoded, np.flatnonzero(split == "train"))
    return {pair: embed(pair.split("/")[0], matrix).half().float() for pair, matrix in latents.items()}


def measure_gap(bridge: Bridge, encoded: EncodedPairs, split: NDArray[np.str_]) -> Bridge:
    """The bridge with means and banks of its training embeddings, and how far apart its modalities lie (Liang et al., 2022).

    In the provenance, for each pair of modalities, `modality_gap` is the distance between the two means, and `pair_cosine` the
    mean cosine similarity of the pairs in `val`, if it has some.
    """

    def embed(modality: str, ids: NDArray[np.int64]) -> Tensor:
        return bridge.project(modality, encoded.latents[modality].matrix[torch.from_numpy(ids)])

    means = dict(bridge.means)
    for modality, ids in encoded.ids.items():
        known = np.unique(ids[(split == "train") & (ids >= 0)])
        means.setdefault(modality, embed(modality, known).mean(0))
    gaps = {f"{a}, {b}": round(float((means[a] - means[b]).norm()), 4) for a, b in combinations(means, 2)}
    cosines = dict(bridge.provenance.get("pair_cosine", {}))
    for a, b in combinations(encoded.ids, 2):
        rows = (split == "val") & (encoded.ids[a] >= 0) & (encoded.ids[b] >= 0)
        if rows.any() and f"{a}, {b}" not in cosines:
            together = embed(a, encoded.ids[a][rows]) * embed(b, encoded.ids[b][rows])
            cosines[f"{a}, {b}"] = round(float(together.sum(1).mean()), 4)
    banks = {**banks_of(encoded, split, bridge.project), **bridge.banks}
    return replace(
        bridge, means=means, banks=banks, provenance={**bridge.provenance, "modality_gap": gaps, "pair_cosine": cosines}
    )
