"""`embed`: write embeddings as safetensors, NumPy or Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from bridgekit.errors import BridgekitError
from bridgekit.storage.cache import write_atomically

FORMATS = (".safetensors", ".npy", ".parquet")


def check_format(path: Path) -> None:
    """Raise BridgekitError unless the path has a supported extension."""
    if path.suffix not in FORMATS:
        raise BridgekitError(
            f"cannot write embeddings as {path.suffix or 'a file without an extension'}",
            where=str(path),
            remedy=f"use {', '.join(FORMATS)}",
        )


def write_embeddings(path: Path, names: Sequence[str], vectors: Tensor) -> None:
    """Write (n, d) vectors and their n names.

    Arguments:
        path: ends in `.safetensors` (tensor `embeddings`, names as JSON in the metadata), `.npy`
            (vectors only) or `.parquet` (columns `item` and `embedding`).
        names: the items.
        vectors: float32.

    Raises:
        BridgekitError: the extension is not supported, or the file cannot be written.
    """
    check_format(path)
    if path.suffix == ".safetensors":
        from bridgekit.storage.sealed import write_sealed

        write_sealed(path, {"embeddings": vectors}, {"items": json.dumps(list(names))})
        return

    def write(aside: Path) -> None:
        if path.suffix == ".npy":
            import numpy as np

            # Through memory: on a full disk, numpy's own error gives no reason.
            content = io.BytesIO()
            np.save(content, vectors.numpy())
            aside.write_bytes(content.getbuffer())
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pa.table({"item": list(names), "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32()))})
            pq.write_table(table, aside, write_page_checksum=True)

    write_atomically(path, write)
