"""Random text of legal tokens is valid for its schema, by the judgement of `jsonschema`.

Schemas come from the JSON Schema Test Suite, which `make install` fetches with the sources of `jsonschema`, and from a
generator; tokens are the demo model's. The suite's own examples are judged too: none that is invalid is accepted.
"""

import json
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from text_generation_proto.matcher import InvalidGrammar, TokenTable
from text_generation_router.grammar import Grammar
from text_generation_router.grammar_text import canonical_text
from text_generation_router.schema_checks import RefusedGrammar
from text_generation_router.tokenizer import Tokenizer

SUITE = Path(sys.prefix, "suites")
MIN_SUITE_SCHEMAS, NUM_GENERATED = 120, 240
MAX_TOKENS = 150
# What `jsonschema` judges by itself, as RFC 3339 and its like do.
FORMATS = jsonschema.FormatChecker(["date", "email", "ipv4", "ipv6", "uuid"])
# What closes values comes before what opens more of them, most of the time: so texts end.
CLOSING = frozenset(b'"]}')


class Writer:
    """Writes random text of tokens that a matcher allows."""

    def __init__(self, token_bytes: list[bytes], eos_token_ids: list[int]) -> None:
        self.token_bytes = token_bytes
        self.eos_token_ids = set(eos_token_ids)
        self.table = TokenTable(token_bytes, eos_token_ids)

    def write(self, text: str, rng: random.Random) -> str | None:
        """A text that ended by itself; None for one that grew too long."""
        matcher = self.table.compile(text)
        written = b""
        for count in range(MAX_TOKENS):
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
            assert allowed, f"nothing can follow {written!r}"
            ends = self.eos_token_ids.intersection(allowed)
            assert bool(ends) == matcher.is_accepting()
            if ends and (len(ends) == len(allowed) or rng.random() < 0.5):
                return written.decode()
            token = self._choose([token for token in allowed if token not in ends], rng, count / MAX_TOKENS)
            assert self.token_bytes[token], "a token that is no text"
            assert matcher.consume_token(token), matcher.get_error()
            written += self.token_bytes[token]
        return None

    def _choose(self, allowed: list[int], rng: random.Random, progress: float) -> int:
        if rng.random() < 0.2 + progress:
            closing = [token for token in allowed if self.token_bytes[token][-1] in CLOSING]
            if closing:
                return min(rng.sample(closing, min(8, len(closing))), key=lambda token: len(self.token_bytes[token]))
        return rng.choice(allowed)


@pytest.fixture(scope="module")
def writer(demo_folder: Path) -> Writer:
    tokens = Tokenizer(demo_folder, 1).grammar_tokens(49152)
    assert tokens is not None
    return Writer(*tokens)


def suite_groups() -> Iterator[dict[str, Any]]:
    archives = sorted(SUITE.glob("jsonschema-*.tar.gz"))
    if not archives:
        pytest.skip("the JSON Schema Test Suite is not there: make install")
    with tarfile.open(archives[-1]) as archive:
        for member in archive.getmembers():
            parts = Path(member.name).parts
            if parts[-3:-1] == ("tests", "draft2020-12") and parts[-1].endswith(".json"):
                file = archive.extractfile(member)
                assert file is not None
                yield from json.load(file)


def canonical(schema: Any, writer: Writer) -> str | None:
    """None for a schema that is refused."""
    try:
        return canonical_text(Grammar.from_schema(schema), writer.table)
    except (RefusedGrammar, InvalidGrammar):
        return None


def assert_valid(schema: Any, text: str) -> None:
    value = json.loads(text)
    try:
        jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(value)
    except jsonschema.ValidationError as error:
        pytest.fail(f"{text} is not valid for {json.dumps(schema)}: {error.message}", pytrace=False)


