"""Symmetric InfoNCE that never holds the n x n similarity matrix, on one process or shared by several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bridgekit.fusion.distributed import Shares, gather_rows, largest_over_processes, sum_over_processes

#: Similarities are made in square tiles of this side: small enough for a processor's cache, large enough to fill a GPU.
TILE = {"cpu": 2_048, "cuda": 8_192}
#: The kinds of device on which what is done to a tile is compiled.
FUSED_ON = {"cuda"}
#: Where no similarity times scale exceeds this, its exponential serves as it is; beyond, maxima are taken off first.
SAFE_EXPONENT = {torch.float32: 70.0, torch.float64: 600.0}


def info_nce(
    x: Tensor, y: Tensor, scale: Tensor, keys: Tensor | None = None, *, tile: int | None = None, shares: Shares | None = None
) -> Tensor:
    """Symmetric InfoNCE: the mean of the cross-entropies of picking y's row from x's and x's row from y's.

    Arguments:
        x: (n, d) embeddings, usually of unit length. Products run in their dtype; sums are float32 (float64 for float64).
        y: (n, d); row i belongs to row i of x.
        scale: a scalar, 1 / temperature.
        keys: (n, k, r) integers: k columns, each with the r keys of the rows that were mixed into row n. Two rows that
            share a key of one column (and it is not negative) are related: they belong together as well and are left out
            of each other's negatives.
        tile: the side of the square of similarities that is held at once; the default suits the device. Memory is a few
            times its square, plus O(n d).
        shares: how rows are shared among processes, if they are: x and y are then this process's own, in the order of the
            processes, and keys those of all. Every process gets the whole loss and its own part of the gradients: those of
            its rows, whole, and for `scale` a summand.

    Returns:
        a scalar, with gradients for x, y and scale. Works inside `torch.compile`, as one opaque operator.

    Source: InfoNCE as in CLIP (arXiv 2103.00020). The tiling follows Inf-CL (arXiv 2410.17243): one product serves both
    directions, row and column log-sum-exp are kept, and the backward pass makes the similarities again.
    """
    tile = tile or TILE.get(x.device.type, TILE["cpu"])
    everyone = y if shares is None else gather_rows(y, shares)
    first = 0 if shares is None else shares.first
    loss: Tensor = _forward_op(x, everyone, scale, keys, tile, first, shares is not None)[0]
    return loss


@torch.library.custom_op("bridgekit::info_nce", mutates_args=())
def _forward_op(
    x: Tensor, y: Tensor, scale: Tensor, keys: Tensor | None, tile: int, first: int, shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the log-sum-exp of this process's rows, (m,), and of all columns, (n,).

    Arguments:
        x: this process's rows, (m, d).
        y: those of all, (n, d).
        first: the number of the first row of x.
        shared: whether other processes have the other rows.
    """
    bounded = _is_bounded(x, y, scale, shared)
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
    own_pairs = (x.to(dtype) * y[first : first + len(x)].to(dtype)).sum(1) * scale
    # A process knows its rows' part; the columns, once they are summed, all know.
    part = (rows / 2 - own_pairs).sum() + columns[first : first + len(x)].sum() / 2
    if shared:
        part = sum_over_processes(part)
    return part / len(y), rows, columns


