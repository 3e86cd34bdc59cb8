"""The head of `starter:openmoji-64`'s text encoder: a sentence vector becomes the tokens that its transformer reads."""

from __future__ import annotations

from torch import Tensor, nn


class TokenHead(nn.Module):
    """384 -> 1024 -> 16 tokens of 128. Sixteen tokens that differ, for one vector would tell each patch the same."""

    TOKENS = 16
    WIDTH = 128

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(384, 1024), nn.GELU(), nn.Linear(1024, self.TOKENS * self.WIDTH))

    def forward(self, vectors: Tensor) -> Tensor:
        """(n, 384) MiniLM sentence vectors of length 1 to (n, 16, 128) prompt embeddings."""
        # A vector of length 1 has small entries; scaled to deviation 1, as initial weights expect.
        tokens: Tensor = self.layers(vectors * 384**0.5)
        return tokens.view(-1, self.TOKENS, self.WIDTH)
