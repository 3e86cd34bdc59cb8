"""Charts of a page as SVG whose colours are the page's: light and dark by CSS, texts by the page's font."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridgekit.pictures import Similarities, draw_loss, draw_recalls
from bridgekit.report.markup import Html, joined, raw, tag

# Matplotlib writes colours as they are given, so each of these stands for a variable of the page's style.
INK, MUTED, FAINT, LINE = "#010101", "#020202", "#030303", "#040404"
#: The colours of series, in order. They differ in lightness too.
SERIES = ("#050501", "#050502", "#050503", "#050504", "#050505", "#050506")
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    FAINT: "var(--faint)",
    LINE: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)},
}
_STYLE: Any = {  # matplotlib types each of its 300 settings
    "svg.fonttype": "none",
    "svg.hashsalt": "bridgekit",  # ids that are the same on every run
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
}
#: Inches at 72 units an inch: as wide as a phone's screen, so that texts keep their size there.
_WIDTH = 5.0


def chart(
    name: str,
    title: str,
    description: str,
    draw: Callable[[Any], None],
    *,
    height: float,
    width: float = _WIDTH,
    tight: bool = False,
) -> Html:
    """An SVG with a title and a description for those who do not see it.

    Arguments:
        name: of the chart on its page: a word. All ids in the SVG begin with it.
        title, description: what it shows, and what can be seen in it.
        draw: draws on matplotlib's axes, in the colours above.
        height, width: inches, of 72 units in the SVG.
        tight: whether to cut off what is left empty around it.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    data = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's fonts have more scripts than matplotlib's
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(data, format="svg", metadata=nothing, bbox_inches="tight" if tight else None, pad_inches=0.05)
    svg = data.getvalue()
    svg = re.sub(r"<style\b.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)  # its rules would be the whole page's
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    # Ids are the page's, of which each stands once.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    # What is drawn as an image is a mask: white where the chart is to have the page's colour.
    svg = re.sub(
        r"<image\b[^>]*?/>|<image\b.*?</image>",
        lambda image: (
            f'<mask id="{name}-mask-{image.start()}">{image[0]}</mask>'
            f'<rect width="100%" height="100%" style="fill: var(--heat)" mask="url(#{name}-mask-{image.start()})"/>'
        ),
        svg,
        flags=re.DOTALL,
    )
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    told = joined(tag("title", title, id=f"{name}-title"), tag("desc", description, id=f"{name}-desc"))
    named = f'role="img" class="chart" aria-labelledby="{name}-title" aria-describedby="{name}-desc"'
    return raw(f"{opening} {named}>{told}{rest}")


def recall_bars(name: str, records: Sequence[Mapping[str, Any]], by_chance: Mapping[int, float], title: str) -> Html:
    """Recall@1, 5 and 10 of each method in one direction, with a line where a ranking at random would be.

    Arguments:
        name: of the chart on its page.
        records: one a method, as of `evaluation.evaluate_splits`, the least of them first.
        by_chance: k to the recall@k of a ranking at random.
        title: which split and direction.
    """

    def draw(axes: Any) -> None:
        width = 0.8 / len(records)
        for number, record in enumerate(records):
            values = [100 * record[f"recall@{k}"] for k in by_chance]
            heights = np.arange(len(values)) + (number - (len(records) - 1) / 2) * width
            axes.barh(heights, values, 0.86 * width, color=method_colour(record["method"]))
            colour = INK if number == len(records) - 1 else MUTED
            for value, height, share in zip(values, heights, by_chance.values(), strict=True):
                # Beside the line of chance, where that is to the right of the bar.
                axes.text(max(value, 100 * share) + 1.5, height, f"{value:.1f}", va="center", fontsize=10, color=colour)
        for place, share in enumerate(by_chance.values()):
            axes.plot([100 * share] * 2, [place - 0.45, place + 0.45], color=INK, linewidth=1.4, linestyle=(0, (2, 1.5)))
        axes.set(xlim=(0, 112), xticks=range(0, 101, 25), yticks=range(len(by_chance)), xlabel="% of queries")
        axes.set_yticklabels([f"@{k}" for k in by_chance])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)

    told = "; ".join(
        f"{record['method']}: " + ", ".join(f"{100 * record[f'recall@{k}']:.1f} % at {k}" for k in by_chance)
        for record in records
    )
    return chart(name, title, f"{told}. The table has the same figures.", draw, height=0.9 + 0.17 * 3 * len(records) + 0.3)


def method_colour(method: str) -> str:
    """The colour of a method's bars."""
    return {"FuseMix": SERIES[0], "linear": MUTED}.get(method, FAINT)


