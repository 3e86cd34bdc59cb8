"""Escaping of untrusted text for terminals, JSON and Markdown."""

from __future__ import annotations

import html
import re

# Control characters (cursor movement, bell, window titles), line breaks, direction marks and overrides, and lone surrogates,
# which JSON and file names may contain but UTF-8 cannot encode.
_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKS = re.compile(r"([\\`*_{}\[\]()#!|~])")
# What renderers make links of without any markup: http://x, www.x, name@x.
_ADDRESS = re.compile(r"((?:[a-z][a-z0-9+.-]{0,30}://|www\.)[^\s|`<>()\[\]]*|[\w.+-]{1,64}@[\w-]+\.[\w.-]+)", re.IGNORECASE)


def plain(text: object) -> str:
    """One line that is safe to print on a terminal: control characters become escapes such as `\\x1b`."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], str(text))


def plain_json(document: str) -> str:
    """A JSON document that is safe to print on a terminal: characters that JSON leaves unescaped are escaped too."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", document)


def without_surrogates(document: str) -> str:
    """A JSON document that UTF-8 can encode: surrogates, Python's bytes of names that are not UTF-8, become `\\udce9`."""
    return _SURROGATE.sub(lambda found: rf"\\u{ord(found[0]):04x}", document)


def markdown(text: object) -> str:
    """One line of Markdown that renders as exactly this text: no tag, link, table cell or heading. Addresses are inline code.

    Some renderers look for addresses after they have resolved escapes, so that nothing but code keeps them from making links.
    """
    parts = _ADDRESS.split(plain(text))  # every second is an address
    parts[::2] = [_MARKS.sub(r"\\\1", html.escape(part, quote=False)) for part in parts[::2]]
    parts[1::2] = [f"`{part}`" for part in parts[1::2]]
    return "".join(parts)
