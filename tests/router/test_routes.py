"""Tokenising, the clouds' routes, what is not offered, and the document of all routes."""

import asyncio
import html.parser
import json
import typing
from pathlib import Path

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_completion_create_params
from text_generation_router.api.chat_schema import CHAT_BODY
from text_generation_router.api.document import build_document, objects_of
from text_generation_router.api.generate_schema import GENERATE_PARAMETERS
from text_generation_router.api.openai_schema import COMPLETIONS_BODY
from text_generation_router.api.reference import markdown
from text_generation_router.api.routes import ROUTES
from text_generation_router.api.schema import Kind
from text_generation_router.config import RouterConfig
from text_generation_router.ranges import request_ranges

USER = [{"role": "user", "content": "Hello"}]
PROMPT = "user:Hello\nassistant:"


def span(token_id, text="", start=0, stop=0):
    return {"id": token_id, "text": text, "start": start, "stop": stop}


def test_tokenize(serving):
    async def run():
        async with serving(max_concurrent_requests=1) as served:
            async with served.client.post("/tokenize", json={"inputs": "aé!"}) as response:
                assert await response.json() == [
                    span(1),
                    span(97, "a", 0, 1),
                    span(233, "é", 1, 3),
                    span(33, "!", 3, 4),
                ]
            body = {"inputs": "aé!", "parameters": {"truncate": 2, "max_new_tokens": 0}}
            async with served.client.post("/tokenize", json=body) as response:
                assert await response.json() == [span(233, "é", 1, 3), span(33, "!", 3, 4)]
            for body in ({"inputs": "a", "parameters": {"truncate": 0}}, {"inputs": 5}, {}):
                async with served.client.post("/tokenize", json=body) as response:
                    assert response.status == 422
            assert served.counts()["tgi_request_count"] == 0

    asyncio.run(run())


def test_chat_tokenize(serving):
    async def run():
        async with serving() as served:
            async with served.client.post("/chat_tokenize", json={"messages": USER}) as response:
                answer = await response.json()
            assert answer["templated_text"] == PROMPT
            assert "".join(token["text"] for token in answer["tokenize_response"]) == PROMPT
            assert answer["tokenize_response"][0]["start"] == 0
            assert answer["tokenize_response"][-1]["stop"] == len(PROMPT)
            async with served.client.post(
                "/chat_tokenize", json={"messages": [{"role": "bad", "content": ""}]}
            ) as response:
                assert response.status == 422
                assert (await response.json())["error_type"] == "template_error"

    asyncio.run(run())


def test_invocations_take_every_dialect(serving):
    async def run():
        async with serving() as served:
            post = served.client.post
            async with post("/invocations", json={"inputs": "abc", "messages": None}) as response:
                assert await response.json() == [{"generated_text": "abcHi you"}]
            async with post("/invocations", json={"inputs": "abc", "stream": True}) as response:
                assert response.headers["Content-Type"] == "text/event-stream"
                assert '"generated_text":"abcHi you"' in await response.text()
            async with post("/invocations", json={"messages": USER}) as response:
                answer = await response.json()
                assert answer["object"] == "chat.completion"
                assert answer["choices"][0]["message"]["content"] == "Hi you"
            async with post("/invocations", json={"messages": USER, "stream": True}) as response:
                assert (await response.text()).endswith("data: [DONE]\n\n")
            async with post("/invocations", json={"prompt": "abc"}) as response:
                assert (await response.json())["choices"][0]["text"] == "Hi you"
            for body in ({}, {"inputs": None}, {"inputs": 5}, {"messages": 5}, {"prompt": 5}):
                async with post("/invocations", json=body) as response:
                    assert response.status == 422
                    assert set(await response.json()) == {"error", "error_type"}
            counts = served.counts()
            assert counts["tgi_request_count"] == 10
            assert counts["tgi_request_success"] == 5
            assert counts["tgi_request_running"] == 0

    asyncio.run(run())


def test_vertex(serving):
    async def run():
        async with serving(max_concurrent_requests=3) as served:
            post = served.client.post
            instances = [
                {"inputs": "abc", "parameters": {"max_new_tokens": 2, "seed": 7}},
                {"inputs": "abc", "parameters": {"do_sample": False}},
                {"messages": USER, "max_tokens": 3, "temperature": 0.5, "stream": True},
            ]
            async with post("/vertex", json={"instances": instances}) as response:
                assert await response.json() == {"predictions": ["Hi", "Hi you", "Hi "]}
                assert response.headers["x-ignored-parameters"] == "instances.stream"
                assert response.headers["x-generated-tokens"] == str(2 + 7 + 3)
            sampled, greedy, chat = served.engine.log
            assert (sampled.sampling.temperature, sampled.sampling.seed) == (1.0, 7)
            assert greedy.sampling.temperature == 0
            assert chat.sampling.temperature == 0.5
            assert bytes(chat.token_ids).decode() == PROMPT
            for bad, kind in (
                ({}, "validation"),
                ({"instances": []}, "validation"),
                ({"instances": 5}, "validation"),
                ({"instances": [5]}, "validation"),
                ({"instances": [{"inputs": ""}]}, "validation"),
                ({"instances": [{"inputs": "a"}] * 5}, "batch size exceeded"),
            ):
                async with post("/vertex", json=bad) as response:
                    assert response.status == 422
                    assert (await response.json())["error_type"] == kind
            async with post("/vertex", json={"instances": instances[:1] * 4}) as response:
                assert response.status == 429
            assert served.counts()["tgi_request_success"] == 3
            assert served.context.permits.num_taken == 0

    asyncio.run(run())


