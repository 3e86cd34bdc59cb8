"""Decodes untrusted files in separate processes: one that crashes, hangs or exhausts a decoder is refused.

What is covered:
- Crashes: a segmentation fault or an abort in a C decoder ends only its own process.
- Hangs: each file has a time limit, after which the parent kills the process. The process also has an alarm of its own.
- Memory: the address space of each process is capped. macOS does not enforce the cap.
- Replies are bytes and JSON, never pickles: a compromised decoder cannot make the parent run code.

What is not covered:
- This is not a sandbox. A decoder has the user's permissions: code that a file injects can use files and the network.
- The parent's memory, which holds the decoded item, is not limited. Neither is disk space.

Processes are started on demand, as many as there are threads decoding at the same time but at most `MOST`, and reused. They
end with the parent; one that serves requests ends those that idle (`retire_idle`).

A request is a line of JSON, followed by the bytes of an item that has no file. A reply is a series of frames, each of two
lengths (of its data and of its JSON, 8 bytes each), the data, and the JSON. The first frame with JSON is the last.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from bridgekit.errors import BridgekitError, ItemError
from bridgekit.items import Blob
from bridgekit.storage.bounded import AGAIN, file_size

if TYPE_CHECKING:
    from bridgekit.decoding.tables import Reply

T = TypeVar("T")
B = TypeVar("B", bytearray, memoryview)

#: The time limit for a file, in seconds: this much, plus this much per megabyte of the file.
SECONDS = 60.0
SECONDS_PER_MB = 1.0
#: Cap on a decoder's address space in bytes, including its program. The largest image allowed takes 2.5 GB (JPEG 2000 with
#: alpha, 100 megapixels), the longest clip 0.2 GB.
MEMORY_CAP = 3 << 30
#: Decoders at a time; further threads wait. More than there are cores take memory for nothing, but a few must not be held up by
#: a file that hangs.
MOST = max(4, os.cpu_count() or 1)

_START_SECONDS = 120.0
_FRAME = struct.Struct("<QQ")
_PIPE_SIZE = 1 << 20
_STEP = 1 << 24  # bytes by which the buffer for a reply grows
_KEPT = 1 << 24  # a larger buffer is not kept for the next reply

# With our search path: `python -m` would first look for modules in the working directory, which may hold anything.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from bridgekit.decoding.isolation import serve; serve(int(sys.argv[1]))"
_ENVIRONMENT = {
    # One thread each, as decoders run in parallel.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Arrow's own memory pools reserve address space in advance.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    # By default, glibc returns an image's memory to the kernel, which zeroes it for the next one: slower than decoding a photo.
    "MALLOC_MMAP_THRESHOLD_": str(_KEPT),
    "MALLOC_TRIM_THRESHOLD_": str(4 * _KEPT),
}


# ---- the parent


def decode(
    operation: str,
    item: Path | Blob,
    finish: Callable[[dict[str, Any], memoryview], T],
    remedy: str = f"convert it again, {AGAIN}",
    **options: object,
) -> T:
    """Decode a file, or bytes that have no file, in a decoder process.

    Arguments:
        operation: one of `decoders.OPERATIONS`.
        item: the file or the bytes.
        finish: makes the result from the operation's facts and data. The data is valid only during this call.
        remedy: what to do about a file that crashes the decoder or exceeds its limits.
        options: arguments of the operation.

    Raises:
        ItemError: the file was refused, crashed the decoder, or took too long or too much memory.
        BridgekitError: no decoder process could be started.
    """
    content = item.read() if isinstance(item, Blob) else None
    size = file_size(item) if isinstance(item, Path) else len(content or b"")
    if not size:
        raise ItemError("the item is empty (0 bytes)", where=str(item), remedy=AGAIN)
    seconds = SECONDS + SECONDS_PER_MB * size / 1e6
    whole = str(Path.cwd() / item) if isinstance(item, Path) else ""  # a decoder has a working directory of its own
    request = {"operation": operation, "path": whole, "bytes": size, "seconds": seconds, "options": options}
    try:
        with _pool.borrowed() as decoder:
            facts, data = decoder.ask(request, seconds, content or b"")
            with data:
                if "what" not in facts:
                    return finish(facts, data)
    except _Ended as ended:
        raise ItemError(str(ended), where=str(item), remedy=remedy) from None
    raise ItemError(
        facts["what"],
        where=str(item) + (str(facts["where"]).removeprefix(whole) if whole else ""),
        remedy=facts["remedy"] or remedy,
    )


def decoder_ids() -> list[int]:
    """The process ids of the decoders."""
    return [decoder.process.pid for decoder in _pool.decoders]


def retire_idle(seconds: float) -> None:
    """End the decoders that nobody has used for this many seconds. The next file starts them again."""
    _pool.retire_idle(seconds)


class _Ended(Exception):
    """A decoder ended without replying; the message says why."""


class _Decoder:
    """A decoder process, seen from its parent."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(MEMORY_CAP), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # C decoders print warnings there
            bufsize=0,
            env={**os.environ, **_ENVIRONMENT},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._replies = self.process.stdin, self.process.stdout
        self._parent = os.getpid()
        self._buffer = bytearray()
        self.used = time.monotonic()
        if sys.platform == "linux":  # let the pipe hold an image of usual size, so that it is sent in one piece
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._replies, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)

    def ask(
        self, request: Mapping[str, object] | None, seconds: float, content: bytes = b""
    ) -> tuple[dict[str, Any], memoryview]:
        """Send a request, with the bytes of an item that has no file, and wait for the whole reply.

        Without a request, wait for the message that the process has started.

        Returns:
            The operation's facts and data. The next reply overwrites the data.

        Raises:
            _Ended: the process crashed, or was killed for taking longer than `seconds`.
        """
        self._until, self._limit = time.monotonic() + seconds, seconds
        if len(self._buffer) > _KEPT:
            self._buffer = bytearray()
        if request is not None:
            try:
                for part in (json.dumps(request).encode() + b"\n", content):
                    rest = memoryview(part)
                    while rest:
                        rest = rest[self._requests.write(rest) :]
            except OSError:
                raise self._ended() from None
        done = 0
        while True:
            size, length = _FRAME.unpack(self._read(bytearray(_FRAME.size)))
            while len(self._buffer) < done + size:
                self._buffer += bytes(_STEP)
            with memoryview(self._buffer)[done : done + size] as place:
                self._read(place)
            done += size
            if length:
                return json.loads(self._read(bytearray(length))), memoryview(self._buffer)[:done]

    def _read(self, place: B) -> B:
        """Fill `place` with the next bytes of the reply."""
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        with memoryview(place) as view:
            done = 0
            while done < len(view):
                if not poll.poll(max(0.0, self._until - time.monotonic()) * 1000):
                    self.process.kill()
                    raise self._ended()
                count = self._replies.readinto(view[done:])  # type: ignore[attr-defined]  # a raw file
                if not count:
                    raise self._ended()
                done += count
        return place

    def _ended(self) -> _Ended:
        """Wait for the process to end, and return why it did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        if time.monotonic() >= self._until:
            return _Ended(f"decoding it took over {self._limit:.0f} seconds")
        code = self.process.returncode
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        if name == "SIGKILL":
            return _Ended("the decoder was killed (SIGKILL), by someone or because memory ran out")
        return _Ended(f"the decoder crashed on this file ({name})")

    def close(self) -> None:
        """Kill the process, which holds nothing that could be lost. A fork of its parent only closes its copy of the pipes."""
        if os.getpid() == self._parent:
            self.process.kill()
            self.process.wait()
        else:
            self.process.returncode = 0  # or `Popen` would warn, when collected, that the process is still running
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                pipe.close()


class _Pool:
    """The decoders of this process: as many as were needed at the same time, but at most `MOST`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._free = threading.Semaphore(MOST)
        self.decoders: list[_Decoder] = []
        self._idle: list[_Decoder] = []

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[_Decoder]:
        """A decoder for one file, as soon as one is free. It is discarded if the file ends it or the caller is interrupted."""
        with self._free:
            decoder = self._take()
            try:
                yield decoder
            except BaseException:
                self._drop(decoder)
                raise
            decoder.used = time.monotonic()
            self._idle.append(decoder)

    def _take(self) -> _Decoder:
        with contextlib.suppress(IndexError):
            while True:
                decoder = self._idle.pop()
                if decoder.process.poll() is None:
                    return decoder
                self._drop(decoder)  # it has ended since its last file
        try:
            with self.lock:
                decoder = _Decoder()
                self.decoders.append(decoder)
        except OSError as error:
            raise _not_started(str(error)) from None
        try:
            decoder.ask(None, _START_SECONDS)
        except BaseException as error:
            self._drop(decoder)
            raise (_not_started(str(error)) if isinstance(error, _Ended) else error) from None
        return decoder

    def _drop(self, decoder: _Decoder) -> None:
        with self.lock:
            self.decoders = [other for other in self.decoders if other is not decoder]
        decoder.close()

    def retire_idle(self, seconds: float) -> None:
        """Close the decoders that have been idle for so long: `_take` takes the last used, so that others can idle."""
        for decoder in list(self._idle):
            if time.monotonic() - decoder.used >= seconds:
                with contextlib.suppress(ValueError):  # it has just been taken
                    self._idle.remove(decoder)
                    self._drop(decoder)

    def close(self) -> None:
        """Close all decoders."""
        with self.lock:
            decoders, self.decoders, self._idle = self.decoders, [], []
        for decoder in decoders:
            decoder.close()

    def forked(self) -> None:
        """Give up all decoders in a forked child, whose requests would mix with its parent's."""
        self.lock, self._free = threading.Lock(), threading.Semaphore(MOST)
        self.close()


