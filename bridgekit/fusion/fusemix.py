"""FuseMix: mixup on latents, with one lambda shared by all modalities of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["halves", "permutation"]
LambdaPer = Literal["batch", "pair"]


def draw_partners(n: int, pairing: Pairing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which rows of a batch of n are mixed with which: two index vectors of equal length.

    `halves` cuts the batch in two and mixes the halves, giving n // 2 mixed pairs, as the release does. `permutation` mixes
    every row with a random one, giving n.
    """
    if pairing == "halves":
        half = n // 2
        return torch.arange(half, device=device), torch.arange(half, 2 * half, device=device)
    return torch.arange(n, device=device), torch.randperm(n, device=device)


def draw_lambda(n: int, alpha: float, per: LambdaPer, device: torch.device) -> Tensor:
    """Lambda ~ Beta(alpha, alpha), shape (1, 1) where one serves the whole batch, (n, 1) where each pair has its own.

    An alpha of 0 means no mixing: lambda is 1.
    """
    shape = (1 if per == "batch" else n, 1)
    if alpha <= 0:
        return torch.ones(shape, device=device)
    # Two gamma draws make a beta draw, and unlike torch.distributions they follow the device's own generator.
    concentration = torch.full((2, *shape), alpha, device=device)
    gamma = torch._standard_gamma(concentration).clamp_min(1e-30)
    return gamma[0] / (gamma[0] + gamma[1])


def fusemix(sides: Sequence[Tensor], first: Tensor, second: Tensor, lam: Tensor) -> list[Tensor]:
    """Mix rows `first` with rows `second` by `lam`, alike in every modality.

    Arguments:
        sides: for each modality the batch's latents, (n, d_modality).
        first: m row indices.
        second: m row indices, the partners.
        lam: (1, 1) or (m, 1), in [0, 1].

    Returns:
        for each modality lam x[first] + (1 - lam) x[second], (m, d_modality). Row k of every modality is a positive pair.

    Source: FuseMix (arXiv 2312.10144), equation 4: the same lambda in both modalities keeps a mixed pair a pair.
    """
    return [torch.lerp(side[second], side[first], lam.to(side.dtype)) for side in sides]
