"""The cache folder, and writing files and folders atomically."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from uuid import uuid4

from bridgekit.errors import BridgekitError
from bridgekit.progress import say
from bridgekit.storage.locks import hold, locked

#: A file or folder being written is `.NAME.<32 hex digits>.part` beside its final path; one about to be removed ends in `.old`.
PART, OLD = "part", "old"
_ASIDE = re.compile(rf"\.(?P<name>.+)\.[0-9a-f]{{32}}\.(?P<kind>{PART}|{OLD})", re.DOTALL)
#: Folders where this process has already removed what killed processes left behind.
_swept: set[Path] = set()
#: Errors of creating a file where this user cannot create any.
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
#: Arguments of `renameat2` (Linux) and `renamex_np` (macOS): relative to the working directory; exchange both paths.
AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2


def cache_folder() -> Path:
    """`$BRIDGEKIT_HOME`, or else `bridgekit` in the user's cache folder. Not created here."""
    home = os.environ.get("BRIDGEKIT_HOME")
    if home:
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bridgekit"


def write_atomically(path: Path, write: Callable[[Path], object], *, own_folder: bool = False) -> None:
    """Let `write` fill a temporary file, flush it to disk, then rename it to `path`.

    If the process is killed, the old file or the new one is there, never a mixture. The next process that writes into the
    folder removes temporary files left behind.

    Arguments:
        path: the file. Missing folders are created.
        write: fills the file whose path it is given.
        own_folder: put the temporary file in a folder of its own, for a library that creates other files beside it.

    Raises:
        BridgekitError: it cannot be written.
    """
    with _temporary(path) as aside:
        file = aside / path.name if own_folder else aside
        if own_folder:
            aside.mkdir()
        write(file)
        _flush(file)
        file.replace(path)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for a UTF-8 text."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_folder_atomically(path: Path, fill: Callable[[Path], object]) -> None:
    """`write_atomically` for a folder: `fill` fills a temporary one, which then replaces `path`."""
    folder = real(path)
    with one_writer(folder), _temporary(folder) as aside:
        aside.mkdir()
        fill(aside)
        for file in [*aside.rglob("*"), aside]:
            _flush(file)
        _swap(aside, folder)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """The path of a temporary file or folder, which the `with` block moves to `path`."""
    aside = _aside(path, PART)
    try:
        _make_folder(path.parent)
        with _writing_in(path.parent):
            try:
                yield aside
                _flush(path.parent)
            finally:
                _remove(aside)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def one_writer(path: Path) -> Iterator[bool]:
    """Be the only process that writes a folder in a `with` block. Others wait here, and say so. Readers need not wait.

    Yields:
        whether this is certain: it is not if the file system has no locks, which is printed, or if this user cannot write in
        the parent folder, where an existing folder may still be read.

    Raises:
        BridgekitError: the lock cannot be taken.
    """
    folder = real(path)
    missing = [parent for parent in folder.parents if not parent.exists()]
    with ExitStack() as stack:
        for parent in reversed(missing):  # an error should leave no empty folders behind
            stack.callback(_remove_empty, parent)
        alone = False
        try:
            _make_folder(folder.parent)
            lock = locked(folder.with_name(f".{folder.name}.lock"), f"another process is writing {path}")
            alone = stack.enter_context(lock)
            if not alone:
                _say_no_locks(folder.parent)
        except OSError as error:
            if error.errno not in READ_ONLY:  # otherwise nothing can be written here, and whoever tries will report it
                raise cannot_write(folder, error) from error
        if alone:  # so any temporary folders were left by killed processes
            put_back(folder)
            for kind in (PART, OLD) if folder.exists() else (PART,):  # an old folder that could not be put back is kept
                for left in _left(folder.parent, kind, folder.name):
                    _remove(left)
        yield alone


@functools.cache
def _say_no_locks(folder: Path) -> None:
    say(f"the file system of {folder} has no locks: let no two processes write there at once")


def put_back(folder: Path) -> None:
    """Restore a folder whose writer was killed between the two renames of `_swap`."""
    if not folder.exists():
        for old in _left(folder.parent, OLD, folder.name):
            with suppress(OSError):  # the parent cannot be written, or another process has put it back
                old.rename(folder)


def put_all_back(folder: Path) -> None:
    """`put_back` for everything in a folder."""
    for old in _left(folder, OLD):
        put_back(folder / old.name[1:].rsplit(".", 2)[0])


def check_writable(folder: Path) -> None:
    """Raise BridgekitError unless files may be written in a folder, which need not exist yet."""
    try:
        # In the nearest existing folder, since a later error should leave no empty folders behind.
        with tempfile.TemporaryFile(dir=next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())):
            return
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(path: Path, error: OSError) -> BridgekitError:
    """The error to show for a path that cannot be written."""
    what, place = error.strerror or str(error), path
    if isinstance(error, FileExistsError | NotADirectoryError):
        what = "there is a file where a folder should be"
        place = next((parent for parent in (path, *path.parents) if parent.is_file()), path)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "let $BRIDGEKIT_HOME name a folder" if real(path).is_relative_to(real(cache_folder())) else "choose a place"
    remedy = f"free some space, or {remedy} on a larger disk" if full else f"{remedy} that can be written"
    return BridgekitError(f"this cannot be written: {what}", where=str(place), remedy=remedy)


def real(path: Path) -> Path:
    """The path with links resolved, so that a folder has one lock for all of its paths."""
    return Path(os.path.realpath(path))


def _aside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex}.{kind}")


def _left(folder: Path, kind: str, name: str | None = None) -> list[Path]:
    """Temporary or old files and folders in a folder, for one name or for all."""
    if not folder.is_dir():
        return []
    found = [(entry.path, _ASIDE.fullmatch(entry.name)) for entry in os.scandir(folder)]
    return [Path(path) for path, parts in found if parts and parts["kind"] == kind and name in (None, parts["name"])]


@contextmanager
def _writing_in(folder: Path) -> Iterator[None]:
    """Share the folder's lock with all who write into it, after removing what killed processes left there.

    While a process holds the lock exclusively, nobody is writing, so any temporary files are abandoned.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # without locks, nothing is removed
            if folder not in _swept and hold(descriptor):
                _swept.add(folder)
                for left in _left(folder, PART):
                    _remove(left)
            hold(descriptor, shared=True, wait=True)
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove as much as possible of a file or folder."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():  # some file systems cannot flush folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(aside: Path, folder: Path) -> None:
    """Put `aside` in place of `folder`, and remove the old folder.

    If the system cannot exchange two folders, `folder` is missing for a moment between two renames: see `put_back`.
    """
    if not folder.exists():
        aside.rename(folder)
        return
    if _exchange(aside, folder):
        return  # the old folder is at `aside` now
    while aside.exists():
        old = _aside(folder, OLD)
        with suppress(FileNotFoundError):
            folder.rename(old)
        try:
            aside.rename(folder)
        except BaseException as error:
            put_back(folder)
            # A reader may just have put the old one back: try again.
            if not isinstance(error, OSError) or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    for old in _left(folder.parent, OLD, folder.name):
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False if the system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        return bool(library.renamex_np(first, second, RENAME_SWAP) == 0)
    return hasattr(library, "renameat2") and bool(library.renameat2(AT_FDCWD, first, AT_FDCWD, second, RENAME_EXCHANGE) == 0)
