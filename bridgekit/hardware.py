"""Hardware: device, precision of matrix products, threads and free memory."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import timeit
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bridgekit.errors import BridgekitError
from bridgekit.storage.cache import cache_folder, write_text_atomically

#: Minimum speedup of bfloat16 products over float32 ones. Casting weights and activations costs part of the gain.
MIN_SPEEDUP = 1.4
#: Side of the square matrices that the probe multiplies: 10 to 20 ms in total on two cores.
_SIDE = 768
#: Environment variable that overrides the probe: `float32`, `bfloat16` or `auto`.
VARIABLE = "BRIDGEKIT_PRECISION"


#: Half precision of latents: float16. bfloat16, with fewer digits, is further from float32: between latents around their mean,
#: the cosine is 0.99996 to 0.999996 for the starter's encoders, and 0.999999 or more with float16.
HALF = torch.float16


def widened(latents: torch.Tensor) -> torch.Tensor:
    """Latents in half precision as float32, others as they are."""
    return latents.float() if latents.dtype == HALF else latents


def product_dtype(device: str = "cpu") -> torch.dtype:
    """`torch.bfloat16` if its matrix products are clearly faster on this device, otherwise `torch.float32`.

    A CPU is benchmarked once; the result is kept in the cache folder.

    Arguments:
        device: a torch device.

    Raises:
        BridgekitError: `$BRIDGEKIT_PRECISION` is not `float32`, `bfloat16` or `auto`.
    """
    named = os.environ.get(VARIABLE, "auto")
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if named in formats:
        return formats[named]
    if named != "auto":
        raise BridgekitError(f"unknown precision {named!r}", where=f"${VARIABLE}", remedy="use float32, bfloat16 or auto")
    return _probed(torch.device(device).type)


@cache
def _probed(kind: str) -> torch.dtype:
    if kind == "cuda":  # tensor cores support bfloat16 since Ampere
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    if kind != "cpu":
        return torch.float32
    # Cached on disk, since timings vary on a busy machine: with another answer, an interrupted run could not be resumed, and
    # the same call would train different adapters.
    note = cache_folder() / f"products-{_processor()}.txt"
    formats = {str(kind): kind for kind in (torch.float32, torch.bfloat16)}

    def cached() -> torch.dtype | None:
        with suppress(OSError, ValueError):
            return formats.get(note.read_text(encoding="utf-8"))
        return None

    if known := cached():
        return known
    speedup = _seconds(torch.float32) / _seconds(torch.bfloat16)
    found = torch.bfloat16 if speedup >= MIN_SPEEDUP else torch.float32
    known = cached()  # another process may have written it meanwhile
    if not known:
        with suppress(BridgekitError):  # a read-only cache: probe again next time
            write_text_atomically(note, str(found))
    return known or found


def _processor() -> str:
    """A hash that identifies the processor model and torch's setup on it."""
    about = [platform.machine(), platform.processor(), torch.__version__, str(torch.get_num_threads())]
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
        # Not the clock, which varies, nor the core number.
        about += sorted(
            re.findall(r"^(?:vendor_id|cpu family|model|model name|stepping|flags|Features|CPU part)\s*:.*$", first, re.M)
        )
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


def _seconds(dtype: torch.dtype) -> float:
    """The fastest of several matrix products, since other processes may slow any one of them."""
    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
    return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=6))


@contextmanager
def fast_products(device: str = "cpu") -> Iterator[None]:
    """Within this context, float32 matrix products may multiply at lower precision, but accumulate in float32.

    On a CPU with AMX, oneDNN multiplies in bfloat16; on other CPUs in float32, often faster than MKL. A GPU uses TF32. This
    has no effect if `product_dtype` is float32.
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
    """The torch device to run on: `auto` picks CUDA, then MPS, then the CPU."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def threads() -> int:
    """How many items to read concurrently."""
    return min(8, os.cpu_count() or 1)


def free_memory() -> float:
    """Available memory in bytes, at most the container's limit; infinite if unknown."""
    free = math.inf
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError):  # `max` means no limit
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return free
