"""The API's description: what OpenAPI cannot be told by FastAPI's own means, and a page of it that loads nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from pydantic import BaseModel

FILE = {"type": "string", "format": "binary"}


def request_body(options: type[BaseModel], example: Mapping[str, Any], curl: str) -> dict[str, Any]:
    """A route's body for OpenAPI: a form with files, or JSON with texts, and in both the route's options.

    Arguments:
        options: the route's options.
        example: a body in JSON.
        curl: the arguments of a call with a form.
    """
    fields = options.model_json_schema()["properties"]
    text = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "A text, or several.",
    }
    files = {
        "audio": {"type": "array", "items": FILE, "description": "Clips: WAV, FLAC, Ogg, MP3."},
        "image": {"type": "array", "items": FILE, "description": "Pictures: PNG, JPEG, WebP and others."},
    }
    content = {
        "multipart/form-data": {"schema": {"type": "object", "properties": {"text": text, **files, **fields}}},
        "application/json": {
            "schema": {"type": "object", "properties": {"text": text, **fields}, "required": ["text"]},
            "example": dict(example),
        },
    }
    return {"requestBody": {"required": True, "content": content}, "x-curl": curl}


def docs_page(api: Mapping[str, Any]) -> str:
    """The description as a page of HTML without scripts."""
    schemas = api.get("components", {}).get("schemas", {})
    parts = []
    for path, methods in api["paths"].items():
        for method, route in methods.items():
            parts.append(f"<section><h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p><strong>{escape(route.get('summary', ''))}.</strong></p>")
            parts += [f"<p>{_words(part)}</p>" for part in route.get("description", "").split("\n\n") if part]
            if "x-curl" in route:
                content = route["requestBody"]["content"]
                sent = json.dumps(content["application/json"]["example"])
                calls = f"curl {route['x-curl']} http://127.0.0.1:7860{path}\n"
                calls += f"curl --json '{sent}' http://127.0.0.1:7860{path}"
                parts.append(f"<pre tabindex='0'>{escape(calls)}</pre>")
                parts.append(_fields("Fields of the form, or of the JSON", content["multipart/form-data"]["schema"]))
            for status, answer in route.get("responses", {}).items():
                schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
                name = schema.get("$ref", "").rpartition("/")[2]
                if status == "200" and name in schemas:
                    parts.append(_fields("Answer", schemas[name]))
                    parts += [_fields(inner, schemas[inner]) for inner in _inner(schemas[name], schemas)]
            parts.append("</section>")
    errors = "".join(
        f"<tr><td>{status}</td><td>{escape(answer['description'])}</td></tr>"
        for status, answer in api["paths"]["/generate"]["post"]["responses"].items()
        if status not in ("200", "422")
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>bridgekit: the API</title><link rel="icon" href="/static/icon.svg">
<link rel="stylesheet" href="/static/style.css"></head>
<body class="docs"><header class="top"><h1>bridgekit <span>the API</span></h1><nav><a href="/">The page</a>
<a href="/openapi.json">openapi.json</a></nav></header><main>
<p>{escape(api["info"]["description"])} Inputs of one kind that come at the same time are encoded together.</p>
{"".join(parts)}
<section><h2>Errors</h2>
<p>Every answer that is no success is <code>{{"error": {{"what", "where", "fix"}}}}</code>, in the words of the
command line.</p><div class="wide"><table><tbody>{errors}</tbody></table></div></section></main></body></html>"""


def _words(text: str) -> str:
    """Text for the page; what stands in backticks is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _fields(title: str, schema: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(field))}</td>"
        f"<td>{_words(field.get('description', ''))}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"<h3>{escape(title)}</h3><div class='wide'><table><tbody>{rows}</tbody></table></div>"


def _inner(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> list[str]:
    """The names of the schemas that one consists of, and those of these."""
    found: list[str] = []
    for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(schema)):
        found += [name, *_inner(schemas[name], schemas)]
    return found


def _kind(field: Mapping[str, Any]) -> str:
    """A field's type in a few words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(part) for part in field["anyOf"] if part.get("type") != "null"))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    return "file" if field.get("format") == "binary" else str(field.get("type", "any"))
