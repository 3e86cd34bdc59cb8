"""Runs the code of a Jupyter notebook without Jupyter. `python -m tests.notebooks NOTEBOOK` also writes its outputs into it."""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image


def cells(notebook: Path) -> list[str]:
    """The code of each code cell."""
    document = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "code"]


def run(codes: list[str]) -> list[list[dict[str, Any]]]:
    """Run the cells one after the other in the working directory; return the outputs of each as a notebook stores them."""
    names: dict[str, Any] = {"__name__": "__main__"}
    return [_run_cell(code, names) for code in codes]


def _run_cell(code: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last is not None else None
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)})
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if isinstance(value, Image.Image):
            png = io.BytesIO()
            value.save(png, "PNG")
            data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["<image>"]}
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data})
    return outputs


def main(notebook: Path) -> None:
    """Run a notebook in an empty folder and write its outputs into it."""
    codes, document = cells(notebook), json.loads(notebook.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        outputs = iter(run(codes))
    for cell in document["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = next(outputs)
    notebook.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
