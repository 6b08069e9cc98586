"""The OpenAPI document, made of the routes and of the schemas by which bodies are read."""

from collections.abc import Iterable, Mapping
from typing import Any

from text_generation_router.api.answer_schemas import ANSWER_SCHEMAS, reference
from text_generation_router.api.responses import is_openai_path
from text_generation_router.api.routes import EVENTS, JSON, Route
from text_generation_router.api.schema import ObjectSchema
from text_generation_router.ranges import Range

_BODY_ERRORS = {
    400: "The body is not JSON.",
    408: "The body did not come in time.",
    413: "The body is longer than `--payload-limit`.",
    415: "The body is compressed.",
    422: "A field is missing, of the wrong type or out of its range, or asks for what is not supported.",
    429: "More requests than `--max-concurrent-requests`, or another bound on what waits.",
}
_GENERATION_ERRORS = {
    424: "A step failed.",
    500: "The answer was not completed.",
    503: "The server is shutting down.",
}


def build_document(
    routes: Iterable[Route], ranges: Mapping[str, Range], version: str, has_keys: bool
) -> dict[str, Any]:
    """The document of a server with these ranges; `has_keys`: requests need an API key."""
    routes = list(routes)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, has_keys)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "text-generation",
            "description": "Text generation: the routes of Text Generation Inference and of OpenAI.",
            "version": version,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": {**_body_schemas(routes, ranges), **ANSWER_SCHEMAS}},
    }
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def objects_of(route: Route) -> list[ObjectSchema]:
    """Every object that a route's bodies are made of, each once."""
    found = {inner.name: inner for one in (*route.bodies, *route.other_objects) for inner in one.nested()}
    return list(found.values())


def _body_schemas(routes: list[Route], ranges: Mapping[str, Range]) -> dict[str, Any]:
    return {one.name: one.json_schema(ranges) for route in routes for one in objects_of(route)}


def _operation(route: Route, has_keys: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method.lower()}{route.path.replace('/', '_').replace('.', '_')}",
        "responses": _responses(route, has_keys),
    }
    if route.bodies:
        references = [body.reference for body in route.bodies]
        content: dict[str, Any] = {"schema": references[0] if len(references) == 1 else {"anyOf": references}}
        if route.examples:
            content["examples"] = {f"{n}": {"value": example} for n, example in enumerate(route.examples, 1)}
        operation["requestBody"] = {"required": True, "content": {JSON: content}}
    if has_keys and not route.is_open:
        operation["security"] = [{"key": []}]
    return operation


def _responses(route: Route, has_keys: bool) -> dict[str, Any]:
    error = {JSON: {"schema": reference("OpenAIError" if is_openai_path(route.path) else "Error")}}
    errors = {401: "No valid API key; the body is empty."} if has_keys and not route.is_open else {}
    if not route.is_offered:
        return {str(status): {"description": text} for status, text in errors.items()} | {
            "501": {"description": "Not offered.", "content": error}
        }
    good: dict[str, Any] = {"description": "Success."}
    if route.answers:
        good["content"] = {media: {"schema": schema} for media, schema in route.answers.items()}
    if route.bodies:
        errors |= _BODY_ERRORS | (_GENERATION_ERRORS if route.is_generating else {})
    elif not route.answers:
        errors |= {503: "The server cannot serve requests."}
    failed = {
        str(status): {"description": text, **({} if status == 401 else {"content": error})}
        for status, text in sorted(errors.items())
    }
    if EVENTS in route.answers and JSON not in route.answers:
        good["description"] = "Success, or an error as the only event."
    return {"200": good, **failed}
