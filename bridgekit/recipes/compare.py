"""`compare`: which encoders to align. A cheap probe of every combination, and real fits of the best."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from itertools import combinations, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bridgekit.bridge.bridge import Bridge
from bridgekit.encoders import Encoder
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.methods import Validation, probe
from bridgekit.evaluation.recall import mean_recall
from bridgekit.fusion.training import PRESETS
from bridgekit.hardware import resolve_device
from bridgekit.latents.batches import BATCH_SIZE, Batch, encode_batches
from bridgekit.latents.encode import encode_items
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.pairs import Column, Pairs, SetAside
from bridgekit.plugins import concatenated, encoder_name, load_encoder, recorded_name
from bridgekit.progress import Report, progress_bars
from bridgekit.recipes.fit import Run, encode_and_split, fit, say_set_aside
from bridgekit.recipes.sides import RunOptions, TrainingOptions, check_columns, select_pairs, takes
from bridgekit.tables.reading import open_table
from bridgekit.tables.splits import count_rows

#: The probe is made from this many training rows at most, and measured on this many validation rows.
PROBE_ROWS = 2_000
#: How many of the best combinations are fitted.
FITTED = 3
PRESET = "default"


@dataclass(frozen=True)
class CompareOptions(RunOptions):
    """Options of `compare`.

    Arguments:
        a: encoders of one modality, `provider:model`, or a modality, for its default encoder.
        b: encoders of another modality. At least one of `a` and `b` has two or more.
        pairs: as for `align`.
        seed: random seed.
        device, columns, strict, outside, progress: see `RunOptions`.
    """

    a: Sequence[str]
    b: Sequence[str]
    pairs: Any = None
    _: KW_ONLY
    seed: int = 0


@dataclass(frozen=True)
class Side:
    """One encoder, or the concatenation of two, as a side of a combination.

    Arguments:
        name: its full name, which `align` takes.
        encoder: the opened encoder.
        columns: which columns of the latents of all encoders of the modality, concatenated, are its own.
        fingerprint: that of its latents.
        seconds: how long encoding an item takes.
    """

    name: str
    encoder: Encoder
    columns: Sequence[slice]
    fingerprint: str
    seconds: float


@dataclass(frozen=True)
class Fitted:
    """What `align` gives for a combination.

    Arguments:
        method: the method that validation prefers.
        validation: the mean of recall@1, @5 and @10 over both directions on the validation rows.
        recall: that on the test rows; None without any.
        interval: its 95 % interval.
        seconds: how long fitting took.
    """

    method: str
    validation: float
    recall: float | None
    interval: tuple[float, float] | None
    seconds: float


@dataclass(frozen=True)
class Combination:
    """One side a with one side b.

    Arguments:
        a, b: the names of their encoders, as `align` takes them.
        probe: recall of the probe on held-out rows: the mean of recall@1, @5 and @10 over both directions.
        interval: its 95 % interval.
        seconds: seconds an item of a, and of b.
        widths: width of the latents of a, and of b.
        fitted: a real fit, of the best combinations.
    """

    a: str
    b: str
    probe: float
    interval: tuple[float, float]
    seconds: tuple[float, float]
    widths: tuple[int, int]
    fitted: Fitted | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Arguments:
        encoders: modality to the names of its encoders, for sides a and b.
        combinations: best first: those that were fitted by their recall on the validation rows, then the others by the probe.
        source: the table.
        rows: split to its number of rows.
        probed: how many training rows the probe was made from, at most.
        set_aside: rows that one of the encoders cannot use. No combination was given them.
        command: trains the best combination.
    """

    encoders: Mapping[str, Sequence[str]]
    combinations: Sequence[Combination]
    source: str
    rows: Mapping[str, int]
    probed: int
    set_aside: Sequence[SetAside]
    command: str


@takes(CompareOptions)
def compare(options: CompareOptions) -> Comparison:
    """Compare encoders on a table of pairs, to choose those to align.

    `compare(a, b, pairs, *, seed=...)`: takes the fields of `CompareOptions`. Every combination of one encoder, or the
    concatenation of two, of each side is probed by a closed form; the best three are then fitted as `align` would.

    Raises:
        BridgekitError: anything the caller can fix; the message says how.
    """
    comparison = run_comparison(options)
    if options.progress:
        say_set_aside(comparison.set_aside)
    return comparison


