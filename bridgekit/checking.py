"""`check`: what is wrong with a table, or worth knowing about it, before anybody trains on it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bridgekit.alignment import choose_sides, open_table
from bridgekit.batches import threads
from bridgekit.encoders import TEXT, Encoder, Item, resolve_device
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.evaluation import NOT_TESTS, leaks, test_splits
from bridgekit.latents import encode_items
from bridgekit.media import content_hash, read_audio, read_image, read_text
from bridgekit.pairs import EXTENSIONS, Pairs, SetAside, split_pairs, table_modalities
from bridgekit.plugins import default_modalities, encoder_name, load_encoder
from bridgekit.progress import Report, progress_bars
from bridgekit.retrieval import alike, chance_recall, relevance
from bridgekit.training_rows import Contents, Ids

#: From the worst. `align` refuses a table with an error; a warning spoils what is learnt or measured; a note is worth knowing.
GRADES = ("error", "warning", "note")

#: Sound whose loudest sample is below this is silence (-60 dB of full scale).
SILENCE = 10 ** (-60 / 20)
#: A clip of which so many samples lie at full scale is clipped.
FULL_SCALE, CLIPPED = 0.999, 0.01
#: Seconds: shorter clips hold next to nothing; the audio encoders hear longer ones in windows, or not whole.
SHORTEST, WINDOW = 0.1, 30.0
#: So many times the median, or that part of it, is an extreme length.
EXTREME = 10
SAMPLE_RATE = 16_000

#: Different items whose latents have this cosine around the mean are the same to an encoder.
SAME = 0.9999
#: Comparing all with all is cheap for this many items.
FEW = 20_000
#: Pairs of such items that are told at most.
MOST_ALIKE = 1_000
#: Latents so many times as far from the middle as those of most items are outliers, which one mean and deviation cannot hold.
FAR = 100
#: Latents of which less than this part is an item's own, the rest being common to all, hardly differ.
HARDLY = 1e-4


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a table, or worth knowing about it.

    Arguments:
        kind: `set aside`, `leak`, `duplicate`, `silence`, `length`, `latents`, ...: for programs.
        grade: one of `GRADES`.
        what: one sentence, with counts.
        remedy: what to do about it.
        items: the rows and items it is about, a line each.
    """

    kind: str
    grade: str
    what: str
    remedy: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitSummary:
    """How large a split is.

    Arguments:
        rows: how many.
        groups: how many different groups they have; None where the table has no groups.
        distinct: modality to how many different items.
        chance: for a split to test by, direction to k to the recall@k of a random order; None for the others.
    """

    rows: int
    groups: int | None
    distinct: Mapping[str, int]
    chance: Mapping[str, Mapping[int, float]] | None


@dataclass(frozen=True)
class TableReport:
    """What `check_pairs` found.

    Arguments:
        source: the table.
        rows: how many of its rows can be used.
        set_aside: the others.
        own_splits: whether the table says which split a row is in. If not, `splits` are what `align` will make of it.
        splits: name to its size.
        figures: modality to readable figures about its items: lengths, and how much their latents have in common.
        findings: the worst first.
    """

    source: str
    rows: int
    set_aside: Sequence[SetAside]
    own_splits: bool
    splits: Mapping[str, SplitSummary]
    figures: Mapping[str, Mapping[str, float]]
    findings: Sequence[Finding]

    def count(self, grade: str) -> int:
        """How many findings have a grade."""
        return sum(finding.grade == grade for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self) | {"set_aside": [vars(row) for row in self.set_aside]}


