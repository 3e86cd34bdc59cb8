"""Galleries: a bridge's own items of each modality, embedded in the background for searches."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.encoders import TEXT, Encoder, Item
from bridgekit.errors import BridgekitError
from bridgekit.progress import Report
from bridgekit.retrieval import Hit, nearest

#: Held while an encoder or a model is opened: transformers' lazy imports fail if two threads run them at once.
OPENING = threading.RLock()


@dataclass(frozen=True)
class Gallery:
    """Items of one modality in a bridge's space.

    Arguments:
        items: n files or texts.
        vectors: (n, dim), unit length.
    """

    items: Sequence[Item]
    vectors: Tensor = field(repr=False)

    def search(self, query: Tensor, k: int, temperature: float) -> list[tuple[Hit, float]]:
        """The k items nearest to a query, (1, dim), each with its softmax over all items at this temperature."""
        [hits] = nearest(query, self.vectors, self.items, k)
        total = float((query @ self.vectors.T / temperature).logsumexp(-1))
        return [(hit, math.exp(hit.similarity / temperature - total)) for hit in hits]


class Galleries:
    """A bridge's galleries, filled in the background: without cached latents, everything has to be encoded again."""

    def __init__(self, bridge: Bridge) -> None:
        self._progress: dict[str, tuple[int, int]] = {}
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, "galleries")
        order = sorted(bridge.sides, key=lambda modality: modality != TEXT)  # text is fastest
        self._filled = {name: self._pool.submit(read_gallery, bridge, name, self._report(name)) for name in order}

    def find(self, modality: str, patience: float) -> Gallery:
        """The gallery of a modality. Blocks for up to `patience` seconds.

        Raises:
            TimeoutError: it is not filled yet.
            Exception: the error from reading the bridge's own items.
        """
        return self._filled[modality].result(patience)

    def state(self, modality: str) -> dict[str, object]:
        """The number of items, the progress of encoding them, or why the gallery cannot be filled."""
        filled = self._filled[modality]
        done, total = self._progress.get(modality, (0, 0))
        error = filled.exception() if filled.done() else None
        if filled.done() and not error:
            return {"items": len(filled.result().items), "ready": True, "problem": None}
        problem = str(getattr(error, "what", error)) if error else None
        return {"items": total, "encoded": done, "ready": False, "problem": problem}

    def close(self) -> None:
        """Stop filling."""
        self._stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _report(self, modality: str) -> Report:
        def report(what: str, done: int, total: int) -> None:
            if self._stopped.is_set():
                raise CancelledError
            self._progress[modality] = (done, total)

        return report


def read_gallery(bridge: Bridge, modality: str, report: Report) -> Gallery:
    """The items of a modality in the first of the bridge's training tables that has it, embedded via the latent store.

    Raises:
        BridgekitError: the table is missing, or none of its items can be used.
    """
    items = bridge.own_items(modality)
    open_encoder(bridge, modality)
    embedded = bridge.embed_usable(modality, items, report=report)
    usable = [item for position, item in enumerate(items) if position not in embedded.failed]
    if not usable:
        raise BridgekitError(f"none of the bridge's own {modality} can be used", where=bridge.table_of(modality))
    return Gallery(usable, embedded.vectors)


def open_encoder(bridge: Bridge, modality: str) -> Encoder:
    """The encoder of one side, opened once."""
    with OPENING:
        return bridge.encoder(modality)
