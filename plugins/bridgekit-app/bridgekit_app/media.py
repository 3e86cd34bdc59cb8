"""Clips and pictures that a search found, served under opaque names."""

from __future__ import annotations

import hashlib
import io
import secrets
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import soundfile

from bridgekit.encoders import Item
from bridgekit.media import read_audio, read_image

#: What a clip is served as: seconds at most, and samples a second.
CLIP_SECONDS, CLIP_RATE = 30, 24_000
#: The longest side of a served picture, in pixels.
THUMBNAIL = 320


class Media:
    """Clips and pictures that were found, under names that reveal nothing. Only what was found can be fetched.

    What is served is decoded and encoded again, as PNG and WAV: never a file's own bytes, whatever it claims to be.

    Arguments:
        most_bytes: of what is kept in memory.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._secret = secrets.token_bytes(16)
        self._known: dict[str, tuple[str, Path]] = {}
        self._held: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def name(self, modality: str, item: Item) -> str | None:
        """The opaque name of a file that can be seen or heard, or None."""
        if modality not in ("audio", "image") or not isinstance(item, Path):
            return None
        name = hashlib.blake2s(f"{modality}\0{item}".encode("utf-8", "surrogateescape"), key=self._secret, digest_size=16)
        self._known[name.hexdigest()] = (modality, item)
        return name.hexdigest()

    def read(self, name: str) -> tuple[str, bytes] | None:
        """Media type and bytes; None for an unknown name.

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
