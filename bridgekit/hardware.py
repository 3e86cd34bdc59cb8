"""What this machine offers: the device, the number format of matrix products, threads and free memory."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bridgekit.errors import BridgekitError
from bridgekit.storage.cache import cache_folder, write_text_atomically

#: How much faster bfloat16 products must be than float32 ones. Casting weights and activations back and forth costs some of it.
WORTH_IT = 1.4
#: The probe multiplies square matrices of this side: 10 to 20 ms in all on two cores.
_SIDE = 768
#: The environment variable that overrules the probe: `float32`, `bfloat16` or `auto`.
VARIABLE = "BRIDGEKIT_PRECISION"


def product_dtype(device: str = "cpu") -> torch.dtype:
    """`torch.bfloat16` where its products are clearly faster on a device, `torch.float32` elsewhere.

    A CPU is asked once: the answer is kept in the cache folder.

    Arguments:
        device: a torch device.

    Raises:
        BridgekitError: `$BRIDGEKIT_PRECISION` is set to none of `float32`, `bfloat16` and `auto`.
    """
    named = os.environ.get(VARIABLE, "auto")
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if named in formats:
        return formats[named]
    if named != "auto":
        raise BridgekitError(f"there is no precision {named!r}", where=f"${VARIABLE}", remedy="use float32, bfloat16 or auto")
    return _probed(torch.device(device).type)


@cache
def _probed(kind: str) -> torch.dtype:
    if kind == "cuda":  # bfloat16 has tensor cores of its own since Ampere
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    if kind != "cpu":
        return torch.float32
    # Remembered: on a busy machine the probe may say this today and that tomorrow, and then a run that was stopped would not
    # go on from where it was, and the same call would give other adapters.
    note = cache_folder() / f"products-{_processor()}.txt"
    known = _remembered(note)
    if known:
        return known
    faster = _seconds(torch.float32) / _seconds(torch.bfloat16)
    found = torch.bfloat16 if faster >= WORTH_IT else torch.float32
    known = _remembered(note)  # by another process, just now
    if not known:
        with suppress(BridgekitError):  # where nothing can be written, it is asked again
            write_text_atomically(note, str(found))
    return known or found


def _remembered(note: Path) -> torch.dtype | None:
    with suppress(OSError, ValueError):
        return {str(kind): kind for kind in (torch.float32, torch.bfloat16)}.get(note.read_text(encoding="utf-8"))
    return None


def _processor() -> str:
    """A name for this kind of processor, as torch uses it here."""
    about = [platform.machine(), platform.processor(), torch.__version__, str(torch.get_num_threads())]
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
        # Not its clock, which changes, nor which of several it is.
        about += sorted(
            re.findall(r"^(?:vendor_id|cpu family|model|model name|stepping|flags|Features|CPU part)\s*:.*$", first, re.M)
        )
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


def _seconds(dtype: torch.dtype) -> float:
    """The best of several products: another program may take the processor during any one of them."""
    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    return min(times)


@contextmanager
def fast_products(device: str = "cpu") -> Iterator[None]:
    """While this lasts, products of float32 matrices run as fast as the hardware can while it still sums in float32.

    On a CPU with AMX oneDNN multiplies them in bfloat16, on other CPUs in float32 and often faster than MKL does; a GPU uses
    TF32. Nothing changes where `product_dtype` says float32.
    """
    backend: Any = getattr(torch.backends, "mkldnn" if torch.device(device).type == "cpu" else "cuda")
    matmul: Any = getattr(backend, "matmul", None)
    if product_dtype(device) == torch.float32 or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if torch.device(device).type == "cpu" else "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def resolve_device(device: str = "auto") -> str:
    """The torch device to run on: `auto` takes CUDA, then Apple's MPS, then the CPU."""
    if device != "auto":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def threads() -> int:
    """How many items are read at the same time."""
    return min(8, os.cpu_count() or 1)


def free_memory() -> float:
    """Bytes of memory that are free, or that a container may use at all if that is less; infinite where nothing tells."""
    free = math.inf
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError):  # the word `max` where there is no limit
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return free
