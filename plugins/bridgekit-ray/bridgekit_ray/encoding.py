"""Encoding on a Ray cluster: each worker opens the encoder and encodes planned batches; the driver stores the latents."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from bridgekit.encoders import TEXT, Blob, Encoder, Item
from bridgekit.errors import BridgekitError, PluginError
from bridgekit.hardware import resolve_device
from bridgekit.latents.batches import Batch, Encoded, Run, encode_batches
from bridgekit.plugins import load_encoder

#: `on_cluster`: from an encoder's full name and the opened encoder to a function that encodes batches on the cluster.
OnCluster = Callable[[str, Encoder], Run]

#: Batches per worker task: while one is being encoded, threads prepare the next.
TAKEN_AT_ONCE = 8


@contextmanager
def cluster() -> Iterator[OnCluster]:
    """Connect to the Ray cluster at `$RAY_ADDRESS`, or start a local one, for the duration of the context.

    Raises:
        BridgekitError: the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BridgekitError(
            f"the Ray cluster cannot be reached: {str(error).splitlines()[0]}",
            where=f"$RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')}",
            remedy="start it (ray start --head), or unset RAY_ADDRESS to use only this machine",
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # bridgekit shows its own
    context.target_max_block_size = 1 << 20  # what workers have done is stored at once, not when a piece is complete
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield on_cluster
    finally:
        ray.shutdown()


def on_cluster(name: str, encoder: Encoder, workers: int | None = None) -> Run:
    """A function that encodes batches on the connected Ray cluster.

    Arguments:
        name: the encoder, `provider:model`. Its plugin must be installed on every machine.
        encoder: the same encoder, opened here. Workers must have the same revision.
        workers: number of workers; default: one per GPU, or one per two cores if the cluster has no GPUs.

    Files must have the same paths on all machines. Batches, and so latents, equal those of a single machine, up to rounding if
    a worker uses a different number of threads.
    """

    def run(batches: Sequence[Batch]) -> Generator[Encoded, None, None]:
        count, share = count_workers(len(batches), workers)
        rows = [
            {
                "number": batch.number,
                # Absolute paths, because workers run in another folder.
                "items": json.dumps([_place(item) for item in batch.items]),
                "reduced": batch.reduced,
            }
            for batch in batches
        ]
        taken = max(1, min(TAKEN_AT_ONCE, len(rows) // count))
        dataset = ray.data.from_items(rows).map_batches(
            _Worker,
            fn_constructor_kwargs={"name": name, "modality": encoder.modality, "revision": encoder.revision},
            batch_size=taken,
            compute=ray.data.ActorPoolStrategy(size=count),
            **share,
        )
        with worker_failures(name):
            for row in dataset.iter_rows():
                yield _read(row)

    return run


def count_workers(work: int, wanted: int | None = None) -> tuple[int, dict[str, Any]]:
    """How many workers to start for so many units of work, and the resources of each as arguments of `map_batches`."""
    resources: dict[str, float] = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    count = max(1, min(wanted or gpus or cores // 2, work))
    return count, {"num_gpus": 1} if gpus else {"num_cpus": max(1, min(2, cores // count))}


@contextmanager
def worker_failures(where: str) -> Iterator[None]:
    """Turn Ray's errors into a BridgekitError about what is at `where`."""
    try:
        yield
    except ray.exceptions.RayError as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        remedy = "install the same bridgekit and plugins on every machine of the cluster; a second run continues this one"
        raise BridgekitError(f"a Ray worker failed: {reason.strip()[:300]}", where=where, remedy=remedy) from error


def fault_of(error: BridgekitError) -> dict[str, str | None]:
    """A worker's error as plain data for `raise_fault`. Workers return errors, since Ray wraps exceptions in its own types."""
    return {"what": f"a Ray worker: {error.what}", "where": error.where, "remedy": error.remedy}


def raise_fault(fault: dict[str, str | None] | None) -> None:
    """Raise a worker's error, if there is one."""
    if fault:
        raise PluginError(str(fault["what"]), where=fault["where"], remedy=fault["remedy"])


def open_on_worker(name: str, revision: str) -> Encoder:
    """Open an encoder on a worker.

    Raises:
        BridgekitError: it cannot be opened, or its revision is not the driver's, under which latents are stored.
    """
    encoder = load_encoder(name, resolve_device())
    if encoder.revision != revision:
        raise BridgekitError(
            f"the revision of {name} differs: {encoder.revision} on the worker, {revision} here",
            where=platform.node(),
            remedy="install the same versions of its plugin and of the model on every machine",
        )
    return encoder


def _place(item: Item) -> str:
    if isinstance(item, Blob):
        raise BridgekitError("Ray's workers take files, not items inside a table", where=item.name, remedy="omit --ray")
    return item if isinstance(item, str) else str(item.absolute())


class _Worker:
    """An actor that runs in its own process on the cluster."""

    def __init__(self, name: str, modality: str, revision: str) -> None:
        self.name, self.modality, self.revision = name, modality, revision
        self.encoder: Encoder | None = None

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Encode planned batches, given and returned as columns of plain values."""
        batches = [
            Batch(
                int(number), [item if self.modality == TEXT else Path(item) for item in json.loads(str(items))], bool(reduced)
            )
            for number, items, reduced in zip(rows["number"], rows["items"], rows["reduced"], strict=True)
        ]
        results = []
        try:
            self.encoder = self.encoder or self._open()
            results += [_row(encoded) for encoded in encode_batches(self.encoder, batches)]
        except BridgekitError as error:
            results.append(_row(Encoded(-1, [], torch.zeros(0, 0), {}), fault_of(error)))
        return {column: [result[column] for result in results] for column in results[0]}

    def _open(self) -> Encoder:
        return open_on_worker(self.name, self.revision)


def _row(encoded: Encoded, fault: dict[str, str | None] | None = None) -> dict[str, Any]:
    """A result as plain cells."""
    about = {"kept": list(encoded.kept), "reasons": dict(encoded.reasons), "width": encoded.latents.shape[1], "fault": fault}
    return {"number": encoded.number, "about": json.dumps(about), "latents": encoded.latents.contiguous().numpy().tobytes()}


def _read(row: dict[str, Any]) -> Encoded:
    about = json.loads(row["about"])
    raise_fault(about["fault"])
    latents = np.frombuffer(row["latents"], dtype=np.float32).reshape(len(about["kept"]), about["width"])
    reasons = {int(at): reason for at, reason in about["reasons"].items()}
    return Encoded(int(row["number"]), about["kept"], torch.from_numpy(latents.copy()), reasons)