@dataclass(frozen=True)
class Look:
    """What one item is like.

    Arguments:
        content: its content hash; None where it cannot be used.
        failure: why not.
        length: seconds of sound, or characters of text.
        faults: kinds of fault, each with a readable figure.
    """

    content: bytes | None = None
    failure: str | None = None
    length: float | None = None
    faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checked:
    """A table whose items were looked at: what all checks start from.

    Arguments:
        pairs: its n usable rows.
        split: each row's split.
        ids, contents: see `bridgekit.training_rows`.
        looks: modality to item to what it is like.
    """

    pairs: Pairs
    split: NDArray[np.str_]
    ids: Ids
    contents: Contents
    looks: Mapping[str, Mapping[Item, Look]]

    def told(self, row: int, modality: str, why: str = "") -> str:
        """One item, for a person."""
        item = str(self.pairs.columns[modality][row] or "")
        return f"row {self.pairs.rows[row]} ({self.split[row]}), {modality}: {item[:100]}{f' ({why})' if why else ''}"

    def first_rows(self, modality: str) -> NDArray[np.int64]:
        """For each content of a modality the first row that has it."""
        there = np.flatnonzero(self.ids[modality] >= 0)
        return there[np.unique(self.ids[modality][there], return_index=True)[1]]


def check_pairs(
    pairs: str | Path | Pairs,
    a: str | None = None,
    b: str | None = None,
    *,
    more: Sequence[str] = (),
    latents: bool = True,
    device: str = "auto",
    outside: bool = False,
    progress: bool = True,
) -> TableReport:
    """Look at a table before anybody trains on it: at its rows, its files, its splits, and what encoders make of its items.

    Arguments:
        pairs: a table, folder, source or `Pairs`, as for `align`.
        a, b, more: modalities or encoders, as for `align`; by default all columns that are modalities. A modality without an
            installed encoder is checked but for its latents.
        latents: encode the items and look at their latents. They are kept: `align` will not encode them again.
        device: a torch device, or `auto`.
        outside: let the table name files outside its own folder.
        progress: show progress bars on standard error.

    Raises:
        BridgekitError: the table cannot be read, none of its rows can be used, or a named encoder is not there.
    """
    with progress_bars(progress) as report:
        encoders, findings = _open_sides(pairs, [name for name in (a, b, *more) if name], device if latents else None)
        table = open_table(pairs, tuple(encoders), progress, outside)
        looks = {modality: _look_at_all(modality, table.columns[modality], report) for modality in encoders}
        table = _usable(table, looks)
        checked, unsplit = _in_splits(table, looks)
        findings += unsplit
        for check in (_same_everywhere, _leaks, _leaking_files, _leaking_groups, _set_aside, _faults, _lengths, _duplicates):
            findings += check(checked)
        figures = {modality: _length_figures(checked, modality) for modality in encoders}
        for modality, encoder in encoders.items():
            if encoder is not None and latents:
                found, about = _latents(checked, modality, encoder, report)
                findings += found
                figures[modality] |= about
    findings.sort(key=lambda finding: GRADES.index(finding.grade))
    names = dict.fromkeys(name for name in (*NOT_TESTS, *checked.split.tolist()) if name in checked.split)
    splits = {name: _summary(checked, name) for name in names}
    return TableReport(table.source, len(table), table.set_aside, table.split is not None, splits, figures, tuple(findings))


# ---- what is looked at


def _open_sides(
    pairs: str | Path | Pairs, names: Sequence[str], device: str | None
) -> tuple[dict[str, Encoder | None], list[Finding]]:
    """Modality to its encoder, or None where none is installed or, without a device, wanted."""
    if not names:
        known = {*EXTENSIONS, TEXT, *default_modalities()}
        names = [name for name in table_modalities(pairs) if name in known]
        names = names if len(names) > 1 else choose_sides(None, None, (), pairs)
    encoders: dict[str, Encoder | None] = {}
    findings = []
    for name in names:
        encoder = None
        try:
            if device or ":" in name:
                encoder = load_encoder(encoder_name(name), resolve_device(device or "cpu"))
        except BridgekitError as error:
            if ":" in name:
                raise
            what = f"the latents of {name} were not looked at: {error.what}"
            findings.append(Finding("encoder", "note", what, error.remedy or "install a plugin that has an encoder for it"))
        encoders[encoder.modality if encoder else name] = encoder if device else None
    return encoders, findings


def _look_at_all(modality: str, items: Sequence[Item | None], report: Report) -> dict[Item, Look]:
    """Each different item of a column, and what it is like. Files are decoded in threads."""
    distinct = [item for item in dict.fromkeys(items) if item is not None]
    looks: dict[Item, Look] = {}
    with ThreadPoolExecutor(threads()) as pool:
        for item, look in zip(distinct, pool.map(lambda item: _look_at(modality, item), distinct), strict=True):
            looks[item] = look
            report(f"looking at {modality}", len(looks), len(distinct))
    return looks


