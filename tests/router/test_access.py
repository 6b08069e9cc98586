"""Who may call what: keys of a flag and of a file, every route and verb without one, tenants, request ids."""

import asyncio
import hashlib
import json
import re

import pytest
from text_generation_router.access import ApiKeys, InvalidKeysFile
from text_generation_router.api.routes import ROUTES

OPEN = {
    ("GET", "/"),
    ("GET", "/health"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/ping"),
    ("GET", "/info"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/docs"),
    ("GET", "/api-doc/openapi.json"),
    ("GET", "/ui"),  # ours: a page without data, that asks for the key
    ("POST", "/chat_tokenize"),
}
VERBS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND")
OTHER_PATHS = ("/nowhere", "/health/", "//health", "/generate/", "/GENERATE", "/docs/index.html", "/v1", "/%67enerate")


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# tenants\n\nanna:{digest('a-key')}\nbert:key:b:key\n  anna:{digest('new-a').upper()}  \n")
    return path


def test_owners(keys_file):
    keys = ApiKeys.read("single", str(keys_file))
    for key, owner in (
        ("a-key", "anna"),
        ("new-a", "anna"),
        ("b:key", "bert"),
        ("single", ""),
        ("key:b:key", None),
        ("A-KEY", None),
        ("a-key ", None),
        ("", None),
        (digest("a-key"), None),
    ):
        assert keys.owner(f"Bearer {key}") == owner, key
        assert keys.owner(f"bEARER {key}") == owner
        for header in (key, f"Basic {key}", f"Bearer{key}", f"Bearer  {key}"):
            assert keys.owner(header) is None, header
    assert ApiKeys.read(None, None) is None
    assert ApiKeys.read("single", None).owner("Bearer a-key") is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("a:b\n", "line 1: a line is NAME:DIGEST"),
        ("anna\n", "line 1"),
        (f"{digest('x')}\n", "line 1"),
        (f"a:{digest('x')[1:]}\n", "line 1"),
        ("a:key:\n", "line 1"),
        ("b c:key:x\n", "line 1"),
        (f"a:key:x\nb:{digest('x')}\n", "line 2: two names have the same key"),
    ],
)
def test_files_that_are_refused(tmp_path, content, reason):
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(InvalidKeysFile, match=reason) as caught:
        ApiKeys.read(None, str(path))
    assert digest("x") not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(InvalidKeysFile, match="cannot be read"):
        ApiKeys.read(None, str(tmp_path / "none"))


def test_the_table_of_open_routes_is_the_contract():
    assert {(route.method, route.path) for route in ROUTES if route.is_open} == OPEN


def test_every_route_and_verb_without_a_key(serving):
    paths = sorted({route.path for route in ROUTES}) + list(OTHER_PATHS)
    opened = OPEN | {("HEAD", path) for method, path in OPEN if method == "GET"}

    async def run():
        async with serving(api_key="k") as served:
            for path in paths:
                for verb in VERBS:
                    for headers in ({}, {"Authorization": "Bearer wrong"}):
                        async with served.client.request(verb, served.url + path, headers=headers) as response:
                            if (verb, path) in opened:
                                assert response.status != 401, (verb, path)
                            else:
                                assert (response.status, await response.read()) == (401, b""), (verb, path)
            assert served.engine.log == []

    asyncio.run(run())


def test_tenants(serving, keys_file, caplog):
    """Every tenant has prefix-cache blocks of its own, whichever of its keys it sends; the log names it."""
    caplog.set_level("INFO")

    async def run():
        async with serving(api_keys_file=str(keys_file), api_key="single") as served:
            for key in ("a-key", "new-a", "b:key", "single"):
                headers = {"Authorization": f"Bearer {key}"}
                for path, body in (
                    ("/generate", {"inputs": "a"}),
                    ("/v1/completions", {"prompt": "a"}),
                    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
                    ("/vertex", {"instances": [{"inputs": "a"}]}),
                ):
                    async with served.client.post(path, json=body, headers=headers) as response:
                        assert response.status == 200
            salts = [request.cache_salt for request in served.engine.log]
            assert salts == [b"anna"] * 8 + [b"bert"] * 4 + [b""] * 4

    asyncio.run(run())
    tenants = [re.search(r"tenant=(\S+)", message)[1] for message in caplog.messages if message.startswith("Success")]
    assert tenants == ["anna"] * 8 + ["bert"] * 4 + ["-"] * 4
    assert not any("a-key" in message for message in caplog.messages)


def test_request_ids(serving, caplog):
    caplog.set_level("INFO")

    async def run():
        async with serving(api_key="k") as served:
            for given in ("abc-1", "x" * 128, "a=b;c"):
                for method, path, body in (
                    ("POST", "/generate", {"inputs": "a"}),
                    ("POST", "/generate_stream", {"inputs": "a"}),
                    ("POST", "/v1/completions", {"prompt": 5}),
                    ("GET", "/health", None),
                    ("GET", "/nowhere", None),
                ):
                    for headers in ({"Authorization": "Bearer k"}, {}):
                        request = served.client.request(
                            method, path, json=body, headers={"x-request-id": given, **headers}
                        )
                        async with request as response:
                            await response.read()
                            assert response.headers["x-request-id"] == given
            fresh = set()
            for given in (None, "", "x" * 129, "a b", "ä"):
                headers = {"Authorization": "Bearer k"} | ({} if given is None else {"x-request-id": given})
                async with served.client.post("/generate", json={"inputs": "a"}, headers=headers) as response:
                    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
                    fresh.add(response.headers["x-request-id"])
            assert len(fresh) == 5

    asyncio.run(run())
    ids = [
        re.search(r"request_id=(\w+) client_request_id=(\S+)", message).groups()
        for message in caplog.messages
        if message.startswith("Success")
    ]
    assert len({ours for ours, _ in ids}) == len(ids) == 11
    assert {theirs for _, theirs in ids} == {"abc-1", "x" * 128, "a=b;c", "-"}


def test_header_limits(serving):
    async def run():
        async with serving() as served:
            for headers in ({"X-Long": "x" * 9000}, {f"X-{n}": "x" for n in range(200)}):
                async with served.client.post("/generate", json={"inputs": "a"}, headers=headers) as response:
                    assert response.status == 400
                    assert json.loads(await response.read())["error_type"] == "validation"
            headers = {"X-Long": "x" * 8000} | {f"X-{n}": "x" for n in range(100)}
            async with served.client.post("/generate", json={"inputs": "a"}, headers=headers) as response:
                assert response.status == 200

    asyncio.run(run())
