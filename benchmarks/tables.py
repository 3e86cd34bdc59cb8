"""5 million rows of Parquet, paths and captions: read, split, related and checked, beside polars reading the same file.

python benchmarks/tables.py [ROWS]
"""

from __future__ import annotations

import os
import re
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import table
from processes import can_measure_memory, in_process, report

ROWS = 5_000_000
CAPTIONS = 5  # per picture
PER_FOLDER = 1_000
WORDS = [
    "a",
    "the",
    "red",
    "small",
    "old",
    "dog",
    "cat",
    "man",
    "woman",
    "child",
    "runs",
    "sits",
    "near",
    "under",
    "over",
    "water",
    "grass",
    "street",
    "with",
    "two",
]


def write(folder: Path, rows: int) -> Path:
    """The table, and its files: links to one file each folder, since only their names and sizes are read."""
    pictures = rows // CAPTIONS
    names = [f"{number // PER_FOLDER:04}/{number:07}.jpg" for number in range(pictures)]
    for number, name in enumerate(names):
        file = folder / name
        if number % PER_FOLDER == 0:
            file.parent.mkdir()
            file.write_bytes(b"x")
        else:
            os.link(file.parent / Path(names[number // PER_FOLDER * PER_FOLDER]).name, file)
    words = np.array(WORDS)[np.random.default_rng(0).integers(0, len(WORDS), (rows, 10))]
    captions = [" ".join(row) for row in words.tolist()]
    path = folder / "pairs.parquet"
    pq.write_table(pa.table({"image": np.repeat(names, CAPTIONS), "caption": captions}), path)
    return path


def ours(path: Path) -> dict[str, Any]:
    """Read the rows, set aside those that cannot be used, split them, and find the related ones."""
    from bridgekit.decoding.isolation import decoder_ids
    from bridgekit.tables.reading import open_table
    from bridgekit.tables.splits import relation_keys, split_pairs

    pairs = open_table(path).pairs(("image", "text"))
    ids = {name: pairs.column(name).codes.astype(np.int64) for name in pairs.modalities}
    split = split_pairs(pairs, 0, ids)
    relation_keys(pairs, ids)
    return {"rows": len(split), "decoders": sum(map(_peak_of, decoder_ids()))}


def polars(path: Path) -> dict[str, Any]:
    """Read the rows and count the distinct ones."""
    import polars as pl

    frame = pl.read_parquet(path)
    return {"rows": int(frame.n_unique()), "decoders": 0}


def _peak_of(process: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(encoding="ascii"))
    return 1024 * int(found[1]) if found else 0


def measured(which: str, path: Path) -> dict[str, Any]:
    """Run one side, and add its CPU seconds, those of its decoders too."""
    figures = {"ours": ours, "polars": polars}[which](path)
    from bridgekit.decoding.isolation import _pool

    _pool.close()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {**figures, "cpu": sum(each.ru_utime + each.ru_stime for each in used)}


def main(rows: int = ROWS) -> str:
    """The table of both."""
    if not can_measure_memory():
        return "Not measured: this system does not report peak memory."
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), rows)
        found = {which: in_process(__file__, which, path) for which in ("ours", "polars")}
        size = path.stat().st_size
    what = {"ours": "read, checked, split, related", "polars": "polars: read, distinct rows counted"}
    lines = [
        [what[which], f"{each['rows']:,}", f"{each['cpu']:.1f}", f"{(each['bytes'] + each['decoders']) / 1e9:.2f}"]
        for which, each in found.items()
    ]
    ratio = found["ours"]["cpu"] / found["polars"]["cpu"]
    text = f"{rows:,} rows of {rows // CAPTIONS:,} files with {CAPTIONS} captions, {size / 1e6:.0f} MB of Parquet. "
    text += f"Ours takes {ratio:.1f} times the CPU time of polars. Memory is that of the process and its decoders."
    return f"{text}\n\n{table(['what', 'rows', 'CPU seconds', 'peak memory, GB'], lines)}"


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["polars"]):
        report(lambda: measured(sys.argv[1], Path(sys.argv[2])))
    else:
        print(main(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS))