def _look_at(modality: str, item: Item) -> Look:
    try:
        content = content_hash(item)
        if modality == TEXT:
            return Look(content, length=len(read_text(item)))
        if modality == "audio":
            wave = read_audio(Path(item), SAMPLE_RATE)
            return Look(content, length=len(wave) / SAMPLE_RATE, faults=_sound_faults(np.abs(wave)))
        if modality == "image":
            flat = bool(np.ptp(np.asarray(read_image(Path(item))), axis=(0, 1)).max() == 0)
            return Look(content, faults={"one colour": "one colour"} if flat else {})
        return Look(content)
    except ItemError as error:
        return Look(failure=error.reason)


def _sound_faults(loudness: NDArray[np.float32]) -> dict[str, str]:
    peak = float(loudness.max())
    if peak < SILENCE:
        return {"silence": f"peak {20 * np.log10(peak):.0f} dBFS" if peak else "all zeros"}
    clipped = float((loudness >= FULL_SCALE).mean())
    return {"clipping": f"{100 * clipped:.1f} % of its samples"} if clipped >= CLIPPED else {}


def _usable(table: Pairs, looks: Mapping[str, Mapping[Item, Look]]) -> Pairs:
    """The rows all of whose items can be read; the others join those set aside."""
    bad: dict[int, SetAside] = {}
    for modality, each in looks.items():
        for row, item in enumerate(table.columns[modality]):
            if item is not None and (why := each[item].failure) is not None:
                bad.setdefault(row, SetAside(table.rows[row], modality, str(item)[:200], why))
    set_aside = (*table.set_aside, *bad.values())
    usable = table.take(row for row in range(len(table)) if row not in bad)
    if not len(usable):
        first = f" (row {set_aside[0].row}: {set_aside[0].reason}: {set_aside[0].item})" if set_aside else ""
        raise BridgekitError(
            f"no row of the table can be used{first}", where=table.source, remedy="mend the files or the paths"
        )
    columns = {modality: usable.columns[modality] for modality in looks}
    return Pairs(columns, usable.source, usable.rows, usable.split, usable.group, set_aside)


def _in_splits(table: Pairs, looks: Mapping[str, Mapping[Item, Look]]) -> tuple[Checked, list[Finding]]:
    """The table with the splits that `align` will take, and what stands in the way of that."""
    ids: dict[str, NDArray[np.int64]] = {}
    contents: dict[str, list[bytes]] = {}
    for modality, items in table.columns.items():
        numbers: dict[bytes, int] = {}
        found = [-1 if item is None else looks[modality][item].content for item in items]
        ids[modality] = np.array(
            [-1 if isinstance(one, int) else numbers.setdefault(one or b"", len(numbers)) for one in found]
        )
        contents[modality] = list(numbers)
    try:
        split = split_pairs(table, 0, ids)
        trouble = []
    except BridgekitError as error:
        split = table.split or ("all",) * len(table)
        trouble = [Finding("split", "error", error.what, error.remedy or "")]
    return Checked(table, np.asarray(split), ids, contents, looks), trouble


# ---- the checks: each gives what it found


def _set_aside(checked: Checked) -> list[Finding]:
    """A finding for each reason, with numbers in it left out."""
    reasons: dict[str, list[SetAside]] = {}
    for row in checked.pairs.set_aside:
        reasons.setdefault(re.sub(r"\d[\d,.]*", "…", row.reason), []).append(row)
    total = len(checked.pairs.set_aside) + len(checked.pairs)
    return [
        Finding(
            "set aside",
            "warning",
            f"{len(rows):,} of {total:,} rows are set aside: {reason if len(rows) > 1 else rows[0].reason}",
            "mend them, or remove them; training does without them",
            tuple(f"row {row.row}, {row.column}: {row.item}{f' ({row.reason})' if '…' in reason else ''}" for row in rows),
        )
        for reason, rows in reasons.items()
    ]


