"""Writes embeddings to a file that other tools read: safetensors, NumPy or Parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from bridgekit.cache import write_atomically
from bridgekit.errors import BridgekitError

FORMATS = (".safetensors", ".npy", ".parquet")


def check_format(path: Path) -> None:
    """Raise BridgekitError unless the path ends in a format that can be written."""
    if path.suffix not in FORMATS:
        raise BridgekitError(
            f"embeddings cannot be written as {path.suffix or 'a file without an ending'}",
            where=str(path),
            remedy=f"use {', '.join(FORMATS)}",
        )


def write_embeddings(path: Path, names: Sequence[str], vectors: Tensor) -> None:
    """Write (n, d) vectors and their n names.

    Arguments:
        path: ends in `.safetensors` (tensor `embeddings`, names as JSON in the metadata), `.npy` (vectors only) or
            `.parquet` (columns `item` and `embedding`).
        names: the items.
        vectors: float32.

    Raises:
        BridgekitError: another ending, or the place cannot be written.
    """
    check_format(path)

    def write(aside: Path) -> None:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({"embeddings": vectors.contiguous()}, aside, {"items": json.dumps(list(names))})
        elif path.suffix == ".npy":
            import numpy as np

            with aside.open("wb") as file:
                np.save(file, vectors.numpy())
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(
                pa.table({"item": list(names), "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32()))}), aside
            )

    try:
        write_atomically(path, write)
    except OSError as error:
        raise BridgekitError(f"the embeddings cannot be written: {error.strerror or error}", where=str(path)) from error