def run_comparison(options: CompareOptions, fitted: int = FITTED) -> Comparison:
    """`compare`, fitting this many of the best combinations."""
    if len(options.a) + len(options.b) < 3 or not options.a or not options.b:
        raise BridgekitError(
            "there is nothing to compare: one side needs two encoders or more, and the other at least one",
            where=", ".join([*options.a, *options.b]) or None,
            remedy="repeat an option, as in --a image --a timm:MODEL --b text; for one encoder a side use bridgekit align",
        )
    device = resolve_device(options.device)
    table = None if options.pairs is None else open_table(options.pairs, columns=options.columns, outside=options.outside)
    check_columns((options.a[0], options.b[0]), table)
    with progress_bars(options.progress) as report:
        opened = _open([options.a, options.b], device, report)
    modalities = (opened[0][0][1].modality, opened[1][0][1].modality)
    pairs = select_pairs(table, modalities, options.progress)
    training = TrainingOptions(
        device=options.device, columns=options.columns, strict=options.strict, outside=options.outside, seed=options.seed
    )
    with progress_bars(options.progress) as report:
        sides = [_sides(encoders, pairs, report) for encoders in opened]
        together = {own[0][1].modality: _together(own) for own in opened}
        encoded, split = encode_and_split(pairs, together, training, report)
        found = _probed(encoded, split, sides, options.seed, report)
        best = []
        for number, (combination, pair) in enumerate(found[:fitted], 1):
            numbered = _numbered(report, number, len(found[:fitted]))
            best.append(replace(combination, fitted=_fit(encoded, split, pair, training, device, numbered)))
    best.sort(key=lambda each: (each.fitted.validation if each.fitted else 0.0, each.probe), reverse=True)
    combined = [*best, *(combination for combination, _ in found[fitted:])]
    rows = count_rows(split)
    command = _command(options, combined[0], modalities)
    probed = min(PROBE_ROWS, rows["train"])
    names = {own[0][1].modality: [name for name, _ in own] for own in opened}
    return Comparison(names, combined, encoded.pairs.source, rows, probed, encoded.pairs.set_aside, command)


Opened = Sequence[tuple[str, Encoder]]


def _open(sides: Sequence[Sequence[str]], device: str, report: Report) -> list[Opened]:
    """The full name and the encoder of each given name. Those of a side are different, and of one modality."""
    opened: list[list[tuple[str, Encoder]]] = []
    total, done = sum(map(len, sides)), 0
    for option, names in zip(("--a", "--b"), sides, strict=True):
        own: list[tuple[str, Encoder]] = []
        for name in names:
            report("opening encoders", done, total)
            full = encoder_name(name)
            encoder = load_encoder(full, device)
            if own and encoder.modality != own[0][1].modality:
                raise BridgekitError(
                    f"the encoders of {option} are of different modalities: {own[0][0]} is for {own[0][1].modality}, "
                    f"{full} for {encoder.modality}",
                    remedy="give all encoders of one modality to --a, and all of the other to --b",
                )
            same = next((known for known, other in own if other.revision == encoder.revision), None)
            if same is not None:
                raise BridgekitError(f"two encoders of {option} are the same", where=f"{same}, {full}", remedy="leave out one")
            own.append((recorded_name(full, encoder), encoder))
            done += 1
        opened.append(own)
    report("opening encoders", total, total)
    (first, a), (second, b) = opened[0][0], opened[1][0]
    if a.modality == b.modality:
        raise BridgekitError(
            f"two sides are {a.modality}",
            where=f"{first}, {second}",
            remedy="give encoders of one modality to --a, and of another to --b",
        )
    return list(opened)


def _together(encoders: Opened) -> Encoder:
    """All encoders of a side as one."""
    return concatenated(encoders) if len(encoders) > 1 else encoders[0][1]


def _sides(encoders: Opened, pairs: Pairs, report: Report) -> list[Side]:
    """Each encoder, and each two of them. Their items are encoded."""
    singles, start = [], 0
    for number, (name, encoder) in enumerate(encoders, 1):
        column = pairs.columns[encoder.modality]
        latents = encode_items(encoder, column, report=_numbered(report, number, len(encoders)))
        measured = latents.encoded >= BATCH_SIZE
        seconds = latents.seconds / latents.encoded if measured else _seconds(encoder, Column.of(column))
        singles.append(Side(name, encoder, [slice(start, start + encoder.dim)], latents.fingerprint, seconds))
        start += encoder.dim
    return singles + [_joined(one, other) for one, other in combinations(singles, 2)]


def _numbered(report: Report, number: int, count: int) -> Report:
    return lambda what, done, total: report(f"{what} {number} of {count}" if count > 1 else what, done, total)


def _seconds(encoder: Encoder, column: Column[Any]) -> float:
    """Seconds an item, by encoding a batch of the column's items once more."""
    items = [column.value(code) for code in islice(column.firsts().tolist(), BATCH_SIZE)]
    list(encode_batches(encoder, [Batch(0, items[:1])]))  # the first call of a model may take longer
    started = time.perf_counter()
    list(encode_batches(encoder, [Batch(0, items)]))
    return (time.perf_counter() - started) / len(items)


