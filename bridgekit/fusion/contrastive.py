"""Symmetric InfoNCE that never holds the n x n similarity matrix, on one process or shared by several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bridgekit.fusion.distributed import Shares, gather_rows, largest_over_processes, sum_over_processes

#: Similarities are computed in square tiles of this side: small enough for a CPU's cache, large enough to fill a GPU.
TILE = {"cpu": 2_048, "cuda": 8_192}
#: The kinds of device on which the passes over a tile are compiled.
FUSED_ON = {"cuda"}
#: Up to this logit exponentials and their sums cannot overflow; above it, maxima are subtracted first.
SAFE_EXPONENT = {torch.float32: 70.0, torch.float64: 600.0}


def info_nce(
    x: Tensor, y: Tensor, scale: Tensor, keys: Tensor | None = None, *, tile: int | None = None, shares: Shares | None = None
) -> Tensor:
    """Symmetric InfoNCE: the mean of the cross-entropies of picking y's row from x's and x's row from y's.

    Arguments:
        x: (n, d) embeddings, usually of unit length. Products run in their dtype; sums are float32 (float64 for float64).
        y: (n, d); row i belongs to row i of x.
        scale: a scalar, 1 / temperature.
        keys: (n, k, r) integers: k columns, each with the keys of the r rows that were mixed into a row. Two rows that share
            a non-negative key in a column are related, and neither is a negative of the other.
        tile: side of the square tiles of similarities; the default depends on the device. Memory is a few times its square,
            plus O(n d).
        shares: how rows are shared among processes, if they are: x and y are then this process's own rows, in the order of
            the processes, and `keys` those of all rows. Every process gets the loss of all rows, the gradients of its own rows,
            and its summand of the gradient of `scale`.

    Returns:
        a scalar, with gradients for x, y and scale.

    Source: InfoNCE as in CLIP (arXiv 2103.00020). The tiling follows Inf-CL (arXiv 2410.17243): one product serves both
    directions, row and column log-sum-exp are kept, and the backward pass recomputes the similarities.
    """
    tile = tile or TILE.get(x.device.type, TILE["cpu"])
    everyone = y if shares is None else gather_rows(y, shares)
    first = 0 if shares is None else shares.first
    loss: Tensor = _TiledInfoNCE.apply(x, everyone, scale, keys, tile, first, shares is not None)  # type: ignore[no-untyped-call]
    return loss


class _TiledInfoNCE(torch.autograd.Function):
    """The loss of this process's rows x, (m, d), against all rows y, (n, d). It keeps O(n) numbers for the backward pass.

    `first` is the number of x's first row among all; `shared` whether other processes have the other rows.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, keys: Tensor | None, tile: int, first: int, shared: bool
    ) -> Tensor:
        ctx.tile, ctx.first = tile, first
        ctx.bounded = bounded = _is_bounded(x, y, scale, shared)
        dtype = _sum_dtype(x)
        start = 0.0 if bounded else -torch.inf
        rows = torch.full((len(x),), start, dtype=dtype, device=x.device)
        columns = torch.full((len(y),), start, dtype=dtype, device=x.device)
        for top, left, logits in _tiles(x, y, scale, keys, tile, first):
            _fused(_take_in, x)(logits, scale, rows[top], columns[left], bounded)
        if shared:
            columns = sum_over_processes(columns, exponents=not bounded)
        if bounded:
            rows.log_()
            columns.log_()
        ctx.save_for_backward(x, y, scale, keys, rows, columns)
        own_pairs = (x.to(dtype) * y[first : first + len(x)].to(dtype)).sum(1) * scale
        # A process knows its own rows' part of the loss; after the sum over processes, all know the columns' sums.
        part = (rows / 2 - own_pairs).sum() + columns[first : first + len(x)].sum() / 2
        if shared:
            part = sum_over_processes(part)
        return part / len(y)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for x, and the contribution of x's rows to those for y and scale."""
        x, y, scale, keys, rows, columns = ctx.saved_tensors
        dtype = rows.dtype
        grad_x, grad_y = (torch.zeros(of.shape, dtype=dtype, device=of.device) for of in (x, y))
        room = torch.empty(min(ctx.tile, len(x)) * min(ctx.tile, len(y)), dtype=dtype, device=x.device)
        for top, left, logits in _tiles(x, y, scale, keys, ctx.tile, ctx.first):
            weights = room[: logits.numel()].view_as(logits)
            _fused(_weigh, x)(logits, scale, rows[top], columns[left], weights, ctx.bounded)
            cast = weights.to(x.dtype)
            _add_product(grad_x[top], cast, y[left])
            _add_product(grad_y[left], cast.T, x[top])
        # The loss subtracts each pair's own similarity.
        own = slice(ctx.first, ctx.first + len(x))
        grad_x -= y[own]
        grad_y[own] -= x
        grad_scale = (grad_x * x).sum()
        factor = upstream[0] / len(y)
        grad_x *= factor * scale
        grad_y *= factor * scale
        return grad_x.to(x.dtype), grad_y.to(y.dtype), (grad_scale * factor).to(scale.dtype), None, None, None, None


def _take_in(logits: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, bounded: bool) -> None:
    """Add a tile to the sums of exponentials of its rows and columns, or to their logarithms. Overwrites the tile."""
    logits.mul_(scale)
    if bounded:
        logits.exp_()
        rows.add_(logits.sum(1))
        columns.add_(logits.sum(0))
    else:
        rows.copy_(torch.logaddexp(rows, logits.logsumexp(1)))
        columns.copy_(torch.logaddexp(columns, logits.logsumexp(0)))


