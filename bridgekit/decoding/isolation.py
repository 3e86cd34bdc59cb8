"""Decodes strangers' files in separate processes: one that crashes a decoder, hangs it or exhausts its memory costs one item.

What is covered:
- Crashes: a segmentation fault or an abort in a C decoder ends its process, and the item is refused.
- Hangs: each file has a time limit, after which the parent kills the process. The process also has an alarm of its own.
- Memory: each process has a cap on its address space on Linux. macOS does not enforce one.
- Replies: bytes and JSON, nothing pickled. A decoder that a file has taken over cannot make the parent run code.

What is not covered:
- This is not a sandbox. A decoder has the user's permissions: code that takes it over can use files and the network.
- The parent's memory, which holds the decoded item, is not limited. Neither is disk space.

Processes are started when first needed, one for each thread that decodes at the same time, and are reused. They end with their
parent.

A request is a line of JSON. A reply is a series of frames, each of two lengths (of its data and of its JSON, 8 bytes each), the
data, and the JSON. The first frame with JSON is the last.
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
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from bridgekit.errors import BridgekitError, ItemError
from bridgekit.storage.bounded import AGAIN, file_size

T = TypeVar("T")
B = TypeVar("B", bytearray, memoryview)

#: The time limit for one file: seconds, and more seconds per megabyte of the file.
SECONDS = 60.0
SECONDS_PER_MB = 1.0
#: Cap on a decoder's address space in bytes, its program included. The largest image allowed takes 2.5 GB (JPEG 2000 with
#: alpha, 100 megapixels), the longest clip 0.2 GB. Linux enforces it, macOS does not.
MEMORY_CAP = 3 << 30

_START_SECONDS = 120.0
_FRAME = struct.Struct("<QQ")
_PIPE_SIZE = 1 << 20
_STEP = 1 << 24  # bytes by which the buffer for a reply grows
_KEPT = 1 << 24  # bytes of the buffer that are kept for the next reply

# With our search path: `python -m` would look for modules in the working directory first, which may hold anything.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from bridgekit.decoding.isolation import serve; serve(int(sys.argv[1]))"
_ENVIRONMENT = {
    # One thread each, as decoders run in parallel.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # A memory pool that does not reserve address space in advance.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    # glibc would return the memory of each image and request it again for the next, and the kernel zeroes it each time: that
    # took longer than decoding a photograph.
    "MALLOC_MMAP_THRESHOLD_": str(_KEPT),
    "MALLOC_TRIM_THRESHOLD_": str(4 * _KEPT),
}


# ---- the parent


def decode(
    operation: str,
    path: Path,
    finish: Callable[[dict[str, Any], memoryview], T],
    remedy: str = f"convert it again, {AGAIN}",
    **options: object,
) -> T:
    """Decode a file in a decoder process.

    Arguments:
        operation: `audio`, `duration`, `image` or `parquet`.
        path: the file.
        finish: makes the result from the operation's facts and its data. The data is only valid during this call.
        remedy: what to do about a file that crashes a decoder or exceeds its limits.
        options: the operation's.

    Raises:
        ItemError: the operation refused the file; or the file crashed the decoder, or took too long or too much memory.
        BridgekitError: no decoder process can be started.
    """
    seconds = SECONDS + SECONDS_PER_MB * file_size(path) / 1e6
    whole = str(path if path.is_absolute() else Path.cwd() / path)  # a decoder has a working directory of its own
    try:
        with _pool.borrowed() as decoder:
            facts, data = decoder.ask({"operation": operation, "path": whole, "seconds": seconds, "options": options}, seconds)
            with data:
                if "what" not in facts:
                    return finish(facts, data)
    except _Ended as ended:
        raise ItemError(str(ended), where=str(path), remedy=remedy) from None
    raise ItemError(
        facts["what"],
        where=str(path) + str(facts["where"]).removeprefix(whole),
        remedy=facts["remedy"] or remedy,
    )


def decoder_ids() -> list[int]:
    """The process ids of this process's decoders."""
    return [decoder.process.pid for decoder in _pool.decoders]


class _Ended(Exception):
    """A decoder ended instead of replying; the message says why."""


class _Decoder:
    """A decoder process, as the parent sees it."""

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
        self._buffer = bytearray()
        _widen(self._replies)

    def ask(self, request: Mapping[str, object] | None, seconds: float) -> tuple[dict[str, Any], memoryview]:
        """Send a request and wait for the whole reply; without a request, for the message that the process has started.

        Returns:
            The operation's facts and its data. The next reply overwrites the data.

        Raises:
            _Ended: the process crashed, or was killed because it took longer than `seconds`.
        """
        self._until, self._limit = time.monotonic() + seconds, seconds
        if len(self._buffer) > _KEPT:
            self._buffer = bytearray()
        if request is not None:
            try:
                self._requests.write(json.dumps(request).encode() + b"\n")
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
        with memoryview(place) as view:
            done = 0
            while done < len(view):
                if not _is_readable(self._replies, self._until):
                    self.process.kill()
                    raise self._ended()
                count = self._replies.readinto(view[done:])  # type: ignore[attr-defined]  # a raw file
                if not count:
                    raise self._ended()
                done += count
        return place

    def _ended(self) -> _Ended:
        """Wait for the process to end; returns why it did."""
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
        """Kill the process. It holds nothing that could be lost."""
        self.process.kill()
        self.process.wait()
        self._close_pipes()

    def forget(self) -> None:
        """Leave the process to the parent that started it: this process is a fork of that parent."""
        self._close_pipes()
        self.process.returncode = 0  # or `Popen` would warn, when collected, that the process is still running

    def _close_pipes(self) -> None:
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                pipe.close()


