"""Opening a file for reading, or saying why it cannot be."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bridgekit.errors import ItemError

#: How to mend a file that is cut short or damaged.
AGAIN = "copy or download it again, or remove the row"


def file_size(path: Path, *, may_be_empty: bool = False) -> int:
    """The bytes of a regular file.

    Raises:
        ItemError: there is no such file, it is a folder or a device, or it is empty.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ItemError("there is no such file", where=str(path), remedy="check the path, or remove the row") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise unreadable(path, error) from None
    if stat.S_ISDIR(status.st_mode):
        raise ItemError("this is a folder, not a file", where=str(path), remedy="name a file in it")
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        raise ItemError("this is not a regular file", where=str(path), remedy="name a file")
    if status.st_size == 0 and not may_be_empty:
        raise ItemError("the file is empty (0 bytes)", where=str(path), remedy=AGAIN)
    return status.st_size


@contextlib.contextmanager
def opened(path: Path, *, may_be_empty: bool = False) -> Iterator[BinaryIO]:
    """A file open for reading.

    Raises:
        ItemError: as for `file_size`, or it may not be read.
    """
    file_size(path, may_be_empty=may_be_empty)
    try:
        file = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None
    with file:
        yield file


def unreadable(path: Path, error: Exception) -> ItemError:
    """What to say of a file that the system does not give."""
    reason = getattr(error, "strerror", None) or str(error)
    return ItemError(f"the file cannot be read ({reason})", where=str(path), remedy="check its name and permissions")
