"""Cosine similarities of held-out pairs, and the images in a bridge's folder: heat maps and training curves as PNG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bridgekit.bridge.bridge import Bridge
from bridgekit.evaluation.recall import correct_items
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.report.labels import short_labels
from bridgekit.report.previews import Names
from bridgekit.report.tables import TableResults
from bridgekit.tables.splits import test_splits

#: Pairs on a heat map: as many as leave room for labels of a legible size.
HEAT_ITEMS = 24
#: Maximum number of items per modality in a histogram of cosines, and its number of bins.
MAX_ITEMS, BINS = 1_000, 48


@dataclass(frozen=True)
class Similarities:
    """Cosine similarities of some pairs.

    Arguments:
        a, b: modalities.
        matrix: (n, n), items of a by items of b, pairs on the diagonal.
        rows, columns: the items' names.
    """

    a: str
    b: str
    matrix: NDArray[np.float64]
    rows: Sequence[str]
    columns: Sequence[str]


def similarities(bridge: Bridge, encoded: EncodedPairs, a: str, b: str, count: int, names: Names) -> Similarities | None:
    """Compare up to `count` pairs that share no item, in the order of b's names. None if no row has both modalities."""
    rows = np.random.default_rng(0).permutation(np.flatnonzero((encoded.ids[a] >= 0) & (encoded.ids[b] >= 0)))
    for modality in (a, b):  # the first row of each item
        rows = rows[np.sort(np.unique(encoded.ids[modality][rows], return_index=True)[1])]
    chosen = rows[:count].tolist()
    if not chosen:
        return None
    columns = encoded.pairs.columns
    named = {modality: {row: names.name(modality, columns[modality][row] or "") for row in chosen} for modality in (a, b)}
    chosen.sort(key=lambda row: named[b][row])
    left, right = (
        bridge.project(modality, encoded.latents[modality].matrix[torch.from_numpy(encoded.ids[modality][chosen])])
        for modality in (a, b)
    )
    matrix = (left @ right.T).double().cpu().numpy()
    return Similarities(a, b, matrix, [named[a][row] for row in chosen], [named[b][row] for row in chosen])


@dataclass(frozen=True)
class Cosines:
    """Cosines of matching pairs, (n,), and of all other pairs, (m,)."""

    matching: NDArray[np.float32]
    others: NDArray[np.float32]

    @property
    def bins(self) -> list[tuple[float, float, float, float]]:
        """Each bin's lower and upper edge, and the shares of matching and of other pairs in it."""
        edges = np.linspace(min(-0.2, float(min(self.matching.min(), self.others.min()))), 1, BINS + 1)
        # Rounding may give a cosine just above 1.
        shares = [np.histogram(np.minimum(each, 1), edges)[0] / len(each) for each in (self.matching, self.others)]
        return list(zip(edges[:-1].tolist(), edges[1:].tolist(), *(each.tolist() for each in shares), strict=True))


def cosines(table: TableResults, a: str, b: str) -> Cosines:
    """Cosines of held-out items of two modalities, at most `MAX_ITEMS` of each."""
    correct = correct_items(table.held_out, np.arange(len(table.held_out.pairs)), a, b)
    left, right = (np.unique(ids)[:MAX_ITEMS] for ids in (correct.query, correct.candidate))
    matrix = (table.embedded[a][torch.from_numpy(left)] @ table.embedded[b][torch.from_numpy(right)].T).numpy()
    matching = np.zeros(matrix.shape, dtype=bool)
    known = np.isin(correct.query, left) & np.isin(correct.candidate, right)
    matching[np.searchsorted(left, correct.query[known]), np.searchsorted(right, correct.candidate[known])] = True
    return Cosines(matrix[matching], matrix[~matching])


# ---- the images in a bridge's folder


def training_curves(history: Sequence[Mapping[str, float]]) -> bytes:
    """A PNG of the loss, and of recall on validation rows, by epoch. Epoch 0, the closed-form start, has no loss."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display needed, safe in threads

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in history]
    trained = [record for record in history if "loss" in record]
    left.plot([record["epoch"] for record in trained], [record["loss"] for record in trained], color="#204a87")
    for name in (name for name in history[0] if name.startswith("recall@")):
        right.plot(epochs, [record[name] for record in history], label=name)
    best = best_epoch(history)
    right.axvline(best, color="#888888", linestyle=":", label=f"best epoch ({best:g})")
    left.set(title="Loss", xlabel="epoch", ylabel="InfoNCE on mixed training pairs")
    right.set(title="Recall on validation rows", xlabel="epoch", ylabel="share of queries", ylim=(0, 1))
    right.legend(fontsize=8)
    for panel in (left, right):
        panel.grid(alpha=0.3)
    return _png(figure)


def best_epoch(history: Sequence[Mapping[str, float]]) -> float:
    """The epoch whose adapters were kept."""
    return max(history, key=lambda record: record["score"])["epoch"]


def heat_maps(bridge: Bridge, encoded: EncodedPairs, split: NDArray[np.str_]) -> dict[str, bytes]:
    """File name and PNG of a heat map for each pair of modalities in the first test split (or else in `val`)."""
    held_out = encoded.take(np.flatnonzero(np.isin(split, test_splits(split.tolist())[:1] or ["val"])))
    names = Names((modality, item) for modality, items in held_out.pairs.columns.items() for item in items)
    found = [similarities(bridge, held_out, a, b, HEAT_ITEMS, names) for a, b in combinations(encoded.ids, 2)]
    return {f"similarity-{shown.a}-{shown.b}.png": _heat_map(shown) for shown in found if shown}


def _heat_map(shown: Similarities) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shown.matrix, cmap="magma")
    for items, axis in ((shown.columns, axes.xaxis), (shown.rows, axes.yaxis)):
        # Matplotlib reads a pair of dollar signs as mathematics.
        labels = [label.replace("$", r"\$") for label in short_labels(items)]
        axis.set_ticks(range(len(items)), labels=labels, fontsize=10)
    axes.tick_params(axis="x", rotation=90)
    axes.set(xlabel=shown.b, ylabel=shown.a, title=f"Cosine similarity of {len(shown.rows)} held-out pairs")
    figure.colorbar(image, shrink=0.8)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The font lacks some scripts, so labels in them show boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()
