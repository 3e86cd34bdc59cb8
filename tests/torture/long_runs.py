"""Long runs: memory, file descriptors and threads while items are encoded and adapters trained, by the tens of thousands.

python -m tests.torture.long_runs 100000 10000 docs/long-runs.png

Each run has a process of its own, so that none grows into what another one gave back.
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

#: A run looks at itself so many times; what it saw in its first fifth is its warm-up and not counted.
SAMPLES, WARM_UP = 50, 0.2
#: Memory may grow by so many MiB from there to the end, by the line fitted to what was seen. Keeping the latents of 100,000
#: items by mistake takes 117; keeping one weight matrix of an adapter at each 100th of 10,000 steps takes 44.
ALLOWED_MIB = 24.0
#: And the store's first merge of 64 shards, after some 60,000 texts, may take so many once, which the allocator keeps.
MERGING_MIB = {"texts": 30.0}
#: Where the whole torture draws what it saw.
PICTURE = Path("torture-long-runs.png")
ROOT = Path(__file__).resolve().parents[2]
CLIPS = ROOT.parent / "shared" / "data" / "esc10" / "clips"


@dataclass(frozen=True)
class Sample:
    """What a run held at one moment.

    Arguments:
        done: items encoded, or steps taken, by then.
        mib: resident memory.
        descriptors: open files, pipes and sockets.
        threads: of the process.
    """

    done: int
    mib: float
    descriptors: int
    threads: int


class Watch:
    """Looks at this process `SAMPLES` times while something counts up to a total."""

    def __init__(self, total: int) -> None:
        self.samples: list[Sample] = []
        self._every = max(1, total // SAMPLES)

    def __call__(self, done: int) -> None:
        """Called with how much is done, however often."""
        if not self.samples or done - self.samples[-1].done >= self._every:
            self.samples.append(look(done))


def look(done: int) -> Sample:
    """This process as it is now. Linux tells in /proc."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Sample(
        done, int(status["VmRSS"].split()[0]) / 1024, len(list(Path("/proc/self/fd").iterdir())) - 1, int(status["Threads"])
    )


# ---- what is run


def short_texts(count: int) -> list[str]:
    """Different texts of one length: a run takes its items in the order of their lengths, and would grow with them."""
    things = ["rain", "snow", "sand", "fern", "moss", "corn", "oats", "reed", "bark", "clay", "dust", "hail", "loam", "turf"]
    things += ["weed", "wind", "mist", "lake"]
    return [f"the sound of {', '.join(words)}" for words in islice(product(things, repeat=4), count)]


def watch_texts(count: int) -> list[Sample]:
    """Encode so many different texts into a fresh store."""
    from bridgekit import load_encoder
    from bridgekit.latents.encode import encode_items

    watch = Watch(count)
    with tempfile.TemporaryDirectory() as folder:
        encode_items(
            load_encoder("starter:text", "cpu"), short_texts(count), report=lambda _, done, __: watch(done), folder=Path(folder)
        )
    return watch.samples


def watch_files(encoder: str, files: Sequence[Path], count: int) -> list[Sample]:
    """Encode files again and again, each time into a fresh store, until so many were encoded."""
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
    """Decode and encode field recordings; the same forty, cut by their Ogg files' own lengths."""
    return watch_files("starter:audio", sorted(CLIPS.rglob("*.ogg"))[:40], count)


def watch_pictures(count: int) -> list[Sample]:
    """Decode and encode pictures of noise, as PNG and JPEG."""
    from PIL import Image

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.{'png' if number % 2 else 'jpeg'}" for number in range(64)]
        for file in files:
            Image.fromarray(generator.integers(0, 256, (240, 320, 3), np.uint8)).save(file)
        return watch_files("starter:image", files, count)


def watch_steps(count: int, keep: Callable[[object], object] = lambda adapters: None) -> list[Sample]:
    """Train adapters of the default preset for so many steps, on random latents of the starter's widths.

    Arguments:
        count: how many steps.
        keep: what is done with the adapters at each validation, beside validating.
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
    """One of `KINDS` in a process of its own."""
    command = [sys.executable, "-m", "tests.torture.long_runs", kind, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2_000:]}")
    return [Sample(**each) for each in json.loads(done.stdout.splitlines()[-1])]


# ---- what is made of it


def growth(samples: Sequence[Sample]) -> tuple[float, float]:
    """By a line through what was seen after the warm-up: MiB a 10,000, and MiB from there to the end."""
    warm = after_warm_up(samples)
    done = np.array([sample.done for sample in warm], float)
    slope = float(np.polyfit(done, [sample.mib for sample in warm], 1)[0])
    return 10_000 * slope, slope * float(done[-1] - done[0])


def after_warm_up(samples: Sequence[Sample]) -> list[Sample]:
    """The samples that count: three at least."""
    return [sample for sample in samples if sample.done >= WARM_UP * samples[-1].done] if len(samples) > 4 else list(samples)


def faults(kind: str, samples: Sequence[Sample]) -> list[str]:
    """What grew that should not have: a line each."""
    warm = after_warm_up(samples)
    half = len(warm) // 2
    found = []
    rate, total = growth(samples)
    if total > ALLOWED_MIB + MERGING_MIB.get(kind, 0.0):
        found.append(f"{kind}: memory grew by {total:.0f} MiB, {rate:.1f} a 10,000")
    for name in ("descriptors", "threads"):
        counts = [getattr(sample, name) for sample in warm]
        # Files and threads come and go with each batch; that there are ever more of them is a leak.
        if max(counts[half:]) > max(counts[:half]) + 2:
            found.append(f"{kind}: {name} grew from {max(counts[:half])} to {max(counts[half:])}")
    return found


def run(
    items: int, steps: int, picture: Path | None = None, kinds: Sequence[str] = ("texts", "sounds", "pictures", "steps")
) -> Outcome:
    """Watch long runs: texts, files of sound and of pictures by the hundreds, and steps of training.

    Arguments:
        items: how many texts; a 50th as many pictures, and a 500th as many sounds.
        steps: of training.
        picture: where to draw memory over what was done, as a PNG.
        kinds: which of these.
    """
    if not Path("/proc/self/status").exists():
        return Outcome("long runs", 0, 0, figures={"not measured": "there is no /proc here that tells of memory"})
    counts = {"texts": items, "sounds": items // 500, "pictures": items // 50, "steps": steps}
    asked = {kind: counts[kind] for kind in kinds if kind != "sounds" or CLIPS.is_dir()}
    seen = {kind: in_its_own_process(kind, count) for kind, count in asked.items()}
    figures, failures = {}, []
    for kind, samples in seen.items():
        failures += faults(kind, samples)
        warm = after_warm_up(samples)
        rate, total = growth(samples)
        pace = f" ({rate:+.2f} a 10,000)" if asked[kind] >= 10_000 else ""
        figures[f"{asked[kind]:,} {kind}"] = (
            f"{warm[0].mib:.0f} MiB after the warm-up, {warm[-1].mib:.0f} at the end, {total:+.1f} by the line fitted to "
            f"{len(warm)} samples{pace}; at most {max(sample.descriptors for sample in warm)} file "
            f"descriptors, {max(sample.threads for sample in warm)} threads"
        )
    if picture:
        draw(seen, picture)
    tried = 3 * len(seen)
    return Outcome("long runs", tried, tried - len(failures), failures, figures)


def draw(seen: dict[str, list[Sample]], path: Path) -> None:
    """Resident memory over what was done, a panel a kind of run, with the line that was fitted."""
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
    """A kind and a count: print its samples as JSON. Two counts, and perhaps a picture's path: all of it."""
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
