"""Where bridgekit keeps what it can make again, and how it writes a file so that a reader never sees half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


def cache_folder() -> Path:
    """`$BRIDGEKIT_HOME`, or else `bridgekit` in the user's cache folder. Not created here."""
    home = os.environ.get("BRIDGEKIT_HOME")
    if home:
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bridgekit"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk, then rename it onto `path`.

    A process killed at any moment leaves the old file or the new one, never a mixture.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for a UTF-8 text."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))
