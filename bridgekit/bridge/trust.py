"""Which of the tables and encoders that a bridge names may be opened. The bridge's author chose them, not the user."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from bridgekit.errors import BridgekitError
from bridgekit.hub import without_downloads
from bridgekit.plugins import pair_providers
from bridgekit.storage.bounded import homes, is_within

#: Environment variable: `yes` lets bridges use encoders that run code from a model's repository.
REMOTE_CODE = "BRIDGEKIT_TRUST_REMOTE_CODE"
#: Environment variable: `yes` lets loaded bridges name tables and encoders anywhere on disk, and have encoders downloaded.
OUTSIDE = "BRIDGEKIT_OUTSIDE"


def refuse_untrusted_table(source: str, folder: Path | None) -> None:
    """Raise BridgekitError for a table outside the working directory and the bridge's folder, after resolving links.

    Arguments:
        source: the table's path; the name of a plugin's source, which is allowed; or of a plugin's provider and a table, which
            is allowed if that is a path inside these folders.
        folder: the bridge's folder, or None for a bridge made in this process, which may name any path.
    """
    is_name = ":" in source and not os.path.lexists(source)
    provider, _, table = source.partition(":")
    if is_name and provider in pair_providers():
        allowed = _may_open(re.split(r"[{*?,\[]", table)[0], folder, must_exist=True)
    else:
        allowed = is_name or _may_open(source, folder)
    if source and not allowed:
        raise BridgekitError(
            "this bridge names a table outside this folder and its own: reading it needs your permission",
            where=source,
            remedy="if you trust it, name it yourself (eval or report --pairs, search --among, generate --captions), "
            f"or set {OUTSIDE}=yes",
        )


def refuse_untrusted_encoder(encoder: str, folder: Path | None) -> None:
    """Raise BridgekitError for an encoder that runs code from its repository, or whose name contains such an outside path."""
    if "trust_remote_code=yes" in encoder and os.environ.get(REMOTE_CODE) != "yes":
        raise BridgekitError(
            "this bridge names an encoder that runs code from its model's repository",
            where=encoder,
            remedy=f"if you have read the code and trust it, set {REMOTE_CODE}=yes",
        )
    for part in re.split("[:,=@+;|]", encoder):
        path = Path(os.path.expanduser(part))  # noqa: PTH111  (Path.expanduser fails where there is no such user)
        is_path = path.is_absolute() or ".." in path.parts or (part != "" and os.path.lexists(path))
        if is_path and not _may_open(path, folder):
            raise BridgekitError(
                "this bridge names an encoder on disk outside this folder and its own: opening it needs your permission",
                where=encoder,
                remedy=f"if you trust the bridge, set {OUTSIDE}=yes, or run this in the encoder's folder",
            )


@contextmanager
def opening_encoder(encoder: str, folder: Path | None) -> Iterator[None]:
    """While an encoder that a bridge names is opened: nothing is downloaded for it, unless the user allows that.

    What is in the hub's cache is used: the user, or a program of the user's, chose to have it there.

    Arguments:
        encoder: `provider:model`.
        folder: the bridge's folder, or None for a bridge made in this process, whose encoders the user named.

    Raises:
        BridgekitError: the encoder runs code from its repository, or is outside this folder and the bridge's own.
    """
    refuse_untrusted_encoder(encoder, folder)
    allowed = folder is None or os.environ.get(OUTSIDE) == "yes"
    with nullcontext() if allowed else without_downloads(f"if you trust the bridge, set {OUTSIDE}=yes"):
        yield


def _may_open(path: str | Path, folder: Path | None, must_exist: bool = False) -> bool:
    """Whether a path is in the working directory or in `folder`. If it must exist: itself, or the folder that it is in."""
    if folder is None or os.environ.get(OUTSIDE) == "yes":
        return True
    try:
        there = not must_exist or os.path.lexists(path) or (os.path.dirname(path) and os.path.isdir(os.path.dirname(path)))  # noqa: PTH112, PTH120
        return bool(there) and is_within(path, (*homes(Path()), *homes(folder)))
    except (OSError, ValueError):
        return False