@pytest.mark.parametrize("most", [3, 7, 12, 24, 40, None])
def test_masks_say_what_each_token_by_itself_does(writer: Writer, most: int | None) -> None:
    """Strings of all bounds: masks decide on tokens in bulk, by how long they are."""
    text = canonical({"items": {"type": "string", **({"maxLength": most} if most else {})}, "minItems": 9}, writer)
    assert text is not None
    rng, matcher = random.Random(most), writer.table.compile(text)
    for _ in range(40):
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        is_allowed = np.unpackbits(mask, bitorder="little").tolist()
        allowed = [token for token, bit in enumerate(is_allowed) if bit]
        tokens = rng.sample(range(len(writer.token_bytes)), 200) + rng.sample(allowed, min(50, len(allowed)))
        texts = [token for token in tokens if writer.token_bytes[token]]
        assert [is_allowed[token] for token in texts] == [matcher.validate_tokens([one]) == 1 for one in texts]
        matcher.consume_token(rng.choice(allowed))


def test_the_suites_schemas_and_examples(writer: Writer) -> None:
    rng, num_accepted, num_written = random.Random(0), 0, 0
    for group in suite_groups():
        schema = group["schema"]
        text = canonical(schema, writer)
        if text is None:
            continue
        try:
            matcher = writer.table.compile(text)
        except InvalidGrammar:
            continue
        num_accepted += 1
        for example in group["tests"]:
            if not example["valid"]:
                value = json.dumps(example["data"], ensure_ascii=False)
                assert not accepts(writer, matcher.deep_copy(), value), (group["description"], value)
        for _ in range(2):
            written = writer.write(text, rng)
            if written is not None:
                num_written += 1
                assert_valid(schema, written)
    assert num_accepted >= MIN_SUITE_SCHEMAS
    assert num_written >= num_accepted


def accepts(writer: Writer, matcher: Any, text: str) -> bool:
    """Whether a text can be written, byte by byte, and end there."""
    single = {value: token for token, value in enumerate(writer.token_bytes) if len(value) == 1}
    tokens = [single.get(bytes([byte])) for byte in text.encode()]
    if None in tokens:
        return False
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


