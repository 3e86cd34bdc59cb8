"""Locks that the system takes back when their holder ends, however it ends: none is ever left behind to block anybody."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bridgekit.progress import say

#: What a file system without locks answers: some network ones, and those of some clusters.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EINVAL)

#: The lock files that this process holds: the thread and the file, to the open file.
_held: dict[tuple[int, Path], int] = {}


def hold(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file or folder for this process, or with others who share it.

    Returns:
        whether it is held now.

    Raises:
        OSError: with one of `NO_LOCKS`, where the file system has none.
    """
    if sys.platform == "win32":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    else:  # mypy reads a branch for one system only where there is another for the others
        import fcntl

        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True


@contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[bool]:
    """Hold a lock file for as long as this lasts; a thread that holds it already may do so again.

    Arguments:
        path: the file, which is there only while somebody holds it. It says who.
        waiting: what to say on standard error when somebody else holds it, before waiting for them. None does not wait.

    Yields:
        whether it is held: not where somebody else holds it, nor where the file system has no locks.

    Raises:
        OSError: the file cannot be made.
    """
    key = (threading.get_ident(), path)
    if key in _held:
        yield True
        return
    descriptor = _acquire(path, waiting)
    if descriptor is None:
        yield False
        return
    _held[key] = descriptor
    try:
        with suppress(OSError):  # a full disk
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield True
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever waits for it looks whether it still has its name
        os.close(_held.pop(key))


def _acquire(path: Path, waiting: str | None) -> int | None:
    """An open lock file that is held; None where it cannot be had."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not hold(descriptor):
                if waiting is None:
                    os.close(descriptor)
                    return None
                holder = os.pread(descriptor, 200, 0).decode(errors="replace")
                say(f"{waiting} ({holder or 'another process'}); waiting for it to end")
                hold(descriptor, wait=True)
            with suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was removed by whom we waited for: the lock is now another file of that name


def _forget() -> None:
    """A process that this one forks is no holder: closed there, the lock ends with this process alone."""
    for descriptor in _held.values():
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
