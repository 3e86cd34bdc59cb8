"""Decoding in processes of their own, so that a file that crashes a decoder, hangs it or eats its memory costs one item.

The processes are started when first needed, one for each thread that reads at the same time, and are used again and again.
Each has a cap on its memory, and a limit of time for each file. They end when the process that started them does.

What goes between the two: a line of JSON that asks, and in reply frames of two lengths (of data and of JSON, 8 bytes each),
so much data, and so much JSON. The first frame with JSON is the last. Nothing is pickled.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
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

from bridgekit.decoding.files import AGAIN, file_size
from bridgekit.errors import BridgekitError, ItemError

T = TypeVar("T")
B = TypeVar("B", bytearray, memoryview)

#: What a decoder may take for one file, in seconds: so many, and so many more for each megabyte that the file has.
SECONDS = 60.0
SECONDS_PER_MB = 1.0
#: What a decoder may hold, in bytes of addresses, its programs included. The largest picture allowed takes 2.5 GB (JPEG 2000
#: with alpha, 100 megapixels), the longest sound 0.2 GB. Linux keeps to it; macOS and Windows have no such limit.
MEMORY_CAP = 3 << 30

_START_SECONDS = 120.0
_FRAME = struct.Struct("<QQ")
_PIPE_SIZE = 1 << 20
_STEP = 1 << 24  # bytes by which room for a reply grows
_KEPT = 1 << 24  # bytes of room that is kept for the next reply
_SET_PIPE_SIZE = 1031  # Linux's F_SETPIPE_SZ, which Python's fcntl names from 3.10 on, on Linux alone

# The search path is ours: `python -m` would look for modules in the working directory first, where anything may lie.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from bridgekit.decoding.isolation import serve; serve(int(sys.argv[1]))"
_ENVIRONMENT = {
    # One thread each, as decoders work side by side.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # A memory pool that does not reserve addresses it may never use.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    # glibc would give the memory of each picture back and ask for it again with the next, and the system clears it each
    # time: that took longer than decoding a photograph.
    "MALLOC_MMAP_THRESHOLD_": str(_KEPT),
    "MALLOC_TRIM_THRESHOLD_": str(4 * _KEPT),
}


# ---- the process that asks


def decode(
    operation: str,
    path: Path,
    finish: Callable[[dict[str, Any], memoryview], T],
    remedy: str = f"convert it anew, {AGAIN}",
    **options: object,
) -> T:
    """Let a decoder process read a file.

    Arguments:
        operation: `audio`, `duration`, `image` or `parquet`.
        path: the file.
        finish: makes the result of what the operation tells and of its data, which is gone when this returns.
        remedy: what to do about a file that a decoder cannot bear.
        options: the operation's.

    Raises:
        ItemError: the file cannot be read, says the operation; or it crashed the decoder, took too long or too much memory.
        BridgekitError: no decoder process can be started.
    """
    seconds = SECONDS + SECONDS_PER_MB * file_size(path) / 1e6
    whole = str(path if path.is_absolute() else Path.cwd() / path)  # a decoder has a working directory of its own
    try:
        with _pool.borrowed() as decoder:
            told, data = decoder.ask({"operation": operation, "path": whole, "seconds": seconds, "options": options}, seconds)
            with data:
                if "what" not in told:
                    return finish(told, data)
    except _Ended as ended:
        raise ItemError(str(ended), where=str(path), remedy=remedy) from None
    raise ItemError(
        told["what"],
        where=str(path) + str(told["where"]).removeprefix(whole),
        remedy=told["remedy"] or remedy,
    )


def decoder_ids() -> list[int]:
    """The process ids of this process's decoders."""
    return [decoder.process.pid for decoder in _pool.decoders]


class _Ended(Exception):
    """A decoder ended instead of answering; the message says why."""


class _Decoder:
    """A decoder process, seen from the process that asks."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(MEMORY_CAP), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders in C grumble there
            bufsize=0,
            env={**os.environ, **_ENVIRONMENT},
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # on Windows, out of Ctrl-C's reach
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._replies = self.process.stdin, self.process.stdout
        self._room = bytearray()
        _widen(self._replies)

    def ask(self, request: Mapping[str, object] | None, seconds: float) -> tuple[dict[str, Any], memoryview]:
        """Send a request and wait for the whole reply; without a request, for the word that the process has started.

        Returns:
            What is told, and the data, in a place where the next reply will lie.

        Raises:
            _Ended: the process crashed, or had to be ended as it took longer than `seconds`.
        """
        self._until, self._limit = time.monotonic() + seconds, seconds
        if len(self._room) > _KEPT:
            self._room = bytearray()
        if request is not None:
            try:
                self._requests.write(json.dumps(request).encode() + b"\n")
            except OSError:
                raise self._ended() from None
        done = 0
        while True:
            size, told = _FRAME.unpack(self._read(bytearray(_FRAME.size)))
            while len(self._room) < done + size:
                self._room += bytes(_STEP)
            with memoryview(self._room)[done : done + size] as place:
                self._read(place)
            done += size
            if told:
                return json.loads(self._read(bytearray(told))), memoryview(self._room)[:done]

    def _read(self, place: B) -> B:
        """Fill a place with what comes next."""
        with memoryview(place) as view:
            done = 0
            while done < len(view):
                if not _is_readable(self._replies, self._until):
                    self.process.kill()
                    raise self._ended()
                count = self._replies.readinto(view[done:])  # type: ignore[attr-defined]  # it is a raw file
                if not count:
                    raise self._ended()
                done += count
        return place

    def _ended(self) -> _Ended:
        """Why the process has ended, once it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        if time.monotonic() >= self._until:
            return _Ended(f"decoding it took over {self._limit:.0f} seconds")
        code = self.process.returncode
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        if name == "SIGKILL":
            return _Ended("the decoder was killed (SIGKILL), by someone or for want of memory")
        return _Ended(f"the decoder crashed on this file ({name})")

    def close(self) -> None:
        """End the process. It keeps nothing that could be lost."""
        self.process.kill()
        self.process.wait()
        self._close_pipes()

    def forget(self) -> None:
        """Leave the process to the one that started it: this one is its fork."""
        self._close_pipes()
        self.process.returncode = 0  # or its going out of scope would warn of a process that is running still

    def _close_pipes(self) -> None:
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                pipe.close()