def _joined(one: Side, other: Side) -> Side:
    encoder = concatenated([(one.name, one.encoder), (other.name, other.encoder)])
    # As `join_latents` makes it, so that `align` continues an interrupted fit of these sides, and the other way round.
    fingerprint = hashlib.sha256(f"{one.fingerprint}+{other.fingerprint}".encode()).hexdigest()
    return Side(encoder.pinned, encoder, [*one.columns, *other.columns], fingerprint, one.seconds + other.seconds)


def _latents_of(encoded: EncodedPairs, pair: Sequence[Side]) -> EncodedPairs:
    """The table with only the latents of these sides."""
    latents = {}
    for side in pair:
        whole = encoded.latents[side.encoder.modality]
        own = torch.cat([whole.matrix[:, columns] for columns in side.columns], 1)
        latents[side.encoder.modality] = replace(whole, matrix=own, fingerprint=side.fingerprint)
    return replace(encoded, latents=latents)


def _probed(
    encoded: EncodedPairs, split: NDArray[np.str_], sides: Sequence[Sequence[Side]], seed: int, report: Report
) -> list[tuple[Combination, tuple[Side, Side]]]:
    """Every combination with the recall of its probe, best first."""
    rows = _probe_rows(split, seed)
    few, its_split = encoded.take(rows), split[rows]
    found = []
    total = len(sides[0]) * len(sides[1])
    for number, (a, b) in enumerate(product(*sides)):
        report("probing", number, total)
        recall, interval = mean_recall(probe(_latents_of(few, (a, b)), its_split, PRESETS[PRESET], seed), seed)
        widths = (a.encoder.dim, b.encoder.dim)
        found.append((Combination(a.name, b.name, recall, interval, (a.seconds, b.seconds), widths), (a, b)))
    report("probing", total, total)
    return sorted(found, key=lambda each: (-each[0].probe, sum(each[0].widths)))


def _probe_rows(split: NDArray[np.str_], seed: int) -> NDArray[np.int64]:
    """Up to `PROBE_ROWS` rows each of `train` and `val`, drawn at random."""
    draw: Callable[[NDArray[np.int64]], NDArray[np.int64]] = np.random.default_rng(seed).permutation
    return np.sort(np.concatenate([draw(np.flatnonzero(split == name))[:PROBE_ROWS] for name in ("train", "val")]))


def _fit(
    encoded: EncodedPairs, split: NDArray[np.str_], pair: Sequence[Side], options: TrainingOptions, device: str, report: Report
) -> Fitted:
    """Fit two sides as `align` does, and measure them."""
    started = time.monotonic()
    own, preset = _latents_of(encoded, pair), PRESETS[PRESET]
    encoders = {side.encoder.modality: (side.name, side.encoder) for side in pair}
    settings = {
        "encoders": {modality: (name, encoder.revision) for modality, (name, encoder) in encoders.items()},
        "preset": asdict(preset),
        "frozen": None,
    }
    run = Run(own, split, encoders, preset, {}, options, device, settings)
    empty = Bridge({}, {}, preset, preset.temperature, {}, (), (), device)
    bridge, _, provenance = fit(run, empty, started, report)
    method = str(provenance["method"])
    validation = Validation.of_split(own, split).figures(bridge.project)["score"]
    records = [each for each in bridge.metrics if (each["method"], each["among"]) == (method, "split")]
    recall, interval = mean_recall(records, options.seed) if records else (None, None)
    return Fitted(method, validation, recall, interval, time.monotonic() - started)


def _command(options: CompareOptions, best: Combination, modalities: tuple[str, str]) -> str:
    """The command, or for a table in memory the call in Python, that trains the best combination."""
    out = Path("bridges") / "-".join(modalities)
    number = 2
    while out.exists():
        out, number = Path("bridges") / f"{'-'.join(modalities)}-{number}", number + 1
    if not (options.pairs is None or isinstance(options.pairs, str | Path)):
        return f"bridgekit.align({best.a!r}, {best.b!r}, pairs, out={str(out)!r}, seed={options.seed})"
    words = ["bridgekit", "align", "--a", best.a, "--b", best.b]
    words += [] if options.pairs is None else ["--pairs", str(options.pairs)]
    for modality, name in options.columns.items():
        words += ["--column", f"{modality}={name}"]
    words += [] if options.seed == 0 else ["--seed", str(options.seed)]
    words += [] if options.device == "auto" else ["--device", options.device]
    words += ["--outside"] if options.outside else []
    return shlex.join([*words, "--out", str(out)])
