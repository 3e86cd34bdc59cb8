"""Where training starts from: the best linear adapters, in closed form, rather than random ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bridgekit.fusion.adapter import FusionAdapter


@torch.no_grad()
def warm_start(adapters: Mapping[str, object], latents: Mapping[str, Tensor], ridge: float) -> None:
    """Set two adapters to the regularised canonical correlation analysis of their training latents.

    On a few thousand pairs a linear map with the right regularisation is hard to beat from a random start; starting from it,
    FuseMix only has to improve on it. Residual blocks begin as the identity (their last layers are zeroed) and the head
    becomes the linear map, so before the first step the adapters are exactly that solution.

    Arguments:
        adapters: two adapters; with a frozen side the other becomes the ridge regression onto it.
        latents: modality to the training rows' latents, (n, d_modality), row i of one belonging to row i of the other.
        ridge: added to each covariance's diagonal, in units of its mean eigenvalue.

    Source: Hotelling, Relations between two sets of variates, 1936; regularised as in Vinod, Canonical ridge, 1976.
    Canonical directions are weighted by the square root of their correlation on each side, so that cosine similarity
    trusts a direction as far as it is shared.
    """
    inputs = {
        name: adapter.normalised(latents[name]) if isinstance(adapter, FusionAdapter) else latents[name]
        for name, adapter in adapters.items()
    }
    a, b = inputs
    means = {name: matrix.mean(0) for name, matrix in inputs.items()}
    centred = {name: (matrix - means[name]).double() for name, matrix in inputs.items()}
    cross = centred[a].T @ centred[b] / len(centred[a])
    moving = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, FusionAdapter)}
    roots = {name: _inverse_root(centred[name], ridge) for name in moving}
    shifts = {name: torch.zeros((), dtype=torch.float64) for name in moving}
    if len(moving) == 2:
        left, correlation, right = torch.linalg.svd(roots[a] @ cross @ roots[b], full_matrices=False)
        weight = correlation.clamp(0, 1).sqrt()
        maps = {a: roots[a] @ left * weight, b: roots[b] @ right.T * weight}
    else:
        (name,) = moving
        maps = {name: roots[name] @ roots[name] @ (cross if name == a else cross.T)}
        shifts = {name: means[b if name == a else a].double()}
    for name, adapter in moving.items():
        adapter.set_linear(maps[name].T, shifts[name] - means[name].double() @ maps[name])


def _inverse_root(centred: Tensor, ridge: float) -> Tensor:
    """(C + ridge * mean eigenvalue * I) ** -1/2 of the covariance C of (n, d) rows, (d, d)."""
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    root: Tensor = vectors * (values.clamp_min(0) + ridge * values.mean().clamp_min(1e-12)).rsqrt() @ vectors.T
    return root