def _same_everywhere(checked: Checked) -> list[Finding]:
    return [
        Finding("variety", "error", f"every row has the same {modality}: there is nothing to tell apart", "add other pairs")
        for modality, contents in checked.contents.items()
        if len(contents) < 2
    ]


def _leaks(checked: Checked) -> list[Finding]:
    found = leaks(checked.split.tolist(), checked.ids, checked.contents)
    what = f"{_count(len(found), 'row')} of validation or test splits that training sees wholly: figures would flatter"
    items = tuple(
        f"row {checked.pairs.rows[row]} ({checked.split[row]}) as row {checked.pairs.rows[other]} ({checked.split[other]})"
        for row, other in found
    )
    return [Finding("leak", "error", what, "give both the same split, or remove one", items)] if found else []


def _leaking_files(checked: Checked) -> list[Finding]:
    """Items of a test or validation split that training sees too, in rows that are not wholly the same."""
    whole = {row for row, _ in leaks(checked.split.tolist(), checked.ids, checked.contents)}
    findings = []
    for modality, ids in checked.ids.items():
        seen = set(ids[(checked.split == "train") & (ids >= 0)].tolist())
        rows = [row for row in np.flatnonzero(checked.split != "train").tolist() if int(ids[row]) in seen and row not in whole]
        count = len({int(ids[row]) for row in rows})
        items = tuple(checked.told(row, modality) for row in rows)
        if modality != TEXT and rows:
            what = f"train also has {count:,} of the {modality} files of other splits, beside something else"
            remedy = "put all rows of one file into the same split, unless it stands for a class"
            findings.append(Finding("file leak", "warning", what, remedy, items))
        elif rows:
            what = f"train also has {count:,} of the texts of other splits"
            findings.append(Finding("text leak", "note", what, "nothing, where texts are names of classes", items))
    return findings


def _leaking_groups(checked: Checked) -> list[Finding]:
    groups: dict[str, set[str]] = {}
    for name, split in zip(checked.pairs.group or (), checked.split.tolist(), strict=False):
        if name:
            groups.setdefault(name, set()).add(split)
    crossing = {name: splits for name, splits in groups.items() if "train" in splits and len(splits) > 1}
    what = f"train shares {_count(len(crossing), 'group')} with other splits"
    items = tuple(f"group {name}: {', '.join(sorted(splits))}" for name, splits in crossing.items())
    remedy = "nothing, where groups are classes; where they are speakers or recordings, one split should have all rows of one"
    return [Finding("group leak", "note", what, remedy, items)] if crossing else []


def _duplicates(checked: Checked) -> list[Finding]:
    findings = []
    first: dict[tuple[object, ...], int] = {}
    same = []
    for row in range(len(checked.pairs)):
        key = (checked.split[row], *(int(ids[row]) for ids in checked.ids.values()))
        if (other := first.setdefault(key, row)) != row:
            same.append(f"row {checked.pairs.rows[row]} ({checked.split[row]}) as row {checked.pairs.rows[other]}")
    if same:
        what = f"{_count(len(same), 'row')} with wholly what another row of the same split holds, under other names"
        findings.append(Finding("duplicate", "warning", what, "remove them: they count twice", tuple(same)))
    for modality, looks in checked.looks.items():
        names: dict[bytes, list[Item]] = {}
        for item, look in looks.items():
            if look.content is not None:
                names.setdefault(look.content, []).append(item)
        several = [items for items in names.values() if len(items) > 1]
        if modality != TEXT and several:
            what = f"{_count(len(several), f'{modality} file')} under several names"
            items = tuple(" = ".join(map(str, items)) for items in several)
            findings.append(Finding("duplicate file", "note", what, "nothing: they count as one item", items))
    return findings


#: Kind of fault to its grade, what an item is called that has it, and what to do.
_FAULTS = {
    "silence": ("warning", "silent", "remove their rows: there is nothing to hear"),
    "clipping": ("note", "clipped", "record or export them at a lower level, if you can"),
    "one colour": ("warning", "of one colour", "remove their rows: there is nothing to see"),
}


