"""HTML that is escaped by construction: whatever is not markup already becomes text."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import TypeAlias

_VOID = frozenset(("br", "col", "img", "input", "link", "meta"))
#: What can stand in an element. None is nothing.
Child: TypeAlias = "str | int | float | Iterable[Child] | None"


class Html(str):
    """Markup. Only `tag`, `joined` and `raw` make it, and whoever calls `raw` vouches for what is in it."""

    __slots__ = ()


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element. Strings in it and in its attributes are escaped, unless they are `Html`.

    Arguments:
        name: of the element.
        children: markup, text, numbers, or sequences of these.
        attributes: `class_` is `class`, `data_item` is `data-item`. True stands without a value; False and None do not stand.
    """
    told = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{told}>" if name in _VOID else f"<{name}{told}>{joined(*children)}</{name}>")


def joined(*children: Child) -> Html:
    """Markup and texts one after the other, the texts escaped."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, str | int | float):
            parts.append(html.escape(str(child)))
        elif child is not None:
            parts.append(str(joined(*child)))
    return Html("".join(parts))


def raw(markup: str) -> Html:
    """Text that is markup already, and trusted."""
    return Html(markup)


def data_block(name: str, value: object) -> Html:
    """Plain data for the page's script, as JSON that no text in it can break out of."""
    told = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return tag("script", raw(told), type="application/json", id=name)
