"""The body of a chat request: messages and tools, and the parameters that only chats have."""

from text_generation_router.api.openai_schema import SHARED
from text_generation_router.api.schema import Kind, ObjectSchema, Parameter

# What a template loops over, and what a client may send once: bounds far above real use.
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
MAX_DOCUMENTS = 1024
MAX_TEMPLATE_KWARGS = 64

PART = ObjectSchema(
    "ContentPart",
    "A part of a message's content; the parts' texts are joined.",
    (
        Parameter("type", Kind.STRING, "Only `text`.", is_required=True, json={"const": "text"}),
        Parameter("text", Kind.STRING, "The text.", is_required=True),
    ),
)
CALLED_FUNCTION = ObjectSchema(
    "CalledFunction",
    "What was called.",
    (
        Parameter("name", Kind.STRING, "The function's name.", is_required=True),
        Parameter(
            "arguments",
            Kind.ANY,
            "The arguments: JSON text, or the object itself.",
            json={"type": ["string", "object", "null"]},
        ),
    ),
)
TOOL_CALL = ObjectSchema(
    "ToolCall",
    "A call that the assistant made.",
    (
        Parameter("id", Kind.STRING, "The call's id, named by the `tool` message that answers it."),
        Parameter("type", Kind.STRING, "Only `function`.", "function"),
        Parameter("function", Kind.OBJECT, "What was called.", is_required=True, inner=CALLED_FUNCTION),
    ),
)
MESSAGE = ObjectSchema(
    "Message",
    "One message of a conversation. `content` may only be missing where there are `tool_calls`.",
    (
        Parameter("role", Kind.STRING, "Whose message it is, in the words of the model's template.", is_required=True),
        Parameter(
            "content",
            Kind.ANY,
            "The text, or a list of parts.",
            json={
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": PART.reference, "maxItems": MAX_PARTS},
                    {"type": "null"},
                ]
            },
            inner=PART,
        ),
        Parameter("name", Kind.STRING, "The author's name, for templates that show it."),
        Parameter(
            "tool_calls",
            Kind.LIST,
            "The assistant's calls, before their answers.",
            inner=TOOL_CALL,
            max_items=MAX_TOOL_CALLS,
        ),
        Parameter("tool_call_id", Kind.STRING, "The call that a `tool` message answers."),
        Parameter("reasoning_content", Kind.STRING, "The assistant's earlier reasoning, for templates that show it."),
        Parameter("refusal", Kind.REFUSED, "The assistant's refusal; give it as `content`."),
        Parameter("audio", Kind.REFUSED, "Spoken content."),
        Parameter("function_call", Kind.REFUSED, "The older form of `tool_calls`."),
    ),
)
FUNCTION = ObjectSchema(
    "FunctionDefinition",
    "What can be called.",
    (
        Parameter(
            "name",
            Kind.STRING,
            "The function's name.",
            is_required=True,
            json={"pattern": "^[a-zA-Z0-9_.-]{1,64}$"},
        ),
        Parameter("description", Kind.STRING, "When to call it and what it does."),
        Parameter("parameters", Kind.OBJECT, "JSON Schema of the arguments. Default: none."),
        Parameter("arguments", Kind.OBJECT, "Another name of `parameters`."),
        Parameter("strict", Kind.BOOLEAN, "Without effect on `auto`; forced calls always follow the schema.", False),
    ),
)
TOOL = ObjectSchema(
    "Tool",
    "A tool that the model may call.",
    (
        Parameter("type", Kind.STRING, "Only `function`.", "function", json={"enum": ["function", None]}),
        Parameter("function", Kind.OBJECT, "What can be called.", is_required=True, inner=FUNCTION),
    ),
)
NAMED_FUNCTION = ObjectSchema(
    "NamedFunction",
    "A function by its name.",
    (Parameter("name", Kind.STRING, "The function's name.", is_required=True),),
)
NAMED_CHOICE = ObjectSchema(
    "NamedToolChoice",
    "One tool that must be called.",
    (
        Parameter("type", Kind.STRING, "Only `function`.", "function"),
        Parameter("function", Kind.OBJECT, "The tool.", is_required=True, inner=NAMED_FUNCTION),
    ),
)
CHAT_BODY = ObjectSchema(
    "ChatRequest",
    "A conversation to continue. A last message of the assistant is continued itself.",
    (
        Parameter(
            "messages",
            Kind.LIST,
            "The conversation.",
            is_required=True,
            inner=MESSAGE,
            max_items=MAX_MESSAGES,
            json={"minItems": 1},
        ),
        *SHARED,
        Parameter("logprobs", Kind.BOOLEAN, "Whether to add the log-probability of each token.", False),
        Parameter(
            "top_logprobs",
            Kind.INTEGER,
            "How many of the best tokens to show at each position. Needs `logprobs`.",
            range_name="top_n_tokens",
        ),
        Parameter("tools", Kind.LIST, "Functions that the model may call.", inner=TOOL, max_items=MAX_TOOLS),
        Parameter(
            "tool_choice",
            Kind.ANY,
            "`auto`: the model chooses; `none`: no tool; `required`: at least one; a tool by its name, or "
            '`{"type": "function", "function": {"name": …}}`: that one.',
            "auto",
            json={"anyOf": [{"type": "string"}, NAMED_CHOICE.reference, {"type": "null"}]},
            inner=NAMED_CHOICE,
        ),
        Parameter("parallel_tool_calls", Kind.BOOLEAN, "Whether one answer may call several tools.", True),
        Parameter(
            "tool_prompt",
            Kind.STRING,
            "Written before the tools in the last message, where the model's template does not show tools.",
        ),
        Parameter(
            "documents",
            Kind.LIST,
            "Documents for the model's template: objects, usually with `title` and `text`.",
            max_items=MAX_DOCUMENTS,
            json={"items": {"type": "object"}},
        ),
        Parameter(
            "chat_template_kwargs",
            Kind.OBJECT,
            "Switches of the model's template, such as `enable_thinking`: true, false, a number or text. Only names "
            "that the template uses.",
            json={"additionalProperties": {"type": ["boolean", "integer", "number", "string", "null"]}},
        ),
        Parameter(
            "reasoning_effort",
            Kind.STRING,
            "Handed to the model's template, where it has such a switch; else refused.",
        ),
        Parameter("grammar", Kind.REFUSED, "Use `response_format`."),
        Parameter(
            "chat_template",
            Kind.STRING,
            "The name of one of the model's own templates. Default: `default`, or `tool_use` with tools where there is "
            "one. A template of the client's own is refused.",
        ),
        Parameter("functions", Kind.REFUSED, "The older form of `tools`.", neutral=([],)),
        Parameter("function_call", Kind.REFUSED, "The older form of `tool_choice`.", neutral=("none",)),
        Parameter("modalities", Kind.REFUSED, "What to answer with: text alone.", neutral=(["text"], [])),
        Parameter("audio", Kind.REFUSED, "Spoken answers."),
        Parameter("moderation", Kind.REFUSED, "Moderation of what is said."),
        Parameter("prediction", Kind.REFUSED, "A text that the answer is likely to repeat."),
        Parameter("web_search_options", Kind.REFUSED, "Answers from the web."),
        Parameter("store", Kind.REFUSED, "Whether to keep the answer; nothing is kept.", neutral=(False,)),
        Parameter("metadata", Kind.REFUSED, "Labels of a stored answer; nothing is stored.", neutral=({},)),
        Parameter("service_tier", Kind.REFUSED, "There is one tier.", neutral=("auto", "default")),
        Parameter("verbosity", Kind.REFUSED, "How long answers are.", neutral=("medium",)),
        Parameter("prompt_cache_key", Kind.STRING, "Accepted: one server has one prefix cache, nothing to route."),
        Parameter("prompt_cache_options", Kind.REFUSED, "How prompts are cached; prefixes always are.", neutral=({},)),
        Parameter(
            "prompt_cache_retention", Kind.REFUSED, "How long prompts are cached.", neutral=("in-memory", "in_memory")
        ),
        Parameter("safety_identifier", Kind.STRING, "Another name of `user`."),
    ),
)