def _faults(checked: Checked) -> list[Finding]:
    findings = []
    for modality, items in checked.pairs.columns.items():
        for kind, (grade, adjective, remedy) in _FAULTS.items():
            faulty = [
                checked.told(row, modality, checked.looks[modality][item].faults[kind])
                for row in checked.first_rows(modality).tolist()
                if (item := items[row]) is not None and kind in checked.looks[modality][item].faults
            ]
            if faulty:
                verb = "is" if len(faulty) == 1 else "are"
                what = f"{len(faulty):,} of {len(checked.contents[modality]):,} {modality} files {verb} {adjective}"
                findings.append(Finding(kind, grade, what, remedy, tuple(faulty)))
    return findings


def _lengths(checked: Checked) -> list[Finding]:
    """Items of extreme length: beside the others of the table, and by what encoders hear."""
    findings = []
    for modality in checked.ids:
        rows, lengths = _lengths_of(checked, modality)
        unit = " characters" if modality == TEXT else " s"
        for low, high, grade, which, remedy in _extremes(modality, unit, float(np.median(lengths)) if len(rows) else 0.0):
            mask = (lengths > low) & (lengths < high)
            if mask.any():
                found = zip(rows[mask].tolist(), lengths[mask].tolist(), strict=True)
                items = tuple(checked.told(row, modality, f"{length:,.4g}{unit}") for row, length in found)
                what = f"{len(items):,} of {len(rows):,} {modality} items {which}"
                findings.append(Finding("length", grade, what, remedy, items))
    return findings


def _extremes(modality: str, unit: str, median: float) -> list[tuple[float, float, str, str, str]]:
    """Ranges of lengths worth telling of: from, to, grade, what is wrong, and what to do."""
    look = "see whether they are what they should be"
    found = [(EXTREME * median, np.inf, "note", f"with over {EXTREME} times the median of {median:,.4g}{unit}", look)]
    if modality == "audio":
        found += [
            (-1, SHORTEST, "warning", f"under {SHORTEST} s", "remove their rows: there is next to nothing to hear"),
            (SHORTEST, median / EXTREME, "note", f"under a tenth of the median of {median:,.4g} s", look),
            (WINDOW, np.inf, "note", f"over {WINDOW:.0f} s", "cut them: encoders hear so much at once, and take means of more"),
        ]
    return found


