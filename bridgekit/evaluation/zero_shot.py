"""Zero-shot classification: text prompts as classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.pairs import SetAside
from bridgekit.progress import Report
from bridgekit.retrieval import class_embeddings, search
from bridgekit.tables.reading import read_pairs

if TYPE_CHECKING:
    from bridgekit.bridge.bridge import Bridge

from bridgekit.evaluation.bridges import leave_out_seen, sides_in
from bridgekit.tables.splits import test_splits


@dataclass(frozen=True)
class ZeroShot:
    """Classification by text prompts alone.

    Arguments:
        modality: what was classified.
        items: how many.
        accuracy: the share whose class was the most similar one.
        per_class: class to its items' accuracy.
        templates: the prompts.
        set_aside: rows that could not be used.
    """

    modality: str
    items: int
    accuracy: float
    per_class: Mapping[str, float]
    templates: Sequence[str]
    set_aside: Sequence[SetAside]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "modality": self.modality,
            "items": self.items,
            "accuracy": self.accuracy,
            "per_class": dict(self.per_class),
            "templates": list(self.templates),
            "set_aside": [vars(row) for row in self.set_aside],
        }


def evaluate_zero_shot(
    bridge: Bridge,
    pairs: str | Path | None,
    templates: Sequence[str],
    splits: Sequence[str] | None,
    report: Report,
    *,
    unseen: bool = False,
    outside: bool = False,
) -> ZeroShot:
    """Classify the items of the side that is not text by prompts made of the texts of the table, taken as class names.

    Arguments:
        bridge: a bridge with a text side.
        pairs: a table or source; None is the one that the bridge was trained on.
        templates: prompts with `{}` for the class.
        splits: which splits to ask, where the table has them; by default all but `train` and `val`, or else every row.
        report: progress.
        unseen: set aside those rows to be asked whose item training saw, as is always done with the bridge's own table.
        outside: let the table name files outside its own folder.

    Raises:
        BridgekitError: no text side, no row left, or rows that training saw, which `unseen` does not set aside.
    """
    bridge.side(TEXT)
    source = pairs or bridge.followed(bridge.tables[0].source)
    modality = next(name for name in (*sides_in(bridge, source), *bridge.sides) if name != TEXT)
    table = read_pairs(source, (modality, TEXT), outside=outside)
    names = table.columns[TEXT]
    wanted = list(splits or (test_splits(table.split) if table.split else ())) or None
    rows = [row for row in range(len(table)) if names[row] and (not wanted or not table.split or table.split[row] in wanted)]
    if not rows:
        raise BridgekitError("there is no row to classify", where=table.source, remedy="look at --split")
    rows, left_out = leave_out_seen(bridge, table, rows, modality, refuse=pairs is not None and not unseen)
    embedded = bridge.embed_usable(modality, [table.columns[modality][row] or "" for row in rows], report=report)
    failed = [
        SetAside(table.rows[rows[at]], modality, str(table.columns[modality][rows[at]]), why)
        for at, why in embedded.failed.items()
    ]
    truth = [str(names[row]) for position, row in enumerate(rows) if position not in embedded.failed]
    classes = sorted(set(truth))
    prompts = class_embeddings(lambda texts: bridge.embed(TEXT, texts), classes, templates)
    predicted = search(embedded.vectors, prompts, 1)[1][:, 0].tolist()
    right = np.array([classes[index] == true for index, true in zip(predicted, truth, strict=True)])
    per_class = {name: float(right[[true == name for true in truth]].mean()) for name in classes}
    return ZeroShot(
        modality,
        len(truth),
        float(right.mean()),
        per_class,
        templates,
        (*table.set_aside, *failed, *(left_out if pairs else ())),
    )
