"""The "hf" style and Jinja templates against Hugging Face's renderer (`transformers`).

HF_TEMPLATE is written from the described behaviour of the template in the Hugging Face repository
of Llama 3.1 8B Instruct, in our words. `transformers` renders it to text, whose special tokens
are then parsed; that must give our ids wherever the template is right. Where it is not, we differ:

- it takes exactly one call a message and drops the text beside it,
- it takes the first message after the system message for the user's if tools are offered,
- it does not escape quotes in built-in arguments, and writes code as `code_interpreter.call(...)`,
- rendering to text turns special tokens in user text into the real ones; ours stay text.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from chat_samples import ADD, CHATML_SPECIALS, WEATHER, ByteTokenizer
from pronk.text.chat import Llama31Format, chat_format_for
from pronk.text.messages import Message, ToolCall, messages_from_dicts
from pronk.text.parse import parse_reply, split_specials
from pronk.text.template import JinjaFormat
from pronk.text.tokenizer import tokenizer_from_gguf, tokenizer_from_meta
from pronk.text.tools import tools_from_dicts
from pronk.text.vocabulary import Tokenizer

chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

HF_TEMPLATE = r"""
{%- set today = date_string if date_string is defined else '26 Jul 2024' %}
{%- set offered = tools if tools is defined else none %}
{%- set in_user = tools_in_user_message if tools_in_user_message is defined else true %}
{%- set answer_form = 'Respond in the format {"name": function name, "parameters": dictionary of '
    ~ 'argument name and its value}.Do not use variables.\n\n' %}
{%- macro header(role) %}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' }}{% endmacro %}
{%- macro listing() %}
    {%- for tool in offered %}{{ tool | tojson(indent=4) ~ '\n\n' }}{% endfor %}
{%- endmacro %}
{{- bos_token ~ header('system') }}
{%- if builtin_tools is defined or offered is not none %}{{ 'Environment: ipython\n' }}{% endif %}
{%- if builtin_tools is defined %}
    {{- 'Tools: ' ~ builtin_tools | reject('equalto', 'code_interpreter') | join(', ') ~ '\n\n' }}
{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' ~ today ~ '\n\n' }}
{%- if offered is not none and not in_user %}
    {{- 'You have access to the following functions. To call a function, please respond with ' }}
    {{- 'JSON for a function call.' ~ answer_form ~ listing() }}
{%- endif %}
{%- set rest = messages %}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content | trim }}
    {%- set rest = messages[1:] %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in rest %}
    {%- if loop.first and offered is not none and in_user %}
        {{- header('user') ~ 'Given the following functions, please respond with a JSON for a ' }}
        {{- 'function call with its proper arguments that best answers the given prompt.\n\n' }}
        {{- answer_form ~ listing() ~ message.content | trim ~ '<|eot_id|>' }}
    {%- elif message.role in ('tool', 'ipython') %}
        {{- header('ipython') ~ message.content | tojson ~ '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception('one call only') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- header('assistant') }}
        {%- if builtin_tools is defined and call.name in builtin_tools %}
            {{- '<|python_tag|>' ~ call.name ~ '.call(' }}
            {%- for name, value in call.arguments.items() %}
                {{- name ~ '="' ~ value ~ '"' ~ ('' if loop.last else ', ') }}
            {%- endfor %}
            {{- ')' }}
        {%- else %}
            {{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ call.arguments | tojson ~ '}' }}
        {%- endif %}
        {{- '<|eom_id|>' if builtin_tools is defined else '<|eot_id|>' }}
    {%- else %}
        {{- header(message.role) ~ message.content | trim ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}
"""


# --- style "hf" ---------------------------------------------------------------------------------


def llama_tokenizer() -> Tokenizer:
    """Meta's vocabulary where `llama-models` is installed, else bytes."""
    try:
        import llama_models
    except ImportError:
        return ByteTokenizer(bos_id=256)
    return tokenizer_from_meta(Path(llama_models.__file__).parent / "llama3/tokenizer.model")


LLAMA = llama_tokenizer()
WORDS = [
    "Hello",
    " world",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "é",
    "日本語",
    "🙂",
    "123",
    "'s",
    '"',
    "\\",
    " ",
]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(0, 10)))


def random_call(rng: random.Random) -> dict[str, Any]:
    values = ["x y", "日本", 1, -2.5, True, None, [1, {"k": "it's"}]]
    any_arguments = {key: rng.choice(values) for key in rng.sample("abc", rng.randint(0, 3))}
    call = rng.choice(
        [
            ("get_weather", any_arguments),
            ("brave_search", {"query": rng.choice(["what's é?", "a, b (c)"])}),
            ("wolfram_alpha", {"query": "1 + 1", "unit": "m"}),
        ]
    )  # fmt: skip
    function = {"name": call[0], "arguments": call[1]}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def random_dialog(rng: random.Random) -> list[dict[str, Any]]:
    dialog = []
    if rng.random() < 0.6:
        dialog.append({"role": "system", "content": random_text(rng)})
    for _ in range(rng.randint(1, 4)):
        dialog.append({"role": "user", "content": random_text(rng)})
        if rng.random() < 0.5:
            dialog.append(random_call(rng))
            dialog.append({"role": "tool", "content": random_text(rng)})
        dialog.append({"role": "assistant", "content": random_text(rng)})
    return dialog[: rng.randint(1 + (dialog[0]["role"] == "system"), len(dialog))]


OFFERS: list[dict[str, Any]] = [
    {},
    {"tools": [WEATHER]},
    {"tools": [WEATHER, ADD]},
    {"builtin_tools": ["brave_search", "code_interpreter"]},
    {"builtin_tools": ["code_interpreter"]},
    {"tools": [ADD], "builtin_tools": ["wolfram_alpha", "brave_search"]},
]


@pytest.mark.parametrize("offer", OFFERS, ids=range(len(OFFERS)))
@pytest.mark.parametrize("in_user", [True, False])
def test_random_dialogs(offer: dict[str, Any], in_user: bool) -> None:
    rng = random.Random(8)
    format = Llama31Format(LLAMA, style="hf", tools_in_user_message=in_user)
    for _ in range(60):
        dialog = random_dialog(rng)
        date = rng.choice([None, "01 Sep 2025"])
        open_header = rng.random() < 0.7
        rendered = format.render(
            messages_from_dicts(dialog),
            tools=tools_from_dicts(offer.get("tools", [])),
            builtin_tools=offer.get("builtin_tools", []),
            date=date,
            add_generation_prompt=open_header,
        )
        variables = dict(offer, **({} if date is None else {"date_string": date}))
        tools = variables.pop("tools", None)
        [text], _ = chat_template_utils.render_jinja_template(
            [dialog], tools, None, HF_TEMPLATE, add_generation_prompt=open_header,
            bos_token="<|begin_of_text|>", tools_in_user_message=in_user, **variables,
        )  # fmt: skip
        assert LLAMA.decode(rendered.ids) == text
        assert rendered.ids == LLAMA.encode(text, special=True)


def test_jinja_format_gives_the_same_ids() -> None:
    """The template that a model brings, run by us, and our native style agree."""
    rng = random.Random(9)
    by_template = JinjaFormat(LLAMA, HF_TEMPLATE)
    native = Llama31Format(LLAMA, style="hf")
    for _ in range(60):
        dialog = messages_from_dicts(random_dialog(rng))
        offer = rng.choice(OFFERS)
        options: dict[str, Any] = {
            "tools": tools_from_dicts(offer.get("tools", [])),
            "builtin_tools": offer.get("builtin_tools", []),
            "date": "26 Jul 2024",
        }
        ours, theirs = native.render(dialog, **options), by_template.render(dialog, **options)
        assert ours.ids == theirs.ids
        assert ours.assistant_mask == theirs.assistant_mask


# --- other templates ----------------------------------------------------------------------------

TEMPLATES = {
    "chatml": """\
{% for message in messages %}
{% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}
{%- endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "generation": """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ m.content | trim }}<|im_end|>
{% endgeneration %}
{%- else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>{% endif %}

{% endfor %}""",
    "tools": """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}<tools>{% for t in tools %}{{ '\n' ~ t.function | tojson }}{% endfor %}
