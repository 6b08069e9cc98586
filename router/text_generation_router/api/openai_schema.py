"""The bodies of OpenAI's dialect: what both routes share, and completions. Messages and tools: chat_schema.py."""

from text_generation_router.api.generate_schema import (
    BEST_OF,
    IGNORE_EOS,
    PRIORITY,
    REPETITION_PENALTY,
    SEED,
    STOP,
    TYPICAL_P,
)
from text_generation_router.api.grammars import GRAMMAR
from text_generation_router.api.schema import Kind, ObjectSchema, Parameter
from text_generation_router.validation import MAX_LOGIT_BIAS, MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS

MAX_MODEL_NAME_CHARACTERS = 256
MAX_USER_CHARACTERS = 512

STREAM_OPTIONS = ObjectSchema(
    "StreamOptions",
    "What a stream holds beside the text.",
    (
        Parameter("include_usage", Kind.BOOLEAN, "Whether the stream ends with an event for the token counts.", False),
        Parameter(
            "include_obfuscation",
            Kind.REFUSED,
            "Padding against guessing from the sizes of events; there is none.",
            neutral=(False,),
        ),
    ),
)
SHARED = (
    Parameter(
        "model",
        Kind.STRING,
        'Any name: one model is served. Null, "tgi" and the model\'s own name are the same.',
        json={"maxLength": MAX_MODEL_NAME_CHARACTERS},
    ),
    Parameter(
        "max_tokens",
        Kind.INTEGER,
        "Most tokens to generate. Default: as many as fit; then 1024, or what is left of `--max-total-tokens`, must "
        "fit beside the prompt.",
        range_name="max_new_tokens",
    ),
    Parameter("max_completion_tokens", Kind.INTEGER, "The newer name of `max_tokens`.", range_name="max_new_tokens"),
    Parameter(
        "temperature",
        Kind.NUMBER,
        "Divides the logits before sampling; 0 is greedy.",
        1.0,
        range_name="temperature",
        special=(0,),
    ),
    Parameter(
        "top_p",
        Kind.NUMBER,
        "Sample from the smallest set of tokens with this probability; 1 is off.",
        1.0,
        range_name="top_p",
        special=(1,),
    ),
    Parameter(
        "top_k",
        Kind.INTEGER,
        "Sample from the k best tokens; 0 and -1 are off.",
        0,
        range_name="top_k",
        special=(0, -1),
    ),
    Parameter(
        "min_p",
        Kind.NUMBER,
        "Leave out tokens below this share of the best token's probability.",
        0.0,
        range_name="min_p",
    ),
    TYPICAL_P,
    SEED,
    PRIORITY,
    Parameter(
        "frequency_penalty",
        Kind.NUMBER,
        "Subtracted from a token's logit for each time the text has it.",
        0.0,
        range_name="frequency_penalty",
    ),
    Parameter(
        "presence_penalty",
        Kind.NUMBER,
        "Subtracted from a token's logit once the text has it.",
        0.0,
        range_name="presence_penalty",
    ),
    REPETITION_PENALTY,
    Parameter(
        "logit_bias",
        Kind.OBJECT,
        "Added to the logits: token ids, as text, to numbers from -100 to 100. At most 512.",
        json={
            "additionalProperties": {"type": "number", "minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS},
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "maxProperties": MAX_LOGIT_BIASES,
        },
    ),
    Parameter(
        "min_tokens",
        Kind.INTEGER,
        "Before so many tokens, none that ends the text is chosen: neither the model's own nor one of "
        "`stop_token_ids`. A stop string still ends it. Not with a grammar.",
        0,
        range_name="min_tokens",
    ),
    Parameter(
        "stop_token_ids",
        Kind.LIST,
        "Tokens that end the text, which they are no part of; ids below the width of the logits.",
        max_items=MAX_STOP_TOKEN_IDS,
        json={"items": {"type": "integer", "minimum": 0}},
    ),
    Parameter("n", Kind.INTEGER, "How many answers to give.", 1, range_name="n"),
    BEST_OF,
    STOP,
    IGNORE_EOS,
    Parameter("stream", Kind.BOOLEAN, "Whether to answer with a stream of events.", False),
    Parameter("stream_options", Kind.OBJECT, "What a stream holds.", inner=STREAM_OPTIONS),
    Parameter(
        "response_format",
        Kind.OBJECT,
        "The form that the text must have. Not with `ignore_eos` or tools.",
        inner=GRAMMAR,
    ),
    Parameter(
        "user",
        Kind.STRING,
        "A name for the end user, written to the log line of the request.",
        json={"maxLength": MAX_USER_CHARACTERS},
    ),
    Parameter("adapter_id", Kind.REFUSED, "An adapter to use; none are loaded."),
    Parameter("guided_json", Kind.REFUSED, "A grammar for the text; use `response_format`."),
    Parameter("guided_regex", Kind.REFUSED, "A grammar for the text; use `response_format`."),
    Parameter("guided_choice", Kind.REFUSED, "A grammar for the text; use `response_format`."),
    Parameter("guided_grammar", Kind.REFUSED, "A grammar for the text; use `response_format`."),
    Parameter("use_beam_search", Kind.REFUSED, "Beam search; there is none.", neutral=(False,)),
)
COMPLETIONS_BODY = ObjectSchema(
    "CompletionRequest",
    "Prompts to continue.",
    (
        Parameter(
            "prompt",
            Kind.ANY,
            "The prompt, or a list of at most `--max-client-batch-size` (4): text, or token ids below the width of the "
            "logits.",
            is_required=True,
            json={
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
                    {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                    {
                        "type": "array",
                        "minItems": 1,
                        "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                    },
                ]
            },
        ),
        *SHARED,
        Parameter("suffix", Kind.REFUSED, "Text after the completion; no model here fills gaps.", neutral=("",)),
        Parameter(
            "echo",
            Kind.BOOLEAN,
            "Whether the text begins with the prompt. With `logprobs` the prompt's tokens have theirs too, but for the "
            "first one; `max_tokens` may then be 0, for the prompt alone.",
            False,
        ),
        Parameter(
            "logprobs",
            Kind.INTEGER,
            "Whether to add the log-probability of each token, and how many of the best tokens to show at its place.",
            range_name="top_n_tokens",
        ),
        Parameter("grammar", Kind.REFUSED, "Use `response_format`."),
    ),
)
