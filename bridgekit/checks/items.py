"""Checks of items: silence, clipping, pictures of one colour, extreme lengths."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bridgekit.checks.findings import Checked, Finding, Look
from bridgekit.encoders import TEXT, Item
from bridgekit.errors import ItemError
from bridgekit.hardware import threads
from bridgekit.media import content_hash, read_audio, read_image, read_text
from bridgekit.progress import Report

#: Sound whose loudest sample is below this is silence (-60 dB of full scale).
SILENCE = 10 ** (-60 / 20)
#: A clip of which so many samples lie at full scale is clipped.
FULL_SCALE, CLIPPED = 0.999, 0.01
#: Seconds: shorter clips hold next to nothing; the audio encoders hear longer ones in windows, or not whole.
SHORTEST, WINDOW = 0.1, 30.0
#: So many times the median, or that part of it, is an extreme length.
EXTREME = 10
SAMPLE_RATE = 16_000


def look_at_all(modality: str, items: Sequence[Item | None], report: Report) -> dict[Item, Look]:
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


#: Kind of fault to its grade, what an item is called that has it, and what to do.
_FAULTS = {
    "silence": ("warning", "silent", "remove their rows: there is nothing to hear"),
    "clipping": ("note", "clipped", "record or export them at a lower level, if you can"),
    "one colour": ("warning", "of one colour", "remove their rows: there is nothing to see"),
}


def faulty_items(checked: Checked) -> list[Finding]:
    """Items that are silent, clipped or of one colour."""
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


def extreme_lengths(checked: Checked) -> list[Finding]:
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


def length_figures(checked: Checked, modality: str) -> dict[str, float]:
    """The least, the median and the greatest length of a column's items."""
    _, lengths = _lengths_of(checked, modality)
    if not len(lengths):
        return {}
    unit = "characters" if modality == TEXT else "seconds"
    values = {"least": lengths.min(), "median": np.median(lengths), "most": lengths.max()}
    return {f"{name} {unit}": round(float(value), 3) for name, value in values.items()}
