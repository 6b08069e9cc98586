"""What the routes answer, as JSON Schema: components of the OpenAPI document. Bodies of requests are in schema.py."""

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_INTEGER: Schema = {"type": "integer"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_BYTE: Schema = {"type": "integer", "minimum": 0, "maximum": 255}
_NULL: Schema = {"type": "null"}


def reference(name: str) -> Schema:
    """Where the document has a component."""
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, _NULL]}


def _object(fields: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """An object with these fields always, and others perhaps."""
    return {"type": "object", "properties": {**fields, **(optional or {})}, "required": list(fields)}


_CALL = {"id": _STRING, "type": {"const": "function"}}
_HEAD = {"id": _STRING, "created": _COUNT, "model": _STRING, "system_fingerprint": _STRING}
_FINISH_REASON: Schema = {"enum": ["stop", "length", "tool_calls"]}
_OUTPUT = {
    "finish_reason": {"enum": ["length", "eos_token", "stop_sequence"]},
    "generated_tokens": _COUNT,
    "seed": _or_null(_COUNT),
    "prefill": _list(reference("PrefillToken")),
    "tokens": _list(reference("Token")),
}

ANSWER_SCHEMAS: dict[str, Schema] = {
    "Error": _object({"error": _STRING, "error_type": _STRING}),
    "OpenAIError": _object(
        {
            "error": _object(
                {"message": _STRING, "type": _STRING, "param": _or_null(_STRING), "code": _NULL},
                {"http_status_code": _INTEGER},
            ),
            "error_type": _STRING,
        }
    ),
    "Token": _object({"id": _COUNT, "text": _STRING, "logprob": _or_null(_NUMBER), "special": {"type": "boolean"}}),
    "PrefillToken": _object({"id": _COUNT, "text": _STRING, "logprob": _or_null(_NUMBER)}),
    "BestOfSequence": _object({"generated_text": _STRING, **_OUTPUT}, {"top_tokens": _list(_list(reference("Token")))}),
    "Details": _object(
        _OUTPUT,
        {
            "top_tokens": _list(_list(reference("Token"))),
            "best_of_sequences": _list(reference("BestOfSequence")),
        },
    ),
    "GenerateResponse": _object({"generated_text": _STRING}, {"details": reference("Details")}),
    "StreamDetails": _object(
        {
            "finish_reason": _OUTPUT["finish_reason"],
            "generated_tokens": _COUNT,
            "seed": _OUTPUT["seed"],
            "input_length": _COUNT,
        }
    ),
    "StreamResponse": _object(
        {
            "index": _COUNT,
            "token": reference("Token"),
            "generated_text": _or_null(_STRING),
            "details": _or_null(reference("StreamDetails")),
        },
        {"top_tokens": _list(reference("Token"))},
    ),
    "SimpleToken": _object({"id": _COUNT, "text": _STRING, "start": _COUNT, "stop": _COUNT}),
    "TokenizeResponse": _list(reference("SimpleToken")),
    "ChatTokenizeResponse": _object({"tokenize_response": reference("TokenizeResponse"), "templated_text": _STRING}),
    "VertexResponse": _object({"predictions": _list(_STRING)}),
    "Info": _object(
        {
            "model_id": _STRING,
            "model_sha": _or_null(_STRING),
            "model_pipeline_tag": _or_null(_STRING),
            "max_concurrent_requests": _COUNT,
            "max_best_of": _COUNT,
            "max_stop_sequences": _COUNT,
            "max_input_tokens": _COUNT,
            "max_total_tokens": _COUNT,
            "validation_workers": _COUNT,
            "max_client_batch_size": _COUNT,
            "router": {"const": "text-generation-router"},
            "version": _STRING,
            "sha": _or_null(_STRING),
            "docker_label": _or_null(_STRING),
        }
    ),
    "ModelList": _object(
        {
            "object": {"const": "list"},
            "data": _list(
                _object({"id": _STRING, "object": {"const": "model"}, "created": _COUNT, "owned_by": _STRING})
            ),
        }
    ),
    "Usage": _object(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
            "recomputed_tokens": _COUNT,
        }
    ),
    "ChatLogprobs": _object(
        {
            "content": _list(
                _object(
                    {
                        "token": _STRING,
                        "logprob": _NUMBER,
                        "bytes": _list(_BYTE),
                        "top_logprobs": _list(_object({"token": _STRING, "logprob": _NUMBER, "bytes": _list(_BYTE)})),
                    }
                )
            )
        }
    ),
    "CompletionLogprobs": _object(
        {
            "tokens": _list(_STRING),
            "token_logprobs": _list(_or_null(_NUMBER)),
            "top_logprobs": _list(_or_null({"type": "object", "additionalProperties": _NUMBER})),
            "text_offset": _list(_COUNT),
        }
    ),
    "AnsweredToolCall": _object({**_CALL, "function": _object({"name": _STRING, "arguments": _STRING})}),
    "ToolCallDelta": _object(
        {"index": _COUNT, **_CALL, "function": _object({"name": _or_null(_STRING), "arguments": _STRING})}
    ),
    "ChatCompletion": _object(
        {
            "object": {"const": "chat.completion"},
            **_HEAD,
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "message": _object(
                            {"role": {"const": "assistant"}, "content": _or_null(_STRING)},
                            {"reasoning_content": _STRING, "tool_calls": _list(reference("AnsweredToolCall"))},
                        ),
                        "logprobs": _or_null(reference("ChatLogprobs")),
                        "finish_reason": _FINISH_REASON,
                    }
                )
            ),
            "usage": reference("Usage"),
        }
    ),
    "ChatCompletionChunk": _object(
        {
            "object": {"const": "chat.completion.chunk"},
            **_HEAD,
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "delta": _object(
                            {"role": {"enum": ["assistant", ""]}},
                            {
                                "content": _STRING,
                                "reasoning_content": _STRING,
                                "tool_calls": _or_null(_list(reference("ToolCallDelta"))),
                            },
                        ),
                        "logprobs": _or_null(reference("ChatLogprobs")),
                        "finish_reason": _or_null(_FINISH_REASON),
                    }
                )
            ),
            "usage": _or_null(reference("Usage")),
        }
    ),
    "Completion": _object(
        {
            "object": {"const": "text_completion"},
            **_HEAD,
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "text": _STRING,
                        "logprobs": _or_null(reference("CompletionLogprobs")),
                        "finish_reason": _or_null(_FINISH_REASON),
                    }
                )
            ),
            "usage": _or_null(reference("Usage")),
        }
    ),
}
