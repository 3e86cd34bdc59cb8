"""A map of the shared space: held-out items of all modalities in two dimensions, near each other where they are alike."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridgekit.encoders import Item
from bridgekit.latents.encoded import EncodedPairs

#: Items on a map, at most: t-SNE of so many takes seconds.
MAP_ITEMS = 1_500
#: An item's partners that a map knows, at most. A name of a class may belong to hundreds of clips.
MAX_PARTNERS = 40


@dataclass(frozen=True)
class Point:
    """An item on the map.

    Arguments:
        modality, item: what it is.
        x, y: where it is, from 0 to 1 from the left and from the top.
        partners: the indices of points that belong to it, the most similar first.
        cosines: their similarities to it.
    """

    modality: str
    item: Item
    x: float
    y: float
    partners: Sequence[int]
    cosines: Sequence[float]


def shared_space(held_out: Sequence[tuple[EncodedPairs, Mapping[str, Tensor]]], limit: int = MAP_ITEMS) -> list[Point]:
    """Lay out the items of some rows: PCA to 50 dimensions, then t-SNE (van der Maaten and Hinton, 2008), seeded.

    Arguments:
        held_out: tables of the rows to show, each with modality to (m, dim), the embeddings of its items. An item that
            several tables have is one point.
        limit: how many items; of more, rows are drawn.

    Returns:
        a point an item. Items of a row stand together.
    """
    at: dict[tuple[str, Item], int] = {}
    vectors: list[Tensor] = []
    together: list[set[int]] = []
    for share, (encoded, embedded) in enumerate(held_out):
        room = limit * (share + 1) // len(held_out)
        chosen, drawn = [], set()
        for row in np.random.default_rng(0).permutation(len(encoded.pairs)).tolist():
            drawn |= {(modality, int(ids[row])) for modality, ids in encoded.ids.items() if ids[row] >= 0}
            if len(at) + len(drawn) > room:
                break
            chosen.append(row)
        for row in sorted(chosen):
            members = []
            for modality, ids in encoded.ids.items():
                item = encoded.pairs.columns[modality][row]
                if item is None:
                    continue
                if (modality, item) not in at:
                    at[modality, item] = len(vectors)
                    vectors.append(embedded[modality][int(ids[row])])
                    together.append(set())
                members.append(at[modality, item])
            for member in members:
                together[member] |= set(members) - {member}
    if not vectors:
        return []
    whole = torch.stack(vectors).float().cpu()
    places = _layout(whole.numpy())
    points = []
    for index, (modality, item) in enumerate(at):
        others = sorted(together[index])
        cosines = (whole[others] @ whole[index]).tolist() if others else []
        nearest = sorted(zip(others, cosines, strict=True), key=lambda pair: -pair[1])[:MAX_PARTNERS]
        x, y = places[index].tolist()
        points.append(Point(modality, item, x, y, [other for other, _ in nearest], [cosine for _, cosine in nearest]))
    return points


def _layout(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, dim) to (n, 2), from 0 to 1."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count = len(vectors)
    small = PCA(min(50, *vectors.shape), random_state=0).fit_transform(vectors.astype(np.float64))
    if count > 3:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # collapsed embeddings: told of by their recall, not by a RuntimeWarning
            flat = TSNE(perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=0).fit_transform(small)
    else:
        flat = np.pad(small, ((0, 0), (0, 2)))[:, :2]
    low, high = flat.min(0), flat.max(0)
    # Each axis on its own: the map is to fill its square, and t-SNE's axes have no unit anyway.
    scaled: NDArray[np.float64] = (flat - low) / np.maximum(high - low, 1e-9)
    return np.nan_to_num(scaled, nan=0.5)
