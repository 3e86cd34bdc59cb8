"""The model card, `README.md` in a bridge's folder: `card.md.j2`, filled in from the bridge's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bridgekit.bridge.provenance import provenance_text
from bridgekit.plain import markdown, plain
from bridgekit.retrieval import recall_cell


def model_card(metadata: Mapping[str, Any], name: str, pictures: Sequence[str]) -> str:
    """The text of a model card, from the content of `bridge.json`, whose texts are escaped, and the names of image files."""
    return _TEMPLATES.get_template("card.md.j2").render(metadata=metadata, name=name, pictures=pictures)


def _escaped(value: object) -> object:
    """Escape a value, unless a filter below made it `Markup`."""
    return value if isinstance(value, Markup) else markdown(value)


def _code(text: str) -> Markup:
    """Inline code, also if the text has pipes or backticks."""
    shown = plain(text).replace("`", "'").replace("|", "\\|")
    return Markup(f"`{shown}`")


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    finalize=_escaped,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters.update(
    code=_code,
    link=lambda name: Markup(quote(name)),
    provenance_text=provenance_text,
    recall_cell=recall_cell,
    quoted=lambda text: Markup(json.dumps(plain(text), ensure_ascii=False)),
    stem=lambda name: Path(name).stem.replace("-", " "),
)