@_forward_op.register_fake
def _(
    x: Tensor, y: Tensor, scale: Tensor, keys: Tensor | None, tile: int, first: int, shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _sum_dtype(x)
    return x.new_empty((), dtype=dtype), x.new_empty(len(x), dtype=dtype), x.new_empty(len(y), dtype=dtype)


@torch.library.custom_op("bridgekit::info_nce_backward", mutates_args=())
def _backward_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    keys: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    upstream: Tensor,
    tile: int,
    first: int,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, for all of y as far as x's rows give any, and for scale likewise."""
    dtype = rows.dtype
    bounded = _is_bounded(x, y, scale, shared)
    grad_x, grad_y = (torch.zeros(of.shape, dtype=dtype, device=of.device) for of in (x, y))
    side = min(tile, len(x)), min(tile, len(y))
    spare = torch.empty(side[0] * side[1], dtype=dtype, device=x.device)
    for top, left, logits in _tiles(x, y, scale, keys, tile, first):
        weights = spare[: logits.numel()].view_as(logits)
        _fused(_weigh, x)(logits, scale, rows[top], columns[left], weights, bounded)
        cast = weights.to(x.dtype)
        _add_product(grad_x[top], cast, y[left])
        _add_product(grad_y[left], cast.T, x[top])
    # What a pair's own similarity has less.
    mine = slice(first, first + len(x))
    grad_x -= y[mine]
    grad_y[mine] -= x
    grad_scale = (grad_x * x).sum()
    factor = upstream / len(y)
    grad_x *= factor * scale
    grad_y *= factor * scale
    return grad_x.to(x.dtype), grad_y.to(y.dtype), (grad_scale * factor).to(scale.dtype)


@_backward_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    keys: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    upstream: Tensor,
    tile: int,
    first: int,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(scale)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, scale, keys, *ctx.rest = inputs
    ctx.save_for_backward(x, y, scale, keys, *output[1:])


def _backward(ctx: Any, upstream: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward_op(*ctx.saved_tensors, upstream, *ctx.rest), None, None, None, None)


_forward_op.register_autograd(_backward, setup_context=_keep)


def _take_in(logits: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, bounded: bool) -> None:
    """Add a tile to its rows' and columns' sums of exponentials, or to the logarithms of these. Spoils the tile."""
    logits.mul_(scale)
    if bounded:
        logits.exp_()
        rows.add_(logits.sum(1))
        columns.add_(logits.sum(0))
    else:
        rows.copy_(torch.logaddexp(rows, logits.logsumexp(1)))
        columns.copy_(torch.logaddexp(columns, logits.logsumexp(0)))


def _weigh(logits: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, out: Tensor, bounded: bool) -> None:
    """The mean of the two directions' softmax, from a tile and its rows' and columns' log-sum-exp. Spoils the tile."""
    logits.mul_(scale)
    if bounded:  # one exponential a similarity, where the general way takes two
        torch.add((-rows).exp()[:, None], (-columns).exp(), out=out)
        out.mul_(logits.exp_())
    else:
        torch.sub(logits, rows[:, None], out=out).exp_()
        out.add_(logits.sub_(columns).exp_())
    out.div_(2)


_Tiled = Callable[..., None]


def _fused(work: _Tiled, x: Tensor) -> _Tiled:
    """On a GPU a tile's passes are compiled into few kernels. On a CPU the tile lies in the cache, and passes cost little."""
    return _compiled(work) if x.device.type in FUSED_ON else work


@cache
def _compiled(work: _Tiled) -> _Tiled:
    return torch.compile(work)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_bounded(x: Tensor, y: Tensor, scale: Tensor, shared: bool) -> bool:
    """Whether exponentials of all similarities, and sums of them, keep within the number format as they are."""
    longest = torch.linalg.vector_norm(x, dim=1).max() if len(x) else x.new_zeros(())
    most = longest * torch.linalg.vector_norm(y, dim=1).max() * scale.abs()
    return bool((largest_over_processes(most) if shared else most) < SAFE_EXPONENT[_sum_dtype(x)])


def _tiles(
    x: Tensor, y: Tensor, scale: Tensor, keys: Tensor | None, tile: int, first: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and similarities (without scale) of each tile, those of related rows but the pair itself at -inf.

    The similarities lie in one buffer that every tile uses again: fresh memory costs the CPU more than what is done with it.
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
    """Those columns of (n, k) keys that say something that no other column says.

    Where all rows that share a key of one column share one of another too (clips of one file and their class), the first
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
    """Which rows share a key, by sorting: a tile is told its own cells, and nothing of the size n x n is ever made."""

    def __init__(self, keys: Tensor) -> None:
        self.n = len(keys)
        self.columns = []
        for column in keys.unbind(1):
            numbers = torch.unique(column, return_inverse=True)[1].view_as(column)  # small enough to be multiplied by n
            numbers[column < 0] = -1
            owners = torch.arange(self.n, device=keys.device)[:, None].expand_as(column)
            there = numbers >= 0
            # Sorted by key and then by row: the rows of a key within a tile's columns are one run.
            runs = (numbers[there] * self.n + owners[there]).sort().values
            self.columns.append((numbers, runs))

    def cells(self, rows: slice, columns: slice, first: int) -> tuple[Tensor, Tensor]:
        """Row and column, within a tile, of each pair of related rows but the pairs themselves. Some may come twice."""
        found_rows, found_columns = [], []
        for numbers, runs in self.columns:
            asked = numbers[first + rows.start : first + rows.stop]
            row = torch.arange(len(asked), device=asked.device)[:, None].expand_as(asked)[asked >= 0]
            key = asked[asked >= 0] * self.n
            begin = torch.searchsorted(runs, key + columns.start)
            count = torch.searchsorted(runs, key + columns.stop) - begin
            row, begin, key = (each.repeat_interleave(count) for each in (row, begin, key))
            step = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count).repeat_interleave(count)
            column = runs[begin + step] - key
            other = column != row + first + rows.start
            found_rows.append(row[other])
            found_columns.append(column[other] - columns.start)
        return torch.cat(found_rows), torch.cat(found_columns)
