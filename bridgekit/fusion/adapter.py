"""The fusion adapter: the small trainable MLP from one encoder's latents into the shared space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bridgekit.hardware import widened


def mean_and_std(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per dimension of (n, dim) latents.

    The deviation has a lower bound, since dividing a nearly constant dimension by its own would amplify noise.
    """
    std = latents.std(0)
    return latents.mean(0), std.clamp_min(1e-3 * std.max().clamp_min(1e-6))


class Dropout(nn.Module):
    """Dropout. On the CPU its masks are random bytes, so the rate is rounded to a 256th: 0.6 becomes 0.6016.

    `torch.nn.Dropout` takes 11 ns a number on some CPUs, more than the matrix products around it (measured on 2 cores of an AMD
    EPYC 9004, torch 2.13); this takes 1 ns.

    Arguments:
        p: the probability that a number is set to zero.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape into the same, scaled to keep its expectation. The identity in eval mode."""
        kept = round(256 * (1 - self.p))
        if not self.training or kept == 256:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.p)
        # Eight bytes a draw. Without bounds, `random_` leaves the top bit at zero.
        draws = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None)
        mask = draws.view(torch.uint8)[: x.numel()].view(x.shape) < kept
        return x * mask.to(x.dtype).mul_(256 / max(1, kept))


class Block(nn.Module):
    """One residual MLP block: `x + W2 Dropout(GELU(W1 LayerNorm(x)))`."""

    def __init__(self, dim: int, expansion: float, dropout: float) -> None:
        super().__init__()
        hidden = round(dim * expansion)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(n, dim) into (n, dim)."""
        out: Tensor = x + self.down(self.dropout(nn.functional.gelu(self.up(self.norm(x)))))
        return out


class FusionAdapter(nn.Module):
    """Residual MLP blocks, then LayerNorm and one linear map into the shared space. Not normalised to unit length.

    Arguments:
        dim: width of the encoder's latents.
        shared_dim: width of the shared space.
        blocks: number of residual blocks; 0 leaves LayerNorm and the linear map.
        expansion: hidden width of a block as a multiple of `dim`.
        dropout: rate of the dropout in each block, between GELU and the second linear map.
        input_dropout: rate of a dropout on the latents, before the blocks.

    Source: FuseMix (Vouitsis et al., CVPR 2024, arXiv 2312.10144), section 5, and its released code and configuration. Two
    things are added for small tables, and off in the `paper` preset: `mean` and `std`, by which latents are standardised first
    (the pooled latents of many encoders share a large common component, which a LayerNorm over one vector cannot remove), and
    dropout on the input.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, dim: int, shared_dim: int, blocks: int, expansion: float, dropout: float, input_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.expansion = expansion
        self.input_dropout = Dropout(input_dropout)
        self.blocks = nn.ModuleList([Block(dim, expansion, dropout) for _ in range(blocks)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, shared_dim)

    @property
    def shared_dim(self) -> int:
        """Width of the shared space."""
        return self.head.out_features

    def standardise(self, latents: Tensor) -> None:
        """Take mean and standard deviation from training latents of shape (n, dim)."""
        mean, std = mean_and_std(latents)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def normalised(self, latents: Tensor) -> Tensor:
        """The head's input if the blocks are the identity: (n, dim) latents, standardised, then LayerNorm."""
        return nn.functional.layer_norm((latents - self.mean) / self.std, self.mean.shape)

    @torch.no_grad()
    def set_linear(self, weight: Tensor, bias: Tensor) -> None:
        """Set the adapter to the linear map `weight @ normalised(x) + bias`, up to a positive factor.

        Arguments:
            weight: (k, dim). If k is less than the shared width, the remaining outputs start small and random.
            bias: (k,).
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.down.weight.zero_()
            block.down.bias.zero_()
        self.norm.reset_parameters()
        own, shift = self.head.weight, self.head.bias
        k = min(len(weight), len(own))
        # Embeddings are compared at unit length: this only sets the size of the weights relative to an optimizer step, to that
        # of a new linear layer.
        size = 3**-0.5
        factor = size / (weight[:k].norm() / max(1, k) ** 0.5).clamp_min(1e-12)
        own[:k], shift[:k] = (weight[:k] * factor).to(own.dtype), (bias[:k] * factor).to(own.dtype)
        own[k:] *= 0.1 * size / (own[k:].norm() / max(1, len(own) - k) ** 0.5).clamp_min(1e-12)
        shift[k:] = 0

    def forward(self, latents: Tensor) -> Tensor:
        """(n, dim) latents into (n, shared_dim)."""
        x = self.input_dropout((latents - self.mean) / self.std)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


class FrozenSide(nn.Module):
    """The identity adapter: the encoder's latents are the shared space, and the other sides are trained to match them.

    Arguments:
        dim: width of the encoder's latents and of the shared space.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shared_dim = dim

    def forward(self, latents: Tensor) -> Tensor:
        """(n, dim) into the same."""
        return latents


Adapter = FusionAdapter | FrozenSide


@torch.inference_mode()
def project(adapter: nn.Module, latents: Tensor, rows: int = 8_192) -> Tensor:
    """Latents, (n, dim), into the shared space, (n, shared), at unit length, in batches.

    Arguments:
        adapter: in eval mode.
        latents: may be on another device than the adapter, and in half precision.
        rows: batch size.

    Returns:
        float32 on the CPU.
    """
    device = next((tensor.device for tensor in adapter.state_dict().values()), latents.device)
    parts = (widened(part.to(device)) for part in torch.split(latents, rows))
    return torch.cat([nn.functional.normalize(adapter(part), dim=-1).cpu() for part in parts])
