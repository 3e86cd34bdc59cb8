"""Zero-shot classification with text prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bridgekit.bridge.bridge import Bridge
from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.bridges import EvalOptions, leave_out_seen, sides_in
from bridgekit.pairs import SetAside
from bridgekit.progress import Report, silent
from bridgekit.retrieval import TEMPLATES, class_embeddings, search
from bridgekit.tables.splits import test_splits


@dataclass(frozen=True)
class ZeroShot:
    """Result of zero-shot classification.

    Arguments:
        modality, items: the modality and the number of the classified items.
        accuracy: top-1 accuracy.
        per_class: class to accuracy.
        templates: the prompt templates.
        set_aside: rows that were not used.
    """

    modality: str
    items: int
    accuracy: float
    per_class: Mapping[str, float]
    templates: Sequence[str]
    set_aside: Sequence[SetAside]


def evaluate_zero_shot(
    bridge: Bridge, options: EvalOptions, templates: Sequence[str] = TEMPLATES, report: Report = silent
) -> ZeroShot:
    """Classify the non-text items of a table, with its texts as class names.

    Arguments:
        bridge: a bridge with a text side.
        options: which rows; for the bridge's own table, items seen in training are always set aside.
        templates: prompts with `{}` in place of the class name.

    Raises:
        BridgekitError: the bridge has no text side, no row is left, or items were seen in training and `unseen` is off.
    """
    bridge.side(TEXT)
    foreign = options.pairs is not None
    if options.pairs is not None:
        opened = bridge.open_other(options.pairs, options.columns, outside=options.outside)
    else:
        opened = bridge.open_own(bridge.tables[0], outside=options.outside)
    modality = next(name for name in (*sides_in(bridge, opened), *bridge.sides) if name != TEXT)
    table = opened.pairs((modality, TEXT))
    names = table.columns[TEXT]
    wanted = list(options.splits or (test_splits(table.split) if table.split else ())) or None
    rows = [row for row in range(len(table)) if names[row] and (not wanted or not table.split or table.split[row] in wanted)]
    if not rows:
        raise BridgekitError("no rows to classify", where=table.source, remedy="check --split")
    rows, left_out = leave_out_seen(bridge, table, rows, modality, refuse=foreign and not options.unseen)
    embedded = bridge.embed_usable(modality, [table.columns[modality][row] or "" for row in rows], report=report)
    failed = [
        SetAside(table.rows[rows[at]], modality, str(table.columns[modality][rows[at]]), why)
        for at, why in embedded.failed.items()
    ]
    truth = [str(names[row]) for position, row in enumerate(rows) if position not in embedded.failed]
    classes = sorted(set(truth))
    prompts = class_embeddings(lambda texts: bridge.embed(TEXT, texts), classes, templates)
    penalty = bridge.hub_penalty(modality, TEXT, prompts)
    predicted = search(embedded.vectors, prompts, 1, penalty)[1][:, 0].tolist()
    right = np.array([classes[index] == true for index, true in zip(predicted, truth, strict=True)])
    per_class = {name: float(right[[true == name for true in truth]].mean()) for name in classes}
    set_aside = (*table.set_aside, *failed, *(left_out if foreign else ()))
    return ZeroShot(modality, len(truth), float(right.mean()), per_class, templates, set_aside)
