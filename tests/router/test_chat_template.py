"""Chat templates against transformers' apply_chat_template."""

import asyncio
import json
from pathlib import Path

import pytest
from text_generation_router import chat_template as chat_template_module
from text_generation_router.chat_template import ChatTemplate
from text_generation_router.conversation import Conversation
from text_generation_router.errors import TemplateError, ValidationError
from text_generation_router.model_family import ToolFormat
from text_generation_router.tokenizer_files import BrokenTokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

LLAMA3 = """{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
QWEN = """{%- set ns = namespace(last_query=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" %}
        {%- set ns.last_query = index %}{%- set ns.found = true %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{% for message in messages %}
{{- '<|im_start|>' + message.role + ('*' if loop.index0 == ns.last_query else '') + '\\n' -}}
    {% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {% else %}{{ message.content + '<|im_end|>' }}
    {% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
{#- a comment #}
"""
SIMPLE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "Wie geht's? <b>&amp; 日本"}
CONVERSATIONS = [
    [USER],
    [{"role": "system", "content": " Be brief.\n"}, USER],
    [USER, {"role": "assistant", "content": "Gut."}, {"role": "user", "content": "Und?"}],
    [USER, {"role": "assistant", "content": "Gut."}, {"role": "user", "content": ""}],
]
CONTINUED = [
    [USER, {"role": "assistant", "content": "The answer is"}],
    [USER, {"role": "assistant", "content": "The answer is "}],
    [USER, {"role": "assistant", "content": "Gut."}, USER, {"role": "assistant", "content": "Gut."}],
    [USER, {"role": "assistant", "content": "  a\nb"}],
]


def folder_with(folder: Path, template: object, **config: object) -> Path:
    values = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def by_transformers(template: str, messages: list, **options: object) -> str:
    backend = Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, []))
    reference = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return str(reference.apply_chat_template(messages, chat_template=template, tokenize=False, **options))


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", [LLAMA3, MISTRAL, QWEN, SIMPLE], ids=["llama3", "mistral", "qwen", "simple"])
def test_well_known_templates(tmp_path, template, messages):
    expected = by_transformers(template, messages, add_generation_prompt=True)
    assert ChatTemplate(folder_with(tmp_path, template)).render_now(Conversation(messages)) == expected


@pytest.mark.parametrize("messages", CONTINUED)
@pytest.mark.parametrize("template", [LLAMA3, MISTRAL, QWEN, SIMPLE], ids=["llama3", "mistral", "qwen", "simple"])
def test_a_last_message_from_the_assistant_is_continued(tmp_path, template, messages):
    expected = by_transformers(template, messages, continue_final_message=True)
    assert ChatTemplate(folder_with(tmp_path, template)).render_now(Conversation(messages)) == expected


def test_the_demo_template(demo_folder):
    source = json.loads((demo_folder / "tokenizer_config.json").read_text())["chat_template"]
    template = ChatTemplate(demo_folder)
    for messages in CONVERSATIONS:
        rendered = template.render_now(Conversation(messages))
        assert rendered == by_transformers(source, messages, add_generation_prompt=True)
        assert rendered.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert template.render_now(Conversation(CONTINUED[1])).endswith("<|im_start|>assistant\nThe answer is ")


def test_rendering_leaves_the_event_loop_free(tmp_path):
    async def render() -> str:
        return await ChatTemplate(folder_with(tmp_path, SIMPLE)).render(Conversation([USER]))

    assert asyncio.run(render()) == f"<user>{USER['content']}</><assistant>"


TOOL_CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"city": "Köln"}'}}


def test_tool_calls_and_tool_messages_reach_a_template_that_takes_them(tmp_path):
    messages = [
        USER,
        {"role": "assistant", "tool_calls": [TOOL_CALL]},
        {"role": "tool", "content": "12 °C", "tool_call_id": "a", "name": "f"},
    ]
    as_objects = [
        USER,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Köln"}}}]},
        messages[2],
    ]
    expected = by_transformers(LLAMA3, as_objects, add_generation_prompt=True)
    assert ChatTemplate(folder_with(tmp_path, LLAMA3)).render_now(Conversation(messages)) == expected
    assert '{"name": "f", "parameters": {"city": "Köln"}}' in expected


def test_tool_calls_become_content_for_a_template_that_does_not_take_them(tmp_path):
    template = ChatTemplate(folder_with(tmp_path, SIMPLE))
    called = {"role": "assistant", "tool_calls": [TOOL_CALL]}
    expected = f"<assistant>{json.dumps([TOOL_CALL], ensure_ascii=False)}</><user>x</><assistant>"
    assert template.render_now(Conversation([called, {"role": "user", "content": "x"}])) == expected
    spoken = called | {"content": "Hm"}
    assert template.render_now(Conversation([spoken, {"role": "user", "content": "x"}])).startswith("<assistant>Hm</>")


def test_names_and_ids_reach_the_template(tmp_path):
    source = "{% for m in messages %}{{ m.name }}|{{ m.tool_call_id }}|{{ m.content }}{% endfor %}"
    message = {"role": "tool", "name": "N", "tool_call_id": "7", "content": "a b"}
    assert ChatTemplate(folder_with(tmp_path, source)).render_now(Conversation([message])) == "N|7|a b"


@pytest.mark.parametrize("arguments", ["not JSON", "[" * 100_000, '"a"', "7", {"b": 1}, None])
def test_arguments_that_are_no_json_of_an_object_stay_as_they_are(tmp_path, arguments):
    source = "{% for m in messages %}{{ m.tool_calls[0].function.arguments }}|{{ m.content }}{% endfor %}"
    message = {"role": "tool", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert ChatTemplate(folder_with(tmp_path, source)).render_now(Conversation([message])) == f"{arguments}|None"


REFUSED = [
    (None, "no chat template"),
    ("{% for %}", "does not compile"),
    (MISTRAL, "roles must alternate"),
    ("{{ messages[0].content.no_such.thing }}", "no_such"),
    ("{{ messages[0].content + 1 }}", "TypeError"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{% set _ = messages.append(1) %}", "append.*unsafe"),
    ("{% for i in range(1000000) %}{% endfor %}", "range"),
]


@pytest.mark.parametrize(("source", "reason"), REFUSED)
def test_templates_that_do_not_render(tmp_path, source, reason):
    template = ChatTemplate(folder_with(tmp_path, source))
    with pytest.raises(TemplateError, match=f"^Template error: .*{reason}") as caught:
        template.render_now(
            Conversation([{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}, USER])
        )
    assert caught.value.status == 422


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in messages[0].content %}{{ '' }}"
ENDLESS += "{% endfor %}{% endfor %}{% endfor %}"


def test_a_template_that_takes_too_long_is_ended(tmp_path):
    for source in (ENDLESS, ENDLESS.replace("{{ '' }}", "")):
        with pytest.raises(TemplateError, match="too long"):
            ChatTemplate(folder_with(tmp_path, source), max_render_s=0.05).render_now(Conversation([USER]))


def test_a_prompt_that_grows_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template_module, "MAX_PROMPT_CHARACTERS", 1000)
    template = ChatTemplate(folder_with(tmp_path, "{% for i in range(101) %}{{ '0123456789' }}{% endfor %}"))
    with pytest.raises(TemplateError, match="1000 characters"):
        template.render_now(Conversation([USER]))


def test_a_template_that_drops_the_last_message_cannot_continue_it(tmp_path):
    with pytest.raises(TemplateError, match="continued"):
        ChatTemplate(folder_with(tmp_path, "{{ messages[0].content }}")).render_now(Conversation(CONTINUED[0]))


def test_where_a_template_comes_from(tmp_path):
    def source() -> str:
        return ChatTemplate(tmp_path).render_now(Conversation([USER]))

    (tmp_path / "processor_config.json").write_text(json.dumps({"chat_template": "processor"}))
    assert source() == "processor"
    folder_with(tmp_path, [{"name": "rag", "template": "rag"}, {"name": "default", "template": "listed"}])
    assert source() == "listed"
    folder_with(tmp_path, "config")
    assert source() == "config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert source() == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja {{ bos_token }}{{ eos_token }}{{ pad_token }}")
    assert source() == "jinja <s></s>"
    (tmp_path / "chat_template.json").write_text("{")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(BrokenTokenizer, match=r"chat_template\.json"):
        ChatTemplate(tmp_path)


TOOLS_AND_SWITCHES = """{%- if tools %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ '</tools>' }}{% endif %}
{%- for document in documents or [] %}[{{ document.title }}: {{ document.text }}]{% endfor %}
{%- for m in messages %}<{{ m.role }}>{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{%- if tone is defined %}({{ tone }}){% endif %}
{%- endif %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wie's <draußen> ist",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": True,
    },
}
DOCUMENTS = [{"title": "Köln", "text": "am Rhein"}, {"title": "Bonn", "text": "auch"}]


@pytest.mark.parametrize("tools", [[], [WEATHER], [WEATHER, TOOL_CALL | {"extra": [1, None]}]])
@pytest.mark.parametrize("documents", [[], DOCUMENTS])
@pytest.mark.parametrize("switches", [{}, {"enable_thinking": False}, {"enable_thinking": True, "tone": "kind"}])
def test_tools_documents_and_switches_reach_the_template(tmp_path, tools, documents, switches):
    expected = by_transformers(
        TOOLS_AND_SWITCHES,
        [USER],
        tools=tools or None,
        documents=documents or None,
        add_generation_prompt=True,
        **switches,
    )
    template = ChatTemplate(folder_with(tmp_path, TOOLS_AND_SWITCHES))
    conversation = Conversation([USER], tools=tools, documents=documents, switches=switches)
    assert template.render_now(conversation) == expected


def test_calls_stay_beside_content_for_a_template_that_takes_them(tmp_path):
    called = {"role": "assistant", "content": "Hm", "tool_calls": [TOOL_CALL]}
    as_object = {
        "role": "assistant",
        "content": "Hm",
        "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Köln"}}}],
    }
    expected = by_transformers(TOOLS_AND_SWITCHES, [USER, as_object, USER], add_generation_prompt=True)
    template = ChatTemplate(folder_with(tmp_path, TOOLS_AND_SWITCHES))
    assert template.render_now(Conversation([USER, called, USER])) == expected


def test_tools_are_written_into_the_last_message_where_the_template_has_no_place_for_them(tmp_path):
    template = ChatTemplate(folder_with(tmp_path, SIMPLE))
    rendered = template.render_now(Conversation([USER], tools=[WEATHER], tool_prompt="Use them."))
    before, _, after = rendered.partition("\n---\n")
    assert before == f"<user>{USER['content']}"
    tools, _, rest = after.partition("\n")
    assert json.loads(tools) == [WEATHER]
    assert rest == "Use them.</><assistant>"


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "bos_token",
        "raise_exception",
        "range",
        "nothing",
        "m",
    ],
)
def test_switches_are_names_that_the_template_leaves_open(tmp_path, name):
    template = ChatTemplate(folder_with(tmp_path, TOOLS_AND_SWITCHES + "{{ bos_token }}{% set nothing = 1 %}"))
    with pytest.raises(ValidationError, match=rf"`chat_template_kwargs\.{name}` is no switch.*enable_thinking, tone"):
        template.render_now(Conversation([USER], switches={name: "x"}))


