"""The pictures in a bridge's folder: loss and recall while training, and a similarity heat map."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bridgekit.bridge.bridge import Bridge
    from bridgekit.encoders import Item
    from bridgekit.latents.encoded import EncodedPairs

#: Rows and columns of the heat map.
HEAT_MAP_ITEMS = 40


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    # The object interface rather than pyplot: no global state, no display needed, safe in threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The font lacks some scripts; a box in a label is no matter for the user's terminal.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()


def training_curves(history: Sequence[Mapping[str, float]]) -> bytes:
    """Loss, and recall on validation rows, over the epochs, as PNG."""
    figure, (left, right) = _figure(10, 4, panels=2)
    draw_loss(left, history, "#204a87")
    draw_recalls(right, history, [name for name in history[0] if name.startswith("recall@")])
    left.set(title="Loss")
    right.set(title="Recall on validation rows")
    right.legend(fontsize=8)
    for panel in (left, right):
        panel.grid(alpha=0.3)
    return _png(figure)


def draw_loss(axes: Any, history: Sequence[Mapping[str, float]], colour: str) -> None:
    """The loss over the epochs."""
    axes.plot([record["epoch"] for record in history], [record["loss"] for record in history], color=colour)
    axes.set(xlabel="epoch", ylabel="InfoNCE on mixed training pairs")


def draw_recalls(
    axes: Any, history: Sequence[Mapping[str, float]], names: Sequence[str], styles: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Some recalls on validation rows over the epochs, and the epoch that was kept."""
    epochs = [record["epoch"] for record in history]
    for number, name in enumerate(names):
        axes.plot(epochs, [record[name] for record in history], label=name, **(styles[number] if styles else {}))
    axes.axvline(best_epoch(history), color="#888888", linestyle=":", label=f"best epoch ({best_epoch(history):g})")
    axes.set(xlabel="epoch", ylabel="share of queries", ylim=(0, 1))


def best_epoch(history: Sequence[Mapping[str, float]]) -> float:
    """The epoch whose adapters were kept."""
    return max(history, key=lambda record: record["score"])["epoch"]


@dataclass(frozen=True)
class Similarities:
    """Cosine similarities of some pairs.

    Arguments:
        matrix: (n, n), the first modality's items by the second's, an item's partner on the diagonal.
        rows, columns: the items' labels.
    """

    matrix: NDArray[np.float32]
    rows: Sequence[str]
    columns: Sequence[str]


def similarities(
    bridge: Bridge,
    encoded: EncodedPairs,
    a: str,
    b: str,
    rows: NDArray[np.int64],
    count: int = HEAT_MAP_ITEMS,
    name: Callable[[str, Item], str] | None = None,
) -> Similarities:
    """Compare some pairs of modalities a and b that have no item in common, in the order of b's labels.

    Arguments:
        bridge: the bridge.
        encoded: the table.
        a, b: modalities.
        rows: indices of rows that have both.
        count: how many pairs, at most.
        name: from a modality and an item to its label, of which the beginning is kept.
    """

    def labelled(modality: str, row: int) -> str:
        item = encoded.pairs.columns[modality][row]
        return label(name(modality, item), 24) if name and item is not None else label(item)

    chosen: list[int] = []
    seen: set[tuple[str, int]] = set()
    for row in np.random.default_rng(0).permutation(rows).tolist():
        items = {(modality, int(encoded.ids[modality][row])) for modality in (a, b)}
        if not items & seen:
            seen |= items
            chosen.append(row)
        if len(chosen) == count:
            break
    chosen.sort(key=lambda row: labelled(b, row))
    embedded = {
        modality: bridge.project(modality, encoded.latents[modality].matrix[torch.from_numpy(encoded.ids[modality][chosen])])
        for modality in (a, b)
    }
    labels = {modality: [labelled(modality, row) for row in chosen] for modality in (a, b)}
    return Similarities((embedded[a] @ embedded[b].T).numpy(), labels[a], labels[b])


def heat_map(bridge: Bridge, encoded: EncodedPairs, a: str, b: str, rows: NDArray[np.int64]) -> bytes:
    """`similarities` of some held-out pairs as PNG. Arguments are the same."""
    shown = similarities(bridge, encoded, a, b, rows)
    figure, axes = _figure(10, 9)
    image = axes.imshow(shown.matrix, cmap="magma")
    for labels, axis in ((shown.columns, axes.xaxis), (shown.rows, axes.yaxis)):
        axis.set_ticks(range(len(labels)), labels=labels, fontsize=7)
    axes.tick_params(axis="x", rotation=90)
    axes.set(xlabel=b, ylabel=a, title=f"Cosine similarity of {len(shown.rows)} pairs that training never saw")
    figure.colorbar(image, shrink=0.8)
    return _png(figure)


def label(item: object, length: int = 32) -> str:
    """A short text for an item: a file's folder and name, or the beginning of a text."""
    text = f"{item.parent.name}/{item.name}" if isinstance(item, Path) else str(item)
    # Matplotlib reads a pair of dollar signs as mathematics.
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$").replace("\n", " ")
