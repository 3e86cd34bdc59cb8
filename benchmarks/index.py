"""100,000 embeddings in an index: build time, size, resuming after a kill, latency and recall@10 of searches.

python benchmarks/index.py
"""

from __future__ import annotations

import ast
import hashlib
import re
import signal
import site
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bridgekit_index import Index, Listing, lance, list_items
from bridgekit_index import index as module
from common import table
from torch import Tensor

from bridgekit import Bridge, align
from bridgekit.progress import progress_bars
from bridgekit.retrieval import search
from bridgekit.storage.cache import cache_folder, write_text_atomically

ROWS, QUERIES = 100_000, 200
#: LanceDB's names of search options.
SETTERS = {"probes": "nprobes", "refine": "refine_factor", "ef": "ef"}
K = 10


def sentences() -> list[str]:
    """ROWS + QUERIES distinct sentences from docstrings of installed packages."""
    kept = cache_folder() / f"benchmark-sentences-{ROWS + QUERIES}.txt"
    if not kept.exists():
        found: dict[str, None] = {}
        for root in site.getsitepackages():
            for file in sorted(Path(root).rglob("*.py")):
                found.update(dict.fromkeys(_sentences(file)))
        order = sorted(found, key=lambda sentence: hashlib.sha256(sentence.encode()).digest())
        write_text_atomically(kept, "\n".join(order[: ROWS + QUERIES]))
    return kept.read_text(encoding="utf-8").split("\n")


