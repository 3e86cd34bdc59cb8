"""Thousands of broken media files: each must be decoded, or refused with a reason, without affecting others.

    python -m tests.torture.media [COUNT [SEED]]

Prints every distinct message with an example, for review.
"""

from __future__ import annotations

import csv
import random
import re
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bridgekit.decoding import isolation
from bridgekit.errors import ItemError
from bridgekit.hardware import threads
from bridgekit.media import read_audio, read_image
from bridgekit.recipes.encode import encode_table
from tests.torture.bombs import bombs
from tests.torture.mutations import BLIND, BY_FORMAT
from tests.torture.originals import PICTURES, SOUNDS, originals
from tests.torture.outcome import Outcome

SAMPLE_RATE = 16_000
#: Broken and valid files per modality in the tables for `whole_tool`.
MIXED = 80
_SOUND_SUFFIXES = (*SOUNDS, "aiff", "au", "caf", "w64")
_NAME = re.compile(r"'[^']*'|\"[^\"]*\"")


@dataclass(frozen=True)
class Broken:
    """A broken file.

    Arguments:
        name: file name, whose suffix selects the decoder.
        how: how it was broken.
        data: content.
    """

    name: str
    how: str
    data: bytes


@dataclass
class Tally:
    """Results of reading broken files."""

    decoded: list[Path] = field(default_factory=list)
    refused: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    messages: dict[str, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    longest: tuple[float, str] = (0.0, "")
    peak: int = 0


def run(count: int, seed: int, mixed: int = MIXED) -> Outcome:
    """Read broken files of eight formats, as `prepare` does, then encode some of them mixed with valid ones.

    Arguments:
        count: number of files, including one bomb of each kind.
        seed: random seed of the mutations.
        mixed: broken and valid files per modality for `whole_tool`; 0 skips it.
    """
    with tempfile.TemporaryDirectory() as folder:
        tally = Tally()
        attack(corpus(count, seed), Path(folder), tally)
        crashes = sum(number for kind, number in tally.kinds.items() if "crashed" in kind)
        figures = {
            "decoded although broken": f"{len(tally.decoded):,}",
            "refused": f"{len(tally.refused):,}",
            "crashes of a decoder contained": f"{crashes:,}",
            "decoders killed after a timeout": f"{sum(n for kind, n in tally.kinds.items() if 'took over' in kind):,}",
            "longest time for one item": f"{tally.longest[0]:.1f} s ({tally.longest[1]})",
            "peak memory of a decoder": f"{tally.peak / 1e6:,.0f} MB of {isolation.MEMORY_CAP / 1e6:,.0f} MB",
            "distinct messages": f"{len(tally.messages):,}",
        }
        if mixed:
            counts, failures = whole_tool(tally, Path(folder), mixed)
            figures["rows set aside by `encode`"] = counts
            tally.failures += failures
    held = len(tally.decoded) + len(tally.refused)
    return Outcome("broken media", count, held, tally.failures, figures, dict(sorted(tally.messages.items())))


def corpus(count: int, seed: int) -> Iterator[Broken]:
    """The bombs, then mutations of valid files, spread evenly over eight formats and a few others."""
    whole = originals()
    by_suffix: dict[str, list[str]] = {}
    for name in whole:
        by_suffix.setdefault(Path(name).suffix[1:], []).append(name)
    suffixes = [*SOUNDS, *PICTURES]
    others = [suffix for suffix in by_suffix if suffix not in suffixes]
    explosive = list(bombs().items())[:count]
    for number, (name, data) in enumerate(explosive):
        yield Broken(f"{number:05d}-{name}", "bomb", data)
    for number in range(len(explosive), count):
        draw = random.Random(f"{seed}-{number}")
        suffix = draw.choice(others) if number % 17 == 0 else suffixes[number % len(suffixes)]
        name = draw.choice(by_suffix[suffix])
        how, data, suffix = _mutated(draw, whole, name)
        yield Broken(f"{number:05d}-{Path(name).stem}-{how}.{suffix}", f"{how} of {name}", data)


def _mutated(draw: random.Random, whole: dict[str, bytes], name: str) -> tuple[str, bytes, str]:
    """Mutate a valid file: the name of the mutation, the content, and the suffix."""
    data, suffix = whole[name], Path(name).suffix[1:]
    kind = draw.random()
    if kind < 0.05:
        return "misnamed", data, draw.choice([*SOUNDS, *PICTURES])
    if kind < 0.13:
        other = whole[draw.choice(list(whole))]
        place = draw.randrange(len(data))
        return draw.choice([("splice", data[:place] + other[place % len(other) :], suffix), ("joined", data + other, suffix)])
    if kind < 0.55 and suffix in BY_FORMAT:
        mutation = BY_FORMAT[suffix]
        data = mutation(draw, data)
        if draw.random() < 0.2 and len(data) > 300:
            with suppress(struct.error, LookupError, ValueError):  # the first may have broken the structure
                data = mutation(draw, data)
        return mutation.__name__, data or b"\0", suffix
    mutation = draw.choice(BLIND)
    return mutation.__name__, mutation(draw, data) or b"\0", suffix


def attack(files: Iterator[Broken], folder: Path, tally: Tally) -> None:
    """Read all files with as many threads as `bridgekit encode`, and record the results."""

    def read(broken: Broken) -> tuple[Path, Broken, float, object]:
        path = folder / broken.name
        path.write_bytes(broken.data)
        started = time.monotonic()
        try:
            result = read_audio(path, SAMPLE_RATE) if is_sound(path) else read_image(path)
        except Exception as error:
            return path, broken, time.monotonic() - started, error
        return path, broken, time.monotonic() - started, result

    with ThreadPoolExecutor(threads()) as pool:
        for path, broken, seconds, result in pool.map(read, files):
            what_is_wrong = complaint(path, result)
            if what_is_wrong:
                tally.failures.append(f"{broken.name} ({broken.how}): {what_is_wrong}")
            else:
                (tally.refused if isinstance(result, ItemError) else tally.decoded).append(path)
            if isinstance(result, ItemError):
                tally.messages.setdefault(
                    shape(result.what) + " | " + shape(str(result.remedy)), f"{broken.name}: {result.what}"
                )
                tally.kinds[result.what] += 1
            tally.longest = max(tally.longest, (seconds, broken.name))
            tally.peak = max(tally.peak, peak_memory())


def is_sound(path: Path) -> bool:
    return path.suffix[1:] in _SOUND_SUFFIXES


def complaint(path: Path, result: object) -> str | None:
    """What is wrong with the result of reading a file, or None."""
    if isinstance(result, ItemError):
        if result.where != str(path) or not result.remedy:
            return f"the message lacks the file or the fix: {result}"
        if "\n" in result.what or len(result.what) > 250 or "Traceback" in result.what:
            return f"the message is not one sentence: {result}"
        return None
    if isinstance(result, Exception):
        return f"{type(result).__name__}: {result}"
    if isinstance(result, np.ndarray):
        fine = result.dtype == np.float32 and result.ndim == 1 and 0 < len(result) <= 4 * 3600 * SAMPLE_RATE
        return None if fine and bool(np.isfinite(result).all()) else "the samples are invalid or not finite"
    mode, size = getattr(result, "mode", None), getattr(result, "size", (0, 0))
    return None if mode == "RGB" and min(size) >= 8 and size[0] * size[1] <= 100_000_000 else "the image is invalid"


def shape(message: str) -> str:
    """A message without numbers and names."""
    return re.sub(r"0x[0-9a-f]+|[\d,.]*\d", "N", _NAME.sub("...", message))


def peak_memory() -> int:
    """Peak memory of the running decoders in bytes; 0 if the system does not report it."""
    peak = 0
    for process in isolation.decoder_ids():
        try:
            status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
        except OSError:
            continue
        peak = max([peak, *(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))])
    return peak


