"""What FuseMix is measured against, on the same latents: the adapters before training, and ridge regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from bridgekit.evaluation.recall import Embed
from bridgekit.fusion.adapter import Adapter, mean_and_std, project
from bridgekit.fusion.training import Preset, initial_adapters
from bridgekit.fusion.warm_start import joining_order

#: Strengths of regularisation; the best on the validation rows is taken.
RIDGE_ALPHAS = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)


def before_training(
    latents: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    preset: Preset,
    seed: int,
    fixed: Mapping[str, Adapter] | None = None,
) -> dict[str, Embed]:
    """`random` adapters, and where the preset starts training from the closed-form solution, that too: `closed-form start`.

    Arguments:
        latents: modality to (m, d).
        rows: modality to the training rows' indices, negative for a hole.
        preset, seed, fixed: as for training.
    """

    def embed_with(preset: Preset) -> Embed:
        adapters = initial_adapters(latents, rows, preset, seed, fixed)
        return lambda modality, matrix: project(adapters[modality].eval(), matrix)

    methods = {"random": embed_with(replace(preset, warm_start=0.0))}
    return methods | ({"closed-form start": embed_with(preset)} if preset.warm_start else {})


def linear(
    latents: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    score: Callable[[Embed], float],
    fixed: Mapping[str, Adapter] | None = None,
) -> Embed:
    """Ridge regression from standardised latents onto those of the modality that has most rows in common with the others.

    A modality that has no rows in common with it is regressed onto those that have. Where sides are fixed, all others are
    regressed onto them.

    Arguments:
        latents: modality to (m, d).
        rows: modality to the training rows' indices, negative for a hole.
        score: of an embedding on the validation rows, larger is better; chooses alpha.
        fixed: modality to an adapter that is not trained.
    """
    from sklearn.linear_model import Ridge

    scale = {name: _standardiser(latents[name][ids[ids >= 0]]) for name, ids in rows.items()}
    anchors: dict[str, Callable[[Tensor], Tensor]]
    if fixed:
        anchors = {name: lambda matrix, name=name: project(fixed[name], matrix) for name in fixed}  # type: ignore[misc]
    else:
        there = torch.stack([ids >= 0 for ids in rows.values()]).long()
        common = (there @ there.T).sum(1) - there.sum(1)
        # Among equals the last: of two modalities, the first is regressed onto the second.
        anchor = [*rows][max(range(len(common)), key=lambda index: (int(common[index]), index))]
        anchors = {anchor: scale[anchor]}
    best: tuple[float, Embed] | None = None
    for alpha in RIDGE_ALPHAS:
        maps = dict(anchors)
        for name, partners in joining_order(anchors, rows):
            inputs, targets = [], []
            for partner in partners:
                both = (rows[name] >= 0) & (rows[partner] >= 0)
                inputs.append(scale[name](latents[name][rows[name][both]]))
                targets.append(maps[partner](latents[partner])[rows[partner][both]])
            model = Ridge(alpha=alpha).fit(torch.cat(inputs).double().numpy(), torch.cat(targets).double().numpy())
            maps[name] = lambda matrix, model=model, name=name: torch.from_numpy(  # type: ignore[misc]
                model.predict(scale[name](matrix).double().numpy())
            ).float()
        best = _better(best, lambda modality, matrix, maps=maps: nn.functional.normalize(maps[modality](matrix), dim=-1), score)  # type: ignore[misc]
    assert best is not None
    return best[1]


def _standardiser(train: Tensor) -> Callable[[Tensor], Tensor]:
    mean, std = mean_and_std(train)
    return lambda matrix: (matrix - mean) / std


def _better(best: tuple[float, Embed] | None, embed: Embed, score: Callable[[Embed], float]) -> tuple[float, Embed]:
    value = score(embed)
    return (value, embed) if best is None or value > best[0] else best
