"""Memory, file descriptors and threads over long runs: tens of thousands of items encoded and training steps taken.

python -m tests.torture.long_runs 100000 10000 docs/long-runs.png

Each run has its own process, so that it cannot reuse memory freed by another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path

import numpy as np

from tests.torture.outcome import Outcome

#: Samples per run, and the fraction of the run that is ignored as warm-up.
SAMPLES, WARM_UP = 50, 0.2
#: Allowed growth after the warm-up in MiB, by linear regression. For comparison: leaking the latents of 100,000 items takes
#: 117; leaking one weight matrix of an adapter every 100 steps takes 44 over 10,000 steps.
ALLOWED_MIB = 24.0
#: Additional allowance for the latent store's first merge of 64 shards, after about 60,000 texts. The allocator keeps it.
MERGING_MIB = {"texts": 30.0}
#: The plot of the full run.
PICTURE = Path("torture-long-runs.png")
ROOT = Path(__file__).resolve().parents[2]
CLIPS = ROOT.parent / "shared" / "data" / "esc10" / "clips"


@dataclass(frozen=True)
class Sample:
    """A process's resources at one time.

    Arguments:
        done: items encoded or steps taken so far.
        mib: resident memory.
        descriptors: open files, pipes and sockets.
        threads: number of threads.
    """

    done: int
    mib: float
    descriptors: int
    threads: int


class Watch:
    """Takes `SAMPLES` samples of this process while a counter goes up to a total."""

    def __init__(self, total: int) -> None:
        self.samples: list[Sample] = []
        self._every = max(1, total // SAMPLES)

    def __call__(self, done: int) -> None:
        """Call this with the counter, as often as you like."""
        if not self.samples or done - self.samples[-1].done >= self._every:
            self.samples.append(look(done))


def look(done: int) -> Sample:
    """A sample of this process, from Linux's /proc."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Sample(
        done, int(status["VmRSS"].split()[0]) / 1024, len(list(Path("/proc/self/fd").iterdir())) - 1, int(status["Threads"])
    )


# ---- runs


def short_texts(count: int) -> list[str]:
    """Distinct texts of similar length: items are encoded in order of length, and memory would grow with it."""
    things = ["rain", "snow", "sand", "fern", "moss", "corn", "oats", "reed", "bark", "clay", "dust", "hail", "loam", "turf"]
    things += ["weed", "wind", "mist", "lake"]
    return [f"the sound of {', '.join(words)}" for words in islice(product(things, repeat=4), count)]


def watch_texts(count: int) -> list[Sample]:
    """Encode distinct texts into an empty store."""
    from bridgekit import load_encoder
    from bridgekit.latents.encode import encode_items

    watch = Watch(count)
    with tempfile.TemporaryDirectory() as folder:
        encode_items(
            load_encoder("starter:text", "cpu"), short_texts(count), report=lambda _, done, __: watch(done), folder=Path(folder)
        )
    return watch.samples


def watch_files(encoder: str, files: Sequence[Path], count: int) -> list[Sample]:
    """Encode files repeatedly, each time into an empty store, `count` in total."""
    from bridgekit import load_encoder
    from bridgekit.latents.encode import encode_items

    if not files:
        raise FileNotFoundError("there is no file to encode")
    opened, watch, done = load_encoder(encoder, "cpu"), Watch(count), 0
    while done < count:
        with tempfile.TemporaryDirectory() as folder:
            some = files[: count - done]
            encode_items(opened, some, report=lambda _, now, __, before=done: watch(before + now), folder=Path(folder))  # type: ignore[misc]
        done += len(some)
    return watch.samples


def watch_sounds(count: int) -> list[Sample]:
    """Decode and encode forty field recordings."""
    return watch_files("starter:audio", sorted(CLIPS.rglob("*.ogg"))[:40], count)


def watch_pictures(count: int) -> list[Sample]:
    """Decode and encode images of noise, as PNG and JPEG."""
    from PIL import Image

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.{'png' if number % 2 else 'jpeg'}" for number in range(64)]
        for file in files:
            Image.fromarray(generator.integers(0, 256, (240, 320, 3), np.uint8)).save(file)
        return watch_files("starter:image", files, count)


def watch_steps(count: int, keep: Callable[[object], object] = lambda adapters: None) -> list[Sample]:
    """Train the default preset's adapters on random latents.

    Arguments:
        count: number of steps.
        keep: called with the adapters at each validation, to simulate a leak.
    """
    from dataclasses import replace

    import torch

    from bridgekit import PRESETS
    from bridgekit.fusion import checkpoint, training

    preset = PRESETS["default"]
    per_epoch, rows = preset.min_steps_per_epoch, 384
    hidden = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    latents = {name: hidden @ torch.randn(64, dim) for name, dim in {"audio": 512, "text": 384}.items()}
    watch = Watch(count)

    def validate(adapters: object) -> dict[str, float]:
        keep(adapters)
        return {"score": 0.0}

    checkpoint.CHECKPOINT_SECONDS = 1.0
    with tempfile.TemporaryDirectory() as folder:
        training.train(
            latents,
            {name: torch.arange(rows) for name in latents},
            torch.arange(rows)[:, None],
            validate=validate,
            preset=replace(preset, epochs=count // per_epoch),
            checkpoint=Path(folder) / "run.safetensors",
            on_epoch=lambda epoch, loss: watch(epoch * per_epoch),
        )
    return watch.samples


KINDS: dict[str, Callable[[int], list[Sample]]] = {
    "texts": watch_texts,
    "sounds": watch_sounds,
    "pictures": watch_pictures,
    "steps": watch_steps,
}


def in_its_own_process(kind: str, count: int) -> list[Sample]:
    """Run one of `KINDS` in a new process."""
    command = [sys.executable, "-m", "tests.torture.long_runs", kind, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2_000:]}")
    return [Sample(**each) for each in json.loads(done.stdout.splitlines()[-1])]


