"""Every example of docs/api.md, as written there, against the demo model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Server

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
CURL = re.compile(r"^curl localhost:3000(\S+) -H 'content-type: application/json' -d '\n(.*)'$", re.MULTILINE)
EXAMPLES = CURL.findall(PAGE.read_text())


def test_every_route_with_a_body_has_an_example() -> None:
    routes = set(re.findall(r"^### POST (\S+)", PAGE.read_text(), re.MULTILINE))
    assert routes - {"/v1/responses", "/v1/embeddings"} == {path for path, _ in EXAMPLES}


@pytest.mark.parametrize(("path", "body"), EXAMPLES, ids=[f"{path} {body[:60]}" for path, body in EXAMPLES])
def test_example(exact: Server, path: str, body: str) -> None:
    reply = exact.request("POST", path, body.encode())
    assert reply.status == 200, reply.body
    assert "x-ignored-parameters" not in reply.headers
    is_stream = path == "/generate_stream" or json.loads(body).get("stream", False)
    assert (reply.headers["content-type"] == "text/event-stream") == is_stream
    assert b'"error"' not in reply.body
