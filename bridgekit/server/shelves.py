"""What is searched: a bridge's own items of one modality, embedded; and their clips and pictures, served under opaque names."""

from __future__ import annotations

import hashlib
import io
import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.encoders import TEXT, Encoder, Item
from bridgekit.errors import BridgekitError
from bridgekit.media import read_audio, read_image
from bridgekit.progress import Report
from bridgekit.tables.reading import read_items

#: Held while an encoder or a model is opened: transformers' lazy imports fail where two threads meet in them.
OPENING = threading.RLock()
#: What a clip is served as: seconds at most, and samples a second.
CLIP_SECONDS, CLIP_RATE = 30, 24_000
#: The longest side of a served picture, in pixels.
THUMBNAIL = 320


@dataclass(frozen=True)
class Neighbour:
    """One item found.

    Arguments:
        item: a text, or a file.
        similarity: its cosine similarity to the query.
        share: the softmax at the bridge's temperature over all items of the shelf: 1 is all of it.
    """

    item: Item
    similarity: float
    share: float


@dataclass(frozen=True)
class Shelf:
    """Items of one modality in a bridge's space.

    All that a search asks of it is `nearest`, how many items there are, and their vectors where it goes through them: an index
    on disk can stand in its place (see `read_shelf`).

    Arguments:
        items: n files or texts.
        vectors: (n, dim) at unit length.
    """

    items: Sequence[Item]
    vectors: Tensor = field(repr=False)

    def nearest(self, queries: Tensor, k: int, temperature: float) -> list[list[Neighbour]]:
        """The k nearest to each of q queries, (q, dim) at unit length."""
        similarities = queries @ self.vectors.T
        shares = (similarities / temperature).softmax(-1)
        top = similarities.topk(min(k, len(self.items)))
        return [
            [
                Neighbour(self.items[place], score, share)
                for place, score, share in zip(places, scores, shares[row, places].tolist(), strict=True)
            ]
            for row, (places, scores) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        ]


class Shelves:
    """A bridge's shelves, filled in the background: of a bridge that came without its latents, all is encoded again.

    Arguments:
        bridge: the bridge.
    """

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._ready: dict[str, Shelf | BridgekitError] = {}
        self._progress: dict[str, tuple[int, int]] = {}
        self._stopped = threading.Event()
        self._done = {modality: threading.Event() for modality in bridge.sides}
        threading.Thread(target=self._fill, name="shelves", daemon=True).start()

    def find(self, modality: str, patience: float) -> Shelf | None:
        """The shelf of a modality; None where it is not filled after so many seconds.

        Raises:
            BridgekitError: the bridge's own items cannot be read.
        """
        self._done[modality].wait(patience)
        found = self._ready.get(modality)
        if isinstance(found, BridgekitError):
            raise found
        return found

    def state(self, modality: str) -> dict[str, object]:
        """How many items a shelf has, or how far it is filled, or why it cannot be."""
        found = self._ready.get(modality)
        if isinstance(found, Shelf):
            return {"items": len(found.items), "ready": True, "problem": None}
        done, total = self._progress.get(modality, (0, 0))
        return {"items": total, "encoded": done, "ready": False, "problem": found.what if found else None}

    def close(self) -> None:
        """Stop filling."""
        self._stopped.set()

    def _fill(self) -> None:
        for modality in sorted(self._bridge.sides, key=lambda modality: modality != TEXT):  # texts are quickest
            try:
                self._ready[modality] = read_shelf(self._bridge, modality, self._report(modality))
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
    """The server ends, or another bridge took this one's place."""


def read_shelf(bridge: Bridge, modality: str, report: Report) -> Shelf:
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
    return Shelf(usable, embedded.vectors)


def open_encoder(bridge: Bridge, modality: str) -> Encoder:
    """The encoder of one side, opened by whichever thread comes first."""
    with OPENING:
        return bridge.encoder(modality)


class Media:
    """Clips and pictures that were found, under names that tell nothing. Only what was found can be asked for.

    What is served is decoded and written anew, as PNG and WAV: never a file's own bytes, whatever it claims to be.

    Arguments:
        most_bytes: of what is held ready.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._secret = secrets.token_bytes(16)
        self._known: dict[str, tuple[str, Path]] = {}
        self._held: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def name(self, modality: str, item: Item) -> str | None:
        """The opaque name of a file of which something can be seen or heard, or None."""
        if modality not in ("audio", "image") or not isinstance(item, Path):
            return None
        name = hashlib.blake2s(f"{modality}\0{item}".encode("utf-8", "surrogateescape"), key=self._secret, digest_size=16)
        self._known[name.hexdigest()] = (modality, item)
        return name.hexdigest()

    def read(self, name: str) -> tuple[str, bytes] | None:
        """Media type and bytes; None for a name that was never given.

        Raises:
            ItemError: the file cannot be read any more.
        """
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
        if name not in self._known:
            return None
        modality, path = self._known[name]
        made = ("audio/wav", _wav(path)) if modality == "audio" else ("image/png", _thumbnail(path))
        with self._lock:
            self._held[name] = made
            while len(self._held) > 1 and sum(len(data) for _, data in self._held.values()) > self._most:
                self._held.popitem(last=False)
        return made


def _wav(path: Path) -> bytes:
    import soundfile

    samples = read_audio(path, CLIP_RATE)[: CLIP_SECONDS * CLIP_RATE]
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(samples, -1, 1), CLIP_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def _thumbnail(path: Path) -> bytes:
    picture = read_image(path)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
