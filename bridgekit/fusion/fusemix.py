"""FuseMix: mixup on latents, with one lambda shared by all modalities of a pair."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["halves", "permutation"]
LambdaPer = Literal["batch", "pair"]


def draw_partners(pattern: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    """Which rows of a batch are mixed with which: two index vectors of equal length.

    Arguments:
        pattern: (n,) integers that encode which modalities a row has. Only rows with the same pattern are mixed, so that a
            mixed row has the same modalities.
        pairing: `halves`, as in the release, splits the rows of a pattern in two and mixes the halves, giving n // 2 mixed rows
            if all have one pattern. `permutation` mixes every row with a random one, giving n.
    """
    order = pattern.argsort(stable=True)
    if pairing == "permutation":
        shuffled = torch.randperm(len(pattern), device=pattern.device)
        return order, shuffled[pattern[shuffled].argsort(stable=True)]
    counts = pattern.bincount()
    place = torch.arange(len(pattern), device=pattern.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    half = (counts // 2).repeat_interleave(counts)
    return order[place < half], order[(place >= half) & (place < 2 * half)]


def draw_lambda(n: int, alpha: float, per: LambdaPer, device: torch.device) -> Tensor:
    """Lambda ~ Beta(alpha, alpha), shape (1, 1) for one per batch, (n, 1) for one per pair.

    An alpha of 0 means no mixing: lambda is 1.
    """
    shape = (1 if per == "batch" else n, 1)
    if alpha <= 0:
        return torch.ones(shape, device=device)
    # A beta draw from two gamma draws. Unlike torch.distributions, this uses the device's own generator.
    concentration = torch.full((2, *shape), alpha, device=device)
    gamma = torch._standard_gamma(concentration).clamp_min(1e-30)
    return gamma[0] / (gamma[0] + gamma[1])


def fusemix(first: Tensor, second: Tensor, lam: Tensor) -> Tensor:
    """Mix latents of one modality; with the same partners and lambda in each modality, a mixed pair is still a pair.

    Arguments:
        first: (m, d) latents.
        second: (m, d) latents of their partners.
        lam: (1, 1) or (m, 1), in [0, 1].

    Returns:
        lam first + (1 - lam) second, (m, d).

    Source: FuseMix (arXiv 2312.10144), equation 4.
    """
    return torch.lerp(second, first, lam.to(first.dtype))