def loss_curve(name: str, history: Sequence[Mapping[str, float]]) -> Html:
    """The loss over the epochs."""
    first, last = history[0]["loss"], history[-1]["loss"]
    told = f"It goes from {first:.3f} in epoch {history[0]['epoch']:g} to {last:.3f} in epoch {history[-1]['epoch']:g}."

    def draw(axes: Any) -> None:
        draw_loss(axes, history, SERIES[0])
        axes.set(ylabel="InfoNCE")

    return chart(name, "Loss on mixed training pairs", told, draw, height=2.7)


def recall_curves(name: str, history: Sequence[Mapping[str, float]], names: Sequence[str], title: str) -> Html:
    """Some recalls on validation rows over the epochs."""
    directions = list(dict.fromkeys(each.split(" ", 1)[1] for each in names))
    styles = [
        {
            "color": SERIES[directions.index(each.split(" ", 1)[1]) % len(SERIES)],
            "linestyle": "--" if each.startswith("recall@1 ") else "-",
        }
        for each in names
    ]

    def draw(axes: Any) -> None:
        draw_recalls(axes, history, names, styles)
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.24), ncols=1 if max(map(len, names)) > 24 else 2, fontsize=10)

    best = max(history, key=lambda record: record["score"])
    told = "; ".join(f"{each}: {100 * best[each]:.1f} %" for each in names)
    return chart(name, title, f"In the epoch that was kept, {best['epoch']:g}: {told}.", draw, height=3.6)


def heat(name: str, shown: Similarities, a: str, b: str) -> Html:
    """A heat map of similarities: the darker (in the dark, the brighter), the more alike."""
    count = len(shown.rows)
    top = max(0.05, float(shown.matrix.max()))

    def draw(axes: Any) -> None:
        axes.imshow(_white(np.clip(shown.matrix / top, 0, 1)), interpolation="none")
        axes.patch.set_gid("cells")  # the page's script asks where they are
        size = 9 if count > 24 else 10
        for labels, axis in ((shown.columns, axes.xaxis), (shown.rows, axes.yaxis)):
            axis.set_ticks(range(count), labels=labels, fontsize=size)
        axes.tick_params(axis="x", rotation=90)
        axes.tick_params(length=0, pad=2)
        axes.set(xlabel=b, ylabel=a)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set(visible=True, color=LINE)
        scale = axes.inset_axes((1.03, 0.0, 0.025, 0.4))
        scale.imshow(_white(np.linspace(1, 0, 64)[:, None]), aspect="auto", extent=(0, 1, 0, top), interpolation="none")
        scale.set_xticks([])
        scale.set_yticks([0, top], labels=["≤ 0", f"{top:.2f}"], fontsize=9)
        scale.yaxis.tick_right()
        scale.grid(visible=False)
        scale.tick_params(length=0)

    together = np.diag(shown.matrix)
    apart = shown.matrix[~np.eye(count, dtype=bool)]
    told = f"{count} pairs of {a} and {b}. Cosine of what belongs together: {decimals(together.mean())} on average"
    told += f"; of all else: {decimals(apart.mean())}." if len(apart) else "."
    return chart(name, f"Cosine similarity of {a} and {b}", told, draw, height=8.6, width=8.6, tight=True)


def _white(shares: NDArray[Any]) -> NDArray[np.float64]:
    """(n, m) from 0 to 1 as white pixels, (n, m, 4), the less transparent the larger."""
    return np.concatenate([np.ones((*shares.shape, 3)), np.asarray(shares, np.float64)[..., None]], axis=-1)


def cosine_histogram(name: str, together: NDArray[Any], apart: NDArray[Any], a: str, b: str) -> Html:
    """How the cosines of pairs that belong together, and of pairs that do not, are spread."""
    edges = np.linspace(min(-0.2, float(min(together.min(), apart.min()))), 1, 49)

    def draw(axes: Any) -> None:
        for values, colour, text in ((apart, MUTED, "do not belong together"), (together, SERIES[0], "belong together")):
            counts, _ = np.histogram(values, edges)
            share = 100 * counts / max(1, len(values))
            axes.stairs(share, edges, color=colour, fill=True, alpha=0.18)
            axes.stairs(share, edges, color=colour, linewidth=1.6, label=text)
        axes.set(xlabel=f"cosine of {a} and {b}", ylabel="% of pairs")
        axes.legend(loc="upper right")

    told = (
        f"Pairs that belong together: mean {decimals(together.mean())}, from {decimals(together.min())} to "
        f"{decimals(together.max())}. Pairs that do not: mean {decimals(apart.mean())}, from {decimals(apart.min())} to "
        f"{decimals(apart.max())}."
    )
    return chart(name, f"Cosines of {a} and {b}", told, draw, height=2.7)


def decimals(value: float, places: int = 2) -> str:
    """A number with a true minus sign, and none before zero."""
    return f"{value:.{places}f}".replace("-0." + "0" * places, "0." + "0" * places).replace("-", "−")