def _lengths_of(checked: Checked, modality: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The first row of each different item that has a length, and its length."""
    rows, lengths = [], []
    for row in checked.first_rows(modality).tolist():
        item = checked.pairs.columns[modality][row]
        if item is not None and (length := checked.looks[modality][item].length) is not None:
            rows.append(row)
            lengths.append(length)
    return np.array(rows, np.int64), np.array(lengths, np.float64)


def _length_figures(checked: Checked, modality: str) -> dict[str, float]:
    _, lengths = _lengths_of(checked, modality)
    if not len(lengths):
        return {}
    unit = "characters" if modality == TEXT else "seconds"
    values = {"least": lengths.min(), "median": np.median(lengths), "most": lengths.max()}
    return {f"{name} {unit}": round(float(value), 3) for name, value in values.items()}


# ---- what encoders make of it


def _latents(checked: Checked, modality: str, encoder: Encoder, report: Report) -> tuple[list[Finding], dict[str, float]]:
    """Encode a column and look at its latents."""
    rows = checked.first_rows(modality)
    encoded = encode_items(
        encoder,
        [checked.pairs.columns[modality][row] for row in rows.tolist()],
        progress=lambda done, total: report(f"encoding {modality}", done, total),
    )
    findings = []
    if encoded.failed:
        items = tuple(checked.told(int(rows[at]), modality, why) for at, why in encoded.failed.items())
        what = f"{_count(len(items), f'{modality} item')} not to be encoded: `align` will set the rows aside"
        findings.append(Finding("set aside", "warning", what, "mend them, or remove their rows", items))
    kept = encoded.ids >= 0
    matrix, rows = encoded.matrix[encoded.ids[kept]].double(), rows[kept]
    if len(rows) < 3:
        return findings, {}
    centred = matrix - matrix.mean(0)
    own = float(centred.square().sum() / matrix.square().sum().clamp_min(1e-300))
    if own < HARDLY:
        what = f"the latents of {modality} hardly differ: {100 * (1 - own):.3f} % of them is common to all"
        findings.append(Finding("latents", "warning", what, "see that the items differ, or take another encoder"))
    findings += _near_and_far(checked, modality, rows, matrix)
    flat = int((centred.std(0) < 1e-3 * centred.std(0).median()).sum())
    if flat:
        what = f"{flat:,} of {matrix.shape[1]:,} dimensions of the latents of {modality} hardly vary"
        findings.append(Finding("latents", "note", what, "nothing: adapters make no use of them"))
    findings += _alike(checked, modality, rows, centred)
    return findings, {"share of latents in common": round(1 - own, 4), "dimensions": matrix.shape[1]}


def _near_and_far(checked: Checked, modality: str, rows: NDArray[np.int64], matrix: Tensor) -> list[Finding]:
    """Items whose latents are those of no item in particular, and items whose latents dwarf all others."""
    distance = (matrix - matrix.median(0).values).norm(dim=1)
    typical = distance.median()
    findings = []
    for mask, what, remedy in (
        (distance > FAR * typical, "dwarf those of all others: they spoil all", "remove their rows, and see what they hold"),
        (
            distance < typical / 1_000,
            "are in the middle of all: nothing tells them apart",
            "remove their rows if they are empty",
        ),
    ):
        items = tuple(checked.told(row, modality) for row in rows[mask.numpy()].tolist())
        if items:
            findings.append(
                Finding("latents", "warning", f"the latents of {_count(len(items), f'{modality} item')} {what}", remedy, items)
            )
    return findings


def _alike(checked: Checked, modality: str, rows: NDArray[np.int64], centred: Tensor) -> list[Finding]:
    """Different items that are the same to the encoder: across train and other splits, and otherwise."""
    if len(rows) > FEW:
        what = f"{modality}: whether some of {len(rows):,} items are near-duplicates was not looked at: there are over {FEW:,}"
        return [Finding("near-duplicate", "note", what, "check a part of the table")]
    across: list[str] = []
    within: list[str] = []
    for one, other, cosine in alike(centred.float(), SAME, MOST_ALIKE):
        first, second = int(rows[one]), int(rows[other])
        leaking = len({checked.split[first] == "train", checked.split[second] == "train"}) > 1
        line = f"{checked.told(first, modality)} = {checked.told(second, modality)} (cosine {cosine:.6f})"
        (across if leaking else within).append(line)
    grade = "note" if modality == TEXT else "warning"
    findings = []
    if across:
        what = f"{_count(len(across), 'pair')} of different {modality} items, one in train, one not, the same to the encoder"
        findings.append(
            Finding("near-duplicate", grade, what, "see whether they are copies; one split should have both", tuple(across))
        )
    if within:
        what = f"{_count(len(within), 'pair')} of different {modality} items, the same to the encoder"
        findings.append(Finding("near-duplicate", "note", what, "see whether they are copies", tuple(within)))
    return findings


# ---- sizes


def _summary(checked: Checked, name: str) -> SplitSummary:
    rows = np.flatnonzero(checked.split == name)
    group = checked.pairs.group
    labels = None if group is None else [group[row] for row in rows.tolist()]
    distinct = {modality: len(np.unique(ids[rows][ids[rows] >= 0])) for modality, ids in checked.ids.items()}
    tested = name in test_splits(checked.split.tolist())
    return SplitSummary(
        len(rows),
        None if labels is None else len({label for label in labels if label}),
        distinct,
        {
            f"{a} → {b}": found
            for a, b in permutations(checked.ids, 2)
            if (found := _chance(checked, rows, a, b, labels)) is not None
        }
        if tested
        else None,
    )


def _chance(
    checked: Checked, rows: NDArray[np.int64], query: str, candidate: str, labels: Sequence[str] | None
) -> dict[int, float] | None:
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels or ()))}
    group = None if labels is None else np.array([numbers[label] if label else -1 for label in labels])
    right = relevance(checked.ids[query][rows], checked.ids[candidate][rows], group)
    return chance_recall(right) if len(right.query) else None


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
