"""What the arguments of `embed`, `search` and `generate` stand for: items of one modality, or folders and tables of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError
from bridgekit.items import EXTENSIONS
from bridgekit.media import read_text
from bridgekit.pairs import SetAside
from bridgekit.progress import Report
from bridgekit.tables.columns import listed_columns
from bridgekit.tables.formats import TABLES
from bridgekit.tables.reading import open_table, read_items

if TYPE_CHECKING:
    from torch import Tensor

    from bridgekit.bridge.bridge import Bridge

LINES = ".txt"  # a file with one text per line
SEARCHED = 10_000  # files that are searched for a name like a missing one
_KNOWN = frozenset(ending for endings in EXTENSIONS.values() for ending in endings)


@dataclass(frozen=True)
class Inputs:
    """Items of one modality.

    Arguments:
        modality: their modality.
        items: n paths or texts, in the order of the arguments.
        rows: n numbers of their rows in a table, or places in a folder; None for an argument that is itself an item.
        set_aside: rows of tables that cannot be used.
    """

    modality: str
    items: Sequence[Item]
    rows: Sequence[int | None]
    set_aside: Sequence[SetAside] = ()


def read_inputs(
    bridge: Bridge,
    arguments: Sequence[str],
    modality: str | None = None,
    *,
    option: str,
    columns: Mapping[str, str] | None = None,
    outside: bool = False,
) -> Inputs:
    """The items that arguments stand for: files, texts, and the items in folders, tables and .txt files with a text per line.

    A path that exists is never a text.

    Arguments:
        bridge: its modalities are those that the items may have.
        arguments: paths and texts.
        modality: their modality, where it cannot be inferred.
        option: the option that sets it, for messages.
        columns: modality to the name of its column in tables, where that is not the modality's.
        outside: let tables refer to files outside their own folders.

    Raises:
        BridgekitError: the arguments have several modalities, or one that the bridge lacks; a file is missing; a folder or
            table cannot be read or has no items.
    """
    for argument in arguments:
        _refuse_missing(argument, modality, tuple(bridge.sides), option)
        if exists(argument) and (Path(argument) / "bridge.json").exists():
            raise BridgekitError("this is a bridge, not an input", where=argument, remedy=f"use it with --bridge {argument}")
    chosen = modality if modality is not None else _inferred(arguments, tuple(bridge.sides), option)
    bridge.side(chosen)
    read = [list_items(argument, chosen, columns=columns, outside=outside) for argument in arguments]
    items = [item for each in read for item in each.items]
    rows = [row for each in read for row in each.rows]
    return Inputs(chosen, items, rows, [row for each in read for row in each.set_aside])


def embed_inputs(bridge: Bridge, inputs: Inputs, report: Report) -> tuple[Inputs, Tensor]:
    """The usable inputs, with the others added to `set_aside`, and their embeddings, (n, dim)."""
    embedded = bridge.embed_usable(inputs.modality, inputs.items, report=report)
    set_aside = [
        SetAside(inputs.rows[position] or position + 1, inputs.modality, str(inputs.items[position])[:200], reason)
        for position, reason in embedded.failed.items()
    ]
    kept = [position for position in range(len(inputs.items)) if position not in embedded.failed]
    items, rows = [inputs.items[position] for position in kept], [inputs.rows[position] for position in kept]
    return Inputs(inputs.modality, items, rows, [*inputs.set_aside, *set_aside]), embedded.vectors


def list_items(
    argument: str | Path, modality: str, *, columns: Mapping[str, str] | None = None, outside: bool = False
) -> Inputs:
    """The distinct items of one modality in a folder, table or .txt file; otherwise the argument, which is itself an item.

    Raises:
        BridgekitError: a folder, table or file cannot be read, or has no items of the modality.
    """
    path = Path(argument)
    if not is_listing(argument, modality):
        return Inputs(modality, [_text_in(path) if modality == TEXT and exists(argument) else argument], [None])
    if modality == TEXT and path.is_dir() and not any(entry.is_dir() for entry in path.iterdir()):
        what = "this is a folder without texts, and a path that exists is never a text"
        raise BridgekitError(what, where=str(path), remedy=f'for its name as a text, add a space, as in "{path} "')
    if path.suffix.lower() not in TABLES or path.is_dir():
        items = read_items(path, modality, columns=columns, outside=outside)
        return Inputs(modality, items, range(1, len(items) + 1))
    return Inputs(modality, *open_table(path, columns=columns, outside=outside).items(modality))


def _text_in(path: Path) -> str:
    """The text in a file."""
    if path.suffix[1:].lower() in _KNOWN:
        what = "this is a file of another modality, and a path that exists is never a text"
        raise BridgekitError(what, where=str(path), remedy=f'for its name as a text, add a space, as in "{path} "')
    return read_text(path)


def exists(argument: str | Path) -> bool:
    """Whether an argument is an existing path. An empty text is not, nor one that is too long for a path."""
    try:
        return argument != "" and Path(argument).exists()
    except OSError:
        return False


def is_listing(argument: str | Path, modality: str) -> bool:
    """Whether an argument is a folder, a table, or for texts a .txt file, rather than an item of the modality."""
    path, there = Path(argument), exists(argument)
    if not there or path.is_dir():
        return there
    ending = path.suffix.lower()
    if ending in TABLES and modality != TEXT and modality not in EXTENSIONS:
        return modality in _columns(path)  # the files of a plugin's modality may be CSV
    return ending in TABLES or (ending == LINES and modality == TEXT)


def _columns(path: Path, *, strict: bool = False) -> tuple[str, ...]:
    """The columns of a table file; none if it is no table, unless `strict`."""
    try:
        return open_table(path).modalities
    except BridgekitError:
        if strict:
            raise
        return ()


def _inferred(arguments: Sequence[str], sides: Sequence[str], option: str) -> str:
    """The modality that all arguments have."""
    common: Sequence[str] = sides
    for argument in arguments:
        found = modalities_in(argument, sides)
        if not set(common) & set(found):
            kinds = [f"{_shown(arguments[0])} is {' or '.join(common)}", f"{_shown(argument)} is {' or '.join(found)}"]
            what = f"one modality at a time, not {common[0]} and {found[0]}"
            raise BridgekitError(what, where=", ".join(kinds), remedy="run the command once for each modality")
        common = [modality for modality in common if modality in found]
    if len(common) > 1:
        several = next(argument for argument in arguments if len(modalities_in(argument, sides)) > 1)
        listed = any(is_listing(several, modality) for modality in common)
        this = f"this has {' and '.join(common)}" if listed else f"this could be {' or '.join(common)}"
        choices = " or ".join(f"{option} {modality}" for modality in common)
        raise BridgekitError(f"one modality at a time: {this}", where=_shown(several), remedy=f"choose one with {choices}")
    return common[0]


def _refuse_missing(argument: str, modality: str | None, sides: Sequence[str], option: str) -> None:
    """Raise BridgekitError if an argument must be a path, and is not there."""
    may_be_text = TEXT in sides and modality in (None, TEXT)
    table = re.match(r"(.+?), (row \d+, column |[^ ]+$)", argument)
    if table and not exists(argument) and exists(table[1]) and Path(table[1]).is_file():
        what = "an item inside a table or archive cannot be named alone"
        raise BridgekitError(what, where=argument[:200], remedy=f"give the whole table, {table[1]}")
    if exists(argument) or (may_be_text and (modality or not _looks_like_path(argument))):
        return
    other = f", or add {option} {TEXT} for a text" if may_be_text else ""
    remedy = f"{_guess(Path(argument))}check the path{other}"
    raise BridgekitError("there is no such file", where=argument[:200], remedy=remedy)


def _guess(path: Path) -> str:
    """A question after the file in the same folder whose name is most like a missing one's."""
    names: list[str] = []
    with suppress(OSError):
        names = [file.name for file in islice(path.parent.iterdir(), SEARCHED)]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / near[0]}? If not, " if near else ""


