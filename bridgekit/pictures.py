"""The pictures in a bridge's folder: loss and recall while training, and a similarity heat map."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bridgekit.bridge import Bridge
    from bridgekit.evaluation import EncodedPairs

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
    epochs = [record["epoch"] for record in history]
    left.plot(epochs, [record["loss"] for record in history], color="#204a87")
    left.set(xlabel="epoch", ylabel="InfoNCE on mixed training pairs", title="Loss")
    for name in [name for name in history[0] if name.startswith("recall@")]:
        right.plot(epochs, [record[name] for record in history], label=name)
    best = max(history, key=lambda record: record["score"])["epoch"]
    right.axvline(best, color="#888888", linestyle=":", label=f"best epoch ({best:g})")
    right.set(xlabel="epoch", ylabel="share of queries", ylim=(0, 1), title="Recall on validation rows")
    right.legend(fontsize=8)
    for panel in (left, right):
        panel.grid(alpha=0.3)
    return _png(figure)


def heat_map(bridge: Bridge, encoded: EncodedPairs, a: str, b: str, rows: NDArray[np.int64]) -> bytes:
    """Cosine similarities of some held-out pairs of modalities a and b, an item's partner on the diagonal, as PNG.

    Arguments:
        bridge: the bridge.
        encoded: the table.
        a, b: modalities.
        rows: indices of rows that have both.
    """
    chosen: list[int] = []
    seen: set[tuple[str, int]] = set()
    for row in np.random.default_rng(0).permutation(rows).tolist():
        items = {(modality, int(encoded.ids[modality][row])) for modality in (a, b)}
        if not items & seen:
            seen |= items
            chosen.append(row)
        if len(chosen) == HEAT_MAP_ITEMS:
            break
    chosen.sort(key=lambda row: _label(encoded.pairs.columns[b][row]))
    embedded = {
        modality: bridge.project(modality, encoded.latents[modality].matrix[torch.from_numpy(encoded.ids[modality][chosen])])
        for modality in (a, b)
    }
    figure, axes = _figure(10, 9)
    image = axes.imshow((embedded[a] @ embedded[b].T).numpy(), cmap="magma")
    for modality, axis in ((b, axes.xaxis), (a, axes.yaxis)):
        labels = [_label(encoded.pairs.columns[modality][row]) for row in chosen]
        axis.set_ticks(range(len(chosen)), labels=labels, fontsize=7)
    axes.tick_params(axis="x", rotation=90)
    axes.set(xlabel=b, ylabel=a, title=f"Cosine similarity of {len(chosen)} pairs that training never saw")
    figure.colorbar(image, shrink=0.8)
    return _png(figure)


def _label(item: object) -> str:
    text = f"{item.parent.name}/{item.name}" if isinstance(item, Path) else str(item)
    # Matplotlib reads a pair of dollar signs as mathematics.
    return (text if len(text) <= 32 else text[:31] + "…").replace("$", r"\$").replace("\n", " ")
