"""Initial adapters: the best linear ones, in closed form, instead of random ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor

from bridgekit.errors import BridgekitError
from bridgekit.fusion.adapter import Adapter, FusionAdapter, project
from bridgekit.hardware import HALF, widened

#: Means, covariances and regressions are as good on this many rows as on millions, which would not fit in memory.
ENOUGH_ROWS = 131_072
#: Rows of latents in half precision that are converted at a time.
PART_ROWS = 8_192


@torch.no_grad()
def warm_start(
    adapters: Mapping[str, Adapter],
    latents: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    ridge: float,
    fixed: Collection[str] = (),
) -> None:
    """Set adapters to the regularised canonical correlation analysis of their training latents.

    On a few thousand pairs, a well-regularised linear map is hard to beat from a random start, so training starts from one.
    Residual blocks begin as the identity (their last layers are zeroed) and the head is set to the linear map, so before the
    first step the adapters are exactly that solution.

    Arguments:
        adapters: two or more. If some are fixed, the others become ridge regressions onto those.
        latents: modality to its distinct items' latents, (m_modality, d_modality).
        rows: modality to n indices into its latents, one per training row; negative if missing.
        ridge: added to each covariance's diagonal, in units of its mean eigenvalue.
        fixed: the modalities whose adapters stay as they are.

    Raises:
        BridgekitError: latents so large that their covariance is not finite.

    Source: Hotelling, Relations between two sets of variates, 1936; regularised as in Vinod, Canonical ridge, 1976; for more
    than two sets the sum of correlations as in Kettenring, Canonical analysis of several sets of variables, 1971, which is
    Hotelling's for two. Two sets without a row in common count as uncorrelated and are connected through the others. Canonical
    directions are weighted by the square root of their correlation, so that cosine similarity weights directions by how much
    the sets share them.
    """
    if fixed:
        for name, partners in joining_order(fixed, rows):
            _regress(adapters, latents, rows, ridge, name, partners)
    else:
        _correlate(adapters, latents, rows, ridge)


def spread_rows(
    latents: Mapping[str, Tensor], rows: Mapping[str, Tensor], most: int = ENOUGH_ROWS
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """At most `most` rows, evenly spread over the table, with only the latents of their items.

    Arguments:
        latents: modality to (m, d).
        rows: modality to n indices into its latents, negative if missing.
        most: the maximum number of rows.

    Returns:
        latents and rows; the given ones if there are no more than that.
    """
    n = len(next(iter(rows.values())))
    if n <= most:
        return latents, rows
    chosen = torch.arange(most) * n // most
    fewer_latents, fewer_rows = {}, {}
    for name, ids in rows.items():
        used, place = torch.unique(ids[chosen], return_inverse=True)
        holes = int((used < 0).sum())
        fewer_latents[name] = latents[name][used[holes:]]
        fewer_rows[name] = torch.where(ids[chosen] < 0, -1, place - holes)
    return fewer_latents, fewer_rows


def joining_order(start: Collection[str], rows: Mapping[str, Tensor]) -> list[tuple[str, list[str]]]:
    """The other modalities, nearest first, each with those before it (or in `start`) that it has a row in common with.

    Modalities that no chain of rows connects to `start` are left out.
    """
    done = list(start)
    order: list[tuple[str, list[str]]] = []
    while True:
        layer = []
        for name in rows:
            partners = [other for other in done if ((rows[name] >= 0) & (rows[other] >= 0)).any()]
            if name not in done and partners:
                layer.append((name, partners))
        if not layer:
            return order
        order += layer
        done += [name for name, _ in layer]


def _regress(
    adapters: Mapping[str, Adapter],
    latents: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    ridge: float,
    name: str,
    partners: list[str],
) -> None:
    """Ridge regression of one modality onto the embeddings of its items' partners."""
    adapter = adapters[name]
    assert isinstance(adapter, FusionAdapter)
    ids, targets = [], []
    for partner in partners:
        both = (rows[name] >= 0) & (rows[partner] >= 0)
        ids.append(rows[name][both])
        targets.append(project(adapters[partner].eval(), latents[partner])[rows[partner][both]])
    x, y = _Inputs(adapter, latents[name], torch.cat(ids)), torch.cat(targets).double()
    centre, shift = x.mean(), y.mean(0)
    root = _inverse_root(x.covariance(centre), ridge)
    linear = _sum(root @ root @ (x.part(at) - centre).T @ (y[at] - shift) for at in x.parts()) / len(y)
    adapter.set_linear(linear.T, shift - centre @ linear)


