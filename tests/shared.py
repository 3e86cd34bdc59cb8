"""What several test files need: things made once a run, however many processes run the tests, and waiting, and forks."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

#: Seconds after which a test gives up waiting. So many that only what never comes takes them, on however busy a machine.
PATIENCE = 600.0


def wait_until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for a condition to hold.

    Raises:
        AssertionError: it does not within `PATIENCE` seconds.
    """
    end = time.perf_counter() + PATIENCE  # not monotonic(), which some tests replace
    while not condition():
        assert time.perf_counter() < end, f"waited {PATIENCE:.0f} s in vain {what}"
        time.sleep(0.01)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker of pytest-xdist to ask for it fills, while the others wait.

    Arguments:
        factory: of this process's temporary folders.
        name: of the folder, the same in all processes.
        make: fills the empty folder; if it fails, the next to ask tries again.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    done = folder.with_suffix(".made")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def compressed(path: Path, codec: str, samples: NDArray[np.float32], rate: int, **options: str) -> Path:
    """A sound track written by PyAV, in the container that the file's name or `format=` says.

    Arguments:
        path: of the file.
        codec: FFmpeg's name of an encoder, `aac` or `libopus`.
        samples: of shape (channels, n): one channel or two.
        rate: in Hz; Opus takes 48,000.
        options: `format`, and FFmpeg's own; `video="libvpx"` and `cover="yes"` add pictures.
    """
    import av

    layout, video, cover = ("mono", "stereo")[len(samples) - 1], options.pop("video", None), options.pop("cover", None)
    with av.open(str(path), "w", format=options.pop("format", None), options=options) as file:
        track = file.add_stream(codec, rate=rate, layout=layout)
        if video or cover:
            pictures = file.add_stream(video or "mjpeg", rate=5)
            pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p" if video else "yuvj420p"
            if cover:
                pictures.disposition = av.stream.Disposition.attached_pic.value  # PyAV 14 takes only a number
            for number in range(20 if video else 1):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * number, np.uint8))
                frame.pts = number
                file.mux(pictures.encode(frame))
            file.mux(pictures.encode(None))
        sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        sound.sample_rate, sound.pts = rate, 0
        waiting = av.AudioFifo()
        for part in av.AudioResampler(format=track.format.name, layout=layout, rate=rate).resample(sound):
            waiting.write(part)
        while piece := waiting.read(track.codec_context.frame_size, partial=True):
            file.mux(track.encode(piece))
        file.mux(track.encode(None))
    return path


class Fork:
    """A process of its own that starts at once: a fork of this one, which has imported everything already.

    Arguments:
        work: what it does. It exits with 0, or as `sys.exit` tells it to, or with 70 after another exception.
        log: the file that its standard output and error are appended to.
    """

    def __init__(self, work: Callable[[], object], log: Path) -> None:
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                work()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self) -> int:
        """Its exit code; negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def taken(work: Callable[[], object], log: Path) -> tuple[int, float]:
    """What some work takes in a process of its own: bytes of memory at its peak, above those before, and seconds of CPU.

    Decoders are processes of their own and are not counted.

    Raises:
        AssertionError: it ends with an exception.
    """

    def measure() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF)
        work()
        after = resource.getrusage(resource.RUSAGE_SELF)
        unit = 1 if sys.platform == "darwin" else 1024
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"\ntook {(after.ru_maxrss - before.ru_maxrss) * unit} {seconds}")

    code = Fork(measure, log).wait()
    printed = log.read_text(encoding="utf-8")
    assert code == 0, printed
    _, memory, seconds = printed.splitlines()[-1].split()
    return int(memory), float(seconds)
