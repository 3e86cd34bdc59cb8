"""What is searched: a bridge's own items of one modality, embedded in the background."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from bridgekit.bridge import Bridge
from bridgekit.encoders import TEXT, Encoder, Item
from bridgekit.errors import BridgekitError
from bridgekit.pairs import read_items
from bridgekit.progress import Report
from bridgekit.retrieval import Hit, nearest

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
        self._bridge = bridge
        self._ready: dict[str, Gallery | BridgekitError] = {}
        self._progress: dict[str, tuple[int, int]] = {}
        self._stopped = threading.Event()
        self._done = {modality: threading.Event() for modality in bridge.sides}
        threading.Thread(target=self._fill, name="galleries", daemon=True).start()

    def find(self, modality: str, patience: float) -> Gallery | None:
        """The gallery of a modality; None if it is not filled within so many seconds.

        Raises:
            BridgekitError: the bridge's own items cannot be read.
        """
        self._done[modality].wait(patience)
        found = self._ready.get(modality)
        if isinstance(found, BridgekitError):
            raise found
        return found

    def state(self, modality: str) -> dict[str, object]:
        """How many items a gallery has, or how many of them are encoded, or why it cannot be filled."""
        found = self._ready.get(modality)
        if isinstance(found, Gallery):
            return {"items": len(found.items), "ready": True, "problem": None}
        done, total = self._progress.get(modality, (0, 0))
        return {"items": total, "encoded": done, "ready": False, "problem": found.what if found else None}

    def close(self) -> None:
        """Stop filling."""
        self._stopped.set()

    def _fill(self) -> None:
        for modality in sorted(self._bridge.sides, key=lambda modality: modality != TEXT):  # texts are quickest
            try:
                self._ready[modality] = read_gallery(self._bridge, modality, self._report(modality))
            except BridgekitError as error:
                self._ready[modality] = error
            except _Stopped:
                return
            self._done[modality].set()

    def _report(self, modality: str) -> Report:
        def report(what: str, done: int, total: int) -> None:
            if self._stopped.is_set():
                raise _Stopped
            self._progress[modality] = (done, total)

        return report


class _Stopped(Exception):
    """The server ends, or another bridge has replaced this one."""


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