def _looks_like_path(argument: str) -> bool:
    ending = Path(argument).suffix.lower() if len(argument) < 256 else ""
    listing = ending in (*TABLES, LINES)
    return listing or ending[1:] in _KNOWN or argument.endswith("/") or argument.startswith(("./", "../", "/"))


def modalities_in(argument: str, sides: Sequence[str]) -> list[str]:
    """The bridge's modalities that an argument has items of.

    Raises:
        BridgekitError: there are none.
    """
    path, ending = Path(argument), Path(argument).suffix.lower()
    plugins = [modality for modality in sides if modality != TEXT and modality not in EXTENSIONS]  # with files of any extension
    if not exists(argument):
        found = [TEXT]
    elif path.is_dir():
        files = (file for file in path.rglob("*") if file.is_file() and file.name[0] != ".")
        found = _by_endings({file.suffix[1:].lower() for file in files}, sides)
    elif ending in TABLES:
        columns = _columns(path, strict=not plugins)
        found = [modality for modality in sides if modality in columns] or plugins
    elif ending == LINES and not plugins:
        found = [TEXT]
    elif ending[1:] in _KNOWN or plugins:
        found = _by_endings({ending[1:]}, sides)
    else:
        found = [modality for modality in sides if modality != TEXT]  # the decoder says what is wrong with it
    if not set(found) & set(sides):
        raise _not_in(argument, sides)
    return found


def _by_endings(endings: set[str], sides: Sequence[str]) -> list[str]:
    """The modalities of files with these extensions. Those that no modality knows may be of a plugin's modality."""
    own = {modality: set(EXTENSIONS.get(modality, ())) for modality in sides if modality != TEXT}
    others = endings.difference(*own.values())
    return [modality for modality, known in own.items() if endings & known or (others and not known)]


def _not_in(argument: str, sides: Sequence[str]) -> BridgekitError:
    """The error for an argument that has none of the bridge's modalities."""
    path = Path(argument)
    ending = path.suffix[1:].lower()
    if path.is_dir():
        what = f"the folder has no files of this bridge's modalities, {' and '.join(sides)}"
    elif f".{ending}" in TABLES:
        columns = listed_columns(_columns(path))
        what = f"the table has no column of this bridge's modalities, {' and '.join(sides)}; its columns are {columns}"
    else:
        modality = next((name for name, endings in EXTENSIONS.items() if ending in endings), TEXT)
        what = f"this is {modality}, and the bridge takes {' and '.join(sides)}"
    return BridgekitError(what, where=_shown(argument), remedy="give other items, or choose another bridge with --bridge")


def _shown(argument: str) -> str:
    """A path, or a text in quotes."""
    return argument[:200] if exists(argument) else repr(argument[:60])
