"""Checks of latents: items that an encoder cannot tell apart, and outliers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bridgekit.checks.findings import Checked, Finding, count_of
from bridgekit.encoders import TEXT, Encoder
from bridgekit.latents.encode import encode_items
from bridgekit.progress import Report
from bridgekit.retrieval import alike

#: Different items whose latents have this cosine around the mean are the same to an encoder.
SAME = 0.9999
#: Comparing all with all is cheap for this many items.
FEW = 20_000
#: Pairs of such items that are told at most.
MOST_ALIKE = 1_000
#: Latents so many times as far from the middle as those of most items are outliers, which one mean and deviation cannot hold.
FAR = 100
#: Latents of which less than this part is an item's own, the rest being common to all, hardly differ.
HARDLY = 1e-4


def latent_findings(
    checked: Checked, modality: str, encoder: Encoder, report: Report
) -> tuple[list[Finding], dict[str, float]]:
    """Encode a column and look at its latents."""
    rows = checked.first_rows(modality)
    encoded = encode_items(
        encoder,
        [checked.pairs.columns[modality][row] for row in rows.tolist()],
        progress=lambda done, total: report(f"encoding {modality}", done, total),
    )
    findings = []
    if encoded.failed:
        items = tuple(checked.told(int(rows[at]), modality, why) for at, why in encoded.failed.items())
        what = f"{count_of(len(items), f'{modality} item')} not to be encoded: `align` will set the rows aside"
        findings.append(Finding("set aside", "warning", what, "mend them, or remove their rows", items))
    kept = encoded.ids >= 0
    matrix, rows = encoded.matrix[encoded.ids[kept]].double(), rows[kept]
    if len(rows) < 3:
        return findings, {}
    centred = matrix - matrix.mean(0)
    own = float(centred.square().sum() / matrix.square().sum().clamp_min(1e-300))
    if own < HARDLY:
        what = f"the latents of {modality} hardly differ: {100 * (1 - own):.3f} % of them is common to all"
        findings.append(Finding("latents", "warning", what, "see that the items differ, or take another encoder"))
    findings += _near_and_far(checked, modality, rows, matrix)
    flat = int((centred.std(0) < 1e-3 * centred.std(0).median()).sum())
    if flat:
        what = f"{flat:,} of {matrix.shape[1]:,} dimensions of the latents of {modality} hardly vary"
        findings.append(Finding("latents", "note", what, "nothing: adapters make no use of them"))
    findings += _alike(checked, modality, rows, centred)
    return findings, {"share of latents in common": round(1 - own, 4), "dimensions": matrix.shape[1]}


def _near_and_far(checked: Checked, modality: str, rows: NDArray[np.int64], matrix: Tensor) -> list[Finding]:
    """Items whose latents are those of no item in particular, and items whose latents dwarf all others."""
    distance = (matrix - matrix.median(0).values).norm(dim=1)
    typical = distance.median()
    findings = []
    for mask, what, remedy in (
        (distance > FAR * typical, "dwarf those of all others: they spoil all", "remove their rows, and see what they hold"),
        (
            distance < typical / 1_000,
            "are in the middle of all: nothing tells them apart",
            "remove their rows if they are empty",
        ),
    ):
        items = tuple(checked.told(row, modality) for row in rows[mask.numpy()].tolist())
        if items:
            findings.append(
                Finding(
                    "latents", "warning", f"the latents of {count_of(len(items), f'{modality} item')} {what}", remedy, items
                )
            )
    return findings


def _alike(checked: Checked, modality: str, rows: NDArray[np.int64], centred: Tensor) -> list[Finding]:
    """Different items that are the same to the encoder: across train and other splits, and otherwise."""
    if len(rows) > FEW:
        what = f"{modality}: whether some of {len(rows):,} items are near-duplicates was not looked at: there are over {FEW:,}"
        return [Finding("near-duplicate", "note", what, "check a part of the table")]
    across: list[str] = []
    within: list[str] = []
    for one, other, cosine in alike(centred.float(), SAME, MOST_ALIKE):
        first, second = int(rows[one]), int(rows[other])
        leaking = len({checked.split[first] == "train", checked.split[second] == "train"}) > 1
        line = f"{checked.told(first, modality)} = {checked.told(second, modality)} (cosine {cosine:.6f})"
        (across if leaking else within).append(line)
    grade = "note" if modality == TEXT else "warning"
    findings = []
    if across:
        what = f"{count_of(len(across), 'pair')} of different {modality} items, one in train, one not, the same to the encoder"
        findings.append(
            Finding("near-duplicate", grade, what, "see whether they are copies; one split should have both", tuple(across))
        )
    if within:
        what = f"{count_of(len(within), 'pair')} of different {modality} items, the same to the encoder"
        findings.append(Finding("near-duplicate", "note", what, "see whether they are copies", tuple(within)))
    return findings
