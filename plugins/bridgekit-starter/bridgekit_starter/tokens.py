"""The head of `starter:openmoji-64`'s text encoder: from a sentence vector to prompt tokens."""

from __future__ import annotations

from torch import Tensor, nn


class TokenHead(nn.Module):
    """384 -> 1024 -> 16 tokens of 128. With a single token, cross-attention would give every patch the same value."""

    TOKENS = 16
    WIDTH = 128

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(384, 1024), nn.GELU(), nn.Linear(1024, self.TOKENS * self.WIDTH))

    def forward(self, vectors: Tensor) -> Tensor:
        """(n, 384) unit-length MiniLM sentence vectors to (n, 16, 128) prompt embeddings."""
        # Scale unit vectors to unit variance, as weight initialisation assumes.
        tokens: Tensor = self.layers(vectors * 384**0.5)
        return tokens.view(-1, self.TOKENS, self.WIDTH)