def _sentences(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", ast.get_docstring(node) or ""):
                sentence = " ".join(sentence.split())
                if 20 <= len(sentence) <= 160 and sentence[0].isalpha() and sentence.isprintable():
                    yield sentence


def add(bridge: Path, folder: Path) -> float:
    """Index the sentences; return seconds."""
    with progress_bars() as report:
        index = Index.create(folder, bridge)
        return index.add(Bridge.load(bridge, "cpu"), Listing("text", sentences()[:ROWS]), report=report).seconds


def killed(bridge: Path, folder: Path) -> int:
    """Index the sentences in a process that is killed after some rows; return the number of rows."""
    process = subprocess.Popen([sys.executable, __file__, str(bridge), str(folder)])
    while process.poll() is None:
        if folder.exists() and (index := Index.create(folder)).modalities and index.rows("text"):
            process.send_signal(signal.SIGKILL)
            process.wait()
            if (rows := Index.open(folder).rows("text")) < ROWS:
                return rows
            break
        time.sleep(0.05)
    raise SystemExit("the process finished before it could be killed")


def fingerprint(folder: Path) -> str:
    """SHA-256 of all rows and vectors, independent of their order."""
    import lancedb

    rows = lancedb.connect(str(folder)).open_table("text").to_arrow().select(["content", "item", "vector"]).sort_by("content")
    whole = hashlib.sha256("".join(rows["content"].to_pylist() + rows["item"].to_pylist()).encode())
    whole.update(rows["vector"].combine_chunks().flatten().to_numpy().tobytes())
    return f"{len(rows):,} rows, {whole.hexdigest()[:12]}"


def size(folder: Path) -> float:
    """Total size of a folder in MB."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


Way = Callable[[Tensor], Sequence[float]]


def measure(way: Way, queries: Tensor, tenth: Sequence[float]) -> list[str]:
    """recall@10, median and 95th percentile of wall-clock ms, and CPU ms, for one query at a time.

    A hit counts if it is at least as similar as the tenth exact hit.
    """
    seconds, found = [], 0
    way(queries[:1])
    worked = time.process_time()
    for query, least in zip(queries, tenth, strict=True):
        started = time.perf_counter()
        scores = way(query[None])
        seconds.append(time.perf_counter() - started)
        found += sum(score >= least - 1e-5 for score in scores)
    worked = (time.process_time() - worked) / len(queries)
    quantiles = [statistics.median(seconds), float(np.quantile(seconds, 0.95)), worked]
    return [f"{found / (K * len(queries)):.3f}", *(f"{1_000 * value:.1f}" for value in quantiles)]


def torchs(queries: Tensor, matrix: Tensor) -> list[float]:
    """`bridgekit.retrieval.search`."""
    scores: list[float] = search(queries, matrix, K)[0][0].tolist()
    return scores


def raw(stored: Any, matrix: Tensor, row_of: dict[str, int], **settings: int) -> Way:
    """LanceDB's search with these settings. Similarities are recomputed exactly."""

    def way(query: Tensor) -> list[float]:
        found_by = stored.search(query[0].numpy(), vector_column_name="vector").distance_type("cosine").limit(K)
        found_by = found_by.select(["content", "_distance"])
        for name, value in settings.items():
            found_by = getattr(found_by, SETTERS[name])(value)
        found = [row_of[content] for content in found_by.to_arrow()["content"].to_pylist()]
        similarities: list[float] = (matrix[found] @ query[0]).tolist()
        return similarities

    return way


def kinds() -> list[tuple[str, Any, list[dict[str, int]]]]:
    """Kinds of approximate index, each with its search settings."""
    from lancedb.index import HnswSq, IvfPq, IvfRq, IvfSq

    few, many = [{"probes": 20}, {"probes": 20, "refine": 10}, {"probes": 50, "refine": 10}], [{"refine": 5}]
    return [
        ("IVF_PQ", IvfPq(distance_type="cosine"), few),
        ("IVF_RQ", IvfRq(distance_type="cosine"), few),
        ("IVF_SQ", IvfSq(distance_type="cosine"), [{"probes": 20, "refine": 2}]),
        ("IVF_HNSW_SQ", HnswSq(distance_type="cosine"), [*many, {"refine": 5, "ef": 200}]),
    ]


def main() -> str:
    """Index and search in one thread; return the tables."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _with_a_new_bridge()
    finally:
        torch.set_num_threads(threads)


def _with_a_new_bridge() -> str:
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        bridge = place / "image-text"
        model = align(a="image", b="text", pairs="starter:openmoji", out=bridge, progress=False)
        vectors = {
            "text": model.embed("text", sentences())[ROWS:],  # this also stores the latents of all sentences
            "image": model.embed("image", list_items("starter:openmoji", "image").items)[:: 1_866 // QUERIES][:QUERIES],
        }
        return _measured(place, model, bridge, vectors)


def _measured(place: Path, model: Bridge, bridge: Path, queries: dict[str, Tensor]) -> str:
    import lancedb

    seconds = add(bridge, place / "whole.index")
    plain = size(place / "whole.index")
    rows_then = killed(bridge, place / "killed.index")
    resumed = add(bridge, place / "killed.index")
    same = fingerprint(place / "whole.index") == fingerprint(place / "killed.index")
    index = Index.open(place / "whole.index")
    index.add(model, list_items("starter:openmoji", "image"))
    started = time.monotonic()
    index.finish()
    finishing = time.monotonic() - started
    whole = lancedb.connect(index.path, read_consistency_interval=timedelta(0)).open_table("text")
    stored = whole.to_arrow()
    matrix = lance.matrix(stored["vector"].combine_chunks())
    row_of = {content: row for row, content in enumerate(stored["content"].to_pylist())}
    tenth = {name: search(vectors, matrix, K)[0][:, -1].tolist() for name, vectors in queries.items()}

    def row(name: str, build: str, megabytes: str, way: Way) -> list[str]:
        figures = [cell for name in queries for cell in measure(way, queries[name], tenth[name])]
        print(name, build, megabytes, *figures, sep=" | ", file=sys.stderr, flush=True)
        return [name, build, megabytes, *figures]

    def bridgekits(exact: bool) -> Way:
        return lambda query: [hit.similarity for hit in index.search(query, "text", K, exact=exact).hits[0]]

    rows = [
        row("torch: one product, topk", "", f"{matrix.nbytes / 1e6:.0f} in memory", lambda query: torchs(query, matrix)),
        row("`Index.search`, exact", "", f"{plain:.0f}", bridgekits(True)),
        row(f"`Index.search`, {module.KIND}", f"{finishing:.0f}", f"{size(Path(index.path)):.0f}", bridgekits(False)),
    ]
    for kind, config, settings in kinds():
        started = time.monotonic()
        whole.create_index("vector", config=config)
        build = f"{time.monotonic() - started:.0f}"
        megabytes = f"+ {(next(iter(whole.list_indices())).size_bytes or 0) / 1e6:.0f}"
        for setting in settings:
            named = ", ".join(f"{name} {value}" for name, value in setting.items())
            rows.append(row(f"LanceDB, {kind}: {named}", build, megabytes, raw(whole, matrix, row_of, **setting)))
            build = megabytes = ""
    built = index.approximate("text")
    recall = ", ".join(f"{value:.3f} for {name} queries" for name, value in built.recall.items()) if built else "none"
    notes = (
        f"{ROWS:,} sentences from docstrings, encoded by `starter:text` and a bridge of `starter:openmoji` ({matrix.shape[1]} "
        f"dimensions). Queries: {QUERIES} other sentences and {QUERIES} images, one at a time. Adding took {seconds:.0f} s "
        f"({ROWS / seconds:,.0f} per second) with cached latents. After SIGKILL at {rows_then:,} rows, the same command "
        f"finished in {resumed:.0f} s, with {'identical rows and vectors' if same else 'DIFFERENT ROWS'}. recall@10 stored "
        f"with the index: {recall}. Sizes are of the folder, which keeps old versions for {module.CLEAN_AFTER.seconds // 60} "
        "minutes; + is the approximate index alone. For `Index.search`, build is `finish`: merging, building and measuring "
        "recall. Times are wall-clock; CPU is of all threads."
    )
    head = [
        "method",
        "build, s",
        "MB",
        *(f"{name}: {what}" for name in queries for what in ("recall@10", "median ms", "p95 ms", "CPU ms")),
    ]
    return notes + "\n\n" + table(head, rows)


if __name__ == "__main__":
    if sys.argv[1:]:
        torch.set_num_threads(1)
        add(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        print(main())
