"""Variants of sounds, as recordings vary: python vary_sounds.py --work /tmp/sounds

Reads WORK/pairs.csv, which `fetch_sounds.py` writes, and writes `VARIANTS` variants of each sound to WORK/varied/, with their
table, WORK/varied.csv: a part of it or repeats, speed and pitch, a filter, an echo, noise or another sound behind it, and
gain. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from fetch_sounds import read_table
from numpy.random import Generator
from scipy.signal import butter, fftconvolve, resample_poly, sosfilt

from bridgekit.media import read_audio

RATE = 44_100
VARIANTS = 2
#: Seconds of a variant, at least and at most.
SECONDS = (1.5, 5.0)
#: Sounds of these kinds may be behind another one.
BACKGROUNDS = (
    "wind",
    "rain",
    "traffic",
    "crowd",
    "stream",
    "electric hum",
    "fan",
    "engine",
    "insects",
    "machine",
    "white noise",
)


def trimmed(wave: np.ndarray) -> np.ndarray:
    """`wave` without the parts at both ends that are 50 dB below its peak."""
    loud = np.flatnonzero(np.abs(wave) > np.abs(wave).max() * 10 ** (-50 / 20))
    return wave[loud[0] : loud[-1] + 1] if len(loud) else wave


def fitted(wave: np.ndarray, size: int, random: Generator) -> np.ndarray:
    """A random part of a long sound; a short one repeated after pauses, or once, at a random place in silence."""
    if len(wave) >= size:
        start = random.integers(len(wave) - size + 1)
        return wave[start : start + size]
    made = np.zeros(size, np.float32)
    at = int(random.integers(size - len(wave) + 1)) if random.random() < 0.4 else 0
    while at < size:
        part = wave[: size - at]
        made[at : at + len(part)] += part * random.uniform(0.6, 1)
        if at and random.random() < 0.4:
            break
        at += len(wave) + int(RATE * random.exponential(0.3))
    return made


def coloured(size: int, random: Generator) -> np.ndarray:
    """Noise with a power of 1 / f ** slope, slope between 0 (white) and 2 (brown)."""
    spectrum = np.fft.rfft(random.standard_normal(size))
    spectrum *= np.maximum(np.fft.rfftfreq(size), 1 / size) ** (-random.uniform(0, 2) / 2)
    return np.fft.irfft(spectrum, size).astype(np.float32)


def filtered(wave: np.ndarray, random: Generator) -> np.ndarray:
    """Cut high or low frequencies, as telephones, distance and small loudspeakers do."""
    if random.random() < 0.4:
        wave = sosfilt(butter(2, np.exp(random.uniform(np.log(2_500), np.log(16_000))), fs=RATE, output="sos"), wave)
    if random.random() < 0.3:
        wave = sosfilt(butter(2, random.uniform(60, 400), "high", fs=RATE, output="sos"), wave)
    return wave


def echoed(wave: np.ndarray, random: Generator) -> np.ndarray:
    """A room: noise that decays by 60 dB in 0.2 to 0.9 seconds, convolved with the sound and added to it."""
    seconds = random.uniform(0.2, 0.9)
    times = np.arange(int(seconds * RATE)) / RATE
    tail = random.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
    room = fftconvolve(wave, tail / np.sqrt((tail**2).sum()))[: len(wave)]
    both: np.ndarray = wave + random.uniform(0.2, 0.8) * room
    return both


def level(wave: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt((wave.astype(np.float64) ** 2).mean())) + 1e-9


def varied(wave: np.ndarray, others: Sequence[np.ndarray], random: Generator) -> np.ndarray:
    """One variant of a sound at 44.1 kHz: float32 samples."""
    size = int(RATE * random.uniform(*SECONDS))
    if random.random() < 0.5:
        wave = resample_poly(wave, 100, int(random.integers(88, 114)))  # faster and higher, or slower and lower
    wave = filtered(fitted(trimmed(wave), size, random), random)
    if random.random() < 0.35:
        wave = echoed(wave, random)
    if random.random() < 0.75:
        behind = coloured(size, random)
        quieter = random.uniform(8, 35)
        if others and random.random() < 0.3:
            behind, quieter = fitted(others[int(random.integers(len(others)))], size, random), random.uniform(12, 30)
        wave = wave + behind * level(wave) / level(behind) * 10 ** (-quieter / 20)
    peak = 10 ** (-random.uniform(0, 24) / 20)
    made: np.ndarray = (wave / (np.abs(wave).max() + 1e-9) * peak).astype(np.float32)
    return made


def main() -> None:
    """Write the variants and their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of fetch_sounds.py")
    work: Path = parser.parse_args().work
    rows = read_table(work / "pairs.csv")
    sounds = {row["audio"]: row for row in rows}
    others = [read_audio(work / name, RATE)[: 30 * RATE] for name, row in sounds.items() if row["kind"] in BACKGROUNDS][::3]
    made: dict[str, list[str]] = {}
    for name in sounds:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        made[name] = [f"varied/{digest}-{number}.flac" for number in range(VARIANTS)]
        if all((work / path).exists() for path in made[name]):
            continue
        wave = read_audio(work / name, RATE)[: 30 * RATE]
        for number, path in enumerate(made[name]):
            random = np.random.default_rng([int(digest, 16), number])
            (work / path).parent.mkdir(exist_ok=True)
            soundfile.write(work / path, varied(wave, others, random), RATE, subtype="PCM_16", format="FLAC")
    with (work / "varied.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("audio", "text", "kind", "package", "original"))
        for row in rows:
            writer.writerows((path, row["text"], row["kind"], row["package"], row["audio"]) for path in made[row["audio"]])
    print(f"{len(sounds) * VARIANTS} variants: {work / 'varied.csv'}")


if __name__ == "__main__":
    main()