# ---- evaluation


def growth(samples: Sequence[Sample]) -> tuple[float, float]:
    """Growth by linear regression after the warm-up: MiB per 10,000, and MiB in total."""
    warm = after_warm_up(samples)
    done = np.array([sample.done for sample in warm], float)
    slope = float(np.polyfit(done, [sample.mib for sample in warm], 1)[0])
    return 10_000 * slope, slope * float(done[-1] - done[0])


def after_warm_up(samples: Sequence[Sample]) -> list[Sample]:
    """The samples after the warm-up; all if there are fewer than five."""
    return [sample for sample in samples if sample.done >= WARM_UP * samples[-1].done] if len(samples) > 4 else list(samples)


def faults(kind: str, samples: Sequence[Sample]) -> list[str]:
    """Resources that grew, one line each."""
    warm = after_warm_up(samples)
    half = len(warm) // 2
    found = []
    rate, total = growth(samples)
    if total > ALLOWED_MIB + MERGING_MIB.get(kind, 0.0):
        found.append(f"{kind}: memory grew by {total:.0f} MiB, {rate:.1f} per 10,000")
    for name in ("descriptors", "threads"):
        counts = [getattr(sample, name) for sample in warm]
        # Numbers fluctuate from batch to batch; a higher maximum in the second half is a leak.
        if max(counts[half:]) > max(counts[:half]) + 2:
            found.append(f"{kind}: {name} grew from {max(counts[:half])} to {max(counts[half:])}")
    return found


def run(
    items: int, steps: int, picture: Path | None = None, kinds: Sequence[str] = ("texts", "sounds", "pictures", "steps")
) -> Outcome:
    """Run and evaluate long runs.

    Arguments:
        items: number of texts; images are 1/50 of it, sounds 1/500.
        steps: number of training steps.
        picture: PNG file for a plot of memory.
        kinds: the kinds of run.
    """
    if not Path("/proc/self/status").exists():
        return Outcome("long runs", 0, 0, figures={"not measured": "memory is measured only on Linux"})
    counts = {"texts": items, "sounds": items // 500, "pictures": items // 50, "steps": steps}
    wanted = {kind: counts[kind] for kind in kinds if kind != "sounds" or CLIPS.is_dir()}
    seen = {kind: in_its_own_process(kind, count) for kind, count in wanted.items()}
    figures, failures = {}, []
    for kind, samples in seen.items():
        failures += faults(kind, samples)
        warm = after_warm_up(samples)
        rate, total = growth(samples)
        pace = f" ({rate:+.2f} per 10,000)" if wanted[kind] >= 10_000 else ""
        figures[f"{wanted[kind]:,} {kind}"] = (
            f"{warm[0].mib:.0f} MiB after the warm-up, {warm[-1].mib:.0f} at the end, {total:+.1f} by linear regression over "
            f"{len(warm)} samples{pace}; at most {max(sample.descriptors for sample in warm)} file "
            f"descriptors, {max(sample.threads for sample in warm)} threads"
        )
    if picture:
        draw(seen, picture)
    tried = 3 * len(seen)
    return Outcome("long runs", tried, tried - len(failures), failures, figures)


def draw(seen: dict[str, list[Sample]], path: Path) -> None:
    """Plot resident memory with the fitted line, one panel per kind of run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(seen), figsize=(3.2 * len(seen), 3), constrained_layout=True, squeeze=False)
    for axes, (kind, samples) in zip(panels[0], seen.items(), strict=True):
        warm = after_warm_up(samples)
        done = [sample.done for sample in warm]
        line = np.poly1d(np.polyfit(done, [sample.mib for sample in warm], 1))
        axes.plot([sample.done for sample in samples], [sample.mib for sample in samples], ".", markersize=4)
        axes.plot(done, line(done), linewidth=1)
        axes.set_ylim(0, 1.3 * max(sample.mib for sample in samples))
        axes.set_title(f"{samples[-1].done:,} {kind}: {growth(samples)[1]:+.1f} MiB after the warm-up", fontsize=9)
        axes.set_xlabel("steps taken" if kind == "steps" else f"{kind} encoded")
    panels[0][0].set_ylabel("resident memory, MiB")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> None:
    """With a kind and a count: print its samples as JSON. With two counts and, optionally, a PNG file: run all kinds."""
    if arguments[0] in KINDS:
        print(json.dumps([asdict(sample) for sample in KINDS[arguments[0]](int(arguments[1]))]))
        return
    outcome = run(int(arguments[0]), int(arguments[1]), Path(arguments[2]) if len(arguments) > 2 else None)
    print(f"{outcome.name}: {outcome.held} of {outcome.tried} held")
    for what, value in outcome.figures.items():
        print(f"  {what}: {value}")
    for failure in outcome.failures:
        print(f"  FAILED {failure}")


if __name__ == "__main__":
    main(sys.argv[1:])
