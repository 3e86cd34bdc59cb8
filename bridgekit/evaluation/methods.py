"""The methods that a bridge may be saved from, and the choice among them: ridge regression, the closed form, and FuseMix."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bridgekit.evaluation.recall import SAMPLES, Embed, correct_items, directions
from bridgekit.fusion.adapter import Adapter, FusionAdapter, project
from bridgekit.fusion.closed_form import ClosedForm, evenly_spread, spread_rows
from bridgekit.fusion.self_training import with_likely_partners
from bridgekit.fusion.training import Preset, initial_adapters
from bridgekit.hardware import widened
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.retrieval import BANK_ROWS, bank_penalty, best_ranks
from bridgekit.tables.splits import draw_folds

#: (query, answer) modalities to the rank of each query's best correct answer, from 1.
Ranks = dict[tuple[str, str], Tensor]

Method = Literal["ridge", "closed form", "self-training", "FuseMix"]
#: The simplest first. Self-training needs unpaired items.
METHODS: tuple[Method, ...] = ("ridge", "closed form", "self-training", "FuseMix")

#: Strengths of regularisation, in units of the mean eigenvalue of a side's covariance.
STRENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
#: With at least this many validation rows, they choose the strength; with fewer, cross-validation over the training rows does.
ENOUGH_VALIDATION = 200
#: Folds of cross-validation. No more are used than it takes to hold out this many rows.
FOLDS, HELD_OUT = 5, 1_000
#: Validation looks at this many rows at most, so that it stays a small part of training.
VALIDATION_ROWS = 4_096
#: FuseMix is taken for a simpler method if it is better in this share of the paired bootstrap's samples, and if there are this
#: many queries in some direction: its epoch was chosen by the same rows, which flatters it the more the fewer they are.
SURE, ENOUGH_QUERIES = 0.9, 50


@dataclass(frozen=True)
class Solution:
    """Adapters that a method gave.

    Arguments:
        adapters: modality to its adapter, in eval mode.
        preset: the hyperparameters that they were made with, among them their shape, and the strength in `warm_start`.
        score: recall on the rows that chose the strength; NaN for FuseMix.
    """

    adapters: Mapping[str, Adapter]
    preset: Preset
    score: float = float("nan")

    def embed(self, modality: str, latents: Tensor) -> Tensor:
        """Latents, (n, d), into the shared space, (n, dim) at unit length."""
        return project(self.adapters[modality], latents)


def bank_latents(encoded: EncodedPairs, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """The latents by which hubs are known, of up to `BANK_ROWS` of these rows, evenly spread, for each pair of modalities.

    Returns:
        for modalities a and b with rows in common, at `a/b` the latents of a, (n, d_a), and at `b/a` those of b, row by row.
    """
    banks = {}
    for a, b in combinations(encoded.ids, 2):
        both = rows[(encoded.ids[a][rows] >= 0) & (encoded.ids[b][rows] >= 0)]
        if len(both):
            chosen = both[evenly_spread(len(both), min(len(both), BANK_ROWS)).numpy()]
            for one, other in ((a, b), (b, a)):
                banks[f"{one}/{other}"] = encoded.latents[one].matrix[torch.from_numpy(encoded.ids[one][chosen])]
    return banks


class Validation:
    """Measures embeddings on some rows of a table, ranking as a search with the bridge would: hubs count less.

    Arguments:
        encoded: the table.
        known: indices of the rows that were trained on.
        rows: indices of the rows to measure on; of more than `VALIDATION_ROWS`, a random sample is used.
        fixed: directions between two of these modalities are left out: nothing that is trained changes them.
        among: only directions between these modalities; the default is all.
    """

    def __init__(
        self,
        encoded: EncodedPairs,
        known: NDArray[np.int64],
        rows: NDArray[np.int64],
        fixed: Collection[str] = (),
        among: Collection[str] | None = None,
    ) -> None:
        if len(rows) > VALIDATION_ROWS:
            rows = np.sort(np.random.default_rng(0).permutation(rows)[:VALIDATION_ROWS])
        wanted = set(encoded.ids if among is None else among)
        pairs = [pair for pair in directions(encoded, rows) if wanted >= set(pair) and not set(pair) <= set(fixed)]
        self._banks, self._small = bank_latents(encoded, known), encoded.take(rows)
        everyone = np.arange(len(rows))
        self._correct = {(query, answer): correct_items(self._small, everyone, query, answer) for query, answer in pairs}

    @classmethod
    def of_split(cls, encoded: EncodedPairs, split: NDArray[np.str_], fixed: Collection[str] = ()) -> Validation:
        """On the `val` rows of a table, of which the `train` rows were trained on."""
        return cls(encoded, np.flatnonzero(split == "train"), np.flatnonzero(split == "val"), fixed)

    def ranks(self, embed: Embed) -> Ranks:
        """(query, answer) modalities to the rank of each query's best correct answer, from 1."""
        names = dict.fromkeys(name for pair in self._correct for name in pair)
        embedded = {name: embed(name, self._small.latents[name].matrix) for name in names}
        used = [f"{a}/{b}" for a, b in self._correct]
        banks = {pair: embed(pair.split("/")[0], self._banks[pair]) for pair in used if pair in self._banks}
        return {
            (query, answer): best_ranks(
                embedded[query], embedded[answer], correct, penalty=bank_penalty(banks, query, answer, embedded[answer])
            )
            for (query, answer), correct in self._correct.items()
        }

    def figures(self, embed: Embed) -> dict[str, float]:
        """recall@1 and @10 in each direction, and the mean over directions of recall@1, @5 and @10 as `score`."""
        ranks = self.ranks(embed)
        figures = {"score": _score(ranks)}
        for (query, answer), each in ranks.items():
            figures |= {f"recall@{k} {query} → {answer}": float((each <= k).float().mean()) for k in (1, 10)}
        return figures