class Generator:
    """Random schemas of the keywords that are supported."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def schema(self, depth: int = 3) -> dict[str, Any]:
        kinds = ["string", "number", "integer", "boolean", "null", "enum", "const"]
        if depth:
            kinds += ["object", "object", "array", "anyOf", "map", "allOf", "oneOf"]
        return getattr(self, "_" + self.rng.choice(kinds))(depth)

    def root(self) -> dict[str, Any]:
        schema = self._object(3) if self.rng.random() < 0.6 else self.schema()
        if self.rng.random() < 0.3:
            inner = {"type": "object", "properties": {"v": self.schema(1), "more": {"type": "array", "maxItems": 2}}}
            inner["properties"]["more"]["items"] = {"$ref": "#/$defs/node"}
            schema = {"anyOf": [schema, {"$ref": "#/$defs/node"}], "$defs": {"node": inner | {"required": ["v"]}}}
        return schema

    def _string(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        choice = self.rng.randrange(5)
        if choice == 0:
            schema["minLength"] = self.rng.randrange(4)
            schema["maxLength"] = schema["minLength"] + self.rng.randrange(6)
        elif choice == 1:
            schema["pattern"] = self.rng.choice(["^[a-z]+[0-9]*$", "ab?c", "^(x|y){2,4}$", "^.{3}$", r"^\d{2}-\d{2}$"])
        elif choice == 2:
            schema["format"] = self.rng.choice(["date", "date-time", "time", "email", "ipv4", "ipv6", "uuid"])
        return schema

    def _number(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "number"}
        low = self.rng.randrange(-50, 50)
        if self.rng.random() < 0.5:
            schema[self.rng.choice(["minimum", "exclusiveMinimum"])] = low
        if self.rng.random() < 0.5:
            schema[self.rng.choice(["maximum", "exclusiveMaximum"])] = low + self.rng.randrange(1, 100)
        return schema

    def _integer(self, depth: int) -> dict[str, Any]:
        schema = self._number(depth) | {"type": "integer"}
        if self.rng.random() < 0.3:
            schema = {"type": "integer", "multipleOf": self.rng.choice([2, 3, 10])}
        if "exclusiveMinimum" in schema and "exclusiveMaximum" in schema:
            schema["exclusiveMaximum"] += 2
        return schema

    def _boolean(self, depth: int) -> dict[str, Any]:
        return {"type": "boolean"}

    def _null(self, depth: int) -> dict[str, Any]:
        return {"type": ["null", "integer"]} if self.rng.random() < 0.5 else {"type": "null"}

    def _enum(self, depth: int) -> dict[str, Any]:
        return {"enum": self.rng.sample(["red", "grün", "x y", 1, 2.5, None, True, [1], {"a": "b"}, 'q"\\'], 3)}

    def _const(self, depth: int) -> dict[str, Any]:
        return {"const": self._enum(depth)["enum"][0]}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self.rng.sample(
            ["a", "name", "Straße", "x-y", "z z", '"', "$ref", "not", "\n"], self.rng.randrange(1, 5)
        )
        schema: dict[str, Any] = {"type": "object", "properties": {name: self.schema(depth - 1) for name in names}}
        schema["required"] = [name for name in names if self.rng.random() < 0.6]
        if self.rng.random() < 0.2:
            del schema["type"]
        if self.rng.random() < 0.4:
            schema["additionalProperties"] = self.rng.choice([False, True, {"type": "integer"}])
        return schema

    def _map(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "object", "additionalProperties": self.schema(depth - 1)}
        if self.rng.random() < 0.5:
            schema |= {"minProperties": 1, "maxProperties": 3}
        else:
            schema = {"type": "object", "patternProperties": {"^k[0-9]$": self.schema(depth - 1)}}
            schema["additionalProperties"] = False
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array", "items": self.schema(depth - 1)}
        schema["minItems"] = self.rng.randrange(3)
        schema["maxItems"] = schema["minItems"] + self.rng.randrange(3)
        if self.rng.random() < 0.3:
            schema["prefixItems"] = [self.schema(depth - 1) for _ in range(2)]
        return schema

    def _anyOf(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth - 1) for _ in range(3)], "title": "one of three"}

    def _oneOf(self, depth: int) -> dict[str, Any]:
        kinds = [{"type": "string"}, {"type": "integer"}, {"type": "array", "items": self.schema(depth - 1)}]
        objects = [
            {"type": "object", "properties": {"kind": {"const": kind}, "v": self.schema(depth - 1)}} for kind in "xyz"
        ]
        if self.rng.random() < 0.7:
            objects = [one | {"required": ["kind"]} for one in objects]
        return {"oneOf": self.rng.sample(self.rng.choice([kinds, objects]), 2)}

    def _allOf(self, depth: int) -> dict[str, Any]:
        parts = [{"properties": {name: self.schema(0)}, "required": [name]} for name in ("p", "q")]
        return {"type": "object", "allOf": parts}


def test_generated_schemas(writer: Writer) -> None:
    rng, num_compiled, num_written = random.Random(1), 0, 0
    for seed in range(NUM_GENERATED):
        schema = Generator(seed).root()
        jsonschema.Draft202012Validator.check_schema(schema)
        try:
            text = canonical_text(Grammar.from_schema(schema), writer.table)
            writer.table.compile(text)
        except InvalidGrammar as refusal:
            if "Unsatisfiable" in str(refusal) or "oneOf" in str(refusal):
                continue
            raise
        num_compiled += 1
        written = [writer.write(text, rng) for _ in range(2)]
        for one in written:
            if one is not None:
                num_written += 1
                assert_valid(schema, one)
    assert num_compiled >= 0.9 * NUM_GENERATED
    assert num_written >= num_compiled


def test_white_space_is_bounded(writer: Writer) -> None:
    """However much a model likes blanks, it gets to the end: between two parts of JSON there are at most 33."""
    text = canonical({"type": "array", "items": {"type": "null"}}, writer)
    assert text is not None
    matcher = writer.table.compile(text)
    run = 0
    for _ in range(300):
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
        allowed = [token for token in allowed if b"]" not in writer.token_bytes[token]]
        blanks = [token for token in allowed if writer.token_bytes[token] and not writer.token_bytes[token].strip()]
        token = max(blanks or allowed, key=lambda token: (len(writer.token_bytes[token]), token))
        value = writer.token_bytes[token]
        run = run + len(value) if not value.strip() else 0
        assert run <= 33
        assert matcher.consume_token(token)
