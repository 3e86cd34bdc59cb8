"""The closed-form linear adapters are canonical correlation analysis or ridge regression, and training starts exactly there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from bridgekit.fusion import closed_form as module
from bridgekit.fusion.adapter import FrozenSide, FusionAdapter, project
from bridgekit.fusion.closed_form import ClosedForm, joining_order, spread_rows


def views(n: int = 400) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 5, generator=generator)
    noise = {name: torch.randn(n, dim, generator=generator) for name, dim in {"a": 12, "b": 9}.items()}
    return {name: hidden @ torch.randn(5, dim.shape[1], generator=generator) + dim for name, dim in noise.items()}


def rows_of(latents: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.arange(len(matrix)) for name, matrix in latents.items()}


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
    ClosedForm(pair, latents, rows_of(latents)).set_adapters(1e-4)
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
    sides = {name: adapter if name == moving else FrozenSide(dims[frozen]) for name in ("a", "b")}
    ClosedForm(sides, latents, rows_of(latents), [frozen]).set_adapters(0.5)
    inputs = adapter.normalised(latents[moving]).numpy()
    mean_eigenvalue = np.cov(inputs.T, bias=True).trace() / dims[moving]
    target = normalize(latents[frozen], dim=-1).numpy()
    reference = Ridge(alpha=0.5 * mean_eigenvalue * len(inputs)).fit(inputs, target).predict(inputs)
    with torch.no_grad():
        agreement = cosine_similarity(adapter(latents[moving]), torch.from_numpy(reference).float())
    assert agreement.min() > 0.9999


def test_the_solution_does_not_depend_on_the_ones_that_were_tried_before() -> None:
    latents, once, often = views(), adapters(32), adapters(32)  # more outputs than there are directions
    ClosedForm(once, latents, rows_of(latents)).set_adapters(0.5)
    form = ClosedForm(often, latents, rows_of(latents))
    for strength in (0.1, 1.0, 10.0) * 20 + (0.5,):
        form.set_adapters(strength)
    for name in once:
        torch.testing.assert_close(project(often[name], latents[name]), project(once[name], latents[name]))


def test_a_shared_space_wider_than_either_side_still_works() -> None:
    pair = adapters(20)
    ClosedForm(pair, views(), rows_of(views())).set_adapters(1.0)
    with torch.no_grad():
        assert pair["a"](views()["a"]).isfinite().all()


def three_views(n: int = 600) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Three views of the same hidden things; the first half of the rows lacks one, the second half another."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 5, generator=generator)
    latents = {
        name: hidden @ torch.randn(5, dim, generator=generator) + 0.3 * torch.randn(n, dim, generator=generator)
        for name, dim in {"a": 12, "b": 9, "c": 10}.items()
    }
    index, hole = torch.arange(n), torch.full((n,), -1)
    first = torch.arange(n) < n // 2
    return latents, {"a": torch.where(first, index, hole), "b": index, "c": torch.where(first, hole, index)}


def agreement(pair: dict[str, FusionAdapter], latents: dict[str, torch.Tensor], one: str, other: str) -> float:
    """The share of items whose partner is among the nearest twentieth."""
    with torch.no_grad():
        x, y = (normalize(pair[name](latents[name]), dim=-1) for name in (one, other))
    scores = x @ y.T
    return float(((scores >= scores.diag()[:, None]).sum(1) <= len(x) // 20).float().mean())


def test_modalities_without_a_row_in_common_meet_through_the_third() -> None:
    latents, rows = three_views()
    trio = {name: FusionAdapter(matrix.shape[1], 8, 1, 2, 0.5, 0.2).eval() for name, matrix in latents.items()}
    before = agreement(trio, latents, "a", "c")
    ClosedForm(trio, latents, rows).set_adapters(0.1)
    assert before < 0.15
    assert agreement(trio, latents, "a", "b") > 0.9
    assert agreement(trio, latents, "a", "c") > 0.9


def test_a_side_is_bound_to_fixed_ones_through_whatever_it_shares_rows_with() -> None:
    latents, rows = three_views()
    trio = {name: FusionAdapter(matrix.shape[1], 8, 1, 2, 0.5, 0.2).eval() for name, matrix in latents.items()}
    fixed = {name: tensor.clone() for name, tensor in trio["a"].state_dict().items()}
    assert joining_order(["a"], rows) == [("b", ["a"]), ("c", ["b"])]
    ClosedForm(trio, latents, rows, ["a"]).set_adapters(0.1)
    assert all(torch.equal(tensor, fixed[name]) for name, tensor in trio["a"].state_dict().items())
    assert agreement(trio, latents, "a", "b") > 0.8
    assert agreement(trio, latents, "a", "c") > 0.5


def test_modalities_that_share_no_rows_are_left_out() -> None:
    rows = {"a": torch.tensor([0, 1, -1, -1]), "b": torch.tensor([0, 1, -1, -1]), "c": torch.tensor([-1, -1, 0, 1])}
    assert joining_order(["a"], rows) == [("b", ["a"])]


def test_rows_of_a_large_table_are_sampled_evenly_and_keep_their_items_and_holes() -> None:
    latents = {"a": torch.arange(40.0)[:, None], "b": torch.arange(100.0)[:, None]}
    rows = {"a": torch.arange(100) % 40, "b": torch.where(torch.arange(100) % 3 == 0, -1, torch.arange(100))}
    fewer_latents, fewer_rows = spread_rows(latents, rows, 10)
    for name in latents:
        assert len(fewer_rows[name]) == 10
        for index, row in enumerate(range(0, 100, 10)):
            there = rows[name][row] >= 0
            assert (fewer_rows[name][index] >= 0) == there
            if there:
                assert fewer_latents[name][fewer_rows[name][index]] == latents[name][rows[name][row]]
    assert len(fewer_latents["b"]) == 6
    assert spread_rows(latents, rows, 100)[1] is rows


@pytest.mark.parametrize("fixed", [False, True])
def test_latents_in_half_precision_give_the_same_start_a_part_at_a_time(fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = views()
    rows = rows_of(latents)
    halves = {name: matrix.half() for name, matrix in latents.items()}
    monkeypatch.setattr(module, "PART_ROWS", 37)
    widened: list[int] = []
    monkeypatch.setattr(module, "widened", lambda part: (widened.append(len(part)), part.float())[1])
    embedded = []
    for matrices in (latents, halves):
        pair: dict[str, FusionAdapter | FrozenSide] = {**adapters(3)}
        if fixed:
            pair["b"] = FrozenSide(9)
            pair["a"] = FusionAdapter(12, 9, 1, 2, 0.5, 0.2).eval()
        widened.clear()
        ClosedForm(pair, matrices, rows, {"b"} if fixed else ()).set_adapters(0.1)
        assert max(widened) == (400 if matrices is latents else 37)
        embedded.append(project(pair["a"], latents["a"]) @ project(pair["b"], latents["b"]).T)
    torch.testing.assert_close(embedded[0], embedded[1], atol=5e-3, rtol=0)
