"""Reading untrusted safetensors files: first their list of tensors, then each tensor once, straight to its place.

Nothing is allocated for a tensor before its reader has compared its type and shape with what belongs there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridgekit.storage.bounded import OutOfBounds, check_on_disk, open_regular, parse_json, regular_size

if TYPE_CHECKING:
    from hashlib import _Hash

#: Bytes of a number of each type.
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}
_PART = 1 << 20  # bytes that are read, and hashed, at a time
_PER_TENSOR, _METADATA = 1 << 10, 1 << 16  # bytes of the header


@dataclass(frozen=True)
class Listed:
    """A tensor as the file's header lists it: `dtype` is safetensors' name, such as F32."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorFile:
    """An open file whose header has been read and checked.

    Arguments:
        listed: its tensors, in the order of their data.
        metadata: the texts in its header, unchecked.
        size: bytes of all tensors, which are in the file to the last one.
    """

    listed: tuple[Listed, ...]
    metadata: dict[str, Any]
    size: int
    _file: BufferedReader
    _digest: _Hash | None

    def read_into(self, place: memoryview) -> Iterator[memoryview]:
        """Fill a place with the bytes of the next tensor, part by part: each is yielded once it is filled and hashed.

        Raises:
            OutOfBounds: the file has become shorter.
        """
        for start in range(0, len(place), _PART):
            part = place[start : start + _PART]
            if self._file.readinto(part) != len(part):
                raise OutOfBounds("it was cut short while being read")
            if self._digest is not None:
                self._digest.update(part)
            yield part


@contextmanager
def open_tensors(path: Path, most: int, digest: _Hash | None = None) -> Iterator[TensorFile]:
    """Open a safetensors file of at most `most` tensors. `digest` takes all of its bytes that are read, header included.

    Raises:
        OutOfBounds: it is not a regular file, its header is not one, its tensors do not fill it, or most of it is a hole.
        OSError, ValueError: as from `open`, or its header is not JSON.
    """
    with open_regular(path) as file:
        size = regular_size(file.fileno())
        check_on_disk(file.fileno())
        head = file.read(8)
        length, limit = int.from_bytes(head, "little"), _METADATA + most * _PER_TENSOR
        if len(head) < 8 or length > size - 8:
            raise OutOfBounds("its header is cut short")
        if length > limit:
            raise OutOfBounds(f"its header has {length:,} bytes, over {limit:,} bytes")
        head += file.read(length)
        if digest is not None:
            digest.update(head)
        header = parse_json(head[8:])
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
            raise OutOfBounds("its header is not a list of tensors")
        metadata = header.pop("__metadata__", {})
        ends = sorted((_ends(entry), name) for name, entry in header.items())
        at = 0
        for (start, stop), name in ends:
            if start != at or stop - start != _bytes_of(header[name]):
                raise OutOfBounds(f"its header contradicts itself about the tensor {name[:100]!r}")
            at = stop
        if at != size - 8 - length:
            raise OutOfBounds(f"its tensors have {at:,} bytes, but {size - 8 - length:,} bytes follow its header")
        listed = tuple(Listed(name, header[name]["dtype"], tuple(header[name]["shape"])) for _, name in ends)
        yield TensorFile(listed, metadata, at, file, digest)


def _ends(entry: Any) -> tuple[int, int]:
    """The offsets of a tensor's data; a fault in any of an entry's fields is an error."""
    fields = entry if isinstance(entry, dict) else {}
    offsets, shape = fields.get("data_offsets"), fields.get("shape")
    if (
        not isinstance(offsets, list)
        or not isinstance(shape, list)
        or len(offsets) != 2
        or not all(type(number) is int and number >= 0 for number in (*offsets, *shape))
        or fields.get("dtype") not in ITEM_BYTES
    ):
        raise OutOfBounds("its header has an entry that is no tensor")
    return offsets[0], offsets[1]


def _bytes_of(entry: dict[str, Any]) -> int:
    return int(math.prod(entry["shape"])) * ITEM_BYTES[entry["dtype"]]
