"""File locks, which the system releases when their holder ends in any way."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bridgekit.errors import BridgekitError
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
        BridgekitError: what is there is not a regular file or has other names, or it cannot be opened or locked.
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
            descriptor = _open(path)
            stack.callback(os.close, descriptor)
            try:
                if not hold(descriptor):
                    if waiting is None:
                        return None
                    holder = os.pread(descriptor, 200, 0).decode(errors="replace")
                    say(f"{waiting} ({holder or 'another process'}); waiting for it to end")
                    hold(descriptor, wait=True)
                with suppress(FileNotFoundError):  # if its last holder removed it, the lock is another file of this name now
                    if os.path.samestat(path.lstat(), os.fstat(descriptor)):
                        stack.pop_all()
                        return descriptor
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                if not _writable(descriptor):  # NFS locks only files that are open for writing
                    raise _unusable(path, f"this lock cannot be taken: {error.strerror}") from error
                path.unlink(missing_ok=True)
                return None


def _open(path: Path) -> int:
    """An open lock file, created unless there is one. Another user's may be open for reading only: enough for a lock."""
    while True:
        try:
            return _create(path)
        except FileExistsError:
            pass
        # Not O_CREAT: in a sticky folder, Linux can refuse it for another user's file.
        for flags in (os.O_RDWR, os.O_RDONLY):
            try:
                descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:  # removed by its holder
                break
            except OSError as error:
                if flags == os.O_RDWR and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    continue
                raise _unusable(path, _why_not_opened(error)) from error
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise _unusable(path, "this lock is not a regular file")
                if status.st_nlink > 1:
                    raise _unusable(path, "this lock has another name too (it is a hard link)")
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor


def _create(path: Path) -> int:
    """A new lock file, open. Whatever the umask, all may read it, and those who may write in its folder may write it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    with suppress(OSError):  # a file system without permissions
        os.fchmod(descriptor, 0o644 | path.parent.stat().st_mode & 0o022)
    return descriptor


def _writable(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def _why_not_opened(error: OSError) -> str:
    if error.errno in (errno.ELOOP, errno.EMLINK):  # EMLINK on BSD
        return "this lock is a link, which is not followed"
    if error.errno in (errno.EISDIR, errno.ENXIO):
        return "this lock is not a regular file"
    return f"this lock cannot be opened: {error.strerror}"


def _unusable(path: Path, what: str) -> BridgekitError:
    return BridgekitError(what, where=str(path), remedy="remove it, unless another process is writing there")


def _forget() -> None:
    """Close the parent's locks in a forked child, which does not hold them."""
    for descriptor in _held.values():
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
