"""Checks of latents: near-duplicates and outliers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bridgekit.checks.findings import Checked, Finding, count_of
from bridgekit.encoders import TEXT, Encoder
from bridgekit.latents.encode import encode_items
from bridgekit.progress import Report
from bridgekit.retrieval import similar_pairs

#: Distinct items are near-duplicates if their centred latents have this cosine similarity.
SAME = 0.9999
#: Maximum number of items for the pairwise comparison.
FEW = 20_000
#: Maximum number of near-duplicate pairs to report.
MAX_PAIRS = 1_000
#: Latents are outliers if their distance from the median is this many times the typical one; they distort standardisation.
FAR = 100
#: Latents barely differ if the share of their energy that is not common to all items is below this.
HARDLY = 1e-4


def latent_findings(
    checked: Checked, modality: str, encoder: Encoder, report: Report
) -> tuple[list[Finding], dict[str, float]]:
    """Encode a column and check its latents."""
    rows = np.array([*checked.distinct(modality)], np.int64)
    encoded = encode_items(encoder, [checked.pairs.columns[modality][row] for row in rows.tolist()], report=report)
    findings = []
    if encoded.failed:
        items = tuple(checked.describe(int(rows[at]), modality, why) for at, why in encoded.failed.items())
        what = f"{count_of(len(items), f'{modality} item')} cannot be encoded: `align` will set the rows aside"
        findings.append(Finding("set aside", "warning", what, "fix them, or remove their rows", items))
    kept = encoded.ids >= 0
    matrix, rows = encoded.matrix[encoded.ids[kept]].double(), rows[kept]
    if len(rows) < 3:
        return findings, {}
    centred = matrix - matrix.mean(0)
    own = float(centred.square().sum() / matrix.square().sum().clamp_min(1e-300))
    if own < HARDLY:
        what = f"the {modality} latents barely differ: {100 * (1 - own):.3f} % is common to all items"
        findings.append(Finding("latents", "warning", what, "check that the items differ, or use another encoder"))
    findings += _near_and_far(checked, modality, rows, matrix)
    flat = int((centred.std(0) < 1e-3 * centred.std(0).median()).sum())
    if flat:
        what = f"{flat:,} of {matrix.shape[1]:,} dimensions of the {modality} latents barely vary"
        findings.append(Finding("latents", "note", what, "nothing to do: adapters ignore them"))
    findings += _near_duplicates(checked, modality, rows, centred)
    return findings, {"share of latents in common": round(1 - own, 4), "dimensions": matrix.shape[1]}


def _near_and_far(checked: Checked, modality: str, rows: NDArray[np.int64], matrix: Tensor) -> Iterator[Finding]:
    """Items whose latents are very far from all others, or indistinguishable from the median."""
    distance = (matrix - matrix.median(0).values).norm(dim=1)
    typical = distance.median()
    for mask, what, remedy in (
        (distance > FAR * typical, "far from all others, which distorts training", "inspect them, or remove their rows"),
        (distance < typical / 1_000, "at the median of all others", "remove their rows if they are empty"),
    ):
        items = tuple(checked.describe(row, modality) for row in rows[mask.numpy()].tolist())
        if items:
            what = f"{count_of(len(items), f'{modality} item')} with latents {what}"
            yield Finding("latents", "warning", what, remedy, items)


def _near_duplicates(checked: Checked, modality: str, rows: NDArray[np.int64], centred: Tensor) -> Iterator[Finding]:
    """Distinct items that the encoder cannot tell apart: between train and other splits, and within them."""
    if len(rows) > FEW:
        what = f"{len(rows):,} {modality} items were not checked for near-duplicates: the limit is {FEW:,}"
        yield Finding("near-duplicate", "note", what, "check a part of the table")
        return
    across: list[str] = []
    within: list[str] = []
    for one, other, cosine in similar_pairs(centred.float(), SAME, MAX_PAIRS):
        first, second = int(rows[one]), int(rows[other])
        leaking = len({checked.split[first] == "train", checked.split[second] == "train"}) > 1
        line = f"{checked.describe(first, modality)} = {checked.describe(second, modality)} (cosine {cosine:.6f})"
        (across if leaking else within).append(line)
    grade = "note" if modality == TEXT else "warning"
    if across:
        what = f"{count_of(len(across), 'pair')} of near-duplicate {modality} items between train and another split"
        yield Finding("near-duplicate", grade, what, "if they are copies, put both in one split", tuple(across))
    if within:
        what = f"{count_of(len(within), 'pair')} of near-duplicate {modality} items"
        yield Finding("near-duplicate", "note", what, "check whether they are copies", tuple(within))
