"""Checks of items: silence, clipping, single-colour images, extreme lengths."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bridgekit.checks.findings import Checked, Finding, Inspected
from bridgekit.encoders import TEXT, Item
from bridgekit.errors import ItemError
from bridgekit.hardware import threads
from bridgekit.media import content_hash, read_audio, read_image, read_text
from bridgekit.progress import Report

#: Audio with a peak below this is silent (-60 dBFS).
SILENCE = 10 ** (-60 / 20)
#: Audio is clipped if this share of samples is at full scale.
FULL_SCALE, CLIPPED = 0.999, 0.01
#: Seconds. Shorter clips have almost no content; encoders split longer ones into windows, or cut them.
SHORTEST, WINDOW = 0.1, 30.0
#: A length is extreme if it differs from the median by this factor.
EXTREME = 10
SAMPLE_RATE = 16_000


def inspect_items(modality: str, items: Sequence[Item | None], report: Report) -> dict[Item, Inspected]:
    """Inspect each distinct item of a column. Files are decoded in threads."""
    distinct = [item for item in dict.fromkeys(items) if item is not None]
    inspected: dict[Item, Inspected] = {}
    with ThreadPoolExecutor(threads()) as pool:
        for item, found in zip(distinct, pool.map(lambda item: _inspect(modality, item), distinct), strict=True):
            inspected[item] = found
            report(f"checking {modality}", len(inspected), len(distinct))
    return inspected


def _inspect(modality: str, item: Item) -> Inspected:
    try:
        content = content_hash(item)
        if modality == TEXT:
            return Inspected(content, length=len(read_text(item)))
        if modality == "audio":
            wave = read_audio(Path(item), SAMPLE_RATE)
            return Inspected(content, length=len(wave) / SAMPLE_RATE, faults=_audio_faults(np.abs(wave)))
        if modality == "image":
            flat = bool(np.ptp(np.asarray(read_image(Path(item))), axis=(0, 1)).max() == 0)
            return Inspected(content, faults={"one colour": "one colour"} if flat else {})
        return Inspected(content)
    except ItemError as error:
        return Inspected(failure=error.reason)


def _audio_faults(loudness: NDArray[np.float32]) -> dict[str, str]:
    peak = float(loudness.max())
    if peak < SILENCE:
        return {"silence": f"peak {20 * np.log10(peak):.0f} dBFS" if peak else "all zeros"}
    clipped = float((loudness >= FULL_SCALE).mean())
    return {"clipping": f"{100 * clipped:.1f} % of its samples"} if clipped >= CLIPPED else {}


#: Kind of fault to grade, adjective and remedy.
_FAULTS = {
    "silence": ("warning", "silent", "remove their rows"),
    "clipping": ("note", "clipped", "record or export them at a lower level, if possible"),
    "one colour": ("warning", "a single colour", "remove their rows"),
}


def faulty_items(checked: Checked) -> list[Finding]:
    """Items that are silent, clipped or a single colour."""
    findings = []
    for modality, items in checked.pairs.columns.items():
        for kind, (grade, adjective, remedy) in _FAULTS.items():
            faulty = [
                checked.describe(row, modality, checked.inspected[modality][item].faults[kind])
                for row in checked.first_rows(modality).tolist()
                if (item := items[row]) is not None and kind in checked.inspected[modality][item].faults
            ]
            if faulty:
                verb = "is" if len(faulty) == 1 else "are"
                what = f"{len(faulty):,} of {len(checked.contents[modality]):,} {modality} files {verb} {adjective}"
                findings.append(Finding(kind, grade, what, remedy, tuple(faulty)))
    return findings


def extreme_lengths(checked: Checked) -> list[Finding]:
    """Items of extreme length, relative to the rest of the table or to the encoders' window."""
    findings = []
    for modality in checked.ids:
        rows, lengths = _lengths_of(checked, modality)
        unit = " characters" if modality == TEXT else " s"
        for low, high, grade, which, remedy in _extremes(modality, unit, float(np.median(lengths)) if len(rows) else 0.0):
            mask = (lengths > low) & (lengths < high)
            if mask.any():
                found = zip(rows[mask].tolist(), lengths[mask].tolist(), strict=True)
                items = tuple(checked.describe(row, modality, f"{length:,.4g}{unit}") for row, length in found)
                what = f"{len(items):,} of {len(rows):,} {modality} items {which}"
                findings.append(Finding("length", grade, what, remedy, items))
    return findings


def _extremes(modality: str, unit: str, median: float) -> list[tuple[float, float, str, str, str]]:
    """Length ranges to report: (low, high, grade, description, remedy)."""
    verify = "check that they are correct"
    found = [(EXTREME * median, np.inf, "note", f"with over {EXTREME} times the median of {median:,.4g}{unit}", verify)]
    if modality == "audio":
        found += [
            (-1, SHORTEST, "warning", f"under {SHORTEST} s", "remove their rows: they are too short to be useful"),
            (SHORTEST, median / EXTREME, "note", f"under a tenth of the median of {median:,.4g} s", verify),
            (WINDOW, np.inf, "note", f"over {WINDOW:.0f} s", "cut them: encoders average over windows of this length"),
        ]
    return found


def _lengths_of(checked: Checked, modality: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The first row and the length of each distinct item that has a length."""
    rows, lengths = [], []
    for row in checked.first_rows(modality).tolist():
        item = checked.pairs.columns[modality][row]
        if item is not None and (length := checked.inspected[modality][item].length) is not None:
            rows.append(row)
            lengths.append(length)
    return np.array(rows, np.int64), np.array(lengths, np.float64)


def length_figures(checked: Checked, modality: str) -> dict[str, float]:
    """Minimum, median and maximum length of a column's items."""
    _, lengths = _lengths_of(checked, modality)
    if not len(lengths):
        return {}
    unit = "characters" if modality == TEXT else "seconds"
    values = {"least": lengths.min(), "median": np.median(lengths), "most": lengths.max()}
    return {f"{name} {unit}": round(float(value), 3) for name, value in values.items()}
