"""What an item is: a file, a text, or bytes that have no file of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bridgekit.errors import ItemError

#: The modality whose items are strings rather than files.
TEXT = "text"

#: File extensions of each modality in folders. Formats that cannot be read are included, to be reported rather than skipped.
EXTENSIONS = {
    "audio": [
        *("aac", "aif", "aiff", "au", "caf", "flac", "m4a", "mka", "mp3", "oga", "ogg", "opus", "w64", "wav", "weba", "wma"),
        *("3gp", "mkv", "mov", "mp4", "webm"),  # of videos, the sound track
    ],
    "image": ["avif", "bmp", "gif", "heic", "jp2", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"],
}


@dataclass(frozen=True)
class Blob:
    """An item without a file of its own: a cell of a table, a member of an archive, or an object in memory.

    `bridgekit.media` reads it like a file. Blobs with the same name are the same item.

    Arguments:
        name: where it is, for messages, for example `train.parquet, row 7, image`.
        read: returns its bytes, which are not kept. May be called several times, in any thread, and may raise ItemError.
        known: its content hash and size (see `bridgekit.media.hash_and_size`), where reading it again would be slow.
    """

    name: str
    read: Callable[[], bytes] = field(repr=False, compare=False)
    known: tuple[bytes, int] | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.name

    @property
    def label(self) -> str:
        """Its file name, if the name ends with one in brackets, or its place, without folders."""
        named = re.search(r"\(([^()]+)\)$", self.name)
        return named[1].rpartition("/")[2] if named else re.sub(r"^.*/(?=[^/]*(, |$))", "", self.name)

    def __fspath__(self) -> str:
        raise ItemError(
            "this item has no file", where=self.name, remedy="the plugin must read items with bridgekit.media.open_item"
        )


#: One input of an encoder: a file, the text itself if the modality is `text`, or bytes without a file.
Item = Path | str | Blob
