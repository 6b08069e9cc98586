"""The page at /docs: the OpenAPI document, readable in a browser, with nothing loaded from elsewhere."""

import json
from collections.abc import Iterator
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em; }
pre { background: #f4f4f4; padding: 0.6rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { border: 1px solid #ddd; padding: 0.3rem 0.5rem; text-align: left; vertical-align: top; }
summary { cursor: pointer; font-weight: 600; padding: 0.3rem 0; }
.verb { display: inline-block; width: 4rem; color: #06c; }
"""
# The page runs no scripts and loads nothing.
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def html_page(document: dict[str, Any]) -> str:
    """The page of one document."""
    info = document["info"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])}</p>",
        '<p><a href="/api-doc/openapi.json">OpenAPI document</a></p><h2>Routes</h2>',
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += _operation(path, method, operation)
    parts.append("<h2>Objects</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts += _object(name, schema)
    return "\n".join(parts)


def _operation(path: str, method: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"<details><summary><span class=verb>{method.upper()}</span> <code>{escape(path)}</code></summary>"
    yield f"<p>{escape(operation['summary'])}</p>"
    for content in operation.get("requestBody", {}).get("content", {}).values():
        yield f"<p>Body: {_type(content['schema'])}</p>"
        for example in content.get("examples", {}).values():
            yield f"<pre>{escape(json.dumps(example['value'], ensure_ascii=False, indent=2))}</pre>"
    yield "<table><tr><th>status<th>meaning<th>body</tr>"
    for status, response in operation["responses"].items():
        bodies = ", ".join(
            f"{escape(media)}: {_type(one['schema'])}" for media, one in response.get("content", {}).items()
        )
        yield f"<tr><td>{status}<td>{escape(response['description'])}<td>{bodies}</tr>"
    yield "</table></details>"


def _object(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f'<details id="{escape(name)}"><summary>{escape(name)}</summary>'
    yield f"<p>{escape(schema.get('description', ''))}</p>"
    if "properties" in schema:
        yield "<table><tr><th>field<th>type<th>default<th>meaning</tr>"
        for field, inner in schema["properties"].items():
            mark = "" if field not in schema.get("required", ()) else " *"
            default = escape(json.dumps(inner["default"])) if "default" in inner else ""
            yield (
                f"<tr><td><code>{escape(field)}</code>{mark}<td>{_type(inner)}<td>{default}"
                f"<td>{escape(inner.get('description', ''))}</tr>"
            )
        yield "</table>"
    else:
        yield f"<p>{_type(schema)}</p>"
    yield "</details>"


def _type(schema: dict[str, Any]) -> str:
    """A schema in one line, objects as links."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f'<a href="#{escape(name)}">{escape(name)}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    shown = {
        key: value for key, value in schema.items() if key not in ("description", "default", "properties", "required")
    }
    kind = shown.pop("type", None)
    words = kind if isinstance(kind, str) else " or ".join(kind or ["anything"] if not shown else kind or [])
    return f"{escape(words)} <code>{escape(json.dumps(shown))}</code>" if shown else escape(words)