class _Pool:
    """This process's decoders: as many as were ever needed at the same time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.decoders: list[_Decoder] = []
        self._idle: list[_Decoder] = []

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[_Decoder]:
        """A decoder for one file. If the file ends it, or waiting is interrupted, it is not used again."""
        decoder = self._take()
        try:
            yield decoder
        except BaseException:
            self._drop(decoder)
            raise
        self._idle.append(decoder)

    def _take(self) -> _Decoder:
        with contextlib.suppress(IndexError):
            while True:
                decoder = self._idle.pop()
                if decoder.process.poll() is None:
                    return decoder
                self._drop(decoder)  # it was ended since its last file
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

    def close(self) -> None:
        """Kill all decoders."""
        with self.lock:
            decoders, self.decoders = self.decoders, []
            self._idle.clear()
        for decoder in decoders:
            decoder.close()

    def start_anew(self) -> None:
        """Forget all decoders in a forked child, whose requests would mix with its parent's."""
        self.lock = threading.Lock()
        decoders, self.decoders, self._idle = self.decoders, [], []
        for decoder in decoders:
            decoder.forget()


def _not_started(reason: str) -> BridgekitError:
    return BridgekitError(
        f"the process that decodes files cannot be started ({reason})",
        where=sys.executable,
        remedy="run `python -c 'import bridgekit.decoding.decoders'`, and check that memory and processes are available",
    )


def _widen(pipe: Any) -> None:
    """Let a pipe hold an image of usual size, so that it is sent in one piece. Only Linux has this."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)


def _is_readable(pipe: Any, until: float) -> bool:
    """Wait for data or the end of a pipe; False if neither comes in time."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(max(0.0, until - time.monotonic()) * 1000))


_pool = _Pool()
atexit.register(_pool.close)
# The lock is held during a fork, so that no decoder is half started then.
os.register_at_fork(
    before=lambda: _pool.lock.acquire(),
    after_in_parent=lambda: _pool.lock.release(),
    after_in_child=_pool.start_anew,
)


# ---- the decoder process


def serve(memory_cap: int) -> None:
    """Answer requests from standard input until it ends.

    Arguments:
        memory_cap: limit on this process's address space in bytes.
    """
    requests, replies = sys.stdin.buffer, _take_standard_output()
    _stand_alone(memory_cap)
    import bridgekit.decoding.decoders  # noqa: F401  # before the first file's time limit begins

    with contextlib.suppress(BrokenPipeError):  # the parent has ended
        _send(replies, facts={"started": True})
        for line in requests:
            request = json.loads(line)
            alarm = _Alarm(request["seconds"])
            try:
                facts = _answer(request, alarm, replies)
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


def _answer(request: Mapping[str, Any], alarm: _Alarm, replies: BinaryIO) -> dict[str, Any]:
    """Send an operation's data piece by piece, so that little of it is in memory, and return its facts."""
    with alarm:
        facts, pieces = _OPERATIONS[request["operation"]](Path(request["path"]), **request["options"])
    while True:
        with alarm:
            piece = next(pieces, None)
        if piece is None:
            return facts
        _send(replies, piece)


def _audio(path: Path, sample_rate: int) -> tuple[dict[str, Any], Iterator[Any]]:
    from bridgekit.decoding.decoders import decode_audio

    return {"dtype": "float32"}, (block.data.cast("B") for block in decode_audio(path, sample_rate) if len(block))


def _duration(path: Path, most: float) -> tuple[dict[str, Any], Iterator[Any]]:
    from bridgekit.decoding.decoders import decode_audio

    rate, frames = 16_000, 0
    for block in decode_audio(path, rate):
        frames += len(block)
        if frames > most * rate:
            break
    return {"seconds": frames / rate}, iter(())


def _image(path: Path) -> tuple[dict[str, Any], Iterator[Any]]:
    from bridgekit.decoding.decoders import bands, decode_image

    picture = decode_image(path)
    boxes = list(bands(picture))
    pieces = ((picture if len(boxes) == 1 else picture.crop(box)).tobytes("raw", "RGBX") for box in boxes)
    return {"size": picture.size}, pieces


def _parquet(path: Path) -> tuple[dict[str, Any], Iterator[Any]]:
    from bridgekit.decoding.decoders import decode_parquet

    names, unread, lines = decode_parquet(path)
    return {"names": names, "unread": unread}, lines


_OPERATIONS: dict[str, Callable[..., tuple[dict[str, Any], Iterator[Any]]]] = {
    "audio": _audio,
    "duration": _duration,
    "image": _image,
    "parquet": _parquet,
}


class _Alarm:
    """Ends this process after a number of seconds in its `with` blocks, even in C code that never returns.

    Sending is outside these blocks: the time that the parent takes to read does not count, as it may have been stopped.
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


def _take_standard_output() -> BinaryIO:
    """Reserve standard output for replies: what a C decoder prints there, which would garble them, goes to standard error."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def _stand_alone(memory_cap: int) -> None:
    """Cap this process's memory, and detach it from the terminal's signals and from its parent's signal settings."""
    os.setpgrp()  # Ctrl-C is for the parent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with contextlib.suppress(ValueError, OSError):  # macOS refuses such a limit
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        cap = memory_cap if hard == resource.RLIM_INFINITY else min(memory_cap, hard)
        resource.setrlimit(resource.RLIMIT_AS, (cap, hard))