# ---- the whole tool


def whole_tool(tally: Tally, folder: Path, count: int) -> tuple[str, list[str]]:
    """Encode tables of refused and valid files with the starter: exactly the refused ones must be set aside."""
    counts, failures = [], []
    for modality, sound in (("audio", True), ("image", False)):
        bad = [path for path in tally.refused if is_sound(path) == sound][:count]
        good = _whole_files(folder / modality, sound, count)
        rows = [*bad, *good]
        random.Random(0).shuffle(rows)
        table = folder / f"{modality}.csv"
        with table.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([(modality, "text"), *((path, f"text {number}") for number, path in enumerate(rows))])
        done = encode_table(f"starter:{modality}", "starter:text", str(table), device="cpu", progress=False)
        aside = {Path(row.item) for row in done.set_aside}
        wrongly = len(aside & set(good))
        counts.append(f"{len(aside & set(bad))} of {len(bad)} broken, {wrongly} of {len(good)} valid ({modality})")
        if aside != set(bad) or done.rows != len(good):
            failures.append(
                f"{modality}: set aside {sorted(aside ^ set(bad))[:3]} wrongly, {done.rows} rows of {len(good)} left"
            )
    return "; ".join(counts), failures


def _whole_files(folder: Path, sound: bool, count: int) -> Sequence[Path]:
    """Valid files: the originals, then copies with trailing bytes, if the format tolerates them, to make them distinct."""
    folder.mkdir()
    whole = [(name, data) for name, data in originals().items() if is_sound(Path(name)) == sound]
    bearing = [(name, data) for name, data in whole if Path(name).suffix in (".wav", ".png", ".jpg", ".gif", ".bmp")]
    tailed = [(name, data + b"JUNK" + bytes(number)) for number, (name, data) in enumerate(bearing * count)]
    paths = []
    for number, (name, data) in enumerate([*whole, *tailed][:count]):
        paths.append(folder / f"{number:03d}-{name}")
        paths[-1].write_bytes(data)
    return paths


def main() -> None:
    """Print the outcome and every distinct message with an example."""
    count, seed = (int(argument) for argument in [*sys.argv[1:], "2400", "0"][:2])
    started = time.monotonic()
    outcome = run(count, seed)
    for message, example in outcome.messages.items():
        print(f"{message}\n    {example}")
    for failure in outcome.failures:
        print("FAILED", failure)
    for name, value in outcome.figures.items():
        print(f"{name}: {value}")
    print(f"{outcome.held:,} of {outcome.tried:,} held, in {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
