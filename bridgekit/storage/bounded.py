"""Reading untrusted files: checks of their size, nesting and kind, and of where their paths lead."""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from bridgekit.errors import ItemError

#: Maximum nesting of brackets. Nothing that bridgekit writes has more than six.
DEPTH = 64
#: Maximum digits of an integer. No count here has more than 20.
DIGITS = 40
#: Bytes from which a file must not be mostly holes.
SPARSE = 16 << 20
#: What to do about a file that is cut short or damaged.
AGAIN = "copy or download it again"

# A string, or a bracket. An unclosed string extends to the end of the text, or the search would take quadratic time.
_STRINGS_AND_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


class OutOfBounds(ValueError):
    """A file is too large, nested too deeply or not a regular file. The message is a clause like `it has 9 bytes, ...`."""


# ---- files


def regular_size(file: Path | int) -> int:
    """The size in bytes of a regular file, given its path or an open descriptor.

    Raises:
        OutOfBounds: it is a folder, a named pipe, which could block forever, or a device, which may be endless.
        OSError, ValueError: as from `Path.stat`.
    """
    status = file.stat() if isinstance(file, Path) else os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise OutOfBounds("it is a folder, not a file" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")
    return status.st_size


def open_regular(path: Path) -> BufferedReader:
    """A regular file, open for reading.

    Raises:
        OutOfBounds: it is something else.
        OSError, ValueError: as from `open`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without waiting for a named pipe's writer
    try:
        regular_size(descriptor)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Nothing is read of a larger one.

    Raises:
        OutOfBounds: it is larger, or not a regular file.
        OSError, ValueError: as from `open`.
    """
    with open_regular(path) as file:
        size = regular_size(file.fileno())
        if size > limit:
            raise OutOfBounds(f"it has {size:,} bytes, over {limit:,} bytes")
        data = file.read(size + 1)
    if len(data) > size:  # for example, files in /proc claim to have 0 bytes
        raise OutOfBounds("it grew while being read, or does not report its size")
    return data


def check_stored(checkpoint: Path) -> None:
    """Raise OutOfBounds for a PyTorch checkpoint with compressed parts: they may unpack to a thousand times their size.

    PyTorch reads such parts but never writes them.
    """
    if zipfile.is_zipfile(checkpoint):
        with zipfile.ZipFile(checkpoint) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise OutOfBounds("its parts are compressed, which PyTorch never does")


def check_on_disk(descriptor: int) -> None:
    """Raise OutOfBounds for a large file that is mostly holes, which are read as zeros: nobody has stored or sent its bytes.

    Copying programs may turn zeros into holes, and adapters have many zeros, but not that many. Some file systems cannot tell:
    there, no file has holes.
    """
    size = held = os.fstat(descriptor).st_size
    if size >= SPARSE:
        with suppress(OSError):
            held = at = 0
            while at < size and held < size / 4:
                start = os.lseek(descriptor, at, os.SEEK_DATA)  # an error beyond the last data
                at = os.lseek(descriptor, start, os.SEEK_HOLE)
                held += at - start
        os.lseek(descriptor, 0, os.SEEK_SET)
    if held < size / 4:
        raise OutOfBounds(f"only {held:,} of its {size:,} bytes are on disk")


# ---- files of items


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


@contextmanager
def opened(path: Path, *, may_be_empty: bool = False) -> Iterator[BufferedReader]:
    """A file open for reading.

    Raises:
        ItemError: as for `file_size`, or the user lacks permission.
    """
    file_size(path, may_be_empty=may_be_empty)
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    with file:
        yield file


def unreadable(path: Path, error: OSError | ValueError) -> ItemError:
    """The error to show for a file that cannot be found, opened or read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ItemError("there is no such file", where=str(path), remedy="check the path")
    if isinstance(error, OutOfBounds):
        return ItemError(str(error), where=str(path), remedy="give the path of a file")
    reason = error.strerror or error if isinstance(error, OSError) else "its name has NUL bytes or broken characters"
    return ItemError(f"the file cannot be read ({reason})", where=str(path), remedy="check its name and permissions")


# ---- JSON


def parse_json(text: str | bytes, *, limit: int | None = None, lenient: bool = False) -> Any:
    """Parse a JSON text within bounds.

    Arguments:
        text: a string, or bytes in UTF-8.
        limit: maximum number of characters or bytes.
        lenient: accept NaN, infinity and lone surrogates: in a table, each affects only its own row.

    Raises:
        OutOfBounds: it is longer than `limit` or nested deeper than `DEPTH`, has a duplicate key, or a number or text that
            cannot be represented.
        ValueError: it is not JSON, or not in UTF-8.
    """
    if limit is not None and len(text) > limit:
        raise OutOfBounds(f"it has {len(text):,} bytes, over {limit:,} bytes")
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    if text.count("[") + text.count("{") > DEPTH:
        _check_depth(text)
    value = json.loads(text, object_pairs_hook=_unique, parse_int=_whole)
    if not lenient:
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError as error:
            raise OutOfBounds(f"it has a broken character ({error.object[error.start]!a})") from None
        except ValueError:
            raise OutOfBounds("it has a number that is not finite") from None
    return value


def read_json(path: Path, limit: int) -> Any:
    """`parse_json` for a file: raises what it and `read_bounded` raise."""
    return parse_json(read_bounded(path, limit))


def why_no_json(error: ValueError) -> str:
    """An error of `parse_json` as a clause about the text."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not in UTF-8"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    if "BOM" in error.msg:
        return "it begins with more than one byte order mark"
    return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"


def _check_depth(text: str) -> None:
    depth = 0
    for found in _STRINGS_AND_BRACKETS.finditer(text):
        mark = found[0]
        if mark in "[{":
            depth += 1
            if depth > DEPTH:
                raise OutOfBounds(f"it is nested more than {DEPTH} deep")
        elif mark in "]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise OutOfBounds(f"it has the key {twice[:60]!r} twice")
    return made


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise OutOfBounds(f"it has a number of {len(digits):,} digits")
    return int(digits)


# ---- paths


def homes(folder: Path) -> tuple[str, ...]:
    """Where the files of a folder may be: the folder with links resolved and, in the hub's cache, the repository's `blobs`.

    There, the files of a snapshot are links into `blobs`.
    """
    real = Path(os.path.realpath(folder))
    within = next((parent for parent in (real, *real.parents) if parent.parent.name == "snapshots"), None)
    return (str(real), *([str(within.parents[1] / "blobs")] if within else []))


def is_within(path: str | Path, places: Iterable[str]) -> bool:
    """Whether a path, existing or not, is in one of these resolved folders after resolving its links.

    Raises:
        ValueError: it has NUL bytes or broken characters.
    """
    real = os.path.realpath(path)
    return any(real == place or real.startswith(place.rstrip(os.sep) + os.sep) for place in places)
