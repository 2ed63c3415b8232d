"""Data that the chat tests share: a tokenizer of single bytes, tools, and raw model outputs."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from pronk.text.vocabulary import Roles, Tokenizer

LLAMA_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class ByteTokenizer(Tokenizer):
    """Each byte is a token; the special tokens come after them."""

    def __init__(self, specials: Sequence[str] = LLAMA_SPECIALS, **roles: Any) -> None:
        ids = {text: 256 + n for n, text in enumerate(specials)}
        super().__init__(256 + len(specials), Roles(special_ids=ids, **roles))

    def _encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode())

    def _ordinary_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(ids)


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get weather info for places",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The name of the city"},
                "metric": {"type": "string", "description": "The unit", "default": "celsius"},
            },
            "required": ["city"],
        },
    },
}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": 'Adds "two" numbers, that\'s all <&>',
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "the first"},
                "b": {"enum": [1, 2], "type": "integer", "description": "größer"},
            },
            "required": ["a", "b"],
        },
    },
}

NAMES = ("get_weather", "add", "get_time", "brave_search", "wolfram_alpha", "code_interpreter")

Call = tuple[str, dict[str, Any]]
SF: Call = ("get_weather", {"city": "San Francisco"})

OUTPUTS: list[tuple[str, str, list[Call]]] = [
    # plain text, and text that only looks like a call
    ("", "", []),
    ("Hello there!\n\nHow can I help? ", "Hello there!\n\nHow can I help? ", []),
    ("See [1] and [this](http://x.y), {x}, `code` and <b>.", "*", []),
    ('{"city": "Paris", "temperature": 20}', "*", []),
    ('{"name": "Bob", "age": 3}', "*", []),
    ('{"name": "get_weather", "age": 3}', "*", []),
    ('{"name": "unknown_tool", "parameters": {"a": 1}}', "*", []),
    ("[unknown_tool(a=1)]", "*", []),
    ("<function=unknown_tool>{}</function>", "*", []),
    ("```python\nprint([add for add in x])\n```", "*", []),
    ("Use get_weather(city='x') like so.", "*", []),
    ("The token <|im_end|> ends a turn.", "*", []),
    ("[[add(a=1", "*", []),
    ('[add("x")]', "*", []),
    # a call that breaks off or goes wrong is text
    ('{"name": "add", "parameters": {"a": 1, "b": "unfin', "*", []),
    ('{"name": "add", "parameters": {"a": oops}}', "*", []),
    ('<function=add>{"a": [1, 2}</function>', "*", []),
    ("[add(a=1, b=", "*", []),
    ('{"type": "person", "name": "add", "parameters": {}}', "*", []),
    ('{"name": "add", "parameters": [1, 2]}', "*", []),
    # JSON
    ('{"name": "get_weather", "parameters": {"city": "San Francisco"}}', "", [SF]),
    (
        '{"type": "function", "name": "get_weather", "parameters": {"city": "San Francisco"}}',
        "",
        [SF],
    ),
    (
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "San Francisco"}}<|eom_id|>',
        "",
        [SF],
    ),
    (
        '<|python_tag|>{\n    "type": "function",\n    "name": "get_weather",\n'
        '    "parameters": {\n'
        '        "city": "San Francisco"\n    }\n}<|eom_id|>',
        "",
        [SF],
    ),
    (
        '{"type": "function", "function": {"name": "get_weather",'
        ' "parameters": {"city": "San Francisco"}}}',
        "",
        [SF],
    ),
    (
        '{"id": "call_9", "type": "function", "function": {"name": "get_weather",'
        ' "arguments": "{\\"city\\": \\"San Francisco\\"}"}}',
        "",
        [SF],
    ),
    ('{"function": "get_weather", "arguments": {"city": "San Francisco"}}', "", [SF]),
    ('{"parameters": {"city": "San Francisco"}, "name": "get_weather"}', "", [SF]),
    (
        '{"name": "get_weather", "parameters": {"city": "San Francisco"}, "type": "function"}',
        "",
        [SF],
    ),
    ("{'name': 'get_weather', 'parameters': {'city': 'San Francisco', }}", "", [SF]),
    ('{"name": "get_weather", "parameters": {"city": "San Francisco"}', "", [SF]),  # no last brace
    (
        '{"parameters": {"a": 1}, "parameters": {"a": 2}, "name": "add", "name": "get_time"}',
        "",
        [("add", {"a": 2})],
    ),
    ('{"name": "get_time"}', "", [("get_time", {})]),
    ('{"name": "get_time", "parameters": null}', "", [("get_time", {})]),
    ('{"name": "get_time", "parameters": {}}', "", [("get_time", {})]),
    (
        '{"name": "get_weather", "parameters":'
        ' {"city": "Xi\'an \\u00e9\\ud83d\\ude00\\n\\"q\\" {}"}}',
        "",
        [("get_weather", {"city": 'Xi\'an é😀\n"q" {}'})],
    ),
    (
        '{"name": "add", "parameters": {"a": {"b": [1, -2.5e3, [true, false, null]], "c": {}}}}',
        "",
        [("add", {"a": {"b": [1, -2500.0, [True, False, None]], "c": {}}})],
    ),
    ('```json\n{"name": "get_weather", "parameters": {"city": "San Francisco"}}\n```', "", [SF]),
    (
        '```\n{"name": "get_weather", "parameters": {"city": "San Francisco"}}\n```\nThere.',
        "There.",
        [SF],
    ),
    (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "San Francisco"}}'
        "\n</tool_call>",
        "",
        [SF],
    ),
    (
        'Let me look.\n\n{"name": "get_weather", "parameters": {"city": "San Francisco"}}',
        "Let me look.",
        [SF],
    ),
    (
        'Sure: `{"name": "get_weather", "parameters": {"city": "San Francisco"}}` and done',
        "Sure: and done",
        [SF],
    ),
    (
        '{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}',
        "",
        [("add", {"a": 1}), ("add", {"a": 2})],
    ),
    (
        '{"name": "add", "parameters": {"a": 1}}\n{"name": "get_time"}\n\n'
        '{"name": "add", "arguments": {}}',
        "",
        [("add", {"a": 1}), ("get_time", {}), ("add", {})],
    ),
    (
        '{"name": "add", "parameters": {"a": 1}}{"name": "get_time"}',
        "",
        [("add", {"a": 1}), ("get_time", {})],
    ),
    (
        '[{"name": "add", "parameters": {"a": 1}},\n {"name": "get_time", "parameters": {}}]',
        "",
        [("add", {"a": 1}), ("get_time", {})],
    ),
    (
        '{"name": "brave_search", "parameters": {"q": "cats"}}',
        "",
        [("brave_search", {"query": "cats"})],
    ),
    # <function=...>
    ('<function=get_weather>{"city": "San Francisco"}</function>', "", [SF]),
    ('<function=get_weather>{"city": "San Francisco"}', "", [SF]),
    ("<function=get_weather>{'city': 'San Francisco'}</function><|eot_id|>", "", [SF]),
    ('<function=get_weather{"city": "San Francisco"}</function>', "", [SF]),
    ("<function=get_time></function>", "", [("get_time", {})]),
    (
        '<function=add>{"a": {"b": {"c": "it\'s"}}, "d": [{}]}</function>',
        "",
        [("add", {"a": {"b": {"c": "it's"}}, "d": [{}]})],
    ),
    (
        'I will check.\n<function=add>{"a": 1}</function>\n<function=get_time>{}</function>\nWait.',
        "I will check.\nWait.",
        [("add", {"a": 1}), ("get_time", {})],
    ),
    # pythonic
    ("[get_weather(city='San Francisco')]", "", [SF]),
    ('<|python_tag|>[get_weather(city="San Francisco")]<|eot_id|>', "", [SF]),
    (
        "[get_weather(city='San Francisco', metric='celsius'),"
        " add(a=-1, b=[2.5, None, {'k': True}]), get_time()]",
        "",
        [
            ("get_weather", {"city": "San Francisco", "metric": "celsius"}),
            ("add", {"a": -1, "b": [2.5, None, {"k": True}]}),
            ("get_time", {}),
        ],
    ),
    (
        "[add(a=\"it's [a] \\\"b\\\", c)\", b='''two\nlines''')]",
        "",
        [("add", {"a": 'it\'s [a] "b", c)', "b": "two\nlines"})],
    ),
    ("[add(a=1), get_time(", "*", []),  # a list is taken as a whole
    ("[add(a=1), get_time()", "", [("add", {"a": 1}), ("get_time", {})]),  # no last bracket
    ('[add(a={name="water"})]', "", [("add", {"a": {"name": "water"}})]),  # Meta's encoder
    ("<|python_tag|>get_weather(city='San Francisco')<|eom_id|>", "", [SF]),
    # built-in
    (
        '<|python_tag|>brave_search.call(query="price of gold")<|eom_id|>',
        "",
        [("brave_search", {"query": "price of gold"})],
    ),
    (
        'brave_search.call(query="price of gold")',
        "",
        [("brave_search", {"query": "price of gold"})],
    ),
    (
        '<|python_tag|>wolfram_alpha.call(query="what is "pi"?")<|eom_id|>',
        "",
        [("wolfram_alpha", {"query": 'what is "pi"?'})],
    ),
    (
        '<|python_tag|>brave_search.call(query="a")\nwolfram_alpha.call(query="b")<|eom_id|>',
        "",
        [("brave_search", {"query": "a"}), ("wolfram_alpha", {"query": "b"})],
    ),
    # code
    (
        "<|python_tag|>def f(x):\n    return {'name': x}\n\nprint(f([1]))\n<|eom_id|>",
        "",
        [("code_interpreter", {"code": "def f(x):\n    return {'name': x}\n\nprint(f([1]))\n"})],
    ),
    ('<|python_tag|>  {"a": "é\\""}', "", [("code_interpreter", {"code": '  {"a": "é\\""}'})]),
    (
        "Some text.\n<|python_tag|>add = [get_time]<|eom_id|>",
        "Some text.",
        [("code_interpreter", {"code": "add = [get_time]"})],
    ),
    ("<|python_tag|> \n<|eom_id|>", "", []),
]
"""Raw output, the text that is left ("*": all of it), the calls. With NAMES as tools."""


def cut(text: str, rng: random.Random, most: int = 8) -> list[str]:
    """`text` in random pieces, one character each in one case of four."""
    if rng.random() < 0.25:
        return list(text)
    pieces = []
    while text:
        n = rng.randint(1, most if rng.random() < 0.8 else len(text))
        pieces.append(text[:n])
        text = text[n:]
    return pieces
