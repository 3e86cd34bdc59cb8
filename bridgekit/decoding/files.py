"""Opening a file for reading, or saying why it cannot be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bridgekit.errors import ItemError
from bridgekit.storage.bounded import OutOfBounds, open_regular, regular_size

#: What to do about a file that is cut short or damaged.
AGAIN = "copy or download it again, or remove the row"


def file_size(path: Path, *, may_be_empty: bool = False) -> int:
    """The size in bytes of a regular file.

    Raises:
        ItemError: there is no such file, it is a folder or a device, or it is empty.
    """
    try:
        size = regular_size(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if size == 0 and not may_be_empty:
        raise ItemError("the file is empty (0 bytes)", where=str(path), remedy=AGAIN)
    return size


@contextlib.contextmanager
def opened(path: Path, *, may_be_empty: bool = False) -> Iterator[BinaryIO]:
    """A file open for reading.

    Raises:
        ItemError: as for `file_size`, or permission is missing.
    """
    file_size(path, may_be_empty=may_be_empty)
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    with file:
        yield file


def unreadable(path: Path, error: OSError | ValueError) -> ItemError:
    """What to say of a file that cannot be looked up, opened or read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ItemError("there is no such file", where=str(path), remedy="check the path, or remove the row")
    if isinstance(error, OutOfBounds):
        return ItemError(str(error), where=str(path), remedy="name a file")
    reason = error.strerror or error if isinstance(error, OSError) else "its name has NUL bytes or broken characters"
    return ItemError(f"the file cannot be read ({reason})", where=str(path), remedy="check its name and permissions")