def _score(ranks: Ranks) -> float:
    """The mean over directions of recall@1, @5 and @10."""
    return sum(float(_hits(each).mean()) for each in ranks.values()) / max(1, len(ranks))


def _hits(ranks: Tensor) -> Tensor:
    """For each rank the mean of its recall@1, @5 and @10."""
    return torch.stack([(ranks <= k).double() for k in (1, 5, 10)]).mean(0)


def closed_forms(
    encoded: EncodedPairs, split: NDArray[np.str_], preset: Preset, seed: int, fixed: Mapping[str, Adapter]
) -> dict[Method, Solution]:
    """The methods that need no training, each with the strength of regularisation that has the best recall on held-out rows.

    `ridge` is ridge regression onto the standardised latents of the modality that shares the most rows with the others, and
    `closed form` a regularised canonical correlation analysis. If sides are fixed, there is only `ridge`, onto those.

    Arguments:
        encoded, split: the table, and each row's split.
        preset: for the width of the shared space and standardisation. The adapters have no residual blocks, unless sides are
            fixed: those of a bridge all have the same shape.
        seed: random seed of the folds of cross-validation.
        fixed: modality to an adapter that is not changed.
    """
    targets = fixed or _anchor(encoded, split)
    ridge = replace(preset, shared_dim=next(iter(targets.values())).shared_dim)
    solutions: dict[Method, Solution] = {"ridge": _best_strength(encoded, split, ridge, seed, targets)}
    if not fixed:
        solutions["closed form"] = _best_strength(encoded, split, preset, seed, {})
    return solutions if fixed else {name: _without_blocks(each) for name, each in solutions.items()}


def _without_blocks(solution: Solution) -> Solution:
    """The same without residual blocks, which are the identity in a closed form."""
    for adapter in solution.adapters.values():
        assert isinstance(adapter, FusionAdapter)
        adapter.blocks = nn.ModuleList()
    return replace(solution, preset=replace(solution.preset, blocks=0))


def _anchor(encoded: EncodedPairs, split: NDArray[np.str_]) -> dict[str, Adapter]:
    """An adapter that standardises the latents of the modality that shares the most training rows with the others.

    Of two modalities it is the second: the first is regressed onto it.
    """
    latents, rows = spread_rows(*training_rows(encoded, split))
    there = torch.stack([ids >= 0 for ids in rows.values()]).long()
    common = (there @ there.T).sum(1) - there.sum(1)
    name = [*rows][max(range(len(common)), key=lambda index: (int(common[index]), index))]
    width = latents[name].shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = FusionAdapter(width, width, 0, 1.0, 0.0).eval()
    adapter.standardise(widened(latents[name][rows[name][rows[name] >= 0]]))
    adapter.set_linear(torch.eye(width), torch.zeros(width))
    return {name: adapter}