def test_what_a_template_has_no_place_for_is_refused(tmp_path):
    template = ChatTemplate(folder_with(tmp_path, SIMPLE))
    with pytest.raises(ValidationError, match="`documents` have no place"):
        template.render_now(Conversation([USER], documents=DOCUMENTS))
    with pytest.raises(ValidationError, match="`reasoning_effort` is no switch") as caught:
        template.render_now(Conversation([USER], switches={"reasoning_effort": "low"}))
    assert caught.value.param == "reasoning_effort"


def test_named_templates(tmp_path):
    named = {"default": "plain{{ messages[0].content }}", "tool_use": "tools{{ tools[0].function.name }}", "rag": "rag"}
    folder_with(tmp_path, [{"name": name, "template": source} for name, source in named.items()])
    template = ChatTemplate(tmp_path)
    question = {"role": "user", "content": "?"}
    assert template.render_now(Conversation([question])) == "plain?"
    assert template.render_now(Conversation([question], tools=[WEATHER])) == "toolsweather"
    assert template.render_now(Conversation([question], template="rag", tools=[WEATHER])) == "rag"
    with pytest.raises(ValidationError, match=r"`chat_template` must be the name of one of.*default, tool_use, rag"):
        template.render_now(Conversation([question], template="{{ messages }}"))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "short.jinja").write_text("short")
    assert ChatTemplate(tmp_path).render_now(Conversation([question], template="short")) == "short"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplate(tmp_path).render_now(Conversation([question]))


@pytest.mark.parametrize(
    ("source", "tool_format", "has_reasoning"),
    [
        (SIMPLE, None, False),
        (LLAMA3, ToolFormat.LLAMA3, False),
        (TOOLS_AND_SWITCHES, ToolFormat.HERMES, True),
        ("{{ '[TOOL_CALLS]' }}{{ tools }}", ToolFormat.MISTRAL, False),
        ("<tool_call>\n<function=name>", None, False),
    ],
    ids=["simple", "llama3", "hermes", "mistral", "other"],
)
def test_families(tmp_path, source, tool_format, has_reasoning):
    family = ChatTemplate(folder_with(tmp_path, source)).family
    assert (family.tool_format, family.has_reasoning) == (tool_format, has_reasoning)
