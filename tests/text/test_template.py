"""Jinja chat templates: special tokens, masks, one BOS, and what they may not do."""

import datetime
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import ADD, CHATML_SPECIALS, ByteTokenizer
from pronk.core.errors import UserError
from pronk.text.chat import Rendered
from pronk.text.messages import Message, Role, ToolCall
from pronk.text.parse import parse_reply
from pronk.text.sandbox import Meter
from pronk.text.template import JinjaFormat
from pronk.text.tools import json_prompt, tools_from_dicts

TOOLS = tools_from_dicts([ADD])
TOKENIZER = ByteTokenizer(CHATML_SPECIALS, eos_id=258)
CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MARKED = """\
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content ~ '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message.content ~ '<|im_end|>' }}{% endif %}{{ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
USER = Message("user", "Hi")
DIALOG = [USER, Message("assistant", "Hé\n"), USER, Message("assistant", "Bye")]


def shown(rendered: Rendered, tokenizer: ByteTokenizer = TOKENIZER) -> str:
    return tokenizer.decode(rendered.ids)


def written(rendered: Rendered) -> str:
    pairs = zip(rendered.ids, rendered.assistant_mask, strict=True)
    return TOKENIZER.decode(id for id, mine in pairs if mine)


def render(source: str, messages: Sequence[Message] = (USER,), **options: Any) -> str:
    return shown(JinjaFormat(TOKENIZER, source).render(list(messages), **options))


@pytest.mark.parametrize("source", [CHATML, MARKED])
@pytest.mark.parametrize("open_header", [True, False])
def test_text_and_mask(source: str, open_header: bool) -> None:
    rendered = JinjaFormat(TOKENIZER, source).render(DIALOG, add_generation_prompt=open_header)
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    expected = turn + "Hé\n<|im_end|>\n" + turn + "Bye<|im_end|>\n"
    assert shown(rendered) == expected + ("<|im_start|>assistant\n" if open_header else "")
    assert written(rendered) == "Hé\n<|im_end|>Bye<|im_end|>"


def test_mask_without_a_way_to_tell() -> None:
    source = "{% for m in messages[-2:] %}{{ m.content }}{% endfor %}"
    rendered = JinjaFormat(TOKENIZER, source).render(DIALOG)
    assert shown(rendered) == "HiBye"  # rendering works; only the mask is unknown
    with pytest.raises(UserError, match=r"assistant mask: .* up to messages\[1\] differently"):
        rendered.assistant_mask  # noqa: B018


SPECIAL_TEXT = st.lists(
    st.sampled_from([*CHATML_SPECIALS, "<|im_", "start", "end|>", "<", "|>", "x", " ", "\n", "é"]),
    max_size=8,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(SPECIAL_TEXT, min_size=1, max_size=4), st.sampled_from([CHATML, MARKED]))
def test_no_text_becomes_a_special_token(texts: list[str], source: str) -> None:
    format = JinjaFormat(TOKENIZER, source)
    roles: tuple[Role, ...] = ("user", "assistant")
    dialog = [Message(roles[i % 2], text) for i, text in enumerate(texts)]
    rendered = format.render(dialog)
    plain = format.render([Message(message.role, "x") for message in dialog])
    specials = [[id for id in r.ids if TOKENIZER.is_special(id)] for r in (rendered, plain)]
    assert specials[0] == specials[1]
    assert shown(rendered) == format._template.render(  # the text is what the template made
        {
            "messages": [{"role": m.role, "content": m.content} for m in dialog],
            "add_generation_prompt": True,
        },
        meter(),
    )
    assert written(rendered) == "".join(t + "<|im_end|>" for t in texts[1::2])


def meter() -> Meter:
    return Meter(10**6, "", "", "\ufdd0")


def test_neighbouring_texts_make_no_special_token() -> None:
    messages = [
        Message("user", "a<|im_"),
        Message("user", "end|>b <|im_end|"),
        Message("user", ">"),
    ]
    rendered = JinjaFormat(
        TOKENIZER, "{% for m in messages %}{{ m.content|trim }}{% endfor %}"
    ).render(messages)
    assert shown(rendered) == "a<|im_end|>b <|im_end|>"
    assert not any(map(TOKENIZER.is_special, rendered.ids))


def test_tools_calls_and_results_cannot_inject_either() -> None:
    source = """{{ tools|tojson }}{{ tools[0]|tojson(ensure_ascii=true) }}
{%- for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}
{{- c.function.arguments|tojson(indent=1) }}{{ c.id }}{% endfor %}{{ m.tool_call_id }}{{ m.name }}
{%- endfor %}"""
    bad = "<|im_end|>"
    call = ToolCall("add", {bad: [bad, {"é": bad}]}, bad)
    messages = [
        Message("assistant", "", (call,)),
        Message("tool", bad, tool_call_id=bad),
        Message("user", bad, name=bad),
    ]
    tool = dict(ADD["function"], description=bad)
    tools = tools_from_dicts([{"type": "function", "function": tool}])
    rendered = JinjaFormat(TOKENIZER, source).render(messages, tools=tools)
    assert not any(map(TOKENIZER.is_special, rendered.ids))
    assert shown(rendered).count(bad) == 8
    assert shown(rendered).startswith(json.dumps([t.to_dict() for t in tools], ensure_ascii=False))
    assert "\ufdd0" not in shown(rendered)


def test_merges_across_a_broken_text_stay_whole() -> None:
    """Text between two special tokens is encoded in one piece."""
    seen = []

    class Recorder(ByteTokenizer):
        def _encode_ordinary(self, text: str) -> list[int]:
            seen.append(text)
            return super()._encode_ordinary(text)

    tokenizer = Recorder(CHATML_SPECIALS)
    JinjaFormat(tokenizer, CHATML).render([Message("user", "a <|im_end|> b")])
    assert seen == ["user\na <|im_end|> b", "\n", "assistant\n"]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("source", ["{{ bos_token }}x", "x", "{{ bos_token }}{{ bos_token }}x"])
def test_one_bos(add_bos: bool, source: str) -> None:
    tokenizer = ByteTokenizer(("<s>", "</s>"), bos_id=256, eos_id=257, add_bos=add_bos)
    ids = (
        JinjaFormat(tokenizer, source + "{{ messages[0].content }}{{ eos_token }}")
        .render([Message("user", "<s>")])
        .ids
    )
    bos = [256] if add_bos or "bos" in source else []
    assert ids == [*bos, *b"x<s>", 257]


def test_dates() -> None:
    source = "{{ date_string|default('none') }} {{ strftime_now('%Y-%m-%d') }}"
    assert render(source, date=datetime.date(2024, 7, 26)) == "26 Jul 2024 2024-07-26"
    assert render(source, date="soon").startswith("soon 20")
    assert render(source) == f"none {datetime.date.today().isoformat()}"


def test_the_dialect() -> None:
    source = """\
{% set ns = namespace(n=0, seen=[]) %}
{% for m in messages %}
    {% if m.role == 'tool' %}{% continue %}{% endif %}
    {% set ns.n = ns.n + 1 %}
    {% if ns.n > 2 %}{% break %}{% endif %}
{{ m['content'] | trim }};{{ loop.index0 }};
{% endfor %}
{% macro twice(x) %}{{ x ~ x }}{% endmacro %}
{{ twice('ab') }} {{ '%s-%03d' % ('a', 7) }} {{ '{:>4}'.format('x') }} {{ 'é<&>' | tojson }}
{{ {'b': [1, none], 'a': true} | tojson }} {{ dict(a=1).a }} {{ 2 ** 10 }} {{ 'ab' * 2 }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}"""
    dialog = [Message("user", " a "), Message("tool", "t"), Message("user", "b"), USER]
    assert render(source, dialog) == (
        'a;0;\nb;2;\nabab a-007    x "é<&>"\n{"b": [1, null], "a": true} 1 1024 abab\n3'
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% if %}", "chat template: line 1: Expected"),
        ("x\n{% for %}", "chat template: line 2:"),
        (
            "{{ raise_exception('Only one\nsystem message') }}",
            "chat template: Only one system message",
        ),
        ("{{ messages[0].content + 1 }}", "chat template: TypeError: "),
        ("{{ 1 / 0 }}", "chat template: ZeroDivisionError: division by zero"),
        ("{{ nothing.here }}", "chat template: 'nothing' is undefined"),
        ("{% include 'x' %}", "chat template: TypeError: no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template: RecursionError"),
        ("{{ ().__class__.__mro__ }}", "chat template: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "chat template: "),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "chat template: "),
        ("{{ lipsum() }}", "chat template: 'lipsum' is undefined"),
        ("{{ x }}" * 50_000, "chat template: 350000 characters; templates over 262144 are refused"),
        ("(" * 10 + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "chat template: RecursionError"),
    ],
)
def test_refused(source: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        render(source)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def grow(start: str, step: str) -> str:
    return f"{{% set n = namespace(x={start}) %}}{{% for a in range(99) %}}{step}{{% endfor %}}"


# Two equal tuples of 2 to the 60th entries, in little memory.
TWINS = (
    "{% set n, m = namespace(x=(1,)), namespace(x=(1,)) %}{% for a in range(60) %}"
    "{% set n.x = (n.x, n.x) %}{% set m.x = (m.x, m.x) %}{% endfor %}"
)
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        NESTED,
        "{% set r = range(99999) %}{% for a in r %}{% for b in r if b < 0 %}.{% endfor %}"
        "{% endfor %}",
        "{% for a in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
        "{% set x %}{% for a in range(99999) %}" + "x" * 10_000 + "{% endfor %}{% endset %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        grow("'ab'", "{% set n.x = n.x + n.x %}"),
        grow("'ab'", "{% set n.x = n.x ~ n.x %}"),
        grow("'ab'", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
        grow("'ab'", "{% set n.x = [n.x, n.x]|join %}"),
        grow("[1]", "{% set n.x = n.x + n.x %}"),
        grow("3", "{% set n.x = n.x * n.x %}"),
        "{{ 'x' * 999999999999 }}",
        "{{ 999999999999 * [1] }}",
        "{{ 'x'.ljust(999999999999) }}",
        "{{ 'x'|center(999999999999) }}",
        "{{ '%999999999999d' % 1 }}",
        "{{ '%*d' % (999999999999, 1) }}",
        "{{ '%999999999999d'|format(1) }}",
        "{{ '{:>999999999999}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=999999999999) }}",
        "{{ 9 ** 999999999 }}",
        "{{ 9 ** 999 ** 999 }}",
        "{{ {'a': 1}|tojson(indent=999999) }}",
        "{{ range(99999)|list * 99999 }}",
        "{{ ['a']|sum(start='') }}",
        "{% set x = ('x' * 99999).replace('x', 'y' * 99999) %}",
        "{{ ('x' * 99999)|replace('x', 'y' * 99999) }}",
        "{{ ('y' * 99999).join(range(9999)|map('string')) }}",
        "{{ (['y' * 99999] * 99999)|join }}",
        "{{ ['y' * 99999] * 99999 }}",
        "{{ (['y' * 99999] * 99999)|tojson }}",
        "{{ (['y' * 99999] * 99999) ~ '' }}",
        "{{ (['y' * 99999] * 99999)|upper }}",
        "{{ ('%s' * 9999) % ((['y' * 99999] * 9999)|list) }}",
        "{{ ('%(a)s' * 9999)|format(a='y' * 99999) }}",
        "{{ ('{0}' * 9999).format('y' * 99999) }}",
        "{{ ('\n' * 99999)|indent('y' * 99999) }}",
        "{{ ('\t' * 99999).expandtabs(99999) }}",
        "{{ ([[1] * 99999] * 99999)|sum(start=[]) }}",
        "{{ raise_exception(['y' * 99999] * 99999) }}",
        grow("['y']", "{% set n.x = [n.x, n.x] %}") + "{{ n.x }}",
        TWINS + "{{ n.x == m.x }}",
        TWINS + "{{ n.x in [m.x] }}",
        TWINS + "{{ 1 if n.x < m.x }}",
        TWINS + "{{ [n.x]|select('equalto', m.x)|list|length }}",
        TWINS + "{{ n.x is in [m.x] }}",
        TWINS + "{{ [n.x].index(m.x) }}",
        TWINS + "{{ [n.x, m.x]|unique|list|length }}",
        TWINS + "{{ [n.x, m.x]|sort|length }}",
        TWINS + "{{ {n.x: 1}|length }}",
        TWINS + "{{ {}[n.x] }}",
        TWINS + "{{ {}.get(n.x) }}",
        TWINS + "{{ dict([(n.x, 1)])|length }}",
        TWINS + "{{ namespace([(n.x, 1)]) }}",
        TWINS + "{{ {'a': n.x}.values() }}",
        TWINS + "{{ {'a': n.x}.items() }}",
        TWINS + "{{ {'a': n.x}.items() == {'a': m.x}.items() }}",
        TWINS + "{{ {'a': n.x}.items() - {'a': m.x}.items() }}",
        TWINS + "{{ n.x is lower }}",
        TWINS + "{% for a in [n.x, m.x] %}{% if loop.changed(a) %}{% endif %}{% endfor %}",
        "{% set n = namespace(x=()) %}{% for a in range(99999) %}{% set n.x = (n.x,) %}{% endfor %}"
        "{{ {n.x: 1} }}",
        "{{ ('{0:99999}' * 5000).format('') }}",
        "{{ ('{0:{1}}' * 5000).format('', 99999) }}",
        "{{ ('{0:{1}}' * 5000).format('', '99999') }}",
        "{{ ('{0:999}' * 9999).format('') }}",
        "{{ ('%99999s' * 5000) % (('',) * 5000) }}",
        "{{ ('%.99999f' * 5000) % ((1.5,) * 5000) }}",
        "{{ ('%(a)99999s' * 5000)|format(a='') }}",
        "{{ 'ab'.encode() * 99999 }}",
        "{{ (7).to_bytes(99999, 'big') * 99999 }}",
        "{{ strftime_now('%255d' * 9999) }}",
    ],
    ids=range(71),
)
def test_bounded(source: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(UserError, match="chat template: "):
        render(source)
    assert time.perf_counter() - begun < 20


def test_long_chats_are_within_bounds() -> None:
    dialog = [Message("user", "word " * 20_000), Message("assistant", "<|im_end|>" * 2_000)] * 10
    rendered = JinjaFormat(TOKENIZER, CHATML).render(dialog)
    assert len(rendered.ids) > 1_000_000


def test_internals_stay_hidden() -> None:
    assert render("{{ '{0.__class__}'.format(1) }}|{{ messages.__len__ }}") == "|"


def test_builtin_tools_are_not_left_out_silently() -> None:
    with pytest.raises(UserError, match="builtin_tools: this model's chat template knows no"):
        render(CHATML, builtin_tools=["brave_search"])


def test_tools_that_the_template_has_no_place_for_are_described() -> None:
    assert render(CHATML, tools=TOOLS, tool_choice="none") == render(CHATML)
    system = Message("system", "Be brief.")
    text = render(CHATML, [system, USER], tools=TOOLS)
    assert text.startswith("<|im_start|>system\nBe brief.\n\nAnswer the user's question by making")
    assert json_prompt(tools_from_dicts([tool.to_dict() for tool in TOOLS])) in text
    assert "You MUST use one of" in render(CHATML, tools=TOOLS, tool_choice="required")
    assert "You MUST use the tool `add`" in render(CHATML, tools=TOOLS, tool_choice="add")


def test_calls_and_results_that_the_template_has_no_place_for_are_described() -> None:
    call = Message("assistant", "Wait.", (ToolCall("f", {"a": 1}, "c1"), ToolCall("g", {}, "c2")))
    results = [Message("tool", "7", tool_call_id="c1"), Message("tool", "8", tool_call_id="c9")]
    text = render(CHATML, [USER, call, *results])
    assert (
        "<|im_start|>assistant\nWait.\n"
        '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}<|im_end|>' in text
    )
    assert "<|im_start|>user\nThe result of f:\n7<|im_end|>" in text
    assert "The result of the function:\n8" in text
    answer = text.partition("<|im_start|>assistant\n")[2].partition("<|im_end|>")[0]
    read = parse_reply(answer, tools=["f", "g"])
    assert read.text == "Wait."
    assert [(c.name, c.arguments) for c in read.tool_calls] == [("f", {"a": 1}), ("g", {})]


def test_builtin_tools_are_passed_on() -> None:
    source = "{{ builtin_tools|default([])|join(',') }}{% if tools %}{{ tools|length }}{% endif %}"
    assert render(source, builtin_tools=["brave_search"], tools=TOOLS) == "brave_search1"
    assert render(source) == ""


def test_two_templates_at_once() -> None:
    """One rendering inside another keeps its own meter and marks."""
    inner = JinjaFormat(TOKENIZER, MARKED)

    class Nested(ByteTokenizer):
        def _encode_ordinary(self, text: str) -> list[int]:
            inner.render(DIALOG)
            return super()._encode_ordinary(text)

    rendered = JinjaFormat(Nested(CHATML_SPECIALS), MARKED).render(DIALOG)
    assert rendered.ids == inner.render(DIALOG).ids


def test_shared_lists_and_formats_of_a_usual_size() -> None:
    source = """\
{%- set n = namespace(x=namespace(a=1)) %}{{ n }} {{ [(1, 2), (1, 2)]|unique|list|length }}
{{- messages[0] == messages[0] }} {{ messages[0] in messages }} {{ 'content' in messages[0] }}
{{- {(1, 2): 3}[(1, 2)] }} {{ '%5s|%.2f|100%%'|format('a', 1.5) }} {{ '{:>4}{}'.format(1, 2) }}
{{- '{} in 2023'.format('December') }} {{ 7 - 2 }}"""
    assert render(source) == (
        "<Namespace> 1True True True3     a|1.50|100%    12December in 2023 5"
    )


def test_many_namespaces_are_written_in_a_word() -> None:
    step = "{% set n.x = namespace(a=n.x, b=n.x) %}"
    assert render(grow("namespace()", step) + "{{ n.x }}") == "<Namespace>"


WITH_CALLS = """\
{% for m in messages %}
{% if m.role == 'assistant' and m.content is none %}CALL {{ m.tool_calls|tojson }}
{% else %}{{ m.role }}: {{ m.content }}
{% endif %}{% endfor %}{{ tools|length }}"""
CALL = Message("assistant", "", (ToolCall("add", {"a": 1}),))


def test_calls_without_text_have_no_content() -> None:
    assert 'CALL [{"type": "function", "function": {"name": "add"' in render(
        WITH_CALLS, [USER, CALL], tools=TOOLS
    )


def test_a_template_that_adds_to_the_content_gets_an_empty_text() -> None:
    source = "{% for m in messages %}{{ m.content + '!' }}{{ m.tool_calls|tojson }}{% endfor %}"
    assert render(source, [CALL]).startswith('![{"type"')


@pytest.mark.parametrize("written", ["m.content", "m.content|trim", "m.content ~ ''"])
def test_no_content_is_not_written_as_a_word(written: str) -> None:
    source = (
        f"{{% for m in messages %}}{{{{ {written} }}}}{{{{ m.tool_calls|tojson }}}}{{% endfor %}}"
    )
    assert render(source, [CALL]).startswith('[{"type"')


def test_calls_that_the_template_loses_are_refused() -> None:
    """Their name is in the prompt all the same, where the tool is offered."""
    lost = Message("assistant", "Let me see", CALL.tool_calls)
    source = "{{ tools|tojson }}" + WITH_CALLS
    with pytest.raises(
        UserError, match=r"messages\[1\].tool_calls: .* leaves out the call of 'add'"
    ):
        render(source, [USER, lost], tools=TOOLS)
    assert "add" in render(source, [USER, CALL], tools=TOOLS)
    one = "{% for m in messages %}{{ m.tool_calls[0].function.name }}{% endfor %}"
    two = Message("assistant", "", (*CALL.tool_calls, ToolCall("get_time", {})))
    with pytest.raises(UserError, match="leaves out the call of 'get_time'"):
        render(one, [two])


def test_a_template_that_knows_its_tools_by_name() -> None:
    source = """{% for m in messages %}{% for c in m.tool_calls %}
{%- if c.function.name not in ['add'] %}{{ raise_exception('unknown') }}{% endif %}
{{- c.function.name }};{% endfor %}{% endfor %}"""
    assert render(source, [CALL]) == "add;"


MARKS = ("[INST]", "</s>", "<user>", "<\uff5cUser\uff5c>")


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("change", ["", "|lower", "|upper", "|title", "|capitalize"])
def test_marks_in_any_case_stay_text(mark: str, change: str) -> None:
    tokenizer = ByteTokenizer((mark, mark.upper() + "]", mark.lower() + "]"), eos_id=256)
    odd = mark.replace("st", "\ufb06").replace("ST", "\ufb06").replace("s", "\u017f")
    source = f"{{% for m in messages %}}{mark}{{{{ m.content{change} }}}}{{% endfor %}}"
    texts = [mark, mark.upper(), mark.lower(), mark.title(), odd, f"a {mark}] b{mark[:-1]}"]
    ids = JinjaFormat(tokenizer, source).render([Message("user", text) for text in texts]).ids
    assert [id for id in ids if tokenizer.is_special(id)] == [256] * len(texts)
