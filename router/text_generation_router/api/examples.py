"""Bodies that the demo model answers well; docs/api.md shows them and its tests send them. Together those of a route
name every parameter that any model can honour; what the demo model's template has no place for stands in the last one
of chats."""

from typing import Any

_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
_CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": _CITY},
}
_STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
# Of both OpenAI routes.
_FILTERS: dict[str, Any] = {"max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.01}
_PENALTIES: dict[str, Any] = {
    "max_tokens": 8,
    "typical_p": 0.95,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"28": -100},
}
_ENDS: dict[str, Any] = {
    "max_completion_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
    "min_tokens": 2,
    "stop_token_ids": [30],
    "priority": 10,
}
_FORM: dict[str, Any] = {
    "max_tokens": 32,
    "temperature": 0,
    "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": _CITY}},
}

GENERATE: dict[str, Any] = {
    "inputs": "The capital of France is",
    "parameters": {"max_new_tokens": 8, "details": True},
}
GENERATE_EXAMPLES: tuple[dict[str, Any], ...] = (
    GENERATE,
    {
        "inputs": "Once upon a time",
        "parameters": {
            "max_new_tokens": 8,
            "temperature": 0.7,
            "top_k": 50,
            "top_p": 0.95,
            "seed": 42,
            "stop": ["\n\n"],
            "return_full_text": True,
        },
    },
    {
        "inputs": "Once upon a time",
        "parameters": {
            "max_new_tokens": 8,
            "do_sample": True,
            "best_of": 2,
            "typical_p": 0.95,
            "repetition_penalty": 1.1,
            "frequency_penalty": 0.5,
            "watermark": True,
            "ignore_eos": True,
            "priority": 10,
        },
    },
    {
        "inputs": "Answer in JSON. The capital of France is",
        "parameters": {
            "max_new_tokens": 32,
            "truncate": 5,
            "top_n_tokens": 2,
            "decoder_input_details": True,
            "grammar": {"type": "json", "value": _CITY},
        },
    },
)
CHAT: dict[str, Any] = {"model": "tgi", "messages": _QUESTION, "max_tokens": 16, "temperature": 0}
_CHAT = {"model": "tgi", "messages": _QUESTION}
CHAT_EXAMPLES: tuple[dict[str, Any], ...] = (
    CHAT,
    {**CHAT, **_STREAMED},
    {**CHAT, "logprobs": True, "top_logprobs": 2, "stop": ".", "user": "someone"},
    {**_CHAT, **_FILTERS, "n": 2, "best_of": 2, "seed": 1},
    {**_CHAT, **_PENALTIES, "prompt_cache_key": "any", "safety_identifier": "someone"},
    {**_CHAT, **_ENDS, "chat_template": "default"},
    {**_CHAT, **_FORM},
    {
        **CHAT,
        "max_tokens": 32,
        "tools": [_TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "tool_prompt": "Call one of these functions:",
    },
    {
        **CHAT,
        "documents": [{"title": "France", "text": "Its capital is Paris."}],
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
    },
)
COMPLETION: dict[str, Any] = {"model": "tgi", "prompt": "1, 2, 3,", "max_tokens": 8, "temperature": 0}
_COMPLETION = {"model": "tgi", "prompt": "1, 2, 3,"}
COMPLETION_EXAMPLES: tuple[dict[str, Any], ...] = (
    COMPLETION,
    {**COMPLETION, "prompt": ["1, 2, 3,", "a, b, c,"]},
    {**COMPLETION, "prompt": [504, 3575], **_STREAMED},
    {**COMPLETION, "echo": True, "logprobs": 2, "stop": ["10"], "user": "someone"},
    {**_COMPLETION, **_FILTERS, "n": 2, "best_of": 2, "seed": 1},
    {**_COMPLETION, **_PENALTIES},
    {**_COMPLETION, **_ENDS},
    {**_COMPLETION, **_FORM},
)
TOKENIZE: dict[str, Any] = {"inputs": "Grüße aus Köln"}
CHAT_TOKENIZE: dict[str, Any] = {"messages": _QUESTION}
VERTEX: dict[str, Any] = {"instances": [GENERATE, {"messages": _QUESTION, "max_tokens": 8}]}
