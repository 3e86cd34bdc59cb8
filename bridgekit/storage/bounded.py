"""Reading what strangers wrote without trusting its size, its depth or that it is a file; and resolving where paths lead."""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

#: Nesting of brackets. Nothing that bridgekit writes has more than six.
DEPTH = 64
#: Digits of an integer. No count here has more than 20.
DIGITS = 40

# A string to its end, or a bracket. An open string runs to the end of the text, or searching would take quadratic time.
_STRINGS_AND_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class OutOfBounds(ValueError):
    """What was read is larger, deeper or of another kind than it may be. The message is a clause like `it has 9 bytes, ...`."""


# ---- files


def regular_size(file: Path | int) -> int:
    """The size in bytes of a regular file: not of a folder, a named pipe, which could block for ever, or an endless device.

    Arguments:
        file: its path, or an open descriptor of it.

    Raises:
        OutOfBounds: it is something else.
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
    """All bytes of a regular file of at most `limit` bytes; nothing is read of a larger one.

    Raises:
        OutOfBounds: it is larger, or not a regular file.
        OSError, ValueError: as from `open`.
    """
    with open_regular(path) as file:
        size = regular_size(file.fileno())
        if size > limit:
            raise OutOfBounds(f"it has {size:,} bytes, over {_amount(limit)}")
        data = file.read(size + 1)
    if len(data) > size:  # a file of /proc, for one, which says 0
        raise OutOfBounds("it grows while it is read, or does not tell its size")
    return data


def _amount(limit: int) -> str:
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if limit >= size:
            return f"{limit / size:g} {unit}"
    return f"{limit} bytes"


def check_stored(checkpoint: Path) -> None:
    """Refuse a PyTorch checkpoint with compressed parts: it could unpack to a thousand times its size.

    PyTorch never writes them, but reads them.

    Raises:
        OutOfBounds: it has some.
    """
    if zipfile.is_zipfile(checkpoint):
        with zipfile.ZipFile(checkpoint) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise OutOfBounds("its parts are compressed, as PyTorch never writes them")


# ---- JSON


def parse_json(text: str | bytes, *, limit: int | None = None, lenient: bool = False) -> Any:
    """Parse a JSON text within bounds.

    Arguments:
        text: if bytes, in UTF-8.
        limit: the largest number of characters (or bytes).
        lenient: accept NaN, infinity and lone surrogates, as in a table, where they cost one row.

    Raises:
        OutOfBounds: it is longer than `limit` or nested deeper than `DEPTH`, has a duplicate key, or a number or text that
            cannot be represented.
        ValueError: it is not JSON, or not in UTF-8.
    """
    if limit is not None and len(text) > limit:
        raise OutOfBounds(f"it has {len(text):,} bytes, over {_amount(limit)}")
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    if text.count("[") + text.count("{") > DEPTH:
        _check_depth(text)
    hooks: dict[str, Any] = {} if lenient else {"parse_constant": _no_number, "parse_float": _finite}
    value = json.loads(text, object_pairs_hook=_unique, parse_int=_whole, **hooks)
    if not lenient and "\\u" in text:
        _check_texts(value)
    return value


def read_json(path: Path, limit: int) -> Any:
    """`parse_json` of a regular file of at most `limit` bytes.

    Raises:
        OutOfBounds, ValueError: as there; or the file is larger.
        OSError: as from `open`.
    """
    return parse_json(read_bounded(path, limit))


def why_no_json(error: ValueError) -> str:
    """What `parse_json` found wrong, as a clause about the text."""
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


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise OutOfBounds(f"it has the number {digits[:40]}, which is too large")
    return number


def _no_number(name: str) -> NoReturn:
    raise OutOfBounds(f"it has {name}, which is not a JSON number")


def _check_texts(value: Any) -> None:
    """Refuse lone surrogates, which cannot be written to a file or a terminal."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, str) and _LONE_SURROGATE.search(each):
            raise OutOfBounds(f"it has a broken character ({each[:40]!a})")
        if isinstance(each, dict):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, list):
            left += each


# ---- paths


def homes(folder: Path) -> tuple[str, ...]:
    """The real folders that files named relative to a folder may lie in: the folder itself, with links resolved.

    In the hub's cache every file of a snapshot is a link into its repository's `blobs`, so that folder counts too.
    """
    real = Path(os.path.realpath(folder))
    within = next((parent for parent in (real, *real.parents) if parent.parent.name == "snapshots"), None)
    return (str(real), *([str(within.parents[1] / "blobs")] if within else []))


def is_within(path: str | Path, places: Iterable[str]) -> bool:
    """Whether a path, with links resolved, lies in one of these real folders. It need not exist.

    Raises:
        ValueError: it cannot be a path (NUL bytes, broken characters).
    """
    real = os.path.realpath(path)
    return any(real == place or real.startswith(place.rstrip(os.sep) + os.sep) for place in places)
