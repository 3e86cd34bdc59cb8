"""What is saved: ridge regression, the closed form or FuseMix, whichever validation prefers, and hubs count less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from bridgekit import Bridge, align
from bridgekit.encoders import Item
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.methods import STRENGTHS, Solution, Validation, choose, closed_forms, training_rows
from bridgekit.fusion.adapter import FrozenSide
from bridgekit.latents.batches import FLOAT32
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.latents.store import Latents
from bridgekit.pairs import Pairs
from bridgekit.retrieval import HUB_NEIGHBOURS, HUB_SHARE, hub_penalty, nearest, recall, relevance
from bridgekit.tables.splits import draw_folds, relation_keys
from tests.conftest import Run
from tests.test_align import QUICK
from tests.toys import NAMES, tone_table

PRESET = replace(QUICK, shared_dim=16)


def two_views(n: int, noise: float, seed: int = 0) -> dict[str, Tensor]:
    """Latents of 40 and 30 numbers, linear in 8 hidden ones, with noise in as many directions as there are."""
    generator = torch.Generator().manual_seed(1)
    mixing = {name: torch.randn(8, dim, generator=generator) for name, dim in {"a": 40, "b": 30}.items()}
    generator.manual_seed(seed)
    hidden = torch.randn(n, 8, generator=generator)
    return {name: hidden @ each + noise * torch.randn(n, each.shape[1], generator=generator) for name, each in mixing.items()}


def table(latents: dict[str, Tensor], val: int) -> tuple[EncodedPairs, NDArray[np.str_]]:
    """A table of these latents; its last rows are for validation."""
    n = len(latents["a"])
    ids = {name: np.arange(n) for name in latents}
    columns: dict[str, tuple[Item | None, ...]] = {name: tuple(f"{name} {row}" for row in range(n)) for name in latents}
    pairs = Pairs(columns, "a test", tuple(range(n)))
    contents = {name: [f"{name} {row}".encode() for row in range(n)] for name in latents}
    stored = {
        name: Latents(matrix, ids[name], {}, 0, name, FLOAT32, 0.0, Path(), contents[name]) for name, matrix in latents.items()
    }
    split = np.where(np.arange(n) < n - val, "train", "val")
    return EncodedPairs(pairs, stored, ids, relation_keys(pairs, ids)), split


def found_first(solution: Solution, latents: dict[str, Tensor]) -> float:
    """recall@1 from a to b."""
    a, b = (solution.embed(name, matrix) for name, matrix in latents.items())
    return float(((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean())


@pytest.mark.parametrize("val", [20, 250])
@pytest.mark.parametrize("method", ["ridge", "closed form"])
def test_the_strength_that_is_chosen_is_nearly_the_best_on_new_rows(method: str, val: int) -> None:
    encoded, split = table(two_views(100 + val, 2.0), val)
    new = two_views(1_000, 2.0, seed=1)
    chosen = found_first(closed_forms(encoded, split, PRESET, 0, {})[method], new)  # type: ignore[index]
    by_strength = []
    for strength in STRENGTHS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bridgekit.evaluation.methods.STRENGTHS", (strength,))
            by_strength.append(found_first(closed_forms(encoded, split, PRESET, 0, {})[method], new))  # type: ignore[index]
    assert max(by_strength) > 1.5 * min(by_strength), "the strength matters here"
    assert chosen >= 0.9 * max(by_strength)


def test_ridge_is_scikit_learns_onto_the_standardised_latents_of_the_second_side() -> None:
    from sklearn.linear_model import Ridge

    encoded, split = table(two_views(300, 1.0), 50)
    solution = closed_forms(encoded, split, PRESET, 0, {})["ridge"]
    latents, rows = training_rows(encoded, split)

    def inputs(name: str, matrix: Tensor) -> Tensor:
        own = latents[name][rows[name]]
        return torch.nn.functional.layer_norm((matrix - own.mean(0)) / own.std(0), matrix.shape[1:])

    x, y = inputs("a", latents["a"][rows["a"]]).numpy(), normalize(inputs("b", latents["b"][rows["b"]]), dim=-1).numpy()
    alpha = solution.preset.warm_start * np.cov(x.T, bias=True).trace() / x.shape[1] * len(x)
    expected = Ridge(alpha=alpha).fit(x, y).predict(inputs("a", latents["a"]).numpy())
    agreement = cosine_similarity(solution.embed("a", latents["a"]), torch.from_numpy(expected).float())
    assert agreement.min() > 0.9999
    torch.testing.assert_close(solution.embed("b", latents["b"]), normalize(inputs("b", latents["b"]), dim=-1))
    assert (solution.preset.shared_dim, solution.preset.blocks) == (30, 0)


def test_with_a_fixed_side_there_is_ridge_regression_onto_it_alone() -> None:
    encoded, split = table(two_views(300, 1.0), 50)
    solutions = closed_forms(encoded, split, PRESET, 0, {"b": FrozenSide(30)})
    assert list(solutions) == ["ridge"]
    assert solutions["ridge"].preset.blocks == PRESET.blocks, "the sides of a bridge have one shape"
    assert found_first(solutions["ridge"], two_views(300, 1.0, seed=1)) > 0.5


class Noisy(Solution):
    """A solution whose embeddings are perturbed."""

    noise = 0.0

    def embed(self, modality: str, latents: Tensor) -> Tensor:
        clear = super().embed(modality, latents)
        generator = torch.Generator().manual_seed(ord(modality))
        return normalize(clear + self.noise * torch.randn(clear.shape, generator=generator), dim=-1)


def test_fusemix_is_saved_only_if_validation_is_sure_that_it_is_better() -> None:
    encoded, split = table(two_views(800, 1.0), 400)
    good = closed_forms(encoded, split, PRESET, 0, {})["closed form"]
    worse = Noisy(good.adapters, good.preset, 0.5)
    object.__setattr__(worse, "noise", 0.5)
    train, val = np.flatnonzero(split == "train"), np.flatnonzero(split == "val")
    choice = choose({"closed form": worse, "FuseMix": good}, Validation(encoded, train, val), 0)
    assert (choice.method, choice.rival, choice.queries) == ("FuseMix", "closed form", 800)
    assert choice.interval[0] > 0
    ranks = [Validation(encoded, train, val).figures(each.embed)["score"] for each in (good, worse)]
    assert choice.difference == pytest.approx(ranks[0] - ranks[1])
    tie = choose({"closed form": good, "FuseMix": good}, Validation(encoded, train, val), 0)
    assert (tie.method, tie.difference) == ("closed form", 0)
    other = choose({"closed form": good, "FuseMix": worse}, Validation(encoded, train, val), 0)
    assert other.method == "closed form"
    assert other.interval[0] > 0
    faint = Noisy(good.adapters, good.preset, 0.5)
    object.__setattr__(faint, "noise", 0.1)
    few = choose({"closed form": faint, "FuseMix": good}, Validation(encoded, train, val[:12]), 0)
    assert few.method == "closed form", "a few rows cannot tell"
    for rows, taken in {49: "closed form", 50: "FuseMix"}.items():
        least = choose({"closed form": worse, "FuseMix": good}, Validation(encoded, train, val[:rows]), 0)
        assert least.method == taken, "the epoch was chosen by the same rows"


@given(
    ids=st.lists(st.integers(0, 30), min_size=12, max_size=60),
    group=st.lists(st.sampled_from(["", "x", "y"]), min_size=60, max_size=60),
    count=st.integers(2, 6),
    seed=st.integers(0, 9),
)
def test_folds_cut_the_rows_and_keep_what_shares_a_file_or_a_group_together(
    ids: list[int], group: list[str], count: int, seed: int
) -> None:
    n = len(ids)
    pairs = Pairs({"image": tuple(map(str, ids)), "text": ("t",) * n}, "a test", tuple(range(n)), group=tuple(group[:n]))
    content = {"image": np.asarray(ids), "text": np.zeros(n, np.int64)}
    folds = draw_folds(pairs, content, np.arange(n), count, seed)
    assert sorted(np.concatenate(folds).tolist()) == list(range(n))
    assert len(folds) <= count
    of = {row: number for number, fold in enumerate(folds) for row in fold.tolist()}
    for one in range(n):
        for other in range(one):
            if ids[one] == ids[other] or (group[one] and group[one] == group[other]):
                assert of[one] == of[other]


# ---- hubs


def unit(n: int, seed: int) -> Tensor:
    return normalize(torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


@given(candidates=st.integers(1, 30), bank=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_hub_loses_half_of_its_mean_similarity_to_its_nearest_known_queries(candidates: int, bank: int, seed: int) -> None:
    gallery, known, partners = unit(candidates, seed), unit(bank, seed + 1), unit(bank, seed + 2)
    partners[::3] = gallery[torch.arange(bank)[::3] % candidates]  # the candidate's own queries do not count
    expected = []
    for candidate in gallery.double().numpy():
        others = [i for i in range(bank) if candidate @ partners[i].double().numpy() <= 0.999]
        nearest_others = sorted((candidate @ known[i].double().numpy() for i in others), reverse=True)[:HUB_NEIGHBOURS]
        expected.append(HUB_SHARE * np.mean(nearest_others) if nearest_others else 0)
    np.testing.assert_allclose(hub_penalty(gallery, known, partners).numpy(), expected, atol=1e-5)


def test_searches_and_recall_order_by_similarity_less_the_penalty_and_show_the_similarity() -> None:
    queries, gallery, known = unit(20, 0), unit(15, 1), unit(40, 2)
    penalty = hub_penalty(gallery, known, unit(40, 3))
    scores = queries @ gallery.T - penalty
    hits = nearest(queries, gallery, [str(number) for number in range(15)], 15, penalty)
    for row, found in enumerate(hits):
        assert [int(str(hit.item)) for hit in found] == scores[row].argsort(descending=True).tolist()
        for hit in found:
            assert hit.similarity == pytest.approx(float(queries[row] @ gallery[int(str(hit.item))]), abs=1e-5)
    right = relevance(np.arange(15), np.arange(15))
    ranks = (scores[:15] >= scores[:15].diagonal()[:, None]).sum(1)
    assert recall(queries, gallery, right, penalty=penalty).at[5] == pytest.approx(float((ranks <= 5).float().mean()))


@pytest.mark.usefixtures("toy")
def test_a_bridge_keeps_its_banks_and_searches_as_it_was_measured(tmp_path: Path) -> None:
    trained = align(pairs=tone_table(tmp_path), out=tmp_path / "bridge", preset=QUICK, progress=False)
    bridge = Bridge.load(tmp_path / "bridge")
    assert set(bridge.banks) == {"audio/text", "text/audio"}
    assert all(torch.equal(bridge.banks[name], trained.banks[name]) for name in bridge.banks)
    clip = tmp_path / "clips" / "owl 0.wav"
    texts = bridge.embed("text", NAMES)
    scores = bridge.embed("audio", clip) @ texts.T - hub_penalty(texts, bridge.banks["audio/text"], bridge.banks["text/audio"])
    expected = [NAMES[place] for place in scores[0].argsort(descending=True).tolist()]
    assert [hit.item for hit in bridge.search("audio", clip, "text", NAMES, len(NAMES))[0]] == expected
    assert bridge.classify("audio", clip, NAMES, ["{}"])[0].argmax() == scores[0].argmax()
    assert bridge.hub_penalty("audio", "audio", texts) is None, "nothing is lost within one modality"


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("rows", [0, 2_000])
def test_a_bank_of_another_size_than_a_bridge_can_have_is_damage(tmp_path: Path, rows: int) -> None:
    import hashlib
    import json

    align(pairs=tone_table(tmp_path), out=tmp_path / "bridge", preset=QUICK, progress=False)
    weights, metadata = tmp_path / "bridge" / "adapters.safetensors", tmp_path / "bridge" / "bridge.json"
    tensors = load_file(weights)
    dim = tensors["bank/text/audio"].shape[1]
    save_file({**tensors, "bank/text/audio": torch.zeros(rows, dim, dtype=torch.float16)}, weights)
    told = json.loads(metadata.read_text())
    told["adapters_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    metadata.write_text(json.dumps(told))
    with pytest.raises(BridgekitError, match=r"adapters\.safetensors"):
        Bridge.load(tmp_path / "bridge")


# ---- the choice, as users see it


@pytest.mark.usefixtures("toy")
def test_a_method_can_be_asked_for_and_the_table_says_how_sure_the_choice_is(tmp_path: Path, run: Run) -> None:
    tone_table(tmp_path)
    pairs = ["--pairs", str(tmp_path / "pairs.csv")]
    for name, expected in {"ridge": "ridge", "closed-form": "closed form", "fusemix": "FuseMix", "auto": None}.items():
        code, out, err = run("align", *pairs, "--out", str(tmp_path / name), "--method", name, "--no-report")
        assert code == 0, err
        bridge = Bridge.load(tmp_path / name)
        assert bridge.provenance["method"] == expected or expected is None
        assert ("Saved: " in out) == (name == "auto")
        assert ("FuseMix" in {record["method"] for record in bridge.metrics}) == (name in ("fusemix", "auto"))
        assert bool(bridge.history) == (name in ("fusemix", "auto"))
        if bridge.history:
            assert bridge.history[0]["epoch"] == 0, "the history starts at the closed form"
    assert Bridge.load(tmp_path / "closed-form").preset.blocks == 0
    code, _, err = run("align", *pairs, "--out", str(tmp_path / "x"), "--method", "best")
    assert code == 2
    assert "unknown method 'best'" in err
    assert "auto, ridge, closed-form, self-training, fusemix" in err
    code, _, err = run("align", *pairs, "--out", str(tmp_path / "y"), "--method", "closed-form", "--freeze", "text")
    assert code == 2
    assert "--method ridge" in err
    assert run("align", *pairs, "--out", str(tmp_path / "y"), "--method", "ridge", "--freeze", "text", "--no-report")[0] == 0
