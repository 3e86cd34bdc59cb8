"""Encoding on a Ray cluster: workers encode planned batches and return the latents, which are stored on this machine.

bridgekit encode --ray: on the cluster at $RAY_ADDRESS (run `ray start` on its machines), or else on this machine
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridgekit.encoders import TEXT, Encoder
from bridgekit.errors import BridgekitError, PluginError
from bridgekit.hardware import resolve_device
from bridgekit.latents.batches import Batch, Encoded, Run, encode_batches
from bridgekit.plugins import load_encoder

#: Batches per worker task: while one is encoded, threads prepare the next.
TAKEN_AT_ONCE = 8


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Connect to the Ray cluster at `$RAY_ADDRESS`, or start a local one, for the duration of the context.

    Raises:
        BridgekitError: Ray is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        remedy = "in bridgekit's own folder: pip install '.[ray]'"
        raise BridgekitError("Ray is not installed", remedy=remedy) from None
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
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def on_ray(name: str, encoder: Encoder, workers: int | None = None) -> Run:
    """A function that encodes batches on the connected Ray cluster. Each row of its Ray dataset is one planned batch.

    Arguments:
        name: the encoder, `provider:model`. Its plugin must be installed on every machine.
        encoder: the same encoder, opened here. Workers must have the same revision.
        workers: number of workers; the default is one per GPU, or one per two cores if the cluster has no GPUs.

    Workers read files under the same paths as here. The batches, and so the latents, are those of a single machine, up to
    rounding if a worker has a different number of threads.
    """

    def run(batches: Sequence[Batch]) -> Generator[Encoded, None, None]:
        import ray

        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        count = max(1, min(workers or gpus or cores // 2, len(batches)))
        share: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": max(1, min(2, cores // count))}
        rows = [
            {
                "number": batch.number,
                # Absolute paths: a worker runs in another folder.
                "items": json.dumps([item if isinstance(item, str) else str(item.absolute()) for item in batch.items]),
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
        try:
            for row in dataset.iter_rows():
                yield _read(row)
        except ray.exceptions.RayError as error:
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            remedy = "install the same bridgekit and plugins on every machine of the cluster"
            raise BridgekitError(f"a Ray worker failed: {reason.strip()[:300]}", where=name, remedy=remedy) from error

    return run


class _Worker:
    """An actor that runs in its own process on the cluster."""

    def __init__(self, name: str, modality: str, revision: str) -> None:
        self.name, self.modality, self.revision = name, modality, revision
        self.encoder: Encoder | None = None

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Encode planned batches; input and output are plain columns."""
        batches = [
            Batch(
                int(number), [item if self.modality == TEXT else Path(item) for item in json.loads(str(items))], bool(reduced)
            )
            for number, items, reduced in zip(rows["number"], rows["items"], rows["reduced"], strict=True)
        ]
        found: dict[str, list[Any]] = {"number": [], "kept": [], "latents": [], "width": [], "reasons": [], "fault": []}
        try:
            self.encoder = self.encoder or self._open()
            for encoded in encode_batches(self.encoder, batches):
                reasons = {str(at): reason for at, reason in encoded.reasons.items()}
                _append(found, encoded.number, encoded.kept, encoded.latents, reasons, {})
        except BridgekitError as error:
            # Returned as a row: Ray wraps exceptions that cross processes in its own.
            fault = {"what": f"a Ray worker: {error.what}", "where": error.where, "remedy": error.remedy}
            _append(found, -1, [], torch.zeros(0, 0), {}, fault)
        return found

    def _open(self) -> Encoder:
        encoder = load_encoder(self.name, resolve_device())
        if encoder.revision != self.revision:  # its latents would be stored under the wrong revision
            raise BridgekitError(
                f"the revision of {self.name} differs: {encoder.revision} there, {self.revision} here",
                where=platform.node(),
                remedy="install the same versions of its plugin and of the model on every machine",
            )
        return encoder


def _append(
    found: dict[str, list[Any]],
    number: int,
    kept: Sequence[int],
    latents: torch.Tensor,
    reasons: dict[str, str],
    fault: dict[str, str | None],
) -> None:
    values = (
        number,
        json.dumps(list(kept)),
        latents.contiguous().numpy().tobytes(),
        latents.shape[1],
        *map(json.dumps, (reasons, fault)),
    )
    for column, value in zip(found.values(), values, strict=True):
        column.append(value)


def _read(row: dict[str, Any]) -> Encoded:
    fault = json.loads(row["fault"])
    if fault:
        raise PluginError(fault["what"], where=fault["where"], remedy=fault["remedy"])
    kept = json.loads(row["kept"])
    latents = torch.from_numpy(np.frombuffer(row["latents"], dtype=np.float32).reshape(len(kept), row["width"]).copy())
    reasons = {int(at): reason for at, reason in json.loads(row["reasons"]).items()}
    return Encoded(int(row["number"]), kept, latents, reasons)
