"""WebDataset shards: tar files in which members with the same name up to the first dot belong together."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from braceexpand import braceexpand

from bridgekit.errors import BridgekitError, ItemError
from bridgekit.items import EXTENSIONS, TEXT, Blob
from bridgekit.progress import say
from bridgekit.storage.bounded import open_regular, parse_json

#: Endings of texts. A member's bytes are read when they are needed; texts and metadata at once.
TEXTS = ("txt", "text", "caption", "transcript")
MAX_TEXT = 4 << 20  # bytes of a text or of a sample's metadata


@dataclass(frozen=True)
class Member:
    """A file in a shard: its place in bytes, and its name in two parts, at the first dot."""

    shard: Path | str
    name: str
    start: int
    size: int
    key: str
    ending: str
    content: bytes | None = field(default=None, repr=False)  # if it was read with the shard

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            ItemError: the shard is cut short, or gone.
        """
        if self.content is not None:
            return self.content
        try:
            with open_regular(Path(self.shard)) as file:
                file.seek(self.start)
                data = file.read(self.size)
        except (OSError, ValueError) as error:
            raise ItemError(f"the shard cannot be read ({error})", where=str(self), remedy="check the path") from None
        if len(data) < self.size:
            raise ItemError("the shard is cut short", where=str(self), remedy="copy or download it again")
        return data

    def __str__(self) -> str:
        return f"{self.shard}, {self.name}"


def open_shards(pattern: str) -> dict[str, list[Any]]:
    """The samples of shards as columns: a row for each key, in the shards' order.

    `image` and `audio` are the members with such an ending, `text` those ending in .txt; a member such as `key.left.png` is in
    the column `left.png`; the values of a .json member are columns of their own. Nothing is unpacked.

    Arguments:
        pattern: paths with braces, as in `shards/{0000..0099}.tar`, or with `*`. The files must not be compressed.

    Raises:
        BridgekitError: there is no such shard, one is not a tar file, or a key has two members with the same ending.
    """
    samples = [_sample(key, members) for shard in _paths(pattern) for key, members in _by_key(_members(shard))]
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: [sample.get(name) for sample in samples] for name in names}


def samples_in(file: IO[bytes], shard: str) -> Iterator[dict[str, Any]]:
    """The samples of a shard that is read forwards, as from object storage, with their members' bytes in memory.

    Arguments:
        file: the shard, open for reading. It need not be seekable.
        shard: its name, for messages.

    Raises:
        BridgekitError: a key has two members with the same ending.
        tarfile.TarError: it is not a tar file, is compressed, or is cut short: after the samples before that.
    """
    with tarfile.open(fileobj=file, mode="r|") as archive:
        members = (member for each in archive if (member := _member(shard, each, archive)) is not None)
        for key, group in _by_key(members):
            yield _sample(key, group)


def _paths(pattern: str) -> list[Path]:
    try:
        expanded = list(braceexpand(pattern))
    except ValueError:
        raise BridgekitError("the braces do not match", where=pattern, remedy="as in shards/{0000..0099}.tar") from None
    paths = [Path(path) for each in expanded for path in (sorted(glob.glob(each)) if glob.has_magic(each) else [each])]  # noqa: PTH207  (absolute patterns)
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None or not paths:
        remedy = f"check the path; it is relative to {Path.cwd()}"
        if "://" in pattern or pattern.startswith("pipe:"):
            remedy = "shards are not fetched: download them and give their paths"
        raise BridgekitError("there is no such shard", where=str(missing or pattern), remedy=remedy)
    return paths


def _members(shard: Path) -> Iterator[Member]:
    """The files in a shard. It may be cut short: the members before that are used."""
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            try:
                yield from (member for each in archive if (member := _member(shard, each)) is not None)
            except tarfile.ReadError as error:
                say(f"{shard} is cut short or damaged ({error}): members after that are not used")
    except (OSError, ValueError, tarfile.TarError) as error:
        raise BridgekitError(
            f"this is not an uncompressed tar file ({error})", where=str(shard), remedy="unpack .tar.gz with gunzip"
        ) from None


def _member(shard: Path | str, each: tarfile.TarInfo, archive: tarfile.TarFile | None = None) -> Member | None:
    """A file of an archive, with its bytes if the archive is given. None if it is a folder, a link or has no key."""
    folder, _, base = each.name.rpartition("/")
    key, _, ending = base.partition(".")
    if not (each.isfile() and key and ending):
        return None
    file = archive.extractfile(each) if archive is not None else None
    content = file.read() if file is not None else None
    return Member(shard, each.name, each.offset_data, each.size, f"{folder}/{key}", ending.lower(), content)


def _by_key(found: Iterator[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Members that follow each other with the same key."""
    group: list[Member] = []
    for member in found:
        if group and member.key != group[0].key:
            yield group[0].key, group
            group = []
        if any(other.ending == member.ending for other in group):
            raise BridgekitError(
                "a key has two members with the same ending", where=str(member), remedy="write the shard again"
            )
        group.append(member)
    if group:
        yield group[0].key, group


def _sample(key: str, members: list[Member]) -> dict[str, Any]:
    """A row: the items and metadata of one key."""
    row: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    for member in members:
        kind = next((modality for modality, endings in EXTENSIONS.items() if member.ending in endings), None)
        if member.ending in TEXTS and member.size <= MAX_TEXT:
            row[TEXT] = _text(member)
        elif member.ending == "json" and member.size <= MAX_TEXT:
            metadata = _metadata(member)
        elif member.ending == "cls":
            row["cls"] = _text(member)
        else:
            row[kind or member.ending] = Blob(str(member), partial(Member.read, member))
    return {"key": key.removeprefix("/"), **{name: value for name, value in metadata.items() if name not in row}, **row}


def _text(member: Member) -> str | None:
    """A text; None if it cannot be read: its row is set aside."""
    try:
        return member.read().decode("utf-8-sig").strip() or None
    except (ItemError, UnicodeDecodeError):
        return None


def _metadata(member: Member) -> dict[str, Any]:
    """The texts, numbers and lists of texts in a sample's JSON."""
    try:
        value = parse_json(member.read(), lenient=True)
    except (ItemError, ValueError):
        return {}
    plain = value.items() if isinstance(value, dict) else ()
    return {
        name: each
        for name, each in plain
        if isinstance(each, str | int | float) or (isinstance(each, list) and all(isinstance(part, str) for part in each))
    }