class _Pool:
    """This process's decoders: as many as were ever wanted at the same time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.decoders: list[_Decoder] = []
        self._idle: list[_Decoder] = []

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[_Decoder]:
        """A decoder for one file. If the file ends it, or the wait is interrupted, it is not used again."""
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
                self._drop(decoder)  # something ended it since its last file
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
        """End all decoders."""
        with self.lock:
            decoders, self.decoders = self.decoders, []
            self._idle.clear()
        for decoder in decoders:
            decoder.close()

    def start_anew(self) -> None:
        """In a fork: a request there would mix with its parent's."""
        self.lock = threading.Lock()
        decoders, self.decoders, self._idle = self.decoders, [], []
        for decoder in decoders:
            decoder.forget()


def _not_started(reason: str) -> BridgekitError:
    return BridgekitError(
        f"no process that decodes files can be started ({reason})",
        where=sys.executable,
        remedy="run `python -c 'import bridgekit.decoding.decoders'`, and check that memory and processes are available",
    )


def _widen(pipe: Any) -> None:
    """Let a pipe hold a picture of usual size, so that it goes over in one piece. Only Linux has this."""
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, _SET_PIPE_SIZE, _PIPE_SIZE)


def _is_readable(pipe: Any, until: float) -> bool:
    """Wait until there is something to read, or the pipe's end; False if there is not by then.

    Windows cannot wait for a pipe. There the decoder's own alarm is what ends it.
    """
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(max(0.0, until - time.monotonic()) * 1000))


_pool = _Pool()
atexit.register(_pool.close)
if hasattr(os, "register_at_fork"):
    # The lock is held meanwhile, so that no pipe is half made when a process is forked.
    os.register_at_fork(
        before=lambda: _pool.lock.acquire(),
        after_in_parent=lambda: _pool.lock.release(),
        after_in_child=_pool.start_anew,
    )


# ---- the process that decodes


def serve(memory_cap: int) -> None:
    """Answer requests from standard input until it ends.

    Arguments:
        memory_cap: the most bytes of addresses that this process may use.
    """
    requests, replies = sys.stdin.buffer, _take_standard_output()
    _stand_alone(memory_cap)
    import bridgekit.decoding.decoders  # noqa: F401  # so that no file waits for it

    with contextlib.suppress(BrokenPipeError):  # the process that asked has ended, and so may this one
        _send(replies, told={"started": True})
        for line in requests:
            request = json.loads(line)
            alarm = _Alarm(request["seconds"])
            try:
                told = _answer(request, alarm, replies)
            except MemoryError:
                told = {"what": f"decoding it takes over {memory_cap / 2**30:g} GB of memory", "where": "", "remedy": None}
            except BridgekitError as error:
                told = {"what": error.what, "where": error.where, "remedy": error.remedy}
            except BrokenPipeError:
                raise
            except Exception as error:  # a decoder may raise anything
                told = {"what": f"it cannot be decoded ({type(error).__name__}: {error})", "where": "", "remedy": None}
            _send(replies, told=told)
    os._exit(0)


def _answer(request: Mapping[str, Any], alarm: _Alarm, replies: BinaryIO) -> dict[str, Any]:
    """Send an operation's data piece by piece, so that little of it is held, and return what else it tells."""
    with alarm:
        told, pieces = _OPERATIONS[request["operation"]](Path(request["path"]), **request["options"])
    while True:
        with alarm:
            piece = next(pieces, None)
        if piece is None:
            return told
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
    """Ends this process after so many seconds within its `with` blocks, even in C code that never returns.

    The time that the reader takes, who may have been stopped for a while, does not count.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def __enter__(self) -> None:
        self._started = time.monotonic()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, max(self._left, 0.001))
        else:
            import faulthandler

            faulthandler.dump_traceback_later(max(self._left, 0.001), exit=True)

    def __exit__(self, *_: object) -> None:
        self._left -= time.monotonic() - self._started
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        else:
            import faulthandler

            faulthandler.cancel_dump_traceback_later()


def _send(replies: BinaryIO, data: Any = b"", told: Mapping[str, Any] | None = None) -> None:
    text = b"" if told is None else json.dumps(told).encode()
    replies.write(_FRAME.pack(len(data), len(text)))
    replies.write(data)
    replies.write(text)
    replies.flush()


def _take_standard_output() -> BinaryIO:
    """Standard output for replies alone: what a decoder in C prints there would garble them, and goes to standard error."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def _stand_alone(memory_cap: int) -> None:
    """Cap this process's memory, and leave it out of what a terminal sends and what its parent ignored or blocked."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is for the process that asks
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with contextlib.suppress(ImportError, ValueError, OSError):  # there is none on Windows; macOS takes no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        cap = memory_cap if hard == resource.RLIM_INFINITY else min(memory_cap, hard)
        resource.setrlimit(resource.RLIMIT_AS, (cap, hard))