def _correlate(
    adapters: Mapping[str, Adapter], latents: Mapping[str, Tensor], rows: Mapping[str, Tensor], ridge: float
) -> None:
    """The directions in which whitened sets correlate most, summed over all pairs of sets: the top of one eigenproblem."""
    means, roots = {}, {}
    for name in adapters:
        there = _Inputs(adapters[name], latents[name], rows[name][rows[name] >= 0])
        means[name] = there.mean()
        roots[name] = _inverse_root(there.covariance(means[name]), ridge)
    blocks = {(name, name): torch.zeros(len(roots[name]), len(roots[name]), dtype=torch.float64) for name in adapters}
    for a, b in combinations(adapters, 2):
        both = (rows[a] >= 0) & (rows[b] >= 0)
        x, y = (_Inputs(adapters[name], latents[name], rows[name][both]) for name in (a, b))
        cross = _sum((x.part(at) - means[a]).T @ (y.part(at) - means[b]) for at in x.parts())
        blocks[a, b] = roots[a] @ (cross / both.sum().clamp_min(1)) @ roots[b]
        blocks[b, a] = blocks[a, b].T
    values, vectors = torch.linalg.eigh(torch.cat([torch.cat([blocks[a, b] for b in adapters], 1) for a in adapters]))
    # Eigenvalues are in ascending order. Only positive ones are correlations.
    width = next(iter(adapters.values())).shared_dim
    best = torch.arange(len(values) - 1, -1, -1)[: min(width, int((values > 1e-9 * values[-1]).sum()))]
    weighted = vectors[:, best] * values[best].sqrt()
    for (name, adapter), part in zip(adapters.items(), weighted.split([len(roots[name]) for name in adapters]), strict=True):
        assert isinstance(adapter, FusionAdapter)
        linear = roots[name] @ part
        adapter.set_linear(linear.T, -means[name] @ linear)


class _Inputs:
    """The inputs of an adapter's head, in double precision, for items that may repeat. Of latents in half precision, a part
    at a time, since all of them would take many times the memory of the latents.

    Arguments:
        adapter: the adapter.
        latents: (m, d).
        ids: (n,) indices into them.
    """

    def __init__(self, adapter: Adapter, latents: Tensor, ids: Tensor) -> None:
        assert isinstance(adapter, FusionAdapter)
        self._adapter, self._latents, self._ids = adapter, latents, ids

    def parts(self) -> list[slice]:
        """Consecutive parts of the n items: a single one unless latents are in half precision."""
        size = PART_ROWS if self._latents.dtype == HALF else max(1, len(self._ids))
        return [slice(start, start + size) for start in range(0, max(1, len(self._ids)), size)]

    def part(self, at: slice) -> Tensor:
        """Inputs of some items."""
        return self._adapter.normalised(widened(self._latents[self._ids[at]])).double()

    def mean(self) -> Tensor:
        """(d,)"""
        return _sum(self.part(at).sum(0) for at in self.parts()) / len(self._ids)

    def covariance(self, mean: Tensor) -> Tensor:
        """(d, d)"""

        def product(inputs: Tensor) -> Tensor:
            centred = inputs - mean
            return centred.T @ centred

        return _sum(product(self.part(at)) for at in self.parts()) / len(self._ids)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def _inverse_root(covariance: Tensor, ridge: float) -> Tensor:
    """(C + ridge * mean eigenvalue * I) ** -1/2 of a covariance C, (d, d)."""
    if not covariance.isfinite().all():
        raise BridgekitError(
            "training diverged before it began: the covariance of the latents is not finite",
            remedy="look for extreme latents (bridgekit check), and remove their rows",
        )
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * (values.clamp_min(0) + ridge * values.mean().clamp_min(1e-12)).rsqrt() @ vectors.T
    return root
