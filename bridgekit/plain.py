"""Escaping of untrusted text for terminals, JSON and Markdown."""

from __future__ import annotations

import html
import re

# Control characters (cursor movement, bell, window titles), line breaks, direction marks and overrides, and lone surrogates,
# which JSON and file names may contain but UTF-8 cannot encode.
_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_MARKS = re.compile(r"([\\`*_{}\[\]()#!|~])")


def plain(text: object) -> str:
    """One line that is safe to print on a terminal: control characters become escapes such as `\\x1b`."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], str(text))


def plain_json(document: str) -> str:
    """A JSON document that is safe to print on a terminal: characters that JSON leaves unescaped are escaped too."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", document)


def markdown(text: object) -> str:
    """One line of Markdown that renders as exactly this text: no tag, link, table cell or heading."""
    return _MARKS.sub(r"\\\1", html.escape(plain(text), quote=False))