def test_what_is_not_offered(serving):
    async def run():
        async with serving() as served:
            for path in ("/v1/responses", "/v1/embeddings"):
                async with served.client.post(path, json={}) as response:
                    assert response.status == 501
                    answer = await response.json()
                assert answer["error"]["type"] == answer["error_type"] == "not_implemented"
                assert path in answer["error"]["message"]

    asyncio.run(run())


# The document.


class Limits(typing.NamedTuple):
    max_input_tokens: int = 64


def document(has_keys=False):
    return build_document(ROUTES, request_ranges(RouterConfig(), Limits()), "4.0.0", has_keys)


def references(value):
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_the_document_is_served(serving):
    async def run():
        async with serving(api_key="k", max_best_of=7) as served:
            async with served.client.get("/api-doc/openapi.json") as response:
                assert response.headers["Content-Type"] == "application/json"
                served_document = await response.json()
            best_of = served_document["components"]["schemas"]["GenerateParameters"]["properties"]["best_of"]
            assert best_of["maximum"] == 7
            assert served_document["paths"]["/generate"]["post"]["security"] == [{"key": []}]
            assert "security" not in served_document["paths"]["/chat_tokenize"]["post"]
            async with served.client.get("/docs") as response:
                assert response.headers["Content-Type"].startswith("text/html")
                assert "default-src 'none'" in response.headers["Content-Security-Policy"]
                page = await response.text()
        parser = html.parser.HTMLParser()
        parser.feed(page)
        for path in served_document["paths"]:
            assert f"<code>{path}</code>" in page
        assert "<script" not in page
        assert "http://" not in page
        assert "https://" not in page

    asyncio.run(run())


def test_every_reference_of_the_document_is_there():
    names = {f"#/components/schemas/{name}" for name in document()["components"]["schemas"]}
    assert set(references(document())) <= names
    assert json.dumps(document())


def test_no_two_objects_share_a_name():
    by_name = {}
    for route in ROUTES:
        for one in objects_of(route):
            assert by_name.setdefault(one.name, one) == one


def test_the_page_in_docs_is_of_these_schemas():
    page = Path(__file__).parents[2] / "docs" / "api.md"
    assert page.read_text() == markdown() + "\n", "run `make docs`"


@pytest.mark.parametrize(
    ("declared", "schema"),
    [
        (chat_completion_create_params.CompletionCreateParamsStreaming, CHAT_BODY),
        (completion_create_params.CompletionCreateParamsStreaming, COMPLETIONS_BODY),
    ],
)
def test_every_parameter_of_the_openai_client_is_declared(declared, schema):
    names = typing.get_type_hints(declared).keys()
    assert {"model", "stream", "seed", "stop"} <= names
    assert names <= schema.by_name.keys()


# What is declared is what is checked.

WRONG = {
    Kind.INTEGER: ("1", 1.5, True, [], {}),
    Kind.NUMBER: ("1", True, [], {}),
    Kind.BOOLEAN: (1, "true", [], {}),
    Kind.STRING: (1, True, [], {}),
    Kind.STRINGS: (1, {}, [1]),
    Kind.OBJECT: (1, "a", []),
    Kind.LIST: (1, "a", {}),
    Kind.ANY: (1.5,),
    Kind.REFUSED: ("no such value", 5, ["x"]),
}
BODIES = (
    ("/generate", GENERATE_PARAMETERS, lambda fields: {"inputs": "a", "parameters": fields}),
    ("/v1/completions", COMPLETIONS_BODY, lambda fields: {"prompt": "a", **fields}),
    ("/v1/chat/completions", CHAT_BODY, lambda fields: {"messages": USER, **fields}),
)


@pytest.mark.parametrize(("path", "schema", "body"), BODIES, ids=[path for path, _, _ in BODIES])
def test_every_declared_field_is_checked(serving, path, schema, body):
    """Null is fine wherever a field is optional; a wrong type, a refused value, a number out of range is named."""
    ranges = request_ranges(RouterConfig(), Limits())

    async def run():
        async with serving() as served:
            for name, parameter in schema.by_name.items():
                values = list(WRONG[parameter.kind])
                if parameter.range_name is not None:
                    allowed = ranges[parameter.range_name]
                    low = None if allowed.minimum is None else allowed.minimum - (0 if allowed.excludes_bounds else 1)
                    high = None if allowed.maximum is None else allowed.maximum + (0 if allowed.excludes_bounds else 1)
                    values += [bound for bound in (low, high) if bound is not None and bound not in parameter.special]
                    values = [value for value in values if value != 2**64]  # no JSON parser keeps it whole
                for value in values:
                    async with served.client.post(path, json=body({name: value})) as response:
                        answer = await response.json()
                        assert response.status == 422, (name, value, answer)
                        message = answer["error"] if path == "/generate" else answer["error"]["message"]
                        assert f"`{name}`" in message or name in ("max_tokens", "max_completion_tokens"), (name, value)
                good = [*parameter.neutral, *parameter.special] + ([] if parameter.is_required else [None])
                for value in good:
                    async with served.client.post(path, json=body({name: value})) as response:
                        assert response.status == 200, (name, value, await response.text())
                        assert "x-ignored-parameters" not in response.headers

    asyncio.run(run())
