"""Concurrent requests through one encoder at a time: what arrives within a few milliseconds is encoded as one batch."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
import torch
from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.errors import BridgekitError, PluginError
from bridgekit.plugins import plugin_of
from bridgekit_app.limits import busy

#: Seconds that a request waits for others to share its batch. Encoding a text takes about as long.
GATHER = 0.004
#: Items in a batch. Whatever waits behind a batch waits for all of it, and a clip takes a tenth of a second.
MOST = 32


@dataclass(frozen=True, eq=False)
class _Waiting:
    bridge: Bridge
    modality: str
    prepared: Sequence[Any]
    future: asyncio.Future[Tensor]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """The requests that wait to be encoded, oldest first. They are encoded in one worker thread, a batch at a time.

    Arguments:
        most: items that may wait; further requests are answered that the server is busy.

    Attributes:
        batches, items: how many were encoded so far.
    """

    def __init__(self, most: int) -> None:
        self.batches = self.items = 0
        self._most = most
        self._waiting: deque[_Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._thread = anyio.CapacityLimiter(1)  # of its own: searches that wait for a gallery fill the common one

    async def embed(self, bridge: Bridge, modality: str, prepared: Sequence[Any]) -> Tensor:
        """Encode and project prepared items: (n, dim) at unit length, float32.

        Arguments:
            bridge: the bridge. Its encoder is opened where it is not open yet.
            modality: one of its modalities.
            prepared: what the encoder's `prepare` returned.

        Raises:
            Refusal: too many are waiting.
        """
        waiting = self.waiting()
        if waiting + len(prepared) > self._most:
            raise busy(f"{waiting} items wait to be encoded", 1)
        mine = _Waiting(bridge, modality, prepared, asyncio.get_running_loop().create_future())
        self._waiting.append(mine)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await mine.future

    def waiting(self) -> int:
        """How many items wait now."""
        return sum(len(each.prepared) for each in self._waiting)

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(max(0.0, self._waiting[0].since + GATHER - time.monotonic()))
            batch = self._take()
            if batch:
                await self._encode(batch)

    def _take(self) -> list[_Waiting]:
        """The oldest request, and those of the same bridge and modality that fit into a batch with it, in their order."""
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
    """Prepared items into a bridge's space. Not through the latent store: what clients send is not kept."""
    encoder = bridge.encoder(modality)
    try:
        with torch.inference_mode():
            latents = encoder.encode(prepared).detach().float().cpu()
            vectors = bridge.project(modality, latents)
    except BridgekitError:
        raise
    except (Exception, SystemExit) as error:  # third-party code
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"{plugin_of(encoder)} failed to encode: {reason}", where=encoder.revision) from error
    if not vectors.isfinite().all():
        raise PluginError(f"{plugin_of(encoder)} returned NaN or infinity", where=encoder.revision)
    return vectors
