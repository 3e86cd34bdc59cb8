"""The warm start is the closed-form linear solution, and training starts exactly there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from bridgekit.fusion.adapter import FrozenSide, FusionAdapter
from bridgekit.fusion.warm_start import warm_start


def views(n: int = 400) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 5, generator=generator)
    noise = {name: torch.randn(n, dim, generator=generator) for name, dim in {"a": 12, "b": 9}.items()}
    return {name: hidden @ torch.randn(5, dim.shape[1], generator=generator) + dim for name, dim in noise.items()}


def adapters(shared_dim: int) -> dict[str, FusionAdapter]:
    torch.manual_seed(1)
    return {name: FusionAdapter(dim, shared_dim, 1, 2, 0.5, 0.2).eval() for name, dim in {"a": 12, "b": 9}.items()}


def canonical_variates(inputs: dict[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    """Canonical correlation analysis by another road: the principal angles between the two column spaces (Björck, Golub 1973).

    Not scikit-learn's CCA: its iteration loses its way where a covariance is singular, as after a LayerNorm it is.
    """
    bases = {}
    for name, matrix in inputs.items():
        left, values, _ = np.linalg.svd(matrix - matrix.mean(0), full_matrices=False)
        bases[name] = left[:, values > 1e-4 * values[0]]
    u, _, vt = np.linalg.svd(bases["a"].T @ bases["b"])
    return {"a": bases["a"] @ u[:, :k], "b": bases["b"] @ vt[:k].T}


def test_two_sides_start_as_canonical_correlation_analysis() -> None:
    latents, pair = views(), adapters(3)
    warm_start(pair, latents, ridge=1e-4)
    inputs = {name: pair[name].normalised(latents[name]).double().numpy() for name in pair}
    reference = canonical_variates(inputs, 3)
    with torch.no_grad():
        for name in pair:
            ours = pair[name](latents[name]).numpy()
            agreement = [abs(np.corrcoef(ours[:, k], reference[name][:, k])[0, 1]) for k in range(3)]
            assert min(agreement) > 0.999
    correlations = np.array([np.corrcoef(reference["a"][:, k], reference["b"][:, k])[0, 1] for k in range(3)])
    with torch.no_grad():
        spreads = pair["a"](latents["a"]).std(0).numpy()
    # A direction counts as far as it is shared: by the square root of its correlation on each side.
    np.testing.assert_allclose(spreads / spreads[0], np.sqrt(correlations / correlations[0]), rtol=1e-3)


@pytest.mark.parametrize("frozen", ["a", "b"])
def test_with_a_frozen_side_the_other_starts_as_ridge_regression_onto_it(frozen: str) -> None:
    from sklearn.linear_model import Ridge

    latents = views()
    moving = "b" if frozen == "a" else "a"
    dims = {"a": 12, "b": 9}
    adapter = FusionAdapter(dims[moving], dims[frozen], 1, 2, 0.5).eval()
    warm_start({name: adapter if name == moving else FrozenSide() for name in ("a", "b")}, latents, ridge=0.5)
    inputs = adapter.normalised(latents[moving]).numpy()
    mean_eigenvalue = np.cov(inputs.T, bias=True).trace() / dims[moving]
    reference = Ridge(alpha=0.5 * mean_eigenvalue * len(inputs)).fit(inputs, latents[frozen].numpy()).predict(inputs)
    with torch.no_grad():
        agreement = cosine_similarity(adapter(latents[moving]), torch.from_numpy(reference).float())
    assert agreement.min() > 0.9999


def test_a_shared_space_wider_than_either_side_still_works() -> None:
    pair = adapters(20)
    warm_start(pair, views(), ridge=1.0)
    with torch.no_grad():
        assert pair["a"](views()["a"]).isfinite().all()
