"""Dynamic batching: inputs of requests that arrive within a few milliseconds are encoded as one batch."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.errors import PluginError
from bridgekit.latents.batches import encode_batch
from bridgekit.plugins import plugin_of
from bridgekit_app.limits import busy

#: Seconds a request waits for others to join its batch: about as long as encoding a text takes.
GATHER = 0.004
#: Items per batch. Other requests wait for the whole batch, and a clip takes 0.1 s.
MOST = 32


@dataclass(frozen=True, eq=False)
class _Waiting:
    bridge: Bridge
    modality: str
    prepared: Sequence[Any]
    future: asyncio.Future[Tensor]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Encodes requests in one worker thread, a batch at a time, oldest first. At most `most` items are queued.

    `batches` and `items` count what has been encoded.
    """

    def __init__(self, most: int) -> None:
        self.batches = self.items = 0
        self._most = most
        self._waiting: deque[_Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._thread = anyio.CapacityLimiter(1)  # not the default pool: searches waiting for a gallery can fill that

    async def embed(self, bridge: Bridge, modality: str, prepared: Sequence[Any]) -> Tensor:
        """Encode and project n results of the encoder's `prepare`: (n, dim) float32, unit length.

        Raises:
            Refusal: too many items are queued.
        """
        waiting = self.waiting()
        if waiting + len(prepared) > self._most:
            raise busy(f"{waiting} items are queued for encoding", 1)
        mine = _Waiting(bridge, modality, prepared, asyncio.get_running_loop().create_future())
        self._waiting.append(mine)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await mine.future

    def waiting(self) -> int:
        """The number of queued items."""
        return sum(len(each.prepared) for each in self._waiting)

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(max(0.0, self._waiting[0].since + GATHER - time.monotonic()))
            if batch := self._take():
                await self._encode(batch)

    def _take(self) -> list[_Waiting]:
        """The oldest request, and later ones of the same bridge and modality that fit into the batch."""
        batch: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        count = 0
        for each in self._waiting:
            alike = not batch or (each.bridge is batch[0].bridge and each.modality == batch[0].modality)
            if not alike or (batch and count + len(each.prepared) > MOST):
                left.append(each)
            elif not each.future.done():  # else it was cancelled
                batch.append(each)
                count += len(each.prepared)
        self._waiting = left
        return batch

    async def _encode(self, batch: Sequence[_Waiting]) -> None:
        prepared = [item for each in batch for item in each.prepared]
        try:
            vectors = await anyio.to_thread.run_sync(_embed, batch[0].bridge, batch[0].modality, prepared, limiter=self._thread)
        except Exception as error:
            for each in batch:
                if not each.future.done():
                    each.future.set_exception(error)
            return
        self.batches += 1
        self.items += len(prepared)
        start = 0
        for each in batch:
            if not each.future.done():
                each.future.set_result(vectors[start : start + len(each.prepared)].clone())
            start += len(each.prepared)


def _embed(bridge: Bridge, modality: str, prepared: list[Any]) -> Tensor:
    """Prepared items as (n, dim) embeddings. Bypasses the latent store: clients' inputs must not be kept."""
    encoder = bridge.encoder(modality)
    vectors = bridge.project(modality, encode_batch(encoder, prepared))
    if not vectors.isfinite().all():
        raise PluginError(f"{plugin_of(encoder)} returned NaN or infinity", where=encoder.revision)
    return vectors
