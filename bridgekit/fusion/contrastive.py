"""Symmetric InfoNCE that never holds the n x n similarity matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: A block of similarities holds about this many numbers at a time (64 MiB in float32).
BLOCK_NUMBERS = 16_777_216


def info_nce(x: Tensor, y: Tensor, scale: Tensor, keys: Tensor | None = None, block_numbers: int = BLOCK_NUMBERS) -> Tensor:
    """Symmetric InfoNCE: the mean of the cross-entropies of picking y's row from x's and x's row from y's.

    Arguments:
        x: (n, d) embeddings of unit length.
        y: (n, d); row i belongs to row i of x.
        scale: a scalar, 1 / temperature.
        keys: (n, k, r) integers: k columns, each with the r keys of the rows that were mixed into row n. Two rows that
            share a key of one column (and it is not negative) are related: they belong together as well and are left out
            of each other's negatives.
        block_numbers: how many similarities are held at once. Memory is this plus O(n d).

    Returns:
        a scalar, with gradients for x, y and scale.

    Source: InfoNCE as in CLIP (arXiv 2103.00020). The tiling follows Inf-CL (arXiv 2410.17243): one product serves both
    directions, row and column log-sum-exp are kept, and the backward pass makes the similarities again.
    """
    loss: Tensor = _InfoNCE.apply(x, y, scale, keys, max(1, block_numbers // max(1, len(y))))  # type: ignore[no-untyped-call]
    return loss


def _block(x: Tensor, y: Tensor, scale: Tensor, keys: Tensor | None, start: int, rows: int) -> Tensor:
    """The scaled similarities of x[start : start + rows] with all of y, related ones other than the pair itself at -inf."""
    logits = (x[start : start + rows] @ y.T).float() if x.dtype != torch.float64 else x[start : start + rows] @ y.T
    logits *= scale
    if keys is not None:
        related = related_rows(keys[start : start + rows], keys)
        own = torch.arange(len(logits), device=x.device)
        related[own, own + start] = False
        logits.masked_fill_(related, -torch.inf)
    return logits


def related_rows(some: Tensor, others: Tensor) -> Tensor:
    """(m, k, r) and (n, k, r) keys into an (m, n) boolean matrix: whether two rows share a key that is not negative."""
    related = torch.zeros(len(some), len(others), dtype=torch.bool, device=some.device)
    for column in range(some.shape[1]):
        for left in some[:, column].unbind(-1):
            for right in others[:, column].unbind(-1):
                related |= (left[:, None] == right[None, :]) & (left[:, None] >= 0)
    return related


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, keys: Tensor | None, rows: int) -> Tensor:
        n = len(x)
        row_lse, column_lse = [], torch.tensor(-torch.inf, device=x.device)
        for start in range(0, n, rows):
            logits = _block(x, y, scale, keys, start, rows)
            row_lse.append(logits.logsumexp(1))
            column_lse = torch.logaddexp(column_lse.to(logits.dtype), logits.logsumexp(0))
        rows_lse = torch.cat(row_lse)
        own = (x * y).sum(1).to(rows_lse.dtype) * scale
        ctx.save_for_backward(x, y, scale, keys, rows_lse, column_lse)
        ctx.rows = rows
        return ((rows_lse + column_lse) / 2 - own).mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, keys, row_lse, column_lse = ctx.saved_tensors
        n = len(x)
        # d loss / d own similarity has the -1 of both directions; d loss / d any similarity the two softmax weights.
        grad_x, grad_y = -y.to(row_lse.dtype), -x.to(row_lse.dtype)
        grad_scale = -(x * y).sum(dtype=row_lse.dtype)
        for start in range(0, n, ctx.rows):
            stop = start + ctx.rows
            logits = _block(x, y, scale, keys, start, ctx.rows)
            weights = (logits - row_lse[start:stop, None]).exp_()
            weights += (logits - column_lse[None, :]).exp_()
            weights /= 2
            if keys is not None:
                logits.masked_fill_(logits == -torch.inf, 0.0)
            grad_scale += (weights * logits).sum() / scale
            cast = weights.to(x.dtype)
            grad_x[start:stop] += cast @ y
            grad_y += cast.T @ x[start:stop]
        factor = upstream[0] / n
        return (
            (grad_x * (factor * scale)).to(x.dtype),
            (grad_y * (factor * scale)).to(y.dtype),
            (grad_scale * factor).to(scale.dtype),
            None,
            None,
        )
