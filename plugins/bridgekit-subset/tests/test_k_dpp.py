"""A diverse choice is the one that plain greedy log-determinant maximisation makes, without its kernel in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from bridgekit_subset import k_dpp
from bridgekit_subset.k_dpp import choose_subset, greedy_k_dpp
from bridgekit_subset.pairs import choose_pairs
from bridgekit_subset.writing import WRITTEN, write_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bridgekit.errors import BridgekitError
from bridgekit.pairs import Pairs
from bridgekit.tables.reading import read_pairs
from tests.toys import tone_table

Matrix = NDArray[np.float32]
KINDS = ("plain", "clustered", "low rank", "integers", "few directions")


def latents(kind: str, n: int, d: int, seed: int) -> Matrix:
    """Latents of some kind: integers have zero vectors, duplicates and ties among them."""
    rng = np.random.default_rng(seed)
    if kind == "clustered":
        x = rng.normal(size=(3, d))[rng.integers(0, 3, n)] + 0.1 * rng.normal(size=(n, d))
    elif kind == "low rank":
        x = rng.normal(size=(n, 1)) @ rng.normal(size=(1, d)) + rng.normal(size=d)
    elif kind == "integers":
        x = rng.integers(-1, 2, (n, d))
    elif kind == "few directions":
        x = np.eye(d)[rng.integers(0, d, n)] * rng.integers(0, 3, (n, 1))
    else:
        x = rng.normal(size=(n, d))
    return x.astype(np.float32)


def kernel(x: Matrix) -> NDArray[np.float64]:
    """The n x n kernel of the paper."""
    lengths = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    unit = x / np.where(lengths > 0, lengths, 1)
    return np.asarray((unit @ unit.T + 1) ** 2)


def naive_gains(whole: NDArray[np.float64], chosen: list[int]) -> NDArray[np.float64]:
    """By what factor each item would increase the determinant, worked out from whole determinants; -1 for the chosen."""

    def log_det(items: list[int]) -> float:
        return float(np.linalg.slogdet(whole[np.ix_(items, items)])[1])

    before = log_det(chosen)
    return np.array([-1.0 if j in chosen else np.exp(log_det([*chosen, j]) - before) for j in range(len(whole))])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A front, batches and tiles so small that a few items need many."""
    monkeypatch.setattr(k_dpp, "FRONT", 4)
    monkeypatch.setattr(k_dpp, "BATCH", 7)
    monkeypatch.setattr(k_dpp, "TILE", 3)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 22),
    d=st.integers(1, 5),
    k=st.integers(1, 22),
    front=st.integers(1, 8),
    batch=st.integers(1, 25),
    tile=st.integers(1, 5),
    seed=st.integers(0, 9_999),
)
def test_every_choice_is_the_one_of_greedy_determinant_maximisation(
    kind: str, n: int, d: int, k: int, front: int, batch: int, tile: int, seed: int
) -> None:
    x = latents(kind, n, d, seed)
    whole = kernel(x)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("FRONT", front), ("BATCH", batch), ("TILE", tile)):
            patch.setattr(k_dpp, name, value)
        found = greedy_k_dpp(x, k)
    items = found.items.tolist()
    assert len(set(items)) == len(items) <= min(n, k)
    for step, item in enumerate(items):
        gains = naive_gains(whole, items[:step])
        best = gains.max()
        if best < 1e-5:  # whole determinants say no more
            return
        assert found.gains[step] == pytest.approx(gains[item], rel=1e-4)
        assert gains[item] >= best - 1e-9
        tied, near = np.flatnonzero(gains >= best - 1e-11), np.flatnonzero(gains >= best - 1e-8)
        if len(tied) == len(near):
            assert item == tied[0], "of equally good items the first is taken"
    if len(items) < min(n, k):
        assert naive_gains(whole, items).max() < 1e-5, "it stops only where nothing is left to gain"


def plain_greedy(x: Matrix, k: int) -> list[int]:
    """Fast greedy MAP inference as Chen et al. write it: the whole kernel, and every item's row of the factor."""
    whole, rows = kernel(x), np.zeros((len(x), k))
    gains, chosen = np.diag(whole).copy(), list[int]()
    for step in range(k):
        best = int(np.round(gains, 10).argmax())
        column = (whole[:, best] - rows[:, :step] @ rows[best, :step]) / np.sqrt(gains[best])
        rows[:, step] = column
        gains -= column**2
        chosen.append(best)
        gains[chosen] = -np.inf
    return chosen


@pytest.mark.parametrize(("n", "d", "k"), [(3_000, 48, 300), (2_000, 12, 60)])
def test_thousands_of_items_are_chosen_as_plain_greedy_chooses_them_with_a_fraction_of_its_gains(
    n: int, d: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(k_dpp, "FRONT", 64)
    monkeypatch.setattr(k_dpp, "BATCH", 200)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(40, d))[rng.integers(0, 40, n)] + 0.4 * rng.normal(size=(n, d))).astype(np.float32)
    found = greedy_k_dpp(x, k)
    assert found.items.tolist() == plain_greedy(x, k)
    assert n < found.evaluations < n * k / 3


