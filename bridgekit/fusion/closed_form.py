"""The best linear adapters, in closed form: a method of its own, and what training starts from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
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


def evenly_spread(n: int, most: int) -> Tensor:
    """(most,) indices below n, evenly spread; n is at least `most`."""
    return torch.arange(most) * n // most


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
    chosen = evenly_spread(n, most)
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


class ClosedForm:
    """The regularised canonical correlation analysis of training latents, for any strength of regularisation.

    On a few thousand pairs, a well-regularised linear map is hard to beat. What is costly is computed once for all strengths.

    Arguments:
        adapters: two or more, standardised. If some are fixed, the others become ridge regressions onto those.
        latents: modality to its distinct items' latents, (m_modality, d_modality).
        rows: modality to n indices into its latents, one per training row; negative if missing.
        fixed: the modalities whose adapters stay as they are.

    Raises:
        BridgekitError: latents so large that their covariance is not finite.

    Source: Hotelling, Relations between two sets of variates, 1936; regularised as in Vinod, Canonical ridge, 1976; for more
    than two sets the sum of correlations as in Kettenring, Canonical analysis of several sets of variables, 1971, which is
    Hotelling's for two. Two sets without a row in common count as uncorrelated and are connected through the others. Canonical
    directions are weighted by the square root of their correlation, so that cosine similarity weights directions by how much
    the sets share them.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        latents: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
        fixed: Collection[str] = (),
    ) -> None:
        self._adapters, self._latents, self._rows, self._fixed = adapters, latents, rows, fixed
        self._spectra: dict[str, _Spectrum] = {}
        self._crosses: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def set_adapters(self, ridge: float) -> None:
        """Set the adapters to the solution.

        Residual blocks become the identity (their last layers are zeroed) and the head is set to the linear map.

        Arguments:
            ridge: added to each covariance's diagonal, in units of its mean eigenvalue.
        """
        if not self._fixed:
            self._correlate(ridge)
            return
        for name, partners in joining_order(self._fixed, self._rows):
            self._regress(name, partners, ridge)

    def _regress(self, name: str, partners: list[str], ridge: float) -> None:
        """Ridge regression of one modality onto the embeddings of its items' partners."""
        adapter = self._adapters[name]
        assert isinstance(adapter, FusionAdapter)
        ids, targets = [], []
        for partner in partners:
            both = (self._rows[name] >= 0) & (self._rows[partner] >= 0)
            ids.append(self._rows[name][both])
            targets.append(project(self._adapters[partner].eval(), self._latents[partner])[self._rows[partner][both]])
        x, y = _Inputs(adapter, self._latents[name], torch.cat(ids)), torch.cat(targets).double()
        spectrum, shift = self._spectrum(name, x), y.mean(0)
        cross = _sum((x.part(at) - spectrum.mean).T @ (y[at] - shift) for at in x.parts()) / len(y)
        shrunk = spectrum.scales(ridge)[:, None] ** 2 * (spectrum.vectors.T @ cross)
        linear = spectrum.vectors @ shrunk
        adapter.set_linear(linear.T, shift - spectrum.mean @ linear)

    def _correlate(self, ridge: float) -> None:
        """The directions in which whitened sets correlate most, summed over all pairs of sets."""
        names = list(self._adapters)
        spectra = {name: self._spectrum(name, self._inputs(name, self._rows[name] >= 0)) for name in names}
        scales = {name: spectrum.scales(ridge) for name, spectrum in spectra.items()}
        blocks = {(a, b): scales[a][:, None] * self._cross(a, b) * scales[b] for a, b in combinations(names, 2)}
        width = next(iter(self._adapters.values())).shared_dim
        for name, directions in _shared_directions(names, blocks, width).items():
            adapter = self._adapters[name]
            assert isinstance(adapter, FusionAdapter)
            linear = spectra[name].vectors @ (scales[name][:, None] * directions)
            adapter.set_linear(linear.T, -spectra[name].mean @ linear)

    def _inputs(self, name: str, which: Tensor) -> _Inputs:
        return _Inputs(self._adapters[name], self._latents[name], self._rows[name][which])

    def _spectrum(self, name: str, inputs: _Inputs) -> _Spectrum:
        if name not in self._spectra:
            self._spectra[name] = inputs.spectrum()
        return self._spectra[name]

    def _cross(self, a: str, b: str) -> Tensor:
        """The covariance of two sets in their eigenvectors, (r_a, r_b), over the rows that have both; 0 if there are none."""
        if (a, b) not in self._crosses:
            both = (self._rows[a] >= 0) & (self._rows[b] >= 0)
            x, y = self._inputs(a, both), self._inputs(b, both)
            one, other = self._spectra[a], self._spectra[b]
            product = _sum((x.part(at) - one.mean).T @ (y.part(at) - other.mean) for at in x.parts())
            self._crosses[a, b] = one.vectors.T @ (product / both.sum().clamp_min(1)) @ other.vectors
        return self._crosses[a, b]


