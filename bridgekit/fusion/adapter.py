"""The fusion adapter: the small trainable MLP from one encoder's latents into the shared space."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mean_and_std(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Per dimension, from (n, dim). A near-constant dimension is given more than it has, lest it be blown up into noise."""
    std = latents.std(0)
    return latents.mean(0), std.clamp_min(1e-3 * std.max().clamp_min(1e-6))


class Block(nn.Module):
    """One residual MLP block: `x + W2 GELU(W1 LayerNorm(x))` with dropout inside (FuseMix, section 5)."""

    def __init__(self, dim: int, expansion: float, dropout: float) -> None:
        super().__init__()
        hidden = round(dim * expansion)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, dim) into (n, dim)."""
        out: Tensor = x + self.mlp(x)
        return out


class FusionAdapter(nn.Module):
    """Residual MLP blocks, then LayerNorm and one linear map into the shared space. Not normalised to unit length.

    Arguments:
        dim: width of the encoder's latents.
        shared_dim: width of the shared space.
        blocks: how many residual blocks; 0 leaves LayerNorm and the linear map.
        expansion: hidden width of a block as a multiple of `dim`.
        dropout: inside the blocks.

    Source: FuseMix (Vouitsis et al., CVPR 2024, arXiv 2312.10144), section 5 and its released configuration. The one
    addition is `mean` and `std`, by which latents are standardised first: pooled latents of many encoders share a large
    common part, and a LayerNorm over one vector cannot take it away.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, shared_dim: int, blocks: int, expansion: float, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.blocks = nn.Sequential(*[Block(dim, expansion, dropout) for _ in range(blocks)])
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, shared_dim))

    def standardise(self, latents: Tensor) -> None:
        """Take mean and standard deviation from training latents of shape (n, dim)."""
        mean, std = mean_and_std(latents)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, latents: Tensor) -> Tensor:
        """(n, dim) latents into (n, shared_dim)."""
        out: Tensor = self.head(self.blocks((latents - self.mean) / self.std))
        return out


class FrozenSide(nn.Module):
    """The identity adapter: the encoder's own latents are the shared space, and the other side comes to them."""

    def forward(self, latents: Tensor) -> Tensor:
        """(n, dim) into the same."""
        return latents
