"""The form that a text must have, as requests ask for it: TGI's `grammar` and OpenAI's `response_format`."""

from text_generation_router.api.fields import Fields
from text_generation_router.api.schema import Kind, ObjectSchema, Parameter
from text_generation_router.grammar import Grammar

JSON_SCHEMA_FORMAT = ObjectSchema(
    "JsonSchemaFormat",
    "A schema with a name.",
    (
        Parameter("name", Kind.STRING, "A name for the schema; without effect."),
        Parameter("description", Kind.STRING, "What the text is for; without effect."),
        Parameter(
            "schema",
            Kind.ANY,
            "The JSON schema: an object, or its JSON text.",
            is_required=True,
            json={"type": ["object", "string"]},
        ),
        Parameter("strict", Kind.BOOLEAN, "Without effect: the text always follows the schema.", True),
    ),
)
GRAMMAR = ObjectSchema(
    "Grammar",
    "The form that the text must have; docs/structured-output.md tells what a schema may hold.",
    (
        Parameter(
            "type",
            Kind.STRING,
            "`json_object` (or `json`): JSON, of the schema in `value` or `schema`, or any object where there is none; "
            "`json_schema`: JSON of the schema in `json_schema` or `value`; `regex`: text that matches the regular "
            "expression in `value` as a whole; `text`: any text.",
            is_required=True,
            json={"enum": ["text", "json_object", "json", "json_schema", "regex"]},
        ),
        Parameter(
            "value",
            Kind.ANY,
            "TGI's place for it: a JSON schema (an object, or its JSON text), a regular expression, or, with "
            "`json_schema`, an object like that of `json_schema`.",
            json={"type": ["object", "string", "null"]},
            inner=JSON_SCHEMA_FORMAT,
        ),
        Parameter("json_schema", Kind.OBJECT, "OpenAI's place for it.", inner=JSON_SCHEMA_FORMAT),
        Parameter(
            "schema",
            Kind.ANY,
            "Langchain's place for the schema of `json_object`.",
            json={"type": ["object", "string", "null"]},
        ),
    ),
)


def read_grammar(fields: Fields | None) -> Grammar | None:
    """The grammar that an object of GRAMMAR asks for; None for any text. Raises ValidationError."""
    if fields is None:
        return None
    kind, value, named = fields.required_string("type"), fields.any("value"), fields.object("json_schema")
    match kind:
        case "text":
            return None
        case "json_object" | "json":
            name, schema = ("schema", fields.any("schema")) if value is None else ("value", value)
            return Grammar.any_object() if schema is None else _read_schema(fields, name, schema)
        case "json_schema":
            if named is None:
                named = fields.child("value", value, JSON_SCHEMA_FORMAT)
            for name in ("name", "description"):
                named.string(name)
            named.boolean("strict")
            return _read_schema(named, "schema", named.any("schema"))
        case "regex":
            if not isinstance(value, str):
                raise fields.error("value", "must be a regular expression")
            return Grammar.from_regex(value)
    raise fields.error("type", "must be text, json_object, json, json_schema or regex")


def _read_schema(fields: Fields, name: str, value: object) -> Grammar:
    if not isinstance(value, (dict, str)):
        raise fields.error(name, "must be a JSON schema: an object, or its JSON text")
    return Grammar.from_schema(value)
