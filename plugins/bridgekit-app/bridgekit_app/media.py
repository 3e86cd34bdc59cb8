"""Audio clips and images found by searches, served under opaque names."""

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
from bridgekit.items import Blob
from bridgekit.media import read_audio, read_image

#: Maximum length and sample rate of served clips.
CLIP_SECONDS, CLIP_RATE = 30, 24_000
#: Longest side of served images, in pixels.
THUMBNAIL = 320


class Media:
    """Serves the files that searches have found, and no others, under names that reveal nothing about their paths.

    Files are decoded and re-encoded as PNG or WAV; their own bytes are never sent. Up to `most_bytes` are cached in memory.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._secret = secrets.token_bytes(16)
        self._known: dict[str, tuple[str, Path | Blob]] = {}
        self._held: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def name(self, modality: str, item: Item) -> str | None:
        """The opaque name of an item that is audio or an image; None for other items."""
        if modality not in ("audio", "image") or isinstance(item, str):
            return None
        name = hashlib.blake2s(f"{modality}\0{item}".encode("utf-8", "surrogatepass"), key=self._secret, digest_size=16)
        self._known[name.hexdigest()] = (modality, item)
        return name.hexdigest()

    def read(self, name: str) -> tuple[str, bytes] | None:
        """Media type and bytes; None if the name is unknown.

        Raises:
            ItemError: the file can no longer be read.
        """
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
        if name not in self._known:
            return None
        made = _encoded(*self._known[name])
        with self._lock:
            self._held[name] = made
            while len(self._held) > 1 and sum(len(data) for _, data in self._held.values()) > self._most:
                self._held.popitem(last=False)
        return made


def _encoded(modality: str, item: Path | Blob) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    if modality == "audio":
        samples = read_audio(item, CLIP_RATE)[: CLIP_SECONDS * CLIP_RATE]
        soundfile.write(buffer, np.clip(samples, -1, 1), CLIP_RATE, format="WAV", subtype="PCM_16")
        return "audio/wav", buffer.getvalue()
    picture = read_image(item)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(buffer, "PNG")
    return "image/png", buffer.getvalue()