def _weigh(logits: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, out: Tensor, bounded: bool) -> None:
    """The mean of the two directions' softmax, from a tile and the log-sum-exp of its rows and columns. Overwrites the tile."""
    logits.mul_(scale)
    if bounded:  # one exponential per similarity; the general case takes two
        torch.add((-rows).exp()[:, None], (-columns).exp(), out=out)
        out.mul_(logits.exp_())
    else:
        torch.sub(logits, rows[:, None], out=out).exp_()
        out.add_(logits.sub_(columns).exp_())
    out.div_(2)


_Tiled = Callable[..., None]


def _fused(work: _Tiled, x: Tensor) -> _Tiled:
    """On a GPU, the passes over a tile are compiled into a few kernels. On a CPU, the tile is cached and passes are cheap."""
    return _compiled(work) if x.device.type in FUSED_ON else work


@cache
def _compiled(work: _Tiled) -> _Tiled:
    return torch.compile(work)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_bounded(x: Tensor, y: Tensor, scale: Tensor, shared: bool) -> bool:
    """Whether the exponentials of all logits, and their sums, are finite without subtracting maxima first."""
    longest = torch.linalg.vector_norm(x, dim=1).max() if len(x) else x.new_zeros(())
    most = longest * torch.linalg.vector_norm(y, dim=1).max() * scale.abs()
    return bool((largest_over_processes(most) if shared else most) < SAFE_EXPONENT[_sum_dtype(x)])


def _tiles(
    x: Tensor, y: Tensor, scale: Tensor, keys: Tensor | None, tile: int, first: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and similarities (not yet scaled) of each tile; -inf for related rows, except a pair's own similarity.

    All tiles share one buffer: allocating fresh memory would cost the CPU more than the arithmetic does.
    """
    related = None if keys is None else _Related(keys)
    room = torch.empty(min(tile, len(x)) * min(tile, len(y)), dtype=_sum_dtype(x), device=x.device)
    for top in range(0, len(x), tile):
        rows = slice(top, min(top + tile, len(x)))
        for left in range(0, len(y), tile):
            columns = slice(left, min(left + tile, len(y)))
            height, width = rows.stop - rows.start, columns.stop - columns.start
            logits = room[: height * width].view(height, width)
            _product(x[rows], y[columns].T, logits)
            if related is not None:
                logits[related.cells(rows, columns, first)] = -torch.inf
            yield rows, columns, logits


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b, summed in out's dtype where the device can."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cuda":
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == to.dtype:
        to.addmm_(a, b)
    elif a.device.type == "cuda":
        to += torch.mm(a, b, out_dtype=to.dtype)
    else:
        to += a @ b


def needed_keys(keys: Tensor) -> Tensor:
    """The columns of (n, k) keys that no other column implies.

    If all rows that share a key in one column also share one in another (clips of one file, and their class), the first
    column adds no relation.
    """
    kept = list(range(keys.shape[1]))
    for column in range(keys.shape[1]):
        if any(_implies(keys[:, column], keys[:, other]) for other in kept if other != column):
            kept.remove(column)
    return keys[:, kept]


def _implies(narrow: Tensor, wide: Tensor) -> bool:
    there = narrow >= 0
    narrow, wide = narrow[there], wide[there]
    if not (wide >= 0).all():
        return False
    narrow, wide = (torch.unique(each, return_inverse=True)[1] for each in (narrow, wide))
    both = narrow * (len(wide) + 1) + wide
    return len(torch.unique(both)) == len(torch.unique(narrow))


class _Related:
    """Which rows share a key, by sorting: each tile looks up its own cells, and nothing of size n x n is allocated."""

    def __init__(self, keys: Tensor) -> None:
        self.n = len(keys)
        self.columns = []
        for column in keys.unbind(1):
            numbers = torch.unique(column, return_inverse=True)[1].view_as(column)  # small enough to multiply by n
            numbers[column < 0] = -1
            owners = torch.arange(self.n, device=keys.device)[:, None].expand_as(column)
            there = numbers >= 0
            # Sorted by key, then by row: the rows of one key that fall into a tile's columns are one run.
            runs = (numbers[there] * self.n + owners[there]).sort().values
            self.columns.append((numbers, runs))

    def cells(self, rows: slice, columns: slice, first: int) -> tuple[Tensor, Tensor]:
        """Row and column, within a tile, of all related rows except each row with itself. May contain duplicates."""
        found_rows, found_columns = [], []
        for numbers, runs in self.columns:
            wanted = numbers[first + rows.start : first + rows.stop]
            row = torch.arange(len(wanted), device=wanted.device)[:, None].expand_as(wanted)[wanted >= 0]
            key = wanted[wanted >= 0] * self.n
            begin = torch.searchsorted(runs, key + columns.start)
            count = torch.searchsorted(runs, key + columns.stop) - begin
            row, begin, key = (each.repeat_interleave(count) for each in (row, begin, key))
            step = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count).repeat_interleave(count)
            column = runs[begin + step] - key
            other = column != row + first + rows.start
            found_rows.append(row[other])
            found_columns.append(column[other] - columns.start)
        return torch.cat(found_rows), torch.cat(found_columns)
