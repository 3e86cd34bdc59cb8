"""A map of the shared space: held-out items of all modalities in two dimensions, with similar ones close together."""

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

#: Maximum number of items on a map: t-SNE of that many takes seconds.
MAP_ITEMS = 1_500
#: Maximum number of matching items kept per item: a class name may match hundreds of clips.
MAX_PARTNERS = 40


@dataclass(frozen=True)
class Point:
    """An item on the map.

    Arguments:
        x, y: its position, from 0 to 1 from the left and from the top.
        partners: index of each matching point to its cosine similarity, most similar first.
    """

    modality: str
    item: Item
    x: float
    y: float
    partners: Mapping[int, float]


def shared_space(held_out: Sequence[tuple[EncodedPairs, Mapping[str, Tensor]]], limit: int = MAP_ITEMS) -> list[Point]:
    """Lay out the items of some rows: PCA to 50 dimensions, then t-SNE (van der Maaten and Hinton, 2008), seed 0.

    Arguments:
        held_out: one or more tables with the rows to show, each with modality to the embeddings of its items, (m, dim). An
            item in several tables is one point.
        limit: maximum number of items; a random sample of rows if there are more.

    Returns:
        one point per item, with the items of a row next to each other.
    """
    vectors: dict[tuple[str, Item], Tensor] = {}
    together: dict[tuple[str, Item], set[tuple[str, Item]]] = {}
    for number, (encoded, embedded) in enumerate(held_out, 1):
        columns = encoded.pairs.columns
        for row in _sample_rows(encoded, limit * number // len(held_out) - len(vectors)):
            members = [(modality, item) for modality in encoded.ids if (item := columns[modality][row]) is not None]
            for modality, item in members:
                vectors.setdefault((modality, item), embedded[modality][int(encoded.ids[modality][row])])
                together.setdefault((modality, item), set()).update(key for key in members if key != (modality, item))
    if not vectors:
        return []
    whole = torch.stack(list(vectors.values())).float().cpu()
    numbers = {key: number for number, key in enumerate(vectors)}
    points = []
    for (index, (modality, item)), (x, y) in zip(enumerate(vectors), _layout(whole.numpy()).tolist(), strict=True):
        others = sorted(numbers[other] for other in together[modality, item])
        cosines = zip(others, (whole[others] @ whole[index]).tolist(), strict=True)
        points.append(Point(modality, item, x, y, dict(sorted(cosines, key=lambda pair: -pair[1])[:MAX_PARTNERS])))
    return points


def _sample_rows(encoded: EncodedPairs, room: int) -> list[int]:
    """Random rows, in order, with at most `room` distinct items in total."""
    chosen: list[int] = []
    items: set[tuple[str, int]] = set()
    for row in np.random.default_rng(0).permutation(len(encoded.pairs)).tolist():
        items |= {(modality, int(ids[row])) for modality, ids in encoded.ids.items() if ids[row] >= 0}
        if len(items) > room:
            break
        chosen.append(row)
    return sorted(chosen)


def _layout(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, dim) to (n, 2), from 0 to 1."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count = len(vectors)
    small = PCA(min(50, *vectors.shape), random_state=0).fit_transform(vectors.astype(np.float64))
    if count > 3:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a RuntimeWarning for collapsed embeddings, which recall shows too
            flat = TSNE(perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=0).fit_transform(small)
    else:
        flat = np.pad(small, ((0, 0), (0, 2)))[:, :2]
    low, high = flat.min(0), flat.max(0)
    # Each axis is scaled separately, to fill the square: t-SNE's axes have no unit.
    scaled: NDArray[np.float64] = (flat - low) / np.maximum(high - low, 1e-9)
    return np.nan_to_num(scaled, nan=0.5)
