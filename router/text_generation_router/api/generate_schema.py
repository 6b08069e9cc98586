"""The bodies of TGI's own dialect."""

from text_generation_router.api.grammars import GRAMMAR
from text_generation_router.api.schema import Kind, ObjectSchema, Parameter

STOP = Parameter(
    "stop",
    Kind.STRINGS,
    "Strings that end the text, found anywhere in the new text, special tokens' text included. At most "
    "`--max-stop-sequences` (4) of 1 to 1024 characters.",
)
IGNORE_EOS = Parameter(
    "ignore_eos", Kind.BOOLEAN, "Whether to go on after an end-of-text token, until the limit or a stop string.", False
)
TYPICAL_P = Parameter("typical_p", Kind.NUMBER, "Typical decoding mass. Off by default.", range_name="typical_p")
SEED = Parameter("seed", Kind.INTEGER, "Seed of the sampling. Default: random, reported back.", range_name="seed")
REPETITION_PENALTY = Parameter(
    "repetition_penalty",
    Kind.NUMBER,
    "Divides or multiplies the logits of tokens that occurred before; 1 is none.",
    1.0,
    range_name="repetition_penalty",
)
BEST_OF = Parameter(
    "best_of",
    Kind.INTEGER,
    "Runs of the request; the one with the highest mean log-probability is the answer.",
    1,
    range_name="best_of",
)
PRIORITY = Parameter(
    "priority",
    Kind.INTEGER,
    "Among the waiting requests with the same API key the lowest goes first.",
    0,
    range_name="priority",
)

GENERATE_PARAMETERS = ObjectSchema(
    "GenerateParameters",
    "How to generate; every field is optional.",
    (
        Parameter(
            "max_new_tokens",
            Kind.INTEGER,
            "Most tokens to generate. Default: as many as fit; then 1024, or what is left of `--max-total-tokens`, "
            "must fit beside the prompt.",
            range_name="max_new_tokens",
        ),
        Parameter(
            "do_sample",
            Kind.BOOLEAN,
            "Whether to sample. False within `parameters`, true when `parameters` is missing; a temperature other than "
            "1, top_k, top_p or typical_p switch it on too.",
            False,
        ),
        Parameter("temperature", Kind.NUMBER, "Divides the logits before sampling.", 1.0, range_name="temperature"),
        Parameter("top_k", Kind.INTEGER, "Sample from the k best tokens. Off by default.", range_name="top_k"),
        Parameter(
            "top_p",
            Kind.NUMBER,
            "Sample from the smallest set of tokens with this probability. Off by default.",
            range_name="top_p",
        ),
        TYPICAL_P,
        SEED,
        REPETITION_PENALTY,
        Parameter(
            "frequency_penalty",
            Kind.NUMBER,
            "Lowers the logits of tokens by their share of prompt and text so far.",
            0.0,
            range_name="frequency_penalty",
        ),
        BEST_OF,
        STOP,
        IGNORE_EOS,
        Parameter(
            "truncate", Kind.INTEGER, "Keep only the last tokens of the prompt. Off by default.", range_name="truncate"
        ),
        Parameter("return_full_text", Kind.BOOLEAN, "Whether the text begins with the prompt.", False),
        Parameter("details", Kind.BOOLEAN, "Whether to add `details`: tokens, seed, finish reason.", False),
        Parameter(
            "decoder_input_details",
            Kind.BOOLEAN,
            "Whether to add the prompt's tokens to `details`; not in a stream. They stay an empty list without "
            "`--enable-prefill-logprobs`.",
            False,
        ),
        Parameter(
            "top_n_tokens",
            Kind.INTEGER,
            "How many of the best tokens to show at each position.",
            0,
            range_name="top_n_tokens",
        ),
        PRIORITY,
        Parameter("watermark", Kind.BOOLEAN, "Whether to watermark the text.", False),
        Parameter("grammar", Kind.OBJECT, "The form that the text must have. Not with `ignore_eos`.", inner=GRAMMAR),
        Parameter("adapter_id", Kind.REFUSED, "An adapter to use; none are loaded."),
    ),
)
INPUTS = Parameter("inputs", Kind.STRING, "The prompt; not empty.", is_required=True, json={"minLength": 1})
PARAMETERS = Parameter("parameters", Kind.OBJECT, "How to generate.", inner=GENERATE_PARAMETERS)
GENERATE_BODY = ObjectSchema("GenerateRequest", "A prompt to continue.", (INPUTS, PARAMETERS))
COMPATIBLE_BODY = ObjectSchema(
    "CompatibleGenerateRequest",
    "A prompt to continue, streamed or not. `return_full_text` is true by default when the model's pipeline tag is "
    "text-generation or there is none.",
    (*GENERATE_BODY.parameters, Parameter("stream", Kind.BOOLEAN, "Whether to answer with a stream.", False)),
)
