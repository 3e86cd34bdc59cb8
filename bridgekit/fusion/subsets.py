"""Which pairs to train on: a diverse subset of latents by greedy k-DPP, or a uniform draw."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn brings it

from bridgekit.errors import BridgekitError
from bridgekit.progress import Report, silent

if TYPE_CHECKING:
    from torch import Tensor


METHODS = ("k-dpp", "uniform")
#: The least gain that counts; the largest is 4. With less, an item lies in the span of those chosen, as far as float32 latents
#: can tell: two items whose directions differ by a few parts in a million are one.
NOTHING = 1e-10
#: Gains are compared to this many decimals, so that rounding does not decide between items that are equally good.
DECIMALS = 10
#: Items whose gains are kept exact while others have upper bounds. Each costs a product per item chosen.
FRONT = 512
#: Items whose bounds are brought up to date together. Fewer make products slow, more are looked at in vain.
BATCH = 2_048
#: Items of a batch that a thread works on at a time. Their bounds are of about one age, so that little is worked out in vain.
TILE = 128


def choose_subset(
    latents: Tensor | NDArray[Any], k: int, *, method: str = "k-dpp", seed: int = 0, report: Report = silent
) -> NDArray[np.int64]:
    """Choose k of n items by their latents.

    `k-dpp` takes, one by one, the item that most increases the determinant of the kernel L_ij = (cos(x_i, x_j) + 1)^2 of those
    chosen: greedy MAP inference for a k-DPP, with the kernel of FuseMix (Vouitsis et al., CVPR 2024, arXiv 2312.10144). Of
    equally good items the first is taken. Where no item adds anything any more (d-dimensional latents leave nothing after
    (d + 1)(d + 2) / 2 items), the others follow in order; those with the same latents as an earlier one come last.

    Arguments:
        latents: (n, d) finite numbers, in the CPU's memory. Their lengths do not matter; a zero vector has cosine 0 with all.
        k: how many; where there are no more than that, all are chosen.
        method: `k-dpp` or `uniform`, a draw without replacement.
        seed: of the draw. `k-dpp` draws nothing.
        report: progress.

    Returns:
        (min(n, k),) distinct indices in the order in which they were chosen. Where k-dpp has no more than k distinct items to
        choose among, it does not rank them: they stand in their own order.

    Raises:
        BridgekitError: no such method, a negative k, or latents that are no matrix, or that k-dpp finds not to be finite.

    `k-dpp` holds k^2 numbers beside the latents, never n^2 or n k: to choose 5,000 of 200,000 items takes about 0.4 GB.
    """
    check_choice(method, k)
    x = np.asarray(latents)
    if x.ndim != 2:
        raise BridgekitError(f"latents must be a matrix, a row an item, not of shape {x.shape}")
    if method == "uniform":
        return np.random.default_rng(seed).permutation(len(x))[:k]
    copies = _copies(x)
    chosen = np.flatnonzero(copies == 0)
    if len(chosen) > k:
        chosen = greedy_k_dpp(x, k, chosen, report).items
    others = np.argsort(copies, kind="stable")
    others = others[~np.isin(others, chosen)]
    return np.concatenate([chosen, others])[:k]


def check_choice(method: str, k: int) -> None:
    """Raise BridgekitError for an unknown method or a count below 1."""
    if method not in METHODS:
        raise BridgekitError(f"there is no method {method!r}", remedy=f"use one of {', '.join(METHODS)}")
    if k < 0:
        raise BridgekitError(f"{k} items cannot be chosen", remedy="give a number that is not negative")


def _copies(x: NDArray[Any]) -> NDArray[np.int64]:
    """How many earlier items have the same content, for each of n: 0 for the first."""
    seen: dict[bytes, int] = {}
    copies = np.empty(len(x), np.int64)
    for item, row in enumerate(x):
        digest = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
        copies[item] = seen[digest] = seen.get(digest, -1) + 1
    return copies


@dataclass(frozen=True)
class Greedy:
    """What the greedy search found.

    Arguments:
        items: (m,) the chosen items in order; fewer than were wanted where the others would make the determinant zero.
        gains: (m,) the factor by which each increased the determinant of the kernel of those chosen.
        evaluations: how many gains were worked out for items outside the front, where plain greedy works out n a step.
    """

    items: NDArray[np.int64]
    gains: NDArray[np.float64]
    evaluations: int


def greedy_k_dpp(x: NDArray[Any], k: int, items: NDArray[np.int64] | None = None, report: Report = silent) -> Greedy:
    """Greedy MAP inference for a k-DPP with the kernel (cosine + 1)^2, exact and lazy.

    An item's gain is what its kernel leaves after a projection onto those chosen: L_ii - |v_i|^2, with v_i = C^-1 L_Si for the
    Cholesky factor C of L_SS (Chen et al., 2018, arXiv 1709.05135). Gains only ever fall, so an old gain is an upper bound
    (Minoux, 1978; for DPPs Hemmi et al., 2022, arXiv 2206.05947), and an item needs a look only when its bound comes up to
    the best gain. Here the items with the largest gains, the front, keep their v_i, which grow with each choice. Of all others
    only the bound is kept, and how many had been chosen then. A bound is brought up to date, a batch of items at a time, by
    those rows of C^-1 that are new since: two matrix products, in float64.

    Arguments:
        x: (n, d) latents.
        k: how many to choose.
        items: candidates in ascending order; by default all.
        report: progress.

    Returns:
        the chosen. Where gains are equal the lowest index comes first.

    Raises:
        BridgekitError: latents that are not finite.
    """
    items = np.arange(len(x)) if items is None else items
    k = min(k, len(items))
    # Threads of our own, a tile each, and none inside a product: those would wait for each other at every small one, and the
    # number of cores would decide how sums are rounded.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        search = _Search(x, items, k, threads)
        while len(search.chosen) < k:
            search.renew()
            if not search.pick():
                break
            report("choosing", len(search.chosen), k)
    return Greedy(search.items[search.chosen], np.array(search.chosen_gains), search.evaluations)


class _Search:
    """The state of `greedy_k_dpp`. Candidates are counted from 0 here, in the order of `items`.

    Arguments:
        x: (n, d) latents.
        items: (m,) candidates among them.
        k: how many to choose at most; no more than m.
        threads: to work in.
    """

    def __init__(self, x: NDArray[Any], items: NDArray[np.int64], k: int, threads: ThreadPoolExecutor) -> None:
        size = min(FRONT, len(items))
        self.x, self.items, self.threads = x, items, threads
        squares = np.einsum("ij,ij->i", x, x, dtype=np.float64)[items]
        if not np.isfinite(squares).all():
            raise BridgekitError("latents are not finite numbers", where=f"item {items[np.argmin(np.isfinite(squares))]}")
        #: What each latent is multiplied by to have length 1; 0 for a zero vector.
        self.scale = np.divide(1, np.sqrt(squares), out=np.zeros(len(items)), where=squares > 0)
        #: The kernel's diagonal. Set, not computed: an item must have cosine 1 with itself to the last bit.
        self.diagonal = np.where(squares > 0, 4.0, 1.0)
        #: Upper bounds of gains, and how many had been chosen when they were gains; -inf for the front's and the chosen.
        self.bounds = self.diagonal.copy()
        self.since = np.zeros(len(items), np.int64)
        self.evaluations = 0

        self.chosen: list[int] = []
        self.chosen_gains: list[float] = []
        self.points = np.empty((k, x.shape[1]))
        #: C^-1, as far as `inverted`, and the rows of C that came since.
        self.inverse = np.zeros((k, k))
        self.inverted = 0
        self.new_rows: list[NDArray[np.float64]] = []

        #: The front: which candidates (-1: none), their unit vectors, the v_i as rows, and the gains (-inf: none).
        self.front = np.argsort(-self.diagonal, kind="stable")[:size]
        self.front_points = self._unit(self.front)
        self.front_rows = np.zeros((size, k))
        self.front_gains = self.bounds[self.front]
        self.bounds[self.front] = -np.inf

    def renew(self) -> None:
        """Bring bounds up to date until none that is out of date comes up to the best gain of the front."""
        t = len(self.chosen)
        while True:
            # A bound that is equal up to rounding counts: its item may have the lower index.
            bar = max(self.front_gains.max() - 10.0**-DECIMALS, NOTHING)
            stale = np.where(self.since < t, self.bounds, -np.inf)
            if stale.max() < bar:
                return
            # The largest bounds, whether they come up to it or not: the next ones would soon.
            count = min(BATCH, len(stale))
            batch = np.argpartition(stale, -count)[-count:]
            batch = batch[stale[batch] >= NOTHING]
            self._renew(batch[np.argsort(self.since[batch], kind="stable")])

    def _renew(self, batch: NDArray[np.int64]) -> None:
        """Bring the bounds of a batch, ordered by their age, up to date, and let the best of it into the front."""
        self._invert()
        t = len(self.chosen)
        kernel = np.empty((len(batch), t))

        def renew(tile: slice) -> None:
            some = batch[tile]
            kernel[tile] = _kernel(self._unit(some), self.points[:t])
            since = self.since[some]
            rows = kernel[tile] @ self.inverse[since[0] : t, :t].T
            rows[np.arange(since[0], t) < since[:, None]] = 0  # their bounds have these already
            self.bounds[some] -= np.einsum("ij,ij->i", rows, rows)

        self._in_tiles(renew, len(batch))
        self.since[batch] = t
        self.evaluations += len(batch)
        self._admit(batch, kernel)

    def _admit(self, batch: NDArray[np.int64], kernel: NDArray[np.float64]) -> None:
        """Make the front the best of itself and a batch that is up to date; those that leave keep their gains as bounds."""
        t, size = len(self.chosen), len(self.front)
        gains = np.concatenate([self.front_gains, self.bounds[batch]])
        best = np.lexsort((np.concatenate([self.front, batch]), -np.round(gains, DECIMALS)))[:size]
        leaves = self.front >= 0
        leaves[best[best < size]] = False
        self.bounds[self.front[leaves]] = self.front_gains[leaves]
        self.since[self.front[leaves]] = t
        self.front[leaves], self.front_gains[leaves] = -1, -np.inf

        comes = best[best >= size] - size
        comes = comes[self.bounds[batch[comes]] >= NOTHING]
        slots = np.flatnonzero(self.front < 0)[: len(comes)]
        self.front[slots] = batch[comes]
        self.front_points[slots] = self._unit(batch[comes])

        def enter(tile: slice) -> None:
            rows = kernel[comes[tile]] @ self.inverse[:t, :t].T
            self.front_rows[slots[tile], :t] = rows
            self.front_gains[slots[tile]] = self.diagonal[batch[comes[tile]]] - np.einsum("ij,ij->i", rows, rows)

        self._in_tiles(enter, len(comes))
        self.bounds[batch[comes]] = -np.inf

    def _in_tiles(self, work: Callable[[slice], None], count: int) -> None:
        list(self.threads.map(work, [slice(start, start + TILE) for start in range(0, count, TILE)]))

    def pick(self) -> bool:
        """Choose the front's best, and take its share out of the others' gains. False where it has none to give."""
        t = len(self.chosen)
        rounded = np.round(self.front_gains, DECIMALS)
        tied = np.flatnonzero(rounded == rounded.max())
        slot = tied[np.argmin(self.front[tied])]
        gain = float(self.front_gains[slot])
        if gain < NOTHING:
            return False
        row, pivot = self.front_rows[slot, :t].copy(), np.sqrt(gain)
        self.points[t] = self.front_points[slot]
        self.new_rows.append(np.append(row, pivot))
        self.chosen.append(int(self.front[slot]))
        self.chosen_gains.append(gain)
        column = (_kernel(self.front_points, self.points[t : t + 1])[:, 0] - self.front_rows[:, :t] @ row) / pivot
        self.front_rows[:, t] = column
        self.front_gains -= column * column
        self.front[slot], self.front_gains[slot] = -1, -np.inf
        return True

    def _invert(self) -> None:
        """Extend C^-1 by the rows of C that are new: block by block, so that it is a matrix product."""
        old, t = self.inverted, len(self.chosen)
        if old == t:
            return
        left = np.stack([row[:old] for row in self.new_rows])
        corner = np.zeros((t - old, t - old))
        for number, row in enumerate(self.new_rows):
            # Row by row, by substitution: the corner is triangular.
            corner[number] = -(row[old:-1] @ corner[:number]) / row[-1]
            corner[number, number] = 1 / row[-1]
        self.inverse[old:t, :old] = -corner @ (left @ self.inverse[:old, :old])
        self.inverse[old:t, old:t] = corner
        self.inverted, self.new_rows = t, []

    def _unit(self, candidates: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(self.x[self.items[candidates]] * self.scale[candidates, None], np.float64)


def _kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """(cosine + 1)^2 between unit vectors, (n, d) and (m, d): (n, m)."""
    kernel = a @ b.T
    kernel += 1
    kernel *= kernel
    return np.asarray(kernel)
