"""Baselines of FuseMix on the same latents: the adapters before training, and ridge regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bridgekit.evaluation.recall import Embed
from bridgekit.fusion.adapter import Adapter, mean_and_std, project
from bridgekit.fusion.training import Preset, initial_adapters
from bridgekit.fusion.warm_start import joining_order
from bridgekit.hardware import widened

Map = Callable[[Tensor], Tensor]

#: Rows that are mapped at a time, in double precision.
PART_ROWS = 131_072
#: Strengths of regularisation; the best on the validation rows is taken.
RIDGE_ALPHAS = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)


def before_training(
    latents: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    preset: Preset,
    seed: int,
    fixed: Mapping[str, Adapter] | None = None,
) -> dict[str, Embed]:
    """`random` adapters, and the `closed-form start` if the preset starts training from it.

    Arguments:
        latents: modality to (m, d).
        rows: modality to the training rows' indices, negative for a hole.
        preset, seed: as for training.
        fixed: modality to an adapter that is not trained.
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
    """Ridge regression from standardised latents onto those of the modality that shares the most rows with the others.

    A modality that shares no rows with it is regressed onto those that do. If sides are fixed, all others are regressed onto
    them.

    Arguments:
        latents, rows, fixed: as for `before_training`.
        score: of an embedding on the validation rows, larger is better; chooses alpha.
    """
    from sklearn.linear_model import Ridge

    scale = {name: _standardiser(latents[name][ids[ids >= 0]]) for name, ids in rows.items()}
    anchors: dict[str, Map] = {name: partial(project, adapter) for name, adapter in (fixed or {}).items()}
    if not anchors:
        there = torch.stack([ids >= 0 for ids in rows.values()]).long()
        common = (there @ there.T).sum(1) - there.sum(1)
        # Among equals the last: of two modalities, the first is regressed onto the second.
        anchor = [*rows][max(range(len(common)), key=lambda index: (int(common[index]), index))]
        anchors = {anchor: scale[anchor]}

    def fitted(alpha: float) -> Embed:
        maps = dict(anchors)
        for name, partners in joining_order(anchors, rows):
            inputs, targets = [], []
            for partner in partners:
                both = (rows[name] >= 0) & (rows[partner] >= 0)
                inputs.append(scale[name](latents[name][rows[name][both]]))
                targets.append(maps[partner](latents[partner])[rows[partner][both]])
            model = Ridge(alpha=alpha).fit(torch.cat(inputs).double().numpy(), torch.cat(targets).double().numpy())
            maps[name] = partial(_predicted, model, scale[name])
        return lambda modality, matrix: torch.cat(
            [nn.functional.normalize(maps[modality](widened(part)), dim=-1) for part in torch.split(matrix, PART_ROWS)]
        )

    return max(map(fitted, RIDGE_ALPHAS), key=score)


def _standardiser(train: Tensor) -> Map:
    mean, std = mean_and_std(train)
    return lambda matrix: (matrix - mean) / std


def _predicted(model: Any, scale: Map, matrix: Tensor) -> Tensor:
    return torch.from_numpy(model.predict(scale(matrix).double().numpy())).float()
