"""Parsers of answers: what they find, and that it does not depend on how the text was cut into pieces."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_generation_router.chat_output.deltas import Answer, CallArguments, CallStart, PlainText
from text_generation_router.chat_output.forced import ForcedParser
from text_generation_router.chat_output.hermes import HermesParser
from text_generation_router.chat_output.json_text import NotJson, ObjectReader, StringDecoder, ValueReader
from text_generation_router.chat_output.llama3 import Llama3Parser
from text_generation_router.chat_output.mistral import MistralParser
from text_generation_router.chat_output.reasoning import ReasoningParser

NAMES = frozenset(("weather", "time"))


def counted_ids():
    count = itertools.count()
    return lambda: f"id{next(count)}"


PARSERS = {
    "hermes": lambda: HermesParser(counted_ids()),
    "llama3": lambda: Llama3Parser(counted_ids(), NAMES),
    "mistral": lambda: MistralParser(counted_ids()),
    "forced": lambda: ForcedParser(counted_ids()),
    "plain": PlainText,
    "thinking": lambda: ReasoningParser(PlainText(), is_begun=False),
    "thinking on": lambda: ReasoningParser(PlainText(), is_begun=True),
    "thinking hermes": lambda: ReasoningParser(HermesParser(counted_ids()), is_begun=False),
}
PARIS = '{"city": "Paris \\"\\u00e9 }", "days": [1, {"a": null}], "t": -1.5e3}'
COMPACT = '{"city":"Paris \\"\\u00e9 }","days":[1,{"a":null}],"t":-1.5e3}'
WEATHER = ("weather", COMPACT)
# Parser, text, content, calls, reasoning.
CASES = [
    ("plain", "Hi <tool_call>", "Hi <tool_call>", [], ""),
    ("hermes", "Just text.  \n", "Just text.  \n", [], ""),
    ("hermes", "", "", [], ""),
    ("hermes", "1 < 2 <tool", "1 < 2 <tool", [], ""),
    ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>', "", [WEATHER], ""),
    (
        "hermes",
        f'Let me see.\n\n<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>\n'
        '<tool_call>{"arguments": {"zone": "UTC"}, "name": "time"}</tool_call>\n Done it.\n',
        "Let me see.Done it.\n",
        [WEATHER, ("time", '{"zone":"UTC"}')],
        "",
    ),
    ("hermes", '<tool_call>{"name": "time"}</tool_call>', "", [("time", "{}")], ""),
    ("hermes", '<tool_call>{"name": "time", "arguments": null}', "", [("time", "{}")], ""),
    ("hermes", '<tool_call>{"name": "time", "arguments": 7, "x": [1]}', "", [("time", "7")], ""),
    ("hermes", '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}', "", [("time", '{"a":1}')], ""),
    (
        "hermes",
        '<tool_call>{"name": "time", "arguments": {"a": "x\ny\tz"}}',
        "",
        [("time", '{"a":"x\\u000ay\\u0009z"}')],
        "",
    ),
    ("hermes", '<tool_call>{"name": "time", "arguments": {"a": "b', "", [("time", '{"a":"b')], ""),
    ("hermes", '<tool_call>{"name": "ti', '<tool_call>{"name": "ti', [], ""),
    ("hermes", "<tool_call>no JSON</tool_call> x", "<tool_call>no JSON</tool_call> x", [], ""),
    ("hermes", 'a <tool_call>{"name": 5} b', 'a <tool_call>{"name": 5} b', [], ""),
    ("hermes", '<tool_call>{"name": "time", oops}</tool_call>ok', "ok", [("time", "oops}")], ""),
    ("hermes", '<tool_call>{"name": "time"}\n<tool_call>{"name": "time"}', "", [("time", "{}"), ("time", "{}")], ""),
    ("llama3", "It is warm. {}", "It is warm. {}", [], ""),
    ("llama3", f'{{"name": "weather", "parameters": {PARIS}}}', "", [WEATHER], ""),
    ("llama3", f' <|python_tag|>{{"type": "function", "name": "weather", "parameters": {PARIS}}}', "", [WEATHER], ""),
    (
        "llama3",
        f'{{"name": "weather", "parameters": {PARIS}}}; {{"name": "time", "parameters": {{}}}}',
        "",
        [WEATHER, ("time", "{}")],
        "",
    ),
    ("llama3", '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', [], ""),
    ("llama3", ' {"answer": 42}\n', ' {"answer": 42}\n', [], ""),
    ("llama3", '{"name": "time", "parameters": {}} Well.', "Well.", [("time", "{}")], ""),
    ("llama3", "<|python", "<|python", [], ""),
    ("llama3", '{"name": "time", "parameters": {"a": tr', "", [("time", '{"a":tr')], ""),
    ("mistral", "Hello. ", "Hello. ", [], ""),
    (
        "mistral",
        f'Well: [TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS}}}, '
        '{"name": "time", "arguments": {}, "id": "123456789"}]',
        "Well:",
        [WEATHER, ("time", "{}")],
        "",
    ),
    ("mistral", '[TOOL_CALLS]{"name": "time", "arguments": {}}', "", [("time", "{}")], ""),
    (
        "mistral",
        f'[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{PARIS}[TOOL_CALLS]time{{"a": 1}}',
        "",
        [WEATHER, ("time", '{"a":1}')],
        "",
    ),
    ("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", [], ""),
    ("mistral", "x [TOOL_CALLS] [5]", "x [TOOL_CALLS] [5]", [], ""),
    ("mistral", "[TOOL_CAL", "[TOOL_CAL", [], ""),
    ("forced", '{"function": {"_name": "time"}}', "", [("time", "{}")], ""),
    (
        "forced",
        f'{{"function": {{"_name": "time", "place": {PARIS}, "b" : [ 1 , 2 ]}} }}',
        "",
        [("time", f'{{"place":{COMPACT},"b":[1,2]}}')],
        "",
    ),
    ("forced", '{"function": {"a": 1, "_name": "time"}}', "", [("time", '{"a":1}')], ""),
    ("forced", '{"function": {"_name": "time", "a": "x', "", [("time", '{"a":"x')], ""),
    ("forced", '{"function": {"_name": "no_tool"}}', "", [], ""),
    (
        "forced",
        '{"function": {"_name": "no_tool", "content": "Say \\"hi\\",\\n\\\\ \\ud83d\\ude00 \\u00e9 😀\\\\" } }',
        'Say "hi",\n\\ 😀 é 😀\\',
        [],
        "",
    ),
    ("forced", '{"function": {"_name": "no_tool", "content": "a\\ud83d b\\ude00"}}', "a\ufffd b\ufffd", [], ""),
    ("hermes", '<tool_call>{"name": "\\ud83d"}', '<tool_call>{"name": "\\ud83d"}', [], ""),
    ("forced", '{"function": {"_name": "no_tool", "content": "Cut \\u00', "Cut ", [], ""),
    ("thinking", "<think>\nHm.\n\nSo.\n</think>\n\nYes.", "Yes.", [], "Hm.\n\nSo."),
    ("thinking", "<think>\n\n</think>\n\nYes. ", "Yes. ", [], ""),
    ("thinking", " No <think>thoughts</think>", " No <think>thoughts</think>", [], ""),
    ("thinking", "<thin", "<thin", [], ""),
    ("thinking", "<think>Cut </thi", "", [], "Cut </thi"),
    ("thinking on", "Hm.\n</think>\nYes.", "Yes.", [], "Hm."),
    ("thinking on", "<think>\nHm.</think>Yes.", "Yes.", [], "Hm."),
    ("thinking on", "Hm", "", [], "Hm"),
    (
        "thinking hermes",
        '<think>\n<tool_call>?\n</think>\n\nOk\n<tool_call>{"name": "time", "arguments": {}}</tool_call>',
        "Ok",
        [("time", "{}")],
        "<tool_call>?",
    ),
]


def folded(parser, pieces):
    answer = Answer()
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.end()
    answer.add(deltas)
    starts = [delta.index for delta in deltas if isinstance(delta, CallStart)]
    assert starts == list(range(len(starts)))
    assert all(delta.text for delta in deltas if not isinstance(delta, CallStart))
    assert all(delta.index < len(starts) for delta in deltas if isinstance(delta, CallArguments))
    return answer


@pytest.mark.parametrize(("name", "text", "content", "calls", "reasoning"), CASES)
def test_every_split(name, text, content, calls, reasoning):
    """Whole, character by character, and cut at every one point and every two points."""
    length = len(text)
    cuts = [(), tuple(range(1, length))]
    cuts += [(i,) for i in range(1, length)]
    step = max(1, length // 15)
    cuts += list(itertools.combinations(range(1, length, step), 2))
    for points in cuts:
        pieces = [text[i:j] for i, j in itertools.pairwise((0, *points, length))]
        answer = folded(PARSERS[name](), pieces)
        found = (answer.content, [(call.name, call.arguments) for call in answer.calls], answer.reasoning)
        assert found == (content, calls, reasoning), pieces
        assert [call.call_id for call in answer.calls] == [f"id{i}" for i in range(len(calls))]


@given(
    st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                "[TOOL_CALLS]",
                "[ARGS]",
                "<think>",
                "</think>",
                "{",
                "}",
                '"name"',
                '"weather"',
                ":",
                ",",
                '"arguments"',
                "[",
                "]",
                " ",
                "\n",
                "x",
                "1",
                '"',
                "\\",
                ";",
                '{"name": "weather", "arguments": {"a": 1}}',
                '{"function": {"_name": "time"',
            ]
        ),
        max_size=14,
    ),
    st.data(),
)
def test_any_text_in_any_pieces(parts, data):
    text = "".join(parts)
    points = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[i:j] for i, j in itertools.pairwise((0, *points, len(text)))]
    for make in PARSERS.values():
        assert folded(make(), pieces) == folded(make(), [text])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.sampled_from([None, 1, "\t"]))
def test_values_become_compact(value, indent):
    """Reference: the standard library's own compact form of what it had spread out."""
    spread = json.dumps(value, indent=indent, ensure_ascii=False) + ","
    reader, kept, position = ValueReader(), "", 0
    while not reader.is_done:
        more, num_read = reader.push(spread[position : position + 3])
        kept, position = kept + more, position + num_read
    assert kept == json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    assert position >= len(spread) - 1


@given(st.text(), st.booleans(), st.data())
def test_strings_in_pieces(value, ascii_only, data):
    """Reference: the standard library, of the whole text."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    points = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    decoder = StringDecoder()
    pieces = [text[i:j] for i, j in itertools.pairwise((0, *points, len(text)))]
    assert "".join(decoder.push(piece) for piece in pieces) == value


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4), st.sampled_from([None, 1]))
def test_members_of_an_object(values, indent):
    reader = ObjectReader()
    pieces, num_read = reader.push(json.dumps(values, indent=indent) + " rest")
    assert reader.is_done
    assert num_read == len(json.dumps(values, indent=indent))
    found = {json.loads(piece.key): json.loads(piece.text) for piece in pieces}
    assert found == values
    assert all(piece.is_first and piece.is_last for piece in pieces)


@pytest.mark.parametrize(
    "text", ["[", "x", "{x", "{,", '{"a" 1', '{"a":}', '{"a":1 2', '{"a":1,}', '{"a":1 "b"', '{"a":"b" "c"']
)
def test_what_is_no_object(text):
    with pytest.raises(NotJson):
        ObjectReader().push(text)
