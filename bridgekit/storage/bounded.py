"""Reading what others wrote without trusting its size, its depth, or that it is a file; and where a path really leads."""

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

#: Brackets within brackets. Nothing that bridgekit writes has more than six.
DEPTH = 64
#: Digits of a whole number. Nothing that is counted here has more than 20.
DIGITS = 40

# A string to its end, or a bracket. An open string runs to the end of the text: looked for again, it would take n squared.
_STRINGS_AND_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class OutOfBounds(ValueError):
    """What was read is larger, deeper or of another kind than it may be. The message is a clause: `it has 9 bytes, ...`."""


# ---- files


def open_regular(path: Path) -> BufferedReader:
    """A regular file, open for reading: never a named pipe, which would wait for ever, nor a device, which would never end.

    Raises:
        OutOfBounds: it is something else.
        OSError: as from `open`.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OutOfBounds("it is no regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes; of a larger one not one is read.

    Raises:
        OutOfBounds: it is larger, or no regular file.
        OSError: as from `open`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OutOfBounds(f"it has {size:,} bytes, over {_amount(limit)}")
        data = file.read(size + 1)
    if len(data) > size:  # a file of /proc, for one, which says 0
        raise OutOfBounds("it grows while it is read, or does not say how large it is")
    return data


def _amount(limit: int) -> str:
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if limit >= size:
            return f"{limit / size:g} {unit}"
    return f"{limit} bytes"


def check_stored(checkpoint: Path) -> None:
    """Refuse a checkpoint of PyTorch's whose parts are compressed: it could unpack to a thousand times its size.

    PyTorch itself never compresses them, and reads them all the same.

    Raises:
        OutOfBounds: some are.
    """
    if zipfile.is_zipfile(checkpoint):
        with zipfile.ZipFile(checkpoint) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise OutOfBounds("its parts are compressed, as PyTorch never writes them")


# ---- JSON


def parse_json(text: str | bytes, *, limit: int | None = None, lenient: bool = False) -> Any:
    """What a JSON text says, if it is one that holds no surprise.

    Arguments:
        text: in UTF-8 if it is bytes.
        limit: the most characters (or bytes).
        lenient: whether NaN, infinity and half a surrogate pair are taken all the same, as in a table, where they cost a row.

    Raises:
        OutOfBounds: it is longer, nested deeper than `DEPTH`, names a key twice, or holds a number or a text that nothing
            can hold.
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
    """What `parse_json` found wrong, in words of the text itself."""
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
        raise OutOfBounds(f"it names {twice[:60]!r} twice")
    return made


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise OutOfBounds(f"it holds a number of {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise OutOfBounds(f"it holds the number {digits[:40]}, which is too large")
    return number


def _no_number(name: str) -> NoReturn:
    raise OutOfBounds(f"it holds {name}, which is no number")


def _check_texts(value: Any) -> None:
    """Refuse half a surrogate pair, which no file and no terminal can be given."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str) and _LONE_SURROGATE.search(each):
            raise OutOfBounds(f"it holds a broken character ({each[:40]!a})")
        if isinstance(each, dict):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list):
            waiting += each


# ---- paths


def homes(folder: Path) -> tuple[str, ...]:
    """Where what is named relative to a folder may really lie: in the folder, wherever links have led to it.

    In the hub's cache every file of a snapshot is a link into its repository's `blobs`: those are at home there too.
    """
    real = Path(os.path.realpath(folder))
    within = next((parent for parent in (real, *real.parents) if parent.parent.name == "snapshots"), None)
    return (str(real), *([str(within.parents[1] / "blobs")] if within else []))


def is_within(path: str | Path, places: Iterable[str]) -> bool:
    """Whether a path, all links followed, lies in one of these real folders. What does not exist lies where it would.

    Raises:
        ValueError: no path can look so (NUL bytes, broken characters).
    """
    real = os.path.realpath(path)
    return any(real == place or real.startswith(place.rstrip(os.sep) + os.sep) for place in places)