def _best_strength(
    encoded: EncodedPairs, split: NDArray[np.str_], preset: Preset, seed: int, fixed: Mapping[str, Adapter]
) -> Solution:
    """The closed form of all training rows, with the strength that has the best recall on rows that it was not made from."""
    latents, rows = training_rows(encoded, split)
    # As training makes them, so that it starts from exactly this.
    adapters = initial_adapters(latents, rows, replace(preset, warm_start=0.0), seed, fixed)
    every = [*encoded.ids]
    # Of three or more sides that all move, the eigenproblem is large. The two with the most common rows choose the strength.
    chosen = every if fixed or len(every) == 2 else list(max(combinations(every, 2), key=lambda two: _common(rows, *two)))
    tried = {name: copy.deepcopy(adapters[name]) for name in chosen}
    best, score, _ = _held_out(encoded, split, seed, tried, fixed)
    ClosedForm(adapters, *spread_rows(latents, rows), fixed).set_adapters(best)
    return Solution(adapters, replace(preset, warm_start=best), score)


def _held_out(
    encoded: EncodedPairs, split: NDArray[np.str_], seed: int, adapters: Mapping[str, Adapter], fixed: Mapping[str, Adapter]
) -> tuple[float, float, list[Ranks]]:
    """The strength with the best recall on held-out rows, the best recall, and the ranks of each round with that strength."""
    latents = {name: each.matrix for name, each in encoded.latents.items()}
    ranks: dict[float, list[Ranks]] = {strength: [] for strength in STRENGTHS}
    for made_from, held_out in _rounds(encoded, split, seed):
        few, its_rows = spread_rows(latents, {name: torch.from_numpy(encoded.ids[name][made_from]) for name in adapters})
        form = ClosedForm(adapters, {name: few[name] for name in adapters}, its_rows, fixed)
        validation = Validation(encoded, made_from, held_out, fixed, adapters)
        for strength in STRENGTHS:
            form.set_adapters(strength)
            ranks[strength].append(validation.ranks(lambda name, matrix: project(adapters[name], matrix)))
    means = np.array([np.mean([_score(each) for each in ranks[strength]]) for strength in STRENGTHS])
    # Neighbours give about the same adapters: with them, chance has less of a say.
    smooth = np.convolve(np.pad(means, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")
    best = STRENGTHS[int(np.median(np.flatnonzero(smooth > smooth.max() - 1e-9)))]
    return best, float(means.max()), ranks[best]


def self_training(
    encoded: EncodedPairs, split: NDArray[np.str_], closed: Solution, seed: int, unpaired: Mapping[str, Tensor]
) -> Solution:
    """The closed form once more, with the same strength, from the training rows and from unpaired items.

    Arguments:
        encoded, split: a table of two modalities, and each row's split.
        closed: its closed form.
        seed: random seed of the folds of cross-validation.
        unpaired: modality to latents, see `with_likely_partners`.
    """

    def made_from(rows: NDArray[np.int64]) -> dict[str, Adapter]:
        latents = {name: each.matrix for name, each in encoded.latents.items()}
        known = spread_rows(latents, {name: torch.from_numpy(ids[rows]) for name, ids in encoded.ids.items()})
        first = initial_adapters(*known, closed.preset, seed)
        return initial_adapters(*with_likely_partners(first, *known, unpaired), closed.preset, seed)

    scores = []
    for rows, held_out in _rounds(encoded, split, seed):
        solution = Solution(made_from(rows), closed.preset)
        scores.append(_score(Validation(encoded, rows, held_out).ranks(solution.embed)))
    return Solution(made_from(np.flatnonzero(split == "train")), closed.preset, float(np.mean(scores)))


def probe(encoded: EncodedPairs, split: NDArray[np.str_], preset: Preset, seed: int) -> list[dict[str, Any]]:
    """How well the closed form of the training rows does on rows that it was not made from, without a look at test splits.

    These rows also choose its strength: the validation rows, or with few of them folds of the training rows.

    Returns:
        for each direction its `direction`, `queries`, and `recall@1`, `@5` and `@10`, as `mean_recall` takes them.
    """
    adapters = initial_adapters(*training_rows(encoded, split), replace(preset, warm_start=0.0), seed, {})
    rounds = _held_out(encoded, split, seed, adapters, {})[2]
    records = []
    for query, answer in rounds[0]:
        ranks = torch.cat([each[query, answer] for each in rounds if (query, answer) in each])
        recalls = {f"recall@{k}": float((ranks <= k).float().mean()) for k in (1, 5, 10)}
        records.append({"direction": f"{query} → {answer}", "queries": len(ranks), **recalls})
    return records


def _common(rows: Mapping[str, Tensor], a: str, b: str) -> int:
    return int(((rows[a] >= 0) & (rows[b] >= 0)).sum())


def _rounds(encoded: EncodedPairs, split: NDArray[np.str_], seed: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows to make a closed form from, and rows to measure it on."""
    train, val = np.flatnonzero(split == "train"), np.flatnonzero(split == "val")
    folds = draw_folds(encoded.pairs, encoded.ids, train, FOLDS, seed)
    if len(val) >= ENOUGH_VALIDATION or len(folds) < 2:
        yield train, val
        return
    held_out = 0
    for fold in folds:
        if held_out < HELD_OUT:
            yield np.setdiff1d(train, fold), fold
        held_out += len(fold)


@dataclass(frozen=True)
class Choice:
    """Which method was taken, and how sure the choice is.

    Arguments:
        method: what was taken.
        rival: what it was compared with.
        difference: recall of `method` less that of `rival`, the mean of recall@1, @5 and @10 over all directions.
        interval: its 95 % interval, by a paired bootstrap over queries.
        queries: number of queries, over all directions.
    """

    method: Method
    rival: Method
    difference: float
    interval: tuple[float, float]
    queries: int


def choose(solutions: Mapping[Method, Solution], validation: Validation, seed: int) -> Choice:
    """Choose among methods by the recall of their embeddings on validation rows.

    Of the closed forms, the one with the best recall on the rows that chose its strength. FuseMix is taken for it only if it is
    better in `SURE` of the bootstrap's samples, so that ties keep the simpler method, and so do tables with fewer than
    `ENOUGH_QUERIES` validation rows.

    Arguments:
        solutions: the closed forms and FuseMix.
        validation: the validation rows.
        seed: random seed of the bootstrap.
    """
    simple = max((name for name in solutions if name != "FuseMix"), key=lambda name: solutions[name].score)
    trained, known = (validation.ranks(solutions[name].embed) for name in ("FuseMix", simple))
    generator = np.random.default_rng(seed)
    samples = np.zeros(SAMPLES)
    for pair in known:
        gain = (_hits(trained[pair]) - _hits(known[pair])).numpy()
        draws = generator.integers(len(gain), size=(SAMPLES, len(gain)))
        samples += gain[draws].mean(1) / len(known)
    difference = sum(float((_hits(trained[pair]) - _hits(known[pair])).mean()) for pair in known) / max(1, len(known))
    better = float((samples > 0).mean()) >= SURE and max(map(len, known.values())) >= ENOUGH_QUERIES
    low, high = np.quantile(samples, (0.025, 0.975)).tolist()
    queries = sum(len(ranks) for ranks in known.values())
    if better:
        return Choice("FuseMix", simple, difference, (low, high), queries)
    return Choice(simple, "FuseMix", -difference, (-high, -low), queries)


def training_rows(encoded: EncodedPairs, split: NDArray[np.str_]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Modality to its latents, (m, d), and modality to the training rows' indices into them, (n,), negative for a hole."""
    latents = {modality: latents.matrix for modality, latents in encoded.latents.items()}
    rows = {modality: torch.from_numpy(ids[split == "train"]) for modality, ids in encoded.ids.items()}
    return latents, rows