def _shared_directions(names: list[str], blocks: Mapping[tuple[str, str], Tensor], width: int) -> dict[str, Tensor]:
    """The top of the eigenproblem whose matrix has the correlations of each pair of whitened sets as its blocks.

    Arguments:
        names: of the sets.
        blocks: for each pair of sets the correlations of their whitened coordinates, (r_a, r_b).
        width: the maximum number of directions.

    Returns:
        name to (r, k): directions times the square root of their correlation. Only positive eigenvalues are correlations.
    """
    if len(names) == 2:  # the same, from the singular vectors of the only block
        left, values, right = torch.linalg.svd(blocks[names[0], names[1]], full_matrices=False)
        count = min(width, int((values > 1e-9 * values[:1]).sum()))
        weights = values[:count].sqrt()
        return {names[0]: left[:, :count] * weights, names[1]: right[:count].T * weights}
    sizes = {a: len(block) for (a, _), block in blocks.items()} | {b: block.shape[1] for (_, b), block in blocks.items()}

    def block(a: str, b: str) -> Tensor:
        if a == b:
            return torch.zeros(sizes[a], sizes[a], dtype=torch.float64)
        return blocks[a, b] if (a, b) in blocks else blocks[b, a].T

    values, vectors = torch.linalg.eigh(torch.cat([torch.cat([block(a, b) for b in names], 1) for a in names]))
    # Eigenvalues are in ascending order.
    best = torch.arange(len(values) - 1, -1, -1)[: min(width, int((values > 1e-9 * values[-1]).sum()))]
    weighted = vectors[:, best] * values[best].sqrt()
    return dict(zip(names, weighted.split([sizes[name] for name in names]), strict=True))


@dataclass(frozen=True)
class _Spectrum:
    """The mean and the covariance of a set's inputs, the latter as eigenvalues and eigenvectors.

    Arguments:
        mean: (d,).
        values: (r,) those above 0.
        vectors: (d, r).
        scale: the mean of all d eigenvalues.
    """

    mean: Tensor
    values: Tensor
    vectors: Tensor
    scale: Tensor

    def scales(self, ridge: float) -> Tensor:
        """(r,) factors that whiten the coordinates: (covariance + ridge * scale * I) ** -1/2."""
        return (self.values + ridge * self.scale).rsqrt()


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

    def spectrum(self) -> _Spectrum:
        """The mean and covariance of these items.

        Raises:
            BridgekitError: latents so large that the covariance is not finite.
        """
        n, parts = len(self._ids), self.parts()
        mean = _sum(self.part(at).sum(0) for at in parts) / n
        whole = self.part(parts[0]) - mean if len(parts) == 1 else None
        fewer = whole is not None and len(whole) < len(mean)
        if whole is not None and fewer:  # the same eigenvalues, of a smaller matrix
            values, vectors = _eigen(whole @ whole.T / n)
            vectors = whole.T @ vectors / (values * n).sqrt()
        else:
            values, vectors = _eigen(_sum((self.part(at) - mean).T @ (self.part(at) - mean) for at in parts) / n)
        return _Spectrum(mean, values, vectors, (values.sum() / len(mean)).clamp_min(1e-12))


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues above 0 and their eigenvectors, of a covariance or a matrix of inner products."""
    if not matrix.isfinite().all():
        raise BridgekitError(
            "training diverged before it began: the covariance of the latents is not finite",
            remedy="look for extreme latents (bridgekit check), and remove their rows",
        )
    values, vectors = torch.linalg.eigh(matrix)
    positive = values > 1e-12 * values[-1].clamp_min(1e-12)
    return values[positive], vectors[:, positive]
