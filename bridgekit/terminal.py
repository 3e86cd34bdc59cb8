"""Printing for people: the only place that does, so that no text from a file, a table or a plugin is obeyed by a terminal.

Control characters are printed as escapes such as `\\x1b`, and square brackets are never rich's markup: a style is given beside
a text, not within it. `tests/test_terminal.py` finds code that prints elsewhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence, Set
from typing import TYPE_CHECKING, TextIO

from bridgekit.plain import plain, plain_json

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console
    from rich.text import Text


def say(line: object = "", file: TextIO | None = None) -> None:
    """Print one line, on standard output or on `file`."""
    print(plain(line), file=file, flush=file is not None)


def say_lines(text: str, file: TextIO | None = None) -> None:
    """Print a text with line breaks of ours. Those in untrusted text must be escaped before."""
    for line in text.split("\n"):
        say(line, file)


def say_styled(*parts: tuple[object, str]) -> None:
    """Print one line of parts, each a text and its rich style, on standard output."""
    line = _cell("")
    for text, style in parts:
        line.append(plain(text), style)
    _console().print(line, soft_wrap=True)


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print one JSON document on standard output."""
    print(plain_json(json.dumps(value, indent=indent, ensure_ascii=False)))


def print_table(title: str, columns: Sequence[str], rows: Iterable[tuple[Sequence[object], bool]], text: Set[str]) -> None:
    """Print a table on standard output.

    Arguments:
        title: a line above it.
        columns: their names, in which a line break is ours.
        rows: the cells of each row, and whether it is bold.
        text: the columns that are text, which wraps where it would be too wide. The others are numbers.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_cell(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name in columns:
        header = Text("\n").join(map(_cell, name.split("\n")))
        table.add_column(header, justify="left" if name in text else "right", no_wrap=name not in text, overflow="fold")
    for cells, bold in rows:
        table.add_row(*map(_cell, cells), style="bold" if bold else None)
    _console().print(table)


def _cell(text: object) -> Text:
    from rich.text import Text

    return Text(plain(text))


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def error_console() -> Console:
    """Standard error for rich's spinners and progress bars, which are drawn over again. Their texts must be `plain` already."""
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback on standard error: a `sys.excepthook`, since messages of other libraries quote what is in files."""
    import traceback

    for part in traceback.format_exception(kind, error, trace):
        say_lines(part.rstrip("\n"), sys.stderr)
