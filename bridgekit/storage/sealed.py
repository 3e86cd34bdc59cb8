"""Safetensors files that carry a SHA-256 over all that is in them: what the disk has changed is noticed, never used."""

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

#: What is told in a file beside its tensors: the name of the seal among it.
SEAL = "sha256"


class DamagedFile(Exception):
    """A file is not what was written. Its message says in a few words what is wrong."""


def write_sealed(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> None:
    """Write tensors, and what is told of them, with their seal: atomically, as one safetensors file.

    Raises:
        BridgekitError: it cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sealed = {**told, SEAL: seal_of(plain, told)}
    # safetensors 0.8 writes a file of its own beside the one that it is told to, and a killed process leaves that behind.
    write_atomically(path, lambda aside: save_tensors(aside, plain, sealed), own_folder=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> None:
    """`safetensors.torch.save_file` into a new folder: the same bytes for the same call, the system's own errors, the folder's
    own permissions.

    safetensors 0.8 lets nobody but the user read its files, wherever they are.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(dict(tensors), path, dict(told))
    except SafetensorError as error:
        raise _system_error(error) from error
    if len(told) > 1:
        _order_told(path)
    path.chmod(path.parent.stat().st_mode & 0o666)


def _order_told(path: Path) -> None:
    """Put what is told of the tensors in the order of its names: safetensors writes it in any, anew each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        listed = json.loads(file.read(length))
        listed["__metadata__"] = dict(sorted(listed["__metadata__"].items()))
        ordered = json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) <= length:
            file.seek(8)
            file.write(ordered.ljust(length))


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a sealed file, in the CPU's memory, and what is told of them.

    Raises:
        DamagedFile: it is not what was written, or has no seal.
        OSError: it cannot be read, or is not there.
    """
    try:
        open_regular(path).close()  # a pipe would be waited for without end
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a handle is not a mapping)
    except (SafetensorError, OutOfBounds) as error:
        raise DamagedFile(str(error)) from error
    if told.get(SEAL) != seal_of(tensors, told):
        raise DamagedFile("its checksum is another")
    return tensors, told


def seal_of(tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> str:
    """The SHA-256 of tensors on the CPU, with their names, types and shapes, and of what is told of them (but the seal)."""
    whole = hashlib.sha256(json.dumps({key: text for key, text in told.items() if key != SEAL}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _system_error(error: SafetensorError) -> OSError:
    """What the system said, which safetensors wraps into a text of its own."""
    found = re.search(r"os error (\d+)|code: (\d+)", str(error))
    number = int(found[1] or found[2]) if found else 0
    return OSError(number, os.strerror(number) if number else str(error))
