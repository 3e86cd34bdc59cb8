"""Batches of any size in bounded memory: cut into pieces, shared among processes, and embedded twice if necessary."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bridgekit.fusion.adapter import Adapter, FrozenSide
from bridgekit.fusion.distributed import rank, world_size

#: A batch is cut into this many pieces, so that up to this many processes can share it and draw the same dropout masks as one.
PIECES = 8
#: No piece has fewer rows than this: smaller products would not use the processor well.
SMALLEST_PIECE = 512
#: Activations may take this many bytes on the CPU, and this share of the memory on a GPU.
CPU_ROOM, GPU_SHARE = 1 << 29, 0.4


@dataclass(frozen=True)
class Pieces:
    """How a batch is cut.

    Arguments:
        rows: the pieces, in order: those of the first process, then of the second, and so on.
        own: the numbers of this process's pieces.
        bounds: for each process the number of its first row and the one after its last.
    """

    rows: Sequence[slice]
    own: range
    bounds: Sequence[tuple[int, int]]


def cut(n: int, most_rows: int) -> Pieces:
    """Cut a batch of n rows into pieces of at most `most_rows`, and share them among the processes."""
    world = world_size()
    size = max(1, min(max(SMALLEST_PIECE, math.ceil(n / PIECES)), math.ceil(n / world), most_rows))
    rows = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    cuts = [len(rows) * number // world for number in range(world + 1)]
    edges = [rows[at].start if at < len(rows) else n for at in cuts]
    return Pieces(rows, range(cuts[rank()], cuts[rank() + 1]), list(pairwise(edges)))


def activation_bytes(adapters: Sequence[Adapter]) -> int:
    """Approximate bytes that the activations of one row take between the forward and the backward pass."""
    numbers = 0
    for adapter in adapters:
        if isinstance(adapter, FrozenSide):
            continue
        dim = adapter.head.in_features
        # A block keeps its input and the normalised input, and at its hidden width GELU's input and output, the dropout mask
        # and the product of the two.
        numbers += 3 * dim + adapter.shared_dim + len(adapter.blocks) * (2 * dim + 4 * round(dim * adapter.expansion))
    return 4 * numbers


def activation_room(device: str) -> int:
    """How many bytes activations may take on a device."""
    if torch.device(device).type == "cuda":
        return int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return CPU_ROOM


def seed_here(*place: int) -> None:
    """Seed torch with a place in a run (seed, epoch, step, piece), so that any process draws the same numbers there."""
    # Torch's generator on the CPU uses 32 bits.
    number = int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=4).digest(), "big")
    # Not torch.manual_seed: if CUDA is not initialized, it stores a stack trace at every call.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(number)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def backward_in_pieces(
    embed: Callable[[int], Sequence[Tensor]],
    pieces: Sequence[int],
    loss_of: Callable[[Sequence[Tensor]], Tensor],
    *,
    keep: bool,
) -> Tensor:
    """The loss of a batch that is embedded in pieces; its gradients are added to those of the parameters.

    Arguments:
        embed: maps a piece's number to its embeddings, one tensor per side; deterministic.
        pieces: the numbers of the pieces.
        loss_of: maps the embeddings of all pieces, one tensor per side, to a scalar.
        keep: keep the activations of all pieces. Otherwise only one piece's activations are in memory at a time, and each piece
            is embedded twice.

    Source: GradCache (Gao et al., arXiv 2101.06983).
    """
    if keep:
        loss = loss_of(_joined([embed(number) for number in pieces]))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    with torch.no_grad():
        parts = [embed(number) for number in pieces]
    embedded = [side.requires_grad_() for side in _joined(parts)]
    loss = loss_of(embedded)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [
        torch.split(torch.zeros_like(side) if side.grad is None else side.grad, [len(part[number]) for part in parts])
        for number, side in enumerate(embedded)
    ]
    del parts
    for place, number in enumerate(pieces):
        moving = [(side, of[place]) for side, of in zip(embed(number), gradients, strict=True) if side.requires_grad]
        if moving:
            torch.autograd.backward([side for side, _ in moving], [gradient for _, gradient in moving])
    return loss.detach()


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(side) for side in zip(*parts, strict=True)]
