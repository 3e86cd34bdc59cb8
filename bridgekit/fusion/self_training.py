"""Self-training: unpaired items, with their likely partners, as further rows for the closed form."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bridgekit.fusion.adapter import Adapter, project
from bridgekit.fusion.closed_form import evenly_spread
from bridgekit.hardware import widened
from bridgekit.retrieval import BANK_ROWS, hub_penalty

#: A pair has the weight of this many unpaired items.
PAIR_WEIGHT = 4
#: Temperature of the softmax over similarities.
TEMPERATURE = 0.05
#: Unpaired items of a modality, and candidates for their partners, at most; of more, as many are taken, evenly spread.
MOST = 16_384
#: Unpaired items whose partners are computed at a time.
TILE = 512


def with_likely_partners(
    adapters: Mapping[str, Adapter], latents: Mapping[str, Tensor], rows: Mapping[str, Tensor], unpaired: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows of a table, and one for each unpaired item with its likely partner.

    The partner is not one item but the mean of the latents of all items of the other modality, paired or not, each weighted by
    how similar the adapters find it, less its `hub_penalty`.

    Arguments:
        adapters: two modalities' adapters, made from the table.
        latents: modality to its distinct items' latents, (m_modality, d_modality).
        rows: modality to n indices into them; every row has both items.
        unpaired: modality to the latents of unpaired items, (u_modality, d_modality). A modality may be missing.

    Returns:
        latents and rows, of which each pair has `PAIR_WEIGHT`.

    Source: self-training with a linear teacher, as in SOTAlign (arXiv 2602.23353), with a softmax in place of optimal
    transport, which was no better here.
    """
    paired = {name: widened(latents[name][rows[name]]) for name in adapters}
    n = len(next(iter(paired.values())))
    banks = {name: project(adapters[name], _spread(matrix, BANK_ROWS)) for name, matrix in paired.items()}
    parts = {name: [matrix] for name, matrix in paired.items()}
    for name, other in zip(adapters, reversed(list(adapters)), strict=True):
        if name in unpaired:
            own = widened(_spread(unpaired[name], MOST))
            known = latents[other][torch.unique(rows[other])]
            candidates = widened(_spread(torch.cat([known, unpaired[other]]) if other in unpaired else known, MOST))
            embedded = project(adapters[other], candidates)
            penalty = hub_penalty(embedded, banks[name], banks[other])
            parts[name].append(own)
            parts[other].append(_likely_partners(project(adapters[name], own), embedded, penalty, candidates))
    matrices = {name: torch.cat(each) for name, each in parts.items()}
    extended = torch.cat([torch.arange(n).repeat(PAIR_WEIGHT), torch.arange(n, len(next(iter(matrices.values()))))])
    return matrices, dict.fromkeys(matrices, extended)


def _likely_partners(queries: Tensor, embedded: Tensor, penalty: Tensor, candidates: Tensor) -> Tensor:
    """(u, d) for each query the mean of the candidates, (m, d), weighted by the softmax of their similarities."""
    tiles = (((tile @ embedded.T - penalty) / TEMPERATURE).softmax(1) @ candidates for tile in torch.split(queries, TILE))
    return torch.cat([*tiles])


def _spread(matrix: Tensor, most: int) -> Tensor:
    """At most so many rows of a matrix, evenly spread."""
    return matrix if len(matrix) <= most else matrix[evenly_spread(len(matrix), most)]
