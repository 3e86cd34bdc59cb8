"""`/docs`: the API reference as a page without scripts. FastAPI's own loads scripts from a CDN."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape


def docs_page(api: Mapping[str, Any]) -> str:
    """The content of /openapi.json as an HTML page."""
    template = Path(__file__).with_name("docs.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"code": _code, "type": _type}
    schemas = api["components"]["schemas"]
    routes = [
        {"method": method.upper(), "path": path, "answers": _answers(route, schemas), **route}
        for path, methods in api["paths"].items()
        for method, route in methods.items()
    ]
    errors = api["paths"]["/generate"]["post"]["responses"]
    return environment.from_string(template).render(info=api["info"], routes=routes, errors=errors)


def _code(text: str) -> Markup:
    """Text as HTML; backticks mark code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _answers(route: Mapping[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas of a route's response and of its parts, by title."""
    answers: dict[str, Any] = {}
    names = _references(route["responses"]["200"].get("content", {}).get("application/json", {}))
    while names:
        name = names.pop(0)
        answers[name if answers else "Response"] = schemas[name]
        names += _references(schemas[name])
    return answers


def _references(part: object) -> list[str]:
    return re.findall(r"#/components/schemas/(\w+)", json.dumps(part))


def _type(field: Mapping[str, Any]) -> str:
    """A field's type in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(part) for part in field["anyOf"] if part.get("type") != "null"))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    return "file" if field.get("format") == "binary" else str(field.get("type", "any"))