def test_gains_are_right_down_to_where_they_end(small: None) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(10, 8))[rng.integers(0, 10, 60)] + 1e-4 * rng.normal(size=(60, 8))).astype(np.float32)
    found = greedy_k_dpp(x, 60)
    # In extended precision: small gains of near duplicates are what double precision's determinants cannot tell.
    unit = x.astype(np.longdouble)
    unit /= np.sqrt((unit**2).sum(1, keepdims=True))
    whole = (unit @ unit.T + 1) ** 2
    rows, gains = np.zeros((60, 60), np.longdouble), np.diag(whole).copy()
    for step, item in enumerate(found.items):
        assert found.gains[step] == pytest.approx(float(gains[item]), abs=1e-12)
        assert gains[item] >= gains.max() - 2e-10
        column = (whole[:, item] - rows[:, :step] @ rows[item, :step]) / np.sqrt(gains[item])
        rows[:, step] = column
        gains = gains - column**2
        gains[found.items[: step + 1]] = -1
    assert found.gains[-1] < 1e-6, "near duplicates were among them"


def test_a_smaller_choice_is_the_beginning_of_a_larger_one(small: None) -> None:
    x = latents("plain", 40, 5, 0)
    large = choose_subset(x, 15)
    for k in range(15):
        assert choose_subset(x, k).tolist() == large[:k].tolist()


def test_the_lengths_of_latents_do_not_matter(small: None) -> None:
    x = latents("clustered", 40, 5, 0)
    stretched = x * np.random.default_rng(1).choice([0.001, 0.25, 8, 3_000], (40, 1)).astype(np.float32)
    assert choose_subset(stretched, 12).tolist() == choose_subset(x, 12).tolist()


@pytest.mark.parametrize("convert", [torch.from_numpy, np.float64, np.asfortranarray])
def test_tensors_and_arrays_of_any_layout_give_the_same(convert: object) -> None:
    x = latents("plain", 40, 5, 0)
    assert choose_subset(convert(x), 12).tolist() == choose_subset(x, 12).tolist()  # type: ignore[operator]


def test_duplicates_wait_until_every_other_item_has_been_taken(small: None) -> None:
    distinct = latents("plain", 8, 4, 0)
    x = distinct[[0, 0, 1, 2, 0, 3, 3, 4, 5, 6, 7, 1]]
    for k in range(1, 13):
        chosen = choose_subset(x, k)
        assert len(set(chosen.tolist())) == k
        assert len(np.unique(x[chosen], axis=0)) == min(k, 8)
    assert choose_subset(x, 11)[8:].tolist() == [1, 6, 11], "second copies come in order, before the third"


def test_items_that_add_nothing_follow_in_order(small: None) -> None:
    angles = np.linspace(0, 6, 30)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    chosen = choose_subset(circle, 12)
    assert len(greedy_k_dpp(circle, 12).items) == 5, "on a circle the kernel has rank 5"
    others = [item for item in range(30) if item not in chosen[:5]]
    assert chosen[5:].tolist() == others[:7]


def test_a_zero_vector_has_cosine_0_with_everything(small: None) -> None:
    x = np.array([[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 2, 0], [0.1, 0, 5]], np.float32)
    assert choose_subset(x, 5).tolist() == [0, 1, 3, 4, 2], "all distinct ones are taken, and then the second zero"
    assert choose_subset(x, 3).tolist() == [1, 3, 4]
    assert choose_subset(np.zeros((4, 3)), 2).tolist() == [0, 1]


def test_identical_items_are_taken_in_order() -> None:
    assert choose_subset(np.ones((1_000, 6)), 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", k_dpp.METHODS)
def test_no_more_than_there_are_and_none_at_all(method: str) -> None:
    x = latents("plain", 6, 3, 0)
    for k in (6, 7, 1_000):
        assert sorted(choose_subset(x, k, method=method).tolist()) == list(range(6))
    assert choose_subset(x, 0, method=method).tolist() == []
    assert len(choose_subset(x, 1, method=method)) == 1
    assert choose_subset(x[:0], 3, method=method).tolist() == []


def test_a_uniform_draw_is_by_seed_and_reaches_every_item() -> None:
    x = latents("plain", 10, 3, 0)
    draws = [choose_subset(x, 4, method="uniform", seed=seed).tolist() for seed in range(30)]
    assert draws[7] == choose_subset(x, 4, method="uniform", seed=7).tolist()
    assert all(len(set(draw)) == 4 for draw in draws)
    assert {item for draw in draws for item in draw} == set(range(10))


def test_a_diverse_choice_has_the_larger_determinant() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(30, 16))[rng.integers(0, 30, 800)] + 0.3 * rng.normal(size=(800, 16))).astype(np.float32)
    whole = kernel(x)

    def log_det(items: NDArray[np.int64]) -> float:
        return float(np.linalg.slogdet(whole[np.ix_(items, items)])[1])

    diverse = log_det(choose_subset(x, 50))
    assert diverse > max(log_det(choose_subset(x, 50, method="uniform", seed=seed)) for seed in range(5)) + 20
    assert diverse == pytest.approx(np.log(greedy_k_dpp(x, 50).gains).sum())


