"""Broken media by the thousand: each is read, or refused with a reason, and costs no more than itself.

    python -m tests.torture.media [COUNT [SEED]]

Every distinct message is printed with an example, to be read by eye.
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
#: Broken and whole files of each modality that the whole tool is given in one table.
MIXED = 80
_SOUND_SUFFIXES = (*SOUNDS, "aiff", "au", "caf", "w64")
_NAME = re.compile(r"'[^']*'|\"[^\"]*\"")


@dataclass(frozen=True)
class Broken:
    """A broken file.

    Arguments:
        name: its own; the suffix says as what it is read.
        how: what was done to it.
        data: its content.
    """

    name: str
    how: str
    data: bytes


@dataclass
class Tally:
    """What became of broken files."""

    decoded: list[Path] = field(default_factory=list)
    refused: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    messages: dict[str, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    longest: tuple[float, str] = (0.0, "")
    peak: int = 0


def run(count: int, seed: int, mixed: int = MIXED) -> Outcome:
    """Read `count` broken files of eight formats, as `prepare` does, and then encode some of them among whole ones.

    Arguments:
        count: how many; a bomb of each kind is among them.
        seed: makes the same files again.
        mixed: broken and whole files of each modality for the whole tool; 0 leaves that out.
    """
    with tempfile.TemporaryDirectory() as folder:
        tally = Tally()
        attack(corpus(count, seed), Path(folder), tally)
        crashes = sum(number for kind, number in tally.kinds.items() if "crashed" in kind)
        figures = {
            "decoded although broken": f"{len(tally.decoded):,}",
            "refused": f"{len(tally.refused):,}",
            "crashes of a decoder contained": f"{crashes:,}",
            "decoders ended as they took too long": f"{sum(n for kind, n in tally.kinds.items() if 'took over' in kind):,}",
            "longest time for one item": f"{tally.longest[0]:.1f} s ({tally.longest[1]})",
            "peak memory of a decoder": f"{tally.peak / 1e6:,.0f} MB of {isolation.MEMORY_CAP / 1e6:,.0f} MB",
            "distinct messages": f"{len(tally.messages):,}",
        }
        if mixed:
            told, failures = whole_tool(tally, Path(folder), mixed)
            figures["rows set aside by the whole tool"] = told
            tally.failures += failures
    held = len(tally.decoded) + len(tally.refused)
    return Outcome("broken media", count, held, tally.failures, figures, dict(sorted(tally.messages.items())))


def corpus(count: int, seed: int) -> Iterator[Broken]:
    """Broken files: the bombs, and then mutations of whole files, evenly over eight formats and a few of others."""
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
    """What is done to a whole file, what comes out, and the suffix that it is given."""
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
            with suppress(struct.error, LookupError, ValueError):  # the first broke what the second goes by
                data = mutation(draw, data)
        return mutation.__name__, data or b"\0", suffix
    mutation = draw.choice(BLIND)
    return mutation.__name__, mutation(draw, data) or b"\0", suffix


def attack(files: Iterator[Broken], folder: Path, tally: Tally) -> None:
    """Read all files, as many at a time as `bridgekit encode` does, and tally what became of them."""

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
    """What is wrong with what came of reading a file, if anything."""
    if isinstance(result, ItemError):
        if result.where != str(path) or not result.remedy:
            return f"the message does not say where or how: {result}"
        if "\n" in result.what or len(result.what) > 250 or "Traceback" in result.what:
            return f"the message is no single sentence: {result}"
        return None
    if isinstance(result, Exception):
        return f"{type(result).__name__}: {result}"
    if isinstance(result, np.ndarray):
        fine = result.dtype == np.float32 and result.ndim == 1 and 0 < len(result) <= 4 * 3600 * SAMPLE_RATE
        return None if fine and bool(np.isfinite(result).all()) else "the samples are not finite, or not samples"
    mode, size = getattr(result, "mode", None), getattr(result, "size", (0, 0))
    return None if mode == "RGB" and min(size) >= 8 and size[0] * size[1] <= 100_000_000 else "the picture is none"


def shape(message: str) -> str:
    """A message without what differs from file to file."""
    return re.sub(r"0x[0-9a-f]+|[\d,.]*\d", "N", _NAME.sub("...", message))


def peak_memory() -> int:
    """Bytes that a living decoder held at most, in memory; 0 where the system does not tell."""
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
    """Encode tables of refused and whole files with the starter's encoders: the rows set aside are the refused, exactly."""
    told, failures = [], []
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
        told.append(f"{len(aside & set(bad))} of {len(bad)} broken, {len(aside & set(good))} of {len(good)} whole ({modality})")
        if aside != set(bad) or done.rows != len(good):
            failures.append(
                f"{modality}: set aside {sorted(aside ^ set(bad))[:3]} wrongly, {done.rows} rows of {len(good)} left"
            )
    return "; ".join(told), failures


def _whole_files(folder: Path, sound: bool, count: int) -> Sequence[Path]:
    """Whole files: the originals, and as many of them again as bear bytes at their end, which make them other files."""
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
    """Print the outcome, and every message with an example."""
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
