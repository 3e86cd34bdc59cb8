"""The studies of the FuseMix paper on 3,000 photographs: quantity, quality and diversity of pairs, batch size, augmentation.

python benchmarks/studies.py

The result of each fit is appended to `studies.jsonl` in the cache folder, so that an interrupted run continues; a change of
bridgekit/fusion/ trains again. Plots are written to docs/studies/.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import spread, table
from flickr import CAPTIONS, FLICKR, HELD_OUT, PHOTOGRAPHS, Fit, Results
from matplotlib.figure import Figure

from bridgekit import PRESETS, Preset

PLOTS = Path(__file__).resolve().parents[1] / "docs" / "studies"
#: Rows a batch and steps of a fit with `paper`, and the steps of the release, whose batch would be the whole table.
BATCH, STEPS, RELEASED = 512, 92, 500
#: Seeds of fits with `default`.
SEEDS = 2
WITHOUT = ", without mixup"
COLORS = {"paper": "#204a87", "default": "#ce5c00"}
ABOUT = (
    f"{2 * HELD_OUT + PHOTOGRAPHS:,} photographs of Flickr8k with five captions each, `starter:image-last` and `starter:text`. "
    f"Each seed draws {HELD_OUT} photographs to test, {HELD_OUT} to validate and {PHOTOGRAPHS:,} to train, with {CAPTIONS:,} "
    f"captions. Figures are the mean of recall@1, @5 and @10 in both directions among the test photographs, with one caption "
    f"each, in %: mean ± standard deviation over {SEEDS} seeds, or one value where a study has one seed of `paper`. In "
    f"brackets is a difference, seed by seed. A random ranking has {100 * (1 + 5 + 10) / 3 / HELD_OUT:.1f}.\n\n"
    "`default` is trained from a closed form of strength 0.5, and not chosen. "
    f"`paper` is FuseMix's released configuration with batches of {BATCH} pairs and about "
    f"{STEPS} steps at every number of pairs. That is fewer: the release would take {RELEASED} steps, each with all pairs. "
    "With `paper`, mixup makes one row of two, as in the release, so that a batch without mixup has twice as many."
)
#: Fits by line (the preset, perhaps with a variant) and by what is varied.
Study = dict[tuple[str, Any], Fit]
#: Their recalls by seed.
Recalls = dict[tuple[str, Any], list[float]]


def presets(pairs: int = PHOTOGRAPHS, steps: int = STEPS) -> dict[str, Preset]:
    """`paper` with smaller batches and fewer steps than the release, and `default`."""
    epochs = round(steps / max(1, pairs // BATCH))
    return {
        "paper": replace(PRESETS["paper"], batch_size=BATCH, epochs=epochs),
        "default": replace(PRESETS["default"], warm_start=0.5),
    }


def changed(fit: Fit, **changes: Any) -> Fit:
    """A fit with changes to its preset."""
    return replace(fit, preset=replace(fit.preset, **changes))


def quantity() -> Study:
    """From 2,400 pairs on there are more captions, but no more photographs. In brackets: without mixup minus with."""
    study = {}
    for pairs in (100, 300, 1_000, PHOTOGRAPHS, CAPTIONS):
        for name, preset in presets(pairs).items():
            study[name, pairs] = Fit(preset, pairs)
            study[name + WITHOUT, pairs] = changed(study[name, pairs], alpha=0.0)
    return study


def quality() -> Study:
    """2,400 pairs, of which some have each other's captions. In brackets: minus the first row."""
    shares = (0.0, 0.1, 0.2, 0.4)
    return {(name, 100 * share): Fit(preset, wrong=share) for share in shares for name, preset in presets().items()}


def diversity() -> Study:
    """600 pairs chosen in four ways. In brackets: minus the first row."""
    ways = {
        "uniform": "600 photographs, uniform",
        "image": "600 photographs, k-DPP on images",
        "text": "600 photographs, k-DPP on captions",
        "captions": "120 photographs, 5 captions each",
    }
    return {(name, way): Fit(preset, 600, subset) for subset, way in ways.items() for name, preset in presets(600).items()}


