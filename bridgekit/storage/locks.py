"""File locks, which the system releases when their holder ends in any way."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bridgekit.progress import say

#: Errors of file systems that have no locks: some network and cluster file systems.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EINVAL)

#: The lock files that this process holds: thread and path to open descriptor.
_held: dict[tuple[int, Path], int] = {}


def hold(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file or folder, exclusively or shared with other processes. Returns whether it is held now.

    Raises:
        OSError: with one of `NO_LOCKS` if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[bool]:
    """Hold a lock file in a `with` block. A thread that already holds it may enter again.

    Arguments:
        path: the lock file. It exists only while it is held, and names its holder.
        waiting: what to print on standard error before waiting for another process to release it. None does not wait.

    Yields:
        whether it is held: not if another process holds it or the file system has no locks.

    Raises:
        OSError: the file cannot be created.
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
            path.unlink()  # while it is held: those who wait for it check that it is still there
        os.close(_held.pop(key))


def _acquire(path: Path, waiting: str | None) -> int | None:
    """The descriptor of a lock file that is now held; None if it cannot be."""
    while True:
        with ExitStack() as stack:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            try:
                if not hold(descriptor):
                    if waiting is None:
                        return None
                    holder = os.pread(descriptor, 200, 0).decode(errors="replace")
                    say(f"{waiting} ({holder or 'another process'}); waiting for it to end")
                    hold(descriptor, wait=True)
                with suppress(FileNotFoundError):  # if its last holder removed it, the lock is another file of this name now
                    if path.stat().st_ino == os.fstat(descriptor).st_ino:
                        stack.pop_all()
                        return descriptor
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                path.unlink(missing_ok=True)
                return None


def _forget() -> None:
    """Close the parent's locks in a forked child, which does not hold them."""
    for descriptor in _held.values():
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
