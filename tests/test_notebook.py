"""The example notebook runs, and shows what it printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import notebooks

NOTEBOOK = Path(__file__).parents[1] / "examples" / "dataset_in_memory.ipynb"


def shown(outputs: list[list[dict[str, Any]]]) -> list[str]:
    """The printed words, without numbers, whose last digits depend on the machine, and without which of a list comes first."""
    texts = ["".join(each.get("text") or each["data"]["text/plain"]) for cell in outputs for each in cell]
    return [re.sub(r"[-\d.]+", "#", text) for text in texts]


def test_the_notebook_goes_from_a_data_set_to_search_and_a_classifier_in_20_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="the plugin bridgekit-datasets is not installed here")
    pytest.importorskip("bridgekit_starter", reason="the starter's encoders are not installed here")
    codes = notebooks.cells(NOTEBOOK)
    assert sum(bool(line.strip()) for code in codes for line in code.splitlines()) <= 22
    stored = [
        cell["outputs"] for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    monkeypatch.chdir(tmp_path)
    found = shown(notebooks.run(codes))
    assert [len(text.splitlines()) for text in found] == [len(text.splitlines()) for text in shown(stored)]
    assert found[:2] == shown(stored)[:2]
    assert sum(line in shown(stored)[4] for line in found[4].splitlines()) >= 6, "of 8 classes"
