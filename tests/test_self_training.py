"""Unpaired items: the closed form once more, with their likely partners, where validation prefers it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit import Bridge
from bridgekit.evaluation.methods import closed_forms, self_training
from bridgekit.fusion import self_training as module
from bridgekit.fusion.adapter import project
from bridgekit.fusion.self_training import PAIR_WEIGHT, TEMPERATURE, with_likely_partners
from bridgekit.fusion.training import initial_adapters
from bridgekit.retrieval import hub_penalty
from tests.conftest import Run, tone
from tests.test_methods import PRESET, found_first, table, two_views
from tests.toys import tone_table


def parts(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Latents of 12 pairs, their rows, and unpaired latents: 7 of `a` and 5 of `b`."""
    latents = two_views(24, 0.5, seed)
    paired = {name: matrix[:12] for name, matrix in latents.items()}
    return paired, {name: torch.arange(12) for name in paired}, {"a": latents["a"][12:19], "b": latents["b"][19:]}


def test_a_likely_partner_is_the_mean_of_all_candidates_by_their_similarity_less_their_penalty() -> None:
    latents, rows, unpaired = parts()
    adapters = initial_adapters(latents, rows, PRESET, 0)
    matrices, _ = with_likely_partners(adapters, latents, rows, unpaired)
    candidates = torch.cat([latents["b"], unpaired["b"]])
    a, b = project(adapters["a"], unpaired["a"]), project(adapters["b"], candidates)
    lost = hub_penalty(b, project(adapters["a"], latents["a"]), project(adapters["b"], latents["b"]))
    for row in range(7):
        weights = np.exp(((b @ a[row] - lost) / TEMPERATURE).double().numpy())
        wanted = (weights[:, None] * candidates.double().numpy()).sum(0) / weights.sum()
        np.testing.assert_allclose(matrices["b"][12 + row], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(matrices["a"][12:19], unpaired["a"])
    assert torch.equal(matrices["b"][19:], unpaired["b"])


def test_every_pair_weighs_as_much_as_several_unpaired_items() -> None:
    matrices, rows = with_likely_partners(initial_adapters(*parts()[:2], PRESET, 0), *parts())
    assert torch.equal(rows["a"], rows["b"])
    assert torch.equal(rows["a"].bincount(), torch.tensor([PAIR_WEIGHT] * 12 + [1] * 12))
    assert len(matrices["a"]) == len(matrices["b"]) == 24


def test_an_item_in_several_pairs_is_one_candidate() -> None:
    latents, rows, unpaired = parts()
    adapters = initial_adapters(latents, rows, PRESET, 0)
    more = {name: torch.cat([ids, ids[:1].expand(50) if name == "b" else ids[1:2].expand(50)]) for name, ids in rows.items()}
    few = with_likely_partners(adapters, latents, rows, {"a": unpaired["a"]})[0]["b"][12:]
    with pytest.MonkeyPatch.context() as patch:  # the bank counts rows, so only the candidates are compared
        patch.setattr(module, "hub_penalty", lambda candidates, *_: torch.zeros(len(candidates)))
        one = with_likely_partners(adapters, latents, rows, {"a": unpaired["a"]})[0]["b"][12:]
        many = with_likely_partners(adapters, latents, more, {"a": unpaired["a"]})[0]["b"][62:]
    torch.testing.assert_close(one, many)
    assert not torch.allclose(few, one), "hubs count less"


def test_large_piles_are_thinned_and_partners_are_computed_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, rows, unpaired = parts()
    adapters = initial_adapters(latents, rows, PRESET, 0)
    whole = with_likely_partners(adapters, latents, rows, unpaired)[0]
    monkeypatch.setattr(module, "TILE", 2)
    for name, matrix in with_likely_partners(adapters, latents, rows, unpaired)[0].items():
        torch.testing.assert_close(matrix, whole[name])
    monkeypatch.setattr(module, "MOST", 3)
    thinned = with_likely_partners(adapters, latents, rows, unpaired)[0]
    assert torch.equal(thinned["a"][12:15], unpaired["a"][[0, 2, 4]])
    assert len(thinned["a"]) == 18


def test_unpaired_items_help_where_pairs_are_few() -> None:
    gains = []
    for seed in range(5):
        encoded, split = table(two_views(60, 1.0, seed), 20)
        pile = two_views(2_000, 1.0, seed + 100)
        unpaired = {"a": pile["a"][:1_000], "b": pile["b"][1_000:]}
        closed = closed_forms(encoded, split, PRESET, seed, {})["closed form"]
        more = self_training(encoded, split, closed, seed, unpaired)
        new = two_views(500, 1.0, seed + 200)
        gains.append(found_first(more, new) - found_first(closed, new))
    assert np.mean(gains) > 0.02, gains


def test_a_pile_that_has_nothing_to_do_with_the_pairs_has_the_lower_score() -> None:
    encoded, split = table(two_views(300, 1.0), 250)
    closed = closed_forms(encoded, split, PRESET, 0, {})["closed form"]
    generator = torch.Generator().manual_seed(0)
    noise = {name: normalize(torch.randn(2_000, dim, generator=generator)) * 20 for name, dim in {"a": 40, "b": 30}.items()}
    assert self_training(encoded, split, closed, 0, noise).score < closed.score


@pytest.fixture
def piles(toy: object, tmp_path: Path) -> Path:
    """A table in `pairs.csv`, a folder of unpaired clips, one of them in the table, and a file of texts."""
    tone_table(tmp_path)
    (tmp_path / "pile").mkdir()
    for hertz in range(300, 900, 25):
        tone(tmp_path / "pile" / f"{hertz}.wav", hertz)
    used = next((tmp_path / "clips").glob("*.wav"))
    (tmp_path / "pile" / "in the table.wav").write_bytes(used.read_bytes())
    (tmp_path / "notes.txt").write_text("\n".join(f"a tone of {hertz} hertz" for hertz in range(310, 900, 25)))
    return tmp_path


def test_align_takes_unpaired_items_and_leaves_out_those_in_the_table(run: Run, piles: Path) -> None:
    options = ("align", "--pairs", "pairs.csv", "--unpaired", "pile", "--unpaired", "notes.txt", "--no-report")
    code, out, err = run(*options)
    assert code == 0, err
    assert "Unpaired: 24 audio, 24 text." in out
    assert "self-training" in out
    code, out, _ = run(*options, "--method", "self-training", "--out", "other", "--json")
    told = json.loads(out)
    assert (told["provenance"]["method"], told["provenance"]["unpaired"]) == ("self-training", {"audio": 24, "text": 24})
    assert Bridge.load("other").method("audio", "text") == "self-training"
    # The same call reuses the bridge; one with other piles does not.
    assert json.loads(run(*options, "--method", "self-training", "--out", "other", "--json")[1])["reused"]
    (piles / "notes.txt").write_text("something else\nand more")
    code, _, err = run(*options, "--method", "self-training", "--out", "other")
    assert (code, "--overwrite" in err) == (2, True)


def test_a_broken_clip_in_a_pile_is_set_aside_unless_strict(run: Run, piles: Path) -> None:
    (piles / "pile" / "broken.wav").write_bytes(b"RIFF")
    options = ("align", "--pairs", "pairs.csv", "--unpaired", "pile", "--no-report")
    code, out, err = run(*options, "--json")
    assert code == 0, err
    assert [Path(row["item"]).name for row in json.loads(out)["set_aside"]] == ["broken.wav"]
    code, _, err = run(*options, "--strict", "--out", "strict")
    assert code == 2
    assert "broken.wav" in err
    assert not Path("strict").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--unpaired", "gone"), "there is no such file or folder"),
        (("--method", "self-training"), "self-training needs unpaired items"),
        (("--unpaired", "pile", "--freeze", "text"), "with a frozen side"),
        (("--unpaired", "empty"), "no unpaired audio or text here"),
        (("--unpaired", "known.txt"), "every unpaired item is in the table"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_message(run: Run, piles: Path, options: tuple[str, ...], told: str) -> None:
    (piles / "empty").mkdir()
    first = (piles / "pairs.csv").read_text(encoding="utf-8").splitlines()[1].split(",")
    (piles / "known.txt").write_text(next(cell for cell in first if not cell.endswith(".wav")))
    code, _, err = run("align", "--pairs", "pairs.csv", *options)
    assert (code, told in err) == (2, True), err
    assert not Path("bridges").exists() or not any(Path("bridges").glob("*/bridge.json"))