def test_neither_the_kernel_nor_a_row_for_every_item_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(k_dpp, "FRONT", 64)
    monkeypatch.setattr(k_dpp, "BATCH", 512)
    n, k = 10_000, 600
    x = latents("plain", n, 40, 0)
    tracemalloc.start()
    try:
        assert len(choose_subset(x, k)) == k
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * n * k / 2 < 8 * n * n / 50


def test_progress_is_reported_up_to_the_end() -> None:
    told: list[tuple[str, int, int]] = []
    choose_subset(latents("plain", 40, 5, 0), 12, report=lambda *what: told.append(what))
    assert told == [("choosing", done, 12) for done in range(1, 13)]


@pytest.mark.parametrize(
    ("x", "k", "method", "expected"),
    [
        (np.ones((3, 2)), -1, "k-dpp", "-1 items"),
        (np.ones((3, 2)), 2, "best", "k-dpp, uniform"),
        (np.ones(3), 2, "k-dpp", "matrix"),
        (np.array([[1.0, 2], [0, 1], [np.nan, 1]]), 2, "k-dpp", "item 2"),
        (np.array([[1.0, 2], [np.inf, 1], [0, 1]]), 2, "k-dpp", "item 1"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(x: NDArray[np.float64], k: int, method: str, expected: str) -> None:
    with pytest.raises(BridgekitError) as caught:
        choose_subset(x, k, method=method)
    assert expected in str(caught.value)


# ---- tables


@pytest.mark.parametrize("ending", WRITTEN)
def test_a_written_table_is_read_as_it_was(tmp_path: Path, ending: str) -> None:
    far, near = tmp_path / "far", tmp_path / "here" / "clips"
    for folder in (far, near):
        folder.mkdir(parents=True)
        for name in ("a.wav", "Köter, 犬.wav"):
            (folder / name).write_bytes(b"x")
    files = (far / "a.wav", near / "a.wav", None, near / "Köter, 犬.wav", tmp_path / "here" / ".." / "far" / "a.wav")
    texts = ('a "dog", barking', "tab\tand\nline\rbreak", "Bär", "犬", None)
    pairs = Pairs(
        {"audio": files, "image": (None, None, near / "a.wav", None, near / "a.wav"), "text": texts},
        "somewhere",
        (2, 3, 4, 5, 6),
        ("train", "val", "train", "test", "train"),
        ("one", "", "two", "", "one"),
    )
    table = tmp_path / "here" / f"table{ending}"
    write_pairs(pairs, table)
    read = read_pairs(table, ("audio", "image", "text"), outside=True)
    assert dict(read.columns) == dict(pairs.columns)
    assert (read.split, read.group, read.set_aside) == (pairs.split, pairs.group, ())
    assert b"clips/" in table.read_bytes(), "files below the table's folder are named from there"
    assert str(near).encode() not in table.read_bytes()


def test_a_write_that_fails_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "chosen.csv"
    table.write_text("old")

    def full(columns: object, suffix: str, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bridgekit_subset.writing._write", full)
    with pytest.raises(BridgekitError, match="No space left"):
        write_pairs(Pairs({"text": ("a",)}, "somewhere", (2,)), table)
    assert table.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["chosen.csv"]


@pytest.mark.usefixtures("toy")
def test_rows_are_chosen_from_python_with_or_without_a_file(tmp_path: Path) -> None:
    table = read_pairs(tone_table(tmp_path), ("audio", "text"))
    done = choose_pairs(table, 20, progress=False)
    assert (done.chosen, done.candidates, done.distinct, done.kept) == (20, 120, 20, {})
    assert len(set(done.pairs.columns["text"])) == 20
    assert list(done.pairs.rows) == sorted(done.pairs.rows)
    assert list(tmp_path.glob("chosen*")) == []
    with pytest.raises(BridgekitError, match="no column `text`"):
        choose_pairs(Pairs({"audio": table.columns["audio"]}, "half", table.rows), 20, progress=False)


@pytest.mark.usefixtures("toy")
def test_rows_without_an_item_to_choose_by_are_set_aside_unless_they_are_to_test_on() -> None:
    texts = ("owl", None, "cat", "dog", None)
    table = Pairs({"text": texts, "smell": ("a", "b", "c", "d", "e")}, "nose", (2, 3, 4, 5, 6), ("train",) * 4 + ("test",))
    done = choose_pairs(table, 9, progress=False)
    assert done.pairs.columns["text"] == ("owl", "cat", "dog", None)
    assert [(row.row, row.column, row.reason) for row in done.pairs.set_aside] == [
        (3, "text", "no item in the column to choose by")
    ]


@pytest.mark.usefixtures("toy")
def test_the_seed_decides_which_row_of_a_text_is_chosen(tmp_path: Path) -> None:
    table = read_pairs(tone_table(tmp_path), ("audio", "text"))
    copies = [
        str(item).split()[-1]
        for seed in range(3)
        for item in choose_pairs(table, 20, seed=seed, progress=False).pairs.columns["audio"]
    ]
    assert len(set(copies)) == 6, "every clip of a name has a chance"
