"""Safetensors files with a SHA-256 of their content, so that corrupted data is detected and never used."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridgekit.storage.bounded import OutOfBounds, open_regular
from bridgekit.storage.cache import write_atomically

#: The name of the checksum in a file's metadata.
SEAL = "sha256"


class DamagedFile(Exception):
    """A file is not what was written. The message says why."""


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, metadata and their checksum as one safetensors file, by `write_atomically`."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sealed = {**metadata, SEAL: seal_of(plain, metadata)}
    # safetensors 0.8 creates a temporary file beside the one it is given, which a killed process leaves behind.
    write_atomically(path, lambda aside: save_tensors(aside, plain, sealed), own_folder=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`safetensors.torch.save_file`, but with reproducible bytes, the system's errors and the folder's permissions.

    safetensors 0.8 itself creates files that only the user can read.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:
        raise _system_error(error) from error
    if len(metadata) > 1:
        _order_metadata(path)
    path.chmod(path.parent.stat().st_mode & 0o666)


def _order_metadata(path: Path) -> None:
    """Sort the metadata in a safetensors header, which safetensors writes in an order that varies between calls."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) <= length:
            file.seek(8)
            file.write(ordered.ljust(length))


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a sealed file, on the CPU, and its metadata.

    Raises:
        DamagedFile: it is not what was written, or has no checksum.
        OSError: it does not exist, or cannot be read.
    """
    try:
        open_regular(path).close()  # safetensors would wait on a named pipe forever
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a handle is not a mapping)
    except (SafetensorError, OutOfBounds) as error:
        raise DamagedFile(str(error)) from error
    if metadata.get(SEAL) != seal_of(tensors, metadata):
        raise DamagedFile("its checksum is wrong")
    return tensors, metadata


def seal_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The SHA-256 of tensors on the CPU, with names, types and shapes, and of the metadata without the checksum itself."""
    digest = hashlib.sha256(json.dumps({key: text for key, text in metadata.items() if key != SEAL}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _system_error(error: SafetensorError) -> OSError:
    """The system's error, which safetensors wraps in its own message."""
    found = re.search(r"os error (\d+)|code: (\d+)", str(error))
    number = int(found[1] or found[2]) if found else 0
    return OSError(number, os.strerror(number) if number else str(error))
