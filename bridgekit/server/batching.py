"""Concurrent requests through one encoder at a time: what arrives within a few milliseconds is encoded as one batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.errors import BridgekitError, PluginError
from bridgekit.plugins import plugin_of
from bridgekit.server.limits import busy

#: Seconds that a request waits for others to be encoded with. A text takes about as long.
GATHER = 0.004
#: Items in a batch. What waits behind a batch waits for all of it, and clips take a tenth of a second each.
MOST = 32


@dataclass(frozen=True, eq=False)
class _Waiting:
    bridge: Bridge
    modality: str
    prepared: Sequence[Any]
    future: Future[Tensor] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """One thread that encodes, and the requests that wait for it, oldest first.

    Arguments:
        most: items that may wait; a request beyond is told that the server is busy.

    Attributes:
        batches, items: how many were encoded so far.
    """

    def __init__(self, most: int) -> None:
        self.batches = self.items = 0
        self._most = most
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="encoders", daemon=True)
        self._thread.start()

    def submit(self, bridge: Bridge, modality: str, prepared: Sequence[Any]) -> Future[Tensor]:
        """Have prepared items encoded and projected: a future of (n, dim) at unit length, float32.

        Arguments:
            bridge: the bridge. Its encoder is opened where it is not open yet.
            modality: one of its modalities.
            prepared: what the encoder's `prepare` gave. A cancelled future's items are left out, if they still wait.

        Raises:
            Refusal: too many are waiting.
        """
        mine = _Waiting(bridge, modality, prepared)
        with self._changed:
            waiting = self.waiting()
            if self._closed or waiting + len(prepared) > self._most:
                raise busy(f"{waiting} items wait to be encoded", 1)
            self._waiting.append(mine)
            self._changed.notify()
        return mine.future

    def waiting(self) -> int:
        """How many items wait now."""
        return sum(len(other.prepared) for other in self._waiting.copy())

    def close(self) -> None:
        """Encode nothing more; what waits is cancelled."""
        with self._changed:
            self._closed = True
            for other in self._waiting:
                other.future.cancel()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(timeout=1)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                oldest = self._waiting[0].since
            time.sleep(max(0.0, oldest + GATHER - time.monotonic()))
            batch = self._take()
            if batch:
                self._encode(batch)

    def _take(self) -> list[_Waiting]:
        """The oldest request, and those of the same bridge and modality that fit into a batch with it, in their order."""
        batch: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        with self._changed:
            count = 0
            for each in self._waiting:
                alike = not batch or (each.bridge is batch[0].bridge and each.modality == batch[0].modality)
                if not alike or (batch and count + len(each.prepared) > MOST):
                    left.append(each)
                elif each.future.set_running_or_notify_cancel():
                    batch.append(each)
                    count += len(each.prepared)
            self._waiting = left
        return batch

    def _encode(self, batch: Sequence[_Waiting]) -> None:
        prepared = [item for each in batch for item in each.prepared]
        try:
            vectors = _embed(batch[0].bridge, batch[0].modality, prepared)
        except BaseException as error:
            for each in batch:
                each.future.set_exception(error)
            return
        self.batches += 1
        self.items += len(prepared)
        start = 0
        for each in batch:
            each.future.set_result(vectors[start : start + len(each.prepared)].clone())
            start += len(each.prepared)


def _embed(bridge: Bridge, modality: str, prepared: list[Any]) -> Tensor:
    """Prepared items into a bridge's space, past the latent store: what strangers send is not kept."""
    encoder = bridge.encoder(modality)
    try:
        with torch.inference_mode():
            latents = encoder.encode(prepared).detach().float().cpu()
            vectors = bridge.project(modality, latents)
    except BridgekitError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"{plugin_of(encoder)} failed to encode: {reason}", where=encoder.revision) from error
    if not vectors.isfinite().all():
        raise PluginError(f"{plugin_of(encoder)} gave NaN or infinity", where=encoder.revision)
    return vectors
