"""What is searched: a bridge's own items of one modality, embedded in the background."""

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
from bridgekit.tables.reading import read_items

#: Held while an encoder or a model is opened: transformers' lazy imports fail where two threads run them at once.
OPENING = threading.RLock()


@dataclass(frozen=True)
class Gallery:
    """Items of one modality in a bridge's space.

    Arguments:
        items: n files or texts.
        vectors: (n, dim) at unit length.
    """

    items: Sequence[Item]
    vectors: Tensor = field(repr=False)

    def search(self, query: Tensor, k: int, temperature: float) -> list[tuple[Hit, float]]:
        """The k items nearest to a query, (1, dim) at unit length, each with its softmax among all items at the temperature."""
        [hits] = nearest(query, self.vectors, self.items, k)
        total = float((query @ self.vectors.T / temperature).logsumexp(-1))
        return [(hit, math.exp(hit.similarity / temperature - total)) for hit in hits]


class Galleries:
    """A bridge's galleries, filled in the background: a bridge that came without its latents has to encode everything again.

    Arguments:
        bridge: the bridge.
    """

    def __init__(self, bridge: Bridge) -> None:
        self._progress: dict[str, tuple[int, int]] = {}
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, "galleries")
        order = sorted(bridge.sides, key=lambda modality: modality != TEXT)  # texts are quickest
        self._filled = {name: self._pool.submit(read_gallery, bridge, name, self._report(name)) for name in order}

    def find(self, modality: str, patience: float) -> Gallery:
        """The gallery of a modality.

        Raises:
            TimeoutError: it is not filled within so many seconds.
            Exception: whatever reading the bridge's own items raised.
        """
        return self._filled[modality].result(patience)

    def state(self, modality: str) -> dict[str, object]:
        """How many items a gallery has, or how many of them are encoded, or why it cannot be filled."""
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
    """The items of a modality in the first of the bridge's own tables that has it, embedded (from the latent store).

    Raises:
        BridgekitError: the table is gone, or none of its items can be used.
    """
    source = bridge.table_of(modality)
    if not source:
        raise BridgekitError(
            f"the bridge does not say which {modality} it was trained on", remedy="train it again from a table that stays"
        )
    items = read_items(bridge.followed(source), modality)
    open_encoder(bridge, modality)
    embedded = bridge.embed_usable(modality, items, report=report)
    usable = [item for position, item in enumerate(items) if position not in embedded.failed]
    if not usable:
        raise BridgekitError(f"none of the bridge's own {modality} can be used", where=source)
    return Gallery(usable, embedded.vectors)


def open_encoder(bridge: Bridge, modality: str) -> Encoder:
    """The encoder of one side, opened by whichever thread comes first."""
    with OPENING:
        return bridge.encoder(modality)
