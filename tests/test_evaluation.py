"""Which rows are asked, who is right, and among whom."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bridgekit.errors import BridgekitError
from bridgekit.evaluation import EncodedPairs, encode_pairs, evaluate_splits, split_recall
from bridgekit.pairs import Pairs
from bridgekit.progress import silent
from tests.toys import LetterEncoder


class OtherLetters(LetterEncoder):
    """A second text-like modality, so that pairs of strings make a table."""


def table(left: list[str], right: list[str], split: list[str], group: list[str] | None = None) -> EncodedPairs:
    other = OtherLetters(modality="other", revision="toy:other@1")
    other_items = tuple(left)
    pairs = Pairs(
        {"other": other_items, "text": tuple(right)},
        "a test",
        tuple(range(2, 2 + len(left))),
        tuple(split),
        tuple(group) if group else None,
    )
    return encode_pairs(pairs, {"other": other, "text": LetterEncoder()}, silent)


def placed(encoded: EncodedPairs, other: dict[int, list[float]], text: dict[int, list[float]]) -> dict[str, Tensor]:
    """Embeddings by row, put where each row's item is."""
    embedded = {}
    for modality, rows in (("other", other), ("text", text)):
        matrix = torch.zeros(len(encoded.latents[modality].matrix), 2)
        for row, vector in rows.items():
            matrix[encoded.ids[modality][row]] = torch.tensor(vector)
        embedded[modality] = matrix
    return embedded


def test_among_all_the_other_splits_distract_but_right_answers_that_training_saw_neither_count_nor_hinder() -> None:
    # Row 0 asks. Row 1, in training, has the same text; row 2's text is a stranger from training.
    encoded = table(["q", "seen", "else"], ["name", "name", "stranger"], ["test", "train", "train"])
    rows = np.array([0])
    near_stranger = placed(encoded, {0: [1, 0], 1: [0, 1], 2: [0, 1]}, {0: [0.6, 0.8], 2: [0.9, 0.1]})
    assert split_recall(encoded, near_stranger, rows, "other", "text", "split").at[1] == 1
    assert split_recall(encoded, near_stranger, rows, "other", "text", "all").at[1] == 0
    # Backwards, the clip of training that is right for the name too stands nearer: it is passed over.
    seen_nearer = placed(encoded, {0: [0.8, 0.6], 1: [1, 0], 2: [0, 1]}, {0: [1, 0], 2: [0, 1]})
    result = split_recall(encoded, seen_nearer, rows, "text", "other", "all")
    assert result.at[1] == 1
    assert result.candidates == 3


def test_rows_of_one_group_are_right_for_each_other() -> None:
    encoded = table(["a", "b"], ["one", "two"], ["test", "test"], ["g", "g"])
    crossed = placed(encoded, {0: [1, 0], 1: [0, 1]}, {0: [0, 1], 1: [1, 0]})
    assert split_recall(encoded, crossed, np.array([0, 1]), "other", "text").at[1] == 1
    alone = table(["a", "b"], ["one", "two"], ["test", "test"])
    assert split_recall(alone, crossed, np.array([0, 1]), "other", "text").at[1] == 0


def test_train_and_val_are_not_reported_and_every_other_split_is() -> None:
    encoded = table(list("abcd"), ["one", "two", "six", "ten"], ["train", "val", "night", "day"])
    records = evaluate_splits(encoded, encoded.pairs.split or (), lambda modality, matrix: matrix, "raw")
    assert {record["split"] for record in records} == {"night", "day"}
    assert {record["direction"] for record in records} == {"other → text", "text → other"}


def test_a_table_whose_every_row_is_bad_says_why() -> None:
    with pytest.raises(BridgekitError, match="row 2"):
        table([" ", " "], ["one", "two"], ["train", "test"])
