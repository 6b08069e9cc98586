"""docs/api.md, made of the routes: `python -m text_generation_router.api.reference > docs/api.md`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from text_generation_router.api.document import objects_of
from text_generation_router.api.routes import ROUTES, Route
from text_generation_router.api.schema import Kind, ObjectSchema, Parameter
from text_generation_router.config import RouterConfig
from text_generation_router.ranges import Range, request_ranges

_INTRODUCTION = """# HTTP API

Made from the source by `make docs`: change the schemas in `router/text_generation_router/api/`, not this page. A
running server shows the same at `/docs`, and as an OpenAPI document with its own limits at `/api-doc/openapi.json`.

- Bodies are JSON whatever their content type says, not compressed, at most `--payload-limit` (2 000 000) bytes long and
  128 levels deep. One must come within 10 s and a second more for each 10 000 bytes, at most 60 s. A request has at
  most 128 headers of 8190 bytes each.
- Every optional field takes null, which is the same as leaving it out. Fields that are not listed here are ignored and
  named in the header `x-ignored-parameters`. A field that is known and cannot be honoured is refused with 422.
- With `--api-key` or `--api-keys-file`, every route that is not marked *open* needs `Authorization: Bearer KEY`; other
  paths too. Without it the answer is 401 with an empty body.
- An answer carries the `x-request-id` of its request, or a new one where that is missing, longer than 128 characters or
  not plain ASCII.
- Whole answers of the generating routes carry `x-compute-type`, `x-compute-time` (seconds), `x-compute-characters`,
  `x-total-time`, `x-validation-time`, `x-queue-time`, `x-inference-time`, `x-time-per-token` (whole milliseconds),
  `x-prompt-tokens` and `x-generated-tokens`; streams carry the first and the third.
- Streams are server-sent events, each `data: ` and JSON, with a comment after 15 s of silence.
- The examples are for the demo model; the one with `documents` is for models whose template takes those.

## Errors

`{"error": text, "error_type": type}`; on `/v1/*` `{"error": {"message", "type", "param", "code"}, "error_type": type}`,
where `param` names the field at fault. Inside a stream an error is the last event, on `/v1/*` with `http_status_code`.

| status | error_type | meaning |
|---|---|---|
| 400 | validation | the body is not JSON, or the request is not HTTP |
| 401 | (no body) | no valid key |
| 404, 405 | not_found, method_not_allowed | no such path, or not with this verb |
| 408, 413, 415 | validation | the body is late, too long, compressed |
| 422 | validation, batch size exceeded, template_error, tool_error | the request asks for what cannot be had |
| 424 | generation | a step failed |
| 429 | overloaded | more requests than `--max-concurrent-requests`; `Retry-After` says when to come back |
| 500 | incomplete_generation, incomplete_generation_stream, internal_error | the answer was not completed |
| 501 | not_implemented | a route that is not offered |
| 503 | healthcheck, overloaded | unhealthy, or shutting down |
"""
_MODEL_LIMIT = "`--max-input-tokens`"


@dataclass(frozen=True)
class _Limits:
    """The page is of no server: what the model allows is named by its flag."""

    max_input_tokens: int = -1


def markdown() -> str:
    """The whole page."""
    ranges = request_ranges(RouterConfig(), _Limits())
    shown: set[str] = set()
    parts = [_INTRODUCTION, "## Routes"]
    for route in ROUTES:
        parts += _route(route, ranges, shown)
    return "\n".join(parts)


def _route(route: Route, ranges: Mapping[str, Range], shown: set[str]) -> Iterator[str]:
    yield f"\n### {route.method} {route.path}{' (open)' if route.is_open else ''}\n"
    yield route.summary
    if route.bodies:
        links = " or ".join(f"[{body.name}](#{body.name.lower()})" for body in route.bodies)
        yield f"\nBody: {links}."
    if route.method == "GET":
        yield f"\n```\ncurl localhost:3000{route.path}\n```"
    for example in route.examples:
        text = json.dumps(example, ensure_ascii=False)
        yield f"\n```\ncurl localhost:3000{route.path} -H 'content-type: application/json' -d '\n{text}'\n```"
    for one in objects_of(route):
        if one.name not in shown:
            shown.add(one.name)
            yield from _object(one, ranges)


def _object(one: ObjectSchema, ranges: Mapping[str, Range]) -> Iterator[str]:
    yield f"\n#### {one.name}\n"
    yield f"{one.text}\n"
    yield "| field | type | allowed | default | meaning |\n|---|---|---|---|---|"
    for parameter in one.parameters:
        cells = (
            f"`{parameter.name}`",
            _type(parameter),
            _allowed(parameter, ranges),
            _default(parameter),
            parameter.text.replace("|", "\\|"),
        )
        yield f"| {' | '.join(cells)} |"


def _type(parameter: Parameter) -> str:
    if parameter.kind is Kind.ANY:
        return "see right"
    if parameter.kind is Kind.REFUSED:
        return "refused"
    if parameter.kind is Kind.STRINGS:
        return "string or list of strings"
    if parameter.inner is None:
        return parameter.kind.value
    link = f"[{parameter.inner.name}](#{parameter.inner.name.lower()})"
    return f"list of {link}" if parameter.kind is Kind.LIST else link


def _allowed(parameter: Parameter, ranges: Mapping[str, Range]) -> str:
    if parameter.kind is Kind.REFUSED:
        return "only " + ", ".join(_value(value) for value in (None, *parameter.neutral))
    parts = []
    if parameter.range_name is not None:
        allowed = ranges[parameter.range_name]
        text = str(allowed).replace("-1", _MODEL_LIMIT) if allowed.flag == "--max-input-tokens" else str(allowed)
        parts.append(text if allowed.flag is None or "--" in text else f"{text} (`{allowed.flag}`)")
    parts += [f"or {_value(value)}" for value in parameter.special]
    if parameter.max_items is not None:
        parts.append(f"at most {parameter.max_items}")
    for keyword, words in (("maxLength", "at most {} characters"), ("pattern", "`{}`"), ("const", "{}")):
        if keyword in parameter.json:
            parts.append(
                words.format(_value(parameter.json[keyword]) if keyword == "const" else parameter.json[keyword])
            )
    return ", ".join(parts)


def _default(parameter: Parameter) -> str:
    return "required" if parameter.is_required else "" if parameter.default is None else _value(parameter.default)


def _value(value: Any) -> str:
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    print(markdown())