def _not_started(reason: str) -> BridgekitError:
    return BridgekitError(
        f"the process that decodes files cannot be started ({reason})",
        where=sys.executable,
        remedy="run `python -c 'import bridgekit.decoding.decoders'`, and check that memory and processes are available",
    )


_pool = _Pool()
atexit.register(_pool.close)
# The lock is held during a fork, so that no decoder is being started then.
os.register_at_fork(
    before=lambda: _pool.lock.acquire(), after_in_parent=lambda: _pool.lock.release(), after_in_child=_pool.forked
)


# ---- the decoder process


def serve(memory_cap: int) -> None:
    """Answer requests from standard input until it ends, with at most `memory_cap` bytes of address space."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what C decoders print to standard output would garble the replies
    _stand_alone(memory_cap)
    from bridgekit.decoding.decoders import OPERATIONS  # not on the first file's time

    with contextlib.suppress(BrokenPipeError):  # the parent has ended
        _send(replies, facts={"started": True})
        for line in requests:
            request = json.loads(line)
            alarm = _Alarm(request["seconds"])
            try:
                with _file_of(request, requests) as path:
                    operation = partial(OPERATIONS[request["operation"]], path, **request["options"])
                    facts = _answer(operation, alarm, replies)
            except MemoryError:
                facts = {"what": f"decoding it takes over {memory_cap / 2**30:g} GB of memory", "where": "", "remedy": None}
            except BridgekitError as error:
                facts = {"what": error.what, "where": error.where, "remedy": error.remedy}
            except BrokenPipeError:
                raise
            except Exception as error:  # a decoder may raise anything
                facts = {"what": f"it cannot be decoded ({type(error).__name__}: {error})", "where": "", "remedy": None}
            _send(replies, facts=facts)
    os._exit(0)


@contextlib.contextmanager
def _file_of(request: Mapping[str, Any], requests: BinaryIO) -> Iterator[Path]:
    """The file to decode: the one that a request names, or the bytes that follow it, in memory where the system allows."""
    if request["path"]:
        yield Path(request["path"])
        return
    on_linux = sys.platform == "linux"
    with os.fdopen(os.memfd_create("item"), "wb") if on_linux else tempfile.NamedTemporaryFile() as file:
        left = request["bytes"]
        while left:
            left -= file.write(requests.read(min(left, _STEP)))
        file.flush()
        yield Path(f"/proc/self/fd/{file.fileno()}" if on_linux else file.name)


def _answer(operation: Callable[[], Reply], alarm: _Alarm, replies: BinaryIO) -> dict[str, Any]:
    """Send an operation's data piece by piece, to save memory, and return its facts."""
    with alarm:
        facts, pieces = operation()
    while True:
        with alarm:
            piece = next(pieces, None)
        if piece is None:
            return facts
        _send(replies, piece)


class _Alarm:
    """Ends this process after a number of seconds spent in its `with` blocks, even in C code that never returns.

    Sending is outside these blocks: the parent may have been stopped, so the time it takes to read does not count.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def __enter__(self) -> None:
        self._started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, max(self._left, 0.001))

    def __exit__(self, *_: object) -> None:
        self._left -= time.monotonic() - self._started
        signal.setitimer(signal.ITIMER_REAL, 0)


def _send(replies: BinaryIO, data: Any = b"", facts: Mapping[str, Any] | None = None) -> None:
    text = b"" if facts is None else json.dumps(facts).encode()
    replies.write(_FRAME.pack(len(data), len(text)))
    replies.write(data)
    replies.write(text)
    replies.flush()


def _stand_alone(memory_cap: int) -> None:
    """Cap this process's memory, and make it independent of the terminal's signals and the parent's signal settings."""
    os.setpgrp()  # Ctrl-C is for the parent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with contextlib.suppress(ValueError, OSError):  # macOS refuses such a limit
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        cap = memory_cap if hard == resource.RLIM_INFINITY else min(memory_cap, hard)
        resource.setrlimit(resource.RLIMIT_AS, (cap, hard))
