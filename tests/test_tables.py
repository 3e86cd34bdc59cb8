"""Every verb opens the table that it is given once, whatever it needs from it."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bridgekit_subset import choose_pairs

from bridgekit import Bridge, align, bind, check_pairs
from bridgekit.evaluation.bridges import EvalOptions, evaluate_bridge
from bridgekit.evaluation.zero_shot import evaluate_zero_shot
from bridgekit.recipes.encode import encode_table
from tests.painting import Workshop
from tests.test_align import QUICK
from tests.toys import tone_table

_opened: list[str] = []
sys.addaudithook(lambda event, arguments: _opened.append(str(arguments[0])) if event == "open" else None)


@contextmanager
def opened_once(path: Path) -> Iterator[None]:
    """This process opens the file once in here. (The decoder process opens a Parquet file too, for the one that asked.)"""
    before = len(_opened)
    yield
    assert [os.path.abspath(name) for name in _opened[before:]].count(str(path)) == 1  # noqa: PTH100


@pytest.fixture(params=["csv", "jsonl", "parquet"])
def table(request: pytest.FixtureRequest, toy: object, tmp_path: Path) -> Path:
    """120 real clips and their names, and a column that is not a modality."""
    source = tone_table(tmp_path)
    with source.open(encoding="utf-8", newline="") as file:
        rows = [{**row, "year": "1990"} for row in csv.DictReader(file)]
    path = tmp_path / f"table.{request.param}"
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        source.rename(path)
    return path


VERBS: dict[str, Callable[[Path], object]] = {
    "align": lambda table: align(pairs=table, out="again", preset=QUICK, progress=False),
    "check": lambda table: check_pairs(table, progress=False),
    "encode": lambda table: encode_table(pairs=table, progress=False),
    "eval": lambda table: evaluate_bridge(Bridge.load("bridge"), EvalOptions()),
    "eval --pairs": lambda table: evaluate_bridge(Bridge.load("bridge"), EvalOptions(pairs=table, unseen=True)),
    "eval --zero-shot": lambda table: evaluate_zero_shot(Bridge.load("bridge"), EvalOptions()),
    "subset": lambda table: choose_pairs(table, 20, progress=False),
}


def test_a_table_is_opened_once(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    align(pairs=table, out="bridge", preset=QUICK, progress=False)
    for run in VERBS.values():
        with opened_once(table):
            run(table)


def test_bind_opens_its_table_once(picture_toys: object, workshop: Workshop, tmp_path: Path) -> None:
    folder = workshop.bridge(tmp_path / "bridge")
    with opened_once(workshop.folder / "gallery.csv"):
        bind(folder, "image", workshop.folder / "gallery.csv", progress=False)
