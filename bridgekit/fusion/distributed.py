"""One training run shared by the processes that `torchrun` started: which rows each has, and sums over all of them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: How long processes wait for each other: the first encodes and evaluates alone.
PATIENCE = timedelta(days=7)


def world_size() -> int:
    """The number of processes that train together; 1 without `torchrun`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def joined_processes() -> Iterator[None]:
    """Join the other processes started by `torchrun`, if any. Each takes its own GPU.

    The processes must share a file system: the first one encodes and saves, the others read what it wrote.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    # Never destroyed: a new group with the keys of a destroyed one may wait for its addresses forever.
    atexit.register(dist.destroy_process_group)
    yield


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block before the others, which then find its results on disk."""
    if rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if rank() == 0 and world_size() > 1:
            dist.barrier()


def broadcast_from_first(value: Any) -> Any:
    """The first process's value (plain data) in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


@dataclass(frozen=True)
class Shares:
    """How the rows of a batch are shared among processes: each has consecutive rows, in the order of the processes.

    Arguments:
        counts: the number of rows of each process.
        rank: this process.
    """

    counts: Sequence[int]
    rank: int

    @property
    def first(self) -> int:
        """The number of this process's first row."""
        return sum(self.counts[: self.rank])


def gather_rows(x: Tensor, shares: Shares) -> Tensor:
    """The rows of all processes, (n, d), from each one's own, (m, d). Gradients flow back to each process's own rows."""
    rows: Tensor = _GatherRows.apply(x, shares)  # type: ignore[no-untyped-call]
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Shares) -> Tensor:
        ctx.shares = shares
        # Padded to one size, as gloo requires.
        most = max(shares.counts)
        own = torch.nn.functional.pad(x, (0, 0, 0, most - len(x))).contiguous()
        all_rows = [torch.empty_like(own) for _ in shares.counts]
        dist.all_gather(all_rows, own)
        return torch.cat([rows[:count] for rows, count in zip(all_rows, shares.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return sum_rows_of(upstream[0], ctx.shares), None


def sum_rows_of(whole: Tensor, shares: Shares) -> Tensor:
    """This process's rows, (m, d), of the sum over all processes of (n, d)."""
    total = whole.contiguous().clone()
    dist.all_reduce(total)
    return total[shares.first : shares.first + shares.counts[shares.rank]]


def sum_over_processes(values: Tensor, *, exponents: bool = False) -> Tensor:
    """The sum over all processes; of `exponents`, the logarithm of the sum of their exponentials."""
    if not exponents:
        total = values.clone()
        dist.all_reduce(total)
        return total
    most = largest_over_processes(values)
    total = (values - most).exp()
    dist.all_reduce(total)
    return total.log_() + most


def largest_over_processes(values: Tensor) -> Tensor:
    """The maximum over all processes."""
    most = values.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Sum the gradients of parameters over all processes, in one message."""
    if world_size() == 1:
        return
    grads = [parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        parameter.grad = part.view_as(parameter)
