"""What FuseMix is measured against: untrained adapters and ridge regression on the same latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bridgekit.evaluation import Embed
from bridgekit.fusion.adapter import FusionAdapter, mean_and_std
from bridgekit.fusion.training import Preset, new_adapters

#: Strengths of regularisation that validation chooses from.
RIDGE_ALPHAS = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)


def untrained(
    latents: Mapping[str, Tensor], rows: Mapping[str, Tensor], frozen: str | None, preset: Preset, seed: int
) -> Embed:
    """Adapters as they are before the first step: what chance looks like.

    Arguments:
        latents: modality to (m, d).
        rows: modality to the training rows' indices.
        frozen, preset, seed: as for training.
    """
    adapters = new_adapters({name: matrix.shape[1] for name, matrix in latents.items()}, frozen, preset, seed)
    for name, adapter in adapters.items():
        if isinstance(adapter, FusionAdapter):
            adapter.standardise(latents[name][rows[name]])
        adapter.eval()

    def embed(modality: str, matrix: Tensor) -> Tensor:
        with torch.inference_mode():
            return nn.functional.normalize(adapters[modality](matrix), dim=-1)

    return embed


def linear(latents: Mapping[str, Tensor], rows: Mapping[str, Tensor], score: Callable[[Embed], float]) -> Embed:
    """Ridge regression from the first modality's standardised latents to the second's, alpha chosen by `score`.

    Arguments:
        latents: two modalities, (m, d) each.
        rows: modality to the training rows' indices.
        score: larger is better, measured on validation rows.
    """
    from sklearn.linear_model import Ridge

    a, b = latents
    train = {name: latents[name][rows[name]] for name in (a, b)}
    x, y = (_standardiser(train[name]) for name in (a, b))
    best: tuple[float, Embed] | None = None
    for alpha in RIDGE_ALPHAS:
        model = Ridge(alpha=alpha).fit(x(train[a]).double().numpy(), y(train[b]).double().numpy())

        def embed(modality: str, matrix: Tensor, model: Ridge = model) -> Tensor:
            mapped = torch.from_numpy(model.predict(x(matrix).double().numpy())).float() if modality == a else y(matrix)
            return nn.functional.normalize(mapped, dim=-1)

        best = _better(best, embed, score)
    assert best is not None
    return best[1]


def _standardiser(train: Tensor) -> Callable[[Tensor], Tensor]:
    mean, std = mean_and_std(train)
    return lambda matrix: (matrix - mean) / std


def _better(best: tuple[float, Embed] | None, embed: Embed, score: Callable[[Embed], float]) -> tuple[float, Embed]:
    value = score(embed)
    return (value, embed) if best is None or value > best[0] else best