def batch_size() -> Study:
    """2,400 pairs, with the same number of epochs or of steps. In brackets: minus the first row."""
    study = {}
    for size in (BATCH, 128, PHOTOGRAPHS):
        for name, preset in presets().items():
            fit = Fit(replace(preset, batch_size=size, min_steps_per_epoch=1))
            epochs = round(preset.epochs * (PHOTOGRAPHS // BATCH) / (PHOTOGRAPHS // size))
            study[f"{name}, same epochs", size] = fit
            study[f"{name}, same steps", size] = changed(fit, epochs=epochs)
    return study


def augmentation() -> Study:
    """2,400 pairs and augmentations of their latents. In brackets: minus the first row."""
    study = {}
    for name, preset in presets().items():
        none = Fit(replace(preset, alpha=0.0, input_dropout=0.0))
        study[name, "none"] = none
        study[name, "mixup (FuseMix)"] = changed(none, alpha=preset.alpha)
        study[name, "noise of 0.3 deviations"] = replace(none, noise=0.3)
        study[name, "noise of 1 deviation"] = replace(none, noise=1.0)
        study[name, "dropout of 0.25"] = changed(none, input_dropout=0.25)
        study[name, "mixup and dropout of 0.25"] = changed(none, alpha=preset.alpha, input_dropout=0.25)
    return study


def longer() -> Study:
    """1,000 pairs, up to the number of steps of the release. In brackets: without mixup minus with."""
    study = {}
    for steps in (STEPS, RELEASED):
        study["paper", steps] = Fit(presets(1_000, steps)["paper"], 1_000)
        study["paper" + WITHOUT, steps] = changed(study["paper", steps], alpha=0.0)
    return study


#: With what is varied, and the number of seeds of fits with `paper`.
STUDIES: dict[Callable[[], Study], tuple[str, int]] = {
    quantity: ("training pairs", 2),
    quality: ("pairs with a wrong caption, %", 2),
    diversity: ("training pairs", 2),
    batch_size: ("rows a batch", 1),
    augmentation: ("augmentation", 2),
    longer: ("steps", 1),
}


def seeds_of(line: str, of_paper: int) -> int:
    """The number of seeds of a line in a study."""
    return of_paper if line.startswith("paper") else SEEDS


def shown(values: Sequence[float]) -> str:
    """Mean and standard deviation in percent; of a single value, itself."""
    return spread(values) if len(values) > 1 else f"{100 * values[0]:.1f}"


def cell(recalls: Recalls, line: str, x: Any) -> str:
    """Mean and deviation over seeds; in brackets, of the differences by seed from the row or column compared with."""
    found, base = recalls[line, x], recalls.get((line.removesuffix(WITHOUT), x), [])
    if (line + WITHOUT, x) in recalls:
        return shown(found)
    if not line.endswith(WITHOUT):
        base = next(first for (other, _), first in recalls.items() if other == line)
    differences = shown([a - b for a, b in zip(found, base, strict=True)])
    sign = "" if differences.startswith("-") else "+"
    return shown(found) if base is found else f"{shown(found)} ({sign}{differences})"


def plot(recalls: Recalls, title: str, axis: str, to: Path) -> None:
    """Recall against what is varied; error bars are standard deviations over seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    values = list(dict.fromkeys(x for _, x in recalls))
    named = isinstance(values[0], str)
    values = values if named else sorted(values)
    places = range(len(values)) if named else values
    for line in dict.fromkeys(line for line, _ in recalls):
        dashed = line.endswith((WITHOUT, "same steps"))
        found = [[100 * recall for recall in recalls[line, x]] for x in values]
        axes.errorbar(
            places,
            [statistics.mean(each) for each in found],
            [statistics.stdev(each) if len(each) > 1 else 0.0 for each in found],
            label=line,
            color=COLORS[line.split(",")[0]],
            linestyle="" if named else "--" if dashed else "-",
            marker="o",
            markerfacecolor="white" if dashed else None,
            capsize=4,
        )
    axes.set_xscale("linear" if named or not values[0] else "log")
    axes.set_xticks(places, [x.replace(", ", ",\n").replace(" of ", "\nof ") if named else f"{x:,g}" for x in values])
    axes.minorticks_off()
    axes.set(title=title, xlabel="" if named else axis, ylabel="mean of recall@1, @5 and @10, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(to, dpi=120)


def main() -> str:
    """Train, evaluate and plot; return the tables, or why there are none."""
    if not FLICKR.is_dir():
        return f"Not measured: the photographs are not in {FLICKR}."
    results, parts = Results(), [ABOUT]
    for seed in range(SEEDS):  # an interrupted run has every study with the first seeds
        for build, (_, of_paper) in STUDIES.items():
            for (line, _), fit in build().items():
                if seed < seeds_of(line, of_paper):
                    results.recall(fit, seed)
    for build, (axis, of_paper) in STUDIES.items():
        study, about = build(), str(build.__doc__)
        recalls = {(line, x): results.recalls(fit, seeds_of(line, of_paper)) for (line, x), fit in study.items()}
        lines, values = (list(dict.fromkeys(names)) for names in zip(*study, strict=True))
        rows = [[x if isinstance(x, str) else f"{x:,g}", *(cell(recalls, line, x) for line in lines)] for x in values]
        title = build.__name__.replace("_", " ").capitalize()
        seeds = f"`paper` with {of_paper} seed{'s' if of_paper > 1 else ''}."
        parts.append(f"**{title}.** {about} {seeds}\n\n{table([axis, *lines], rows)}")
        plot(recalls, f"{title}. {about.split('.')[0]}", axis, PLOTS / f"{build.__name__}.png")
    minutes = sum(results.seconds.values()) / 60
    parts.append(f"{len(results.seconds)} fits took {minutes:.0f} minutes. They are kept: a run that finds them takes seconds.")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(main())
