"""Text that others wrote, made safe to show: on a terminal, and in Markdown."""

from __future__ import annotations

import html
import re

# What moves a cursor, rings, rewrites a window's title, breaks a line, turns the direction of what follows, or cannot be
# encoded at all (half a surrogate pair, which JSON and file names may hold).
_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_MARKS = re.compile(r"([\\`*_{}\[\]()#!|~])")


def plain(text: object) -> str:
    """One line that a terminal shows and does not obey: control characters become their escapes, `\\x1b` for one."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], str(text))


def plain_json(document: str) -> str:
    """A JSON document whose strings may hold anything, safe to print: what JSON itself leaves as it is is escaped too."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", document)


def markdown(text: object) -> str:
    """One line of Markdown that shows this text and nothing else: no tag, link, table cell or heading comes of it."""
    return _MARKS.sub(r"\\\1", html.escape(plain(text), quote=False))
