"""Checks of items: silence, clipping, single-colour images, extreme lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np
from numpy.typing import NDArray

from bridgekit.checks.findings import Checked, Finding, Inspected
from bridgekit.encoders import TEXT, Item
from bridgekit.errors import ItemError
from bridgekit.hardware import threads
from bridgekit.media import content_hash, read_audio, read_image, read_opacity, read_text
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
            wave = read_audio(item, SAMPLE_RATE)
            return Inspected(content, length=len(wave) / SAMPLE_RATE, faults=_audio_faults(np.abs(wave)))
        if modality == "image":
            return Inspected(content, faults=_image_faults(item))
        return Inspected(content)
    except ItemError as error:
        return Inspected(failure=error.reason)


def _audio_faults(loudness: NDArray[np.float32]) -> dict[str, str]:
    peak = float(loudness.max())
    if peak < SILENCE:
        return {"silence": f"peak {20 * np.log10(peak):.0f} dBFS" if peak else "all zeros"}
    clipped = float((loudness >= FULL_SCALE).mean())
    return {"clipping": f"{100 * clipped:.1f} % of its samples"} if clipped >= CLIPPED else {}


def _image_faults(item: Item) -> dict[str, str]:
    """Judges an image as encoders see it: transparent parts are white."""
    if np.ptp(np.asarray(read_image(item)), axis=(0, 1)).max() > 0:
        return {}
    low, high = read_opacity(item)
    if low < high:
        return {"white on transparent": "white on transparent"}
    return {"one colour": "fully transparent" if high == 0 else "one colour"}


#: Kind of fault to grade, adjective and remedy.
_FAULTS = {
    "silence": ("warning", "silent", "remove their rows"),
    "clipping": ("note", "clipped", "record or export them at a lower level, if possible"),
    "one colour": ("warning", "a single colour", "remove their rows"),
    "white on transparent": (
        "warning",
        "white on a transparent background, which encoders see as white",
        "save them on a background of another colour",
    ),
}


def faulty_items(checked: Checked) -> Iterator[Finding]:
    """Items that are silent or clipped, or show nothing."""
    for modality in checked.ids:
        found = checked.distinct(modality)
        for kind, (grade, adjective, remedy) in _FAULTS.items():
            faults = {row: each.faults[kind] for row, each in found.items() if kind in each.faults}
            if faults:
                what = f"{len(faults):,} of {len(found):,} {modality} files {'is' if len(faults) == 1 else 'are'} {adjective}"
                items = tuple(checked.describe(row, modality, fault) for row, fault in faults.items())
                yield Finding(kind, grade, what, remedy, items)


def extreme_lengths(checked: Checked) -> Iterator[Finding]:
    """Items of extreme length, relative to the rest of the table or to the encoders' window."""
    for modality in checked.ids:
        lengths = _lengths_of(checked, modality)
        unit = " characters" if modality == TEXT else " s"
        for low, high, grade, which, remedy in _extremes(modality, unit, median([*lengths.values()])) if lengths else ():
            found = {row: length for row, length in lengths.items() if low < length < high}
            if found:
                items = tuple(checked.describe(row, modality, f"{length:,.4g}{unit}") for row, length in found.items())
                what = f"{len(items):,} of {len(lengths):,} {modality} items {which}"
                yield Finding("length", grade, what, remedy, items)


def _extremes(modality: str, unit: str, middle: float) -> list[tuple[float, float, str, str, str]]:
    """Length ranges to report: (low, high, grade, description, remedy)."""
    verify = "check that they are correct"
    found = [(EXTREME * middle, np.inf, "note", f"with over {EXTREME} times the median of {middle:,.4g}{unit}", verify)]
    if modality == "audio":
        found += [
            (-1, SHORTEST, "warning", f"under {SHORTEST} s", "remove their rows: they are too short to be useful"),
            (SHORTEST, middle / EXTREME, "note", f"under a tenth of the median of {middle:,.4g} s", verify),
            (WINDOW, np.inf, "note", f"over {WINDOW:.0f} s", "cut them: encoders average over windows of this length"),
        ]
    return found


def _lengths_of(checked: Checked, modality: str) -> dict[int, float]:
    """The first row of each distinct item that has a length, to its length."""
    return {row: each.length for row, each in checked.distinct(modality).items() if each.length is not None}


def length_figures(checked: Checked, modality: str) -> dict[str, float]:
    """Minimum, median and maximum length of a column's items."""
    lengths = [*_lengths_of(checked, modality).values()]
    if not lengths:
        return {}
    unit = "characters" if modality == TEXT else "seconds"
    values = {"least": min(lengths), "median": median(lengths), "most": max(lengths)}
    return {f"{name} {unit}": round(float(value), 3) for name, value in values.items()}