</tools>
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' and loop.index0 < ns.last %}{% continue %}{% endif %}
    {{- '<|im_start|>' ~ m.role ~ ('*' if loop.index0 == ns.last else '') ~ '\n' ~ m.content }}
    {%- for c in m.tool_calls or [] %}
        {{- '<call>' ~ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}
    {%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{{- strftime_now('%Y') and bos_token ~ eos_token }}""",
}
CHATML = ByteTokenizer(CHATML_SPECIALS, bos_id=257, eos_id=258)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(name: str) -> None:
    rng = random.Random(10)
    format = JinjaFormat(CHATML, TEMPLATES[name])
    tools = [WEATHER, ADD] if name == "tools" else None
    for _ in range(50):
        dialog = [
            message if "content" in message else dict(message, content="")
            for message in random_dialog(rng)
            if name == "tools" or "tool_calls" not in message
        ]
        variables: dict[str, Any] = {
            "add_generation_prompt": rng.random() < 0.5,
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
        }
        [text], indices = chat_template_utils.render_jinja_template(
            [dialog], tools, None, TEMPLATES[name], name == "generation", **variables
        )
        rendered = format.render(
            messages_from_dicts(dialog),
            tools=tools_from_dicts(tools or []),
            add_generation_prompt=variables["add_generation_prompt"],
        )
        assert CHATML.decode(rendered.ids) == text
        assert rendered.ids == CHATML.encode(text, special=True)
        if name == "generation":
            pairs = zip(rendered.ids, rendered.assistant_mask, strict=True)
            expected = "".join(text[start:end] for start, end in indices[0])
            assert CHATML.decode(id for id, mine in pairs if mine) == expected


def test_calls_read_back_from_the_template() -> None:
    """What the template writes for a call is what the parser reads."""
    call = ToolCall("add", {"a": 'é "x"', "b": [1, None]}, "call_0")
    rendered = Llama31Format(LLAMA, style="hf").render(
        [Message("user", "x"), Message("assistant", "", (call,))]
    )
    written = [id for id, mine in zip(rendered.ids, rendered.assistant_mask, strict=True) if mine]
    reply = parse_reply(
        split_specials(LLAMA.decode(written)), tools=["add"], call_id="call_{}".format
    )
    assert (reply.text, reply.tool_calls) == ("", (call,))


def test_the_template_of_a_real_model(smollm2_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(smollm2_path).fields
    keys = {key: f.contents() for key, f in fields.items() if key.startswith("tokenizer.")}
    tokenizer = tokenizer_from_gguf(keys)
    format = chat_format_for(tokenizer)
    assert isinstance(format, JinjaFormat)
    rng = random.Random(12)
    for _ in range(60):
        dialog = [message for message in random_dialog(rng) if "tool_calls" not in message]
        [text], _ = chat_template_utils.render_jinja_template(
            [dialog], None, None, tokenizer.chat_template, add_generation_prompt=True
        )
        rendered = format.render(messages_from_dicts(dialog))
        assert rendered.ids == tokenizer.encode(text, special=True)
        pairs = zip(rendered.ids, rendered.assistant_mask, strict=True)
        answers = "".join(m["content"] for m in dialog if m["role"] == "assistant")
        written = tokenizer.decode(id for id, mine in pairs if mine)
        # A token of the header's newline and an answer's leading white space is the header's.
        assert "".join(written.replace("<|im_end|>", "").split()) == "".join(answers.split())
        assert written.count("<|im_end|>") == sum(m["role"] == "assistant" for m in dialog)
