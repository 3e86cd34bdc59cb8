"""Search filters such as `split = 'test' and year > 1990`: parsed and rewritten before they reach the database."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from bridgekit.errors import BridgekitError

#: Maximum length of a filter, in characters.
MAX_LENGTH = 2_000
_KEYWORDS = frozenset({"AND", "OR", "NOT", "IN", "LIKE", "BETWEEN", "IS", "NULL", "TRUE", "FALSE"})
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<text>'(?:[^']|'')*')
      | `(?P<quoted>[^`]+)`
      | (?P<number>\d+(?:\.\d+)?(?:[eE][-+]?\d{1,3})?)(?!\w)
      | (?P<word>[^\W\d]\w*)
      | (?P<sign>!=|<>|<=|>=|[=<>(),+\-])
    )\s*""",
    re.VERBOSE,
)


def check_filter(where: str, columns: Mapping[str, str]) -> str:
    """A filter as SQL that only compares columns with strings and numbers. Function calls are rejected.

    Arguments:
        where: the user's filter. Column names are case-insensitive and need `backticks` unless they are plain words.
        columns: column name to type (text or numbers), for messages.

    Raises:
        BridgekitError: it is too long, names an unknown column, or contains anything but comparisons.
    """
    known = ", ".join(f"{_shown(name)} ({kind})" for name, kind in columns.items())
    if len(where) > MAX_LENGTH:
        raise BridgekitError(f"the filter has {len(where):,} characters; at most {MAX_LENGTH:,} are allowed")
    if not where.strip():
        raise BridgekitError("the filter is empty", remedy=f"compare a column with a value; columns: {known}")
    parts: list[str] = []
    at = 0
    while at < len(where):
        token = _TOKEN.match(where, at)
        if token is None:
            raise _refused(f"syntax error in the filter at {where[at : at + 20]!r}", where, known)
        at = token.end()
        if token["word"] and token["word"].upper() in _KEYWORDS:
            parts.append(token["word"].upper())
        elif name := token["word"] or token["quoted"]:
            if token["word"] and where.startswith("(", at):
                raise _refused(f"functions are not allowed in a filter: {name}()", where, known)
            parts.append(f"`{_column(name, columns, where, known)}`")
        else:
            parts.append(token.group().strip())
    return " ".join(parts)


def unusable_filter(where: str, columns: Mapping[str, str], reason: str) -> BridgekitError:
    """The error for a filter of known columns that the database rejects."""
    known = ", ".join(f"{_shown(name)} ({kind})" for name, kind in columns.items())
    return _refused(f"the filter does not fit the columns ({reason})", where, known)


def _column(name: str, columns: Mapping[str, str], where: str, known: str) -> str:
    lowered = {column.lower(): column for column in columns}
    if name in columns:
        return name
    if name.lower() in lowered:
        return lowered[name.lower()]
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    meant = f"; did you mean {_shown(lowered[close[0]])}?" if close else ""
    raise _refused(f"there is no column `{name}`{meant}", where, known)


def _shown(name: str) -> str:
    return name if re.fullmatch(r"[^\W\d]\w*", name) and name.upper() not in _KEYWORDS else f"`{name}`"


def _refused(what: str, where: str, known: str) -> BridgekitError:
    remedy = f"compare columns with numbers or with strings in 'single quotes'; columns: {known}"
    return BridgekitError(what, where=where[:200], remedy=remedy)
