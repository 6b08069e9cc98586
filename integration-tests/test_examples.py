"""Every example of docs/api.md, as written there, against the demo model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Reply, Server

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
CURL = re.compile(r"^curl localhost:3000(\S+) -H 'content-type: application/json' -d '\n(.*)'$", re.MULTILINE)
EXAMPLES = CURL.findall(PAGE)
PATHS = re.findall(r"^curl localhost:3000(\S+)$", PAGE, re.MULTILINE)
TEMPLATE = (
    "{% for document in documents or [] %}[{{ document.title }}: {{ document.text }}]{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if not enable_thinking | default(true) %}no thoughts, {{ reasoning_effort }} effort{% endif %}"
)


def routes(verb: str) -> set[str]:
    return set(re.findall(rf"^### {verb} (\S+)", PAGE, re.MULTILINE))


def parameters(name: str) -> set[str]:
    """Those of an object of the page that are not refused."""
    (table,) = re.findall(rf"^#### {name}$(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"^\| `(\w+)` \| (?!refused)", table, re.MULTILINE))


def test_every_route_has_an_example() -> None:
    assert routes("POST") - {"/v1/responses", "/v1/embeddings"} == {path for path, _ in EXAMPLES}
    assert routes("GET") == set(PATHS)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/generate", "GenerateParameters"),
        ("/v1/chat/completions", "ChatRequest"),
        ("/v1/completions", "CompletionRequest"),
    ],
)
def test_every_parameter_has_an_example(path: str, name: str) -> None:
    shown: set[str] = set()
    for other, body in EXAMPLES:
        if other == path:
            fields = json.loads(body)
            shown |= fields.keys() | fields.get("parameters", {}).keys()
    assert len(parameters(name)) > 15
    assert parameters(name) <= shown


@pytest.mark.parametrize("path", PATHS)
def test_path(exact: Server, path: str) -> None:
    assert exact.get(path).status == 200


@pytest.fixture(scope="module")
def templated(serve: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model whose template, given by a flag, takes what the demo model's does not."""
    file = tmp_path_factory.mktemp("template") / "tokenizer_config.json"
    file.write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}))
    with serve("--model-id", str(tiny_model), "--tokenizer-config-path", str(file)) as server:
        yield server


@pytest.fixture(scope="module")
def document(exact: Server) -> Any:
    """The server's own."""
    return exact.get("/api-doc/openapi.json").json()


def check_answer(document: Any, path: str, reply: Reply) -> int:
    """The body, or each event, is what the document says; gives their number."""
    media = reply.headers["content-type"].partition(";")[0]
    schema = document["paths"][path]["post"]["responses"]["200"]["content"][media]["schema"]
    if media == "text/event-stream":
        data = schema["properties"]["data"]
        schema = next(one["contentSchema"] for one in (data, *data.get("anyOf", [])) if "contentSchema" in one)
    validator = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    texts = [reply.body.decode()]
    if media == "text/event-stream":
        blocks = texts[0].split("\n\n")
        texts = [block.removeprefix("data: ") for block in blocks if block not in ("", "data: [DONE]")]
    for text in texts:
        validator.validate(json.loads(text))
    return len(texts)


def test_the_example_for_other_models(templated: Server) -> None:
    [(path, body)] = [(path, body) for path, body in EXAMPLES if "documents" in json.loads(body)]
    assert templated.request("POST", path, body.encode()).status == 200
    told = templated.request("POST", "/chat_tokenize", body.encode()).json()["templated_text"]
    assert told.startswith("[France: Its capital is Paris.]user: What is")
    assert told.endswith("no thoughts, low effort")


OF_THE_DEMO = [(path, body) for path, body in EXAMPLES if "documents" not in json.loads(body)]


@pytest.mark.parametrize(("path", "body"), OF_THE_DEMO, ids=[f"{path} {body[:60]}" for path, body in OF_THE_DEMO])
def test_example(exact: Server, document: Any, path: str, body: str) -> None:
    reply = exact.request("POST", path, body.encode())
    assert reply.status == 200, reply.body
    assert "x-ignored-parameters" not in reply.headers
    is_stream = path == "/generate_stream" or json.loads(body).get("stream", False)
    assert (reply.headers["content-type"] == "text/event-stream") == is_stream
    assert b'"error"' not in reply.body
    assert check_answer(document, path, reply) > (1 if is_stream else 0)


@pytest.mark.parametrize("path", ["/", "/generate_stream", "/v1/chat/completions", "/v1/completions"])
def test_examples_as_streams(exact: Server, document: Any, path: str) -> None:
    """Each is what the document says, too, or refused for what no stream can have."""
    source = "/generate" if path in ("/", "/generate_stream") else path
    num_streams = 0
    for other, text in OF_THE_DEMO:
        if other == source:
            body = json.loads(text)
            reply = exact.post(path, {**body, "stream": True})
            parameters = body.get("parameters", body)
            may_be_refused = parameters.get("best_of", 1) > 1 or parameters.get("decoder_input_details")
            if reply.status == 200:
                assert check_answer(document, path, reply) > 0
                is_refused = b'"error"' in reply.body
            else:
                is_refused = True
                assert reply.status == 422
            assert not is_refused or may_be_refused, reply.body
            num_streams += not is_refused
    assert num_streams >= 2
