"""Markdown of answers: right, safe, and the same while it grows."""

import json

import pytest
from fake_openai import call
from page_driver import SAMPLE, TOOL, Page

RENDER = """
const { Markdown } = await import('/static/markdown.js');
const root = document.createElement('div');
new Markdown(root).update(values[0]);
for (const e of root.querySelectorAll('.code-head')) e.remove();
return root.innerHTML;
"""

A = 'target="_blank" rel="noopener noreferrer"'
FRAME = '<div class="code"><pre tabindex="0" role="group" aria-label="Code, {}">'
PRE = FRAME + "<code>{}</code></pre></div>"


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a *b* **c** ***d*** ~~e~~", "<p>a <em>b</em> <strong>c</strong> "
         "<em><strong>d</strong></em> <del>e</del></p>"),
        ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
        ("**a *b***", "<p><strong>a <em>b</em></strong></p>"),
        ("2 * 3 * 4, snake_case_name, a**", "<p>2 * 3 * 4, snake_case_name, a**</p>"),
        (r"\*a\* \(x\) `\*`", r"<p>*a* \(x\) <code>\*</code></p>"),
        ("``a ` b`` `**c**`", "<p><code>a ` b</code> <code>**c**</code></p>"),
        ("one\ntwo", "<p>one<br>two</p>"),
        ("[a *b*](https://x.y/z_(1))", f'<p><a href="https://x.y/z_(1)" {A}>a <em>b</em></a></p>'),
        ("see https://x.y/a_b_c.", f'<p>see <a href="https://x.y/a_b_c" {A}>https://x.y/a_b_c</a>.</p>'),
        ("<mailto:a@b.c>", f'<p><a href="mailto:a@b.c" {A}>mailto:a@b.c</a></p>'),
        ("![alt](https://x.y/i.png)", f'<p><a href="https://x.y/i.png" {A}>alt</a></p>'),
        ("# A\n## B ##\n#c", '<h3 class="h1">A</h3><h4 class="h2">B</h4><p>#c</p>'),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        ("> a\n> > b\n\nc",
         "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
        ("- a\n  - b\n    - c\n- d",
         "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>"),
        ("1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
        ("In\n1984. A year", "<p>In<br>1984. A year</p>"),
        ("1. a\n\n   ```\n   x\n     y\n   ```\n2. b",
         "<ol><li><p>a</p>" + PRE.format("text", "x\n  y") + "</li><li><p>b</p></li></ol>"),
        ("```nope\na < b\n```", PRE.format("nope", "a &lt; b")),
        ("```\nopen **end", PRE.format("text", "open **end")),
        ("~~~~\n```\n~~~~", PRE.format("text", "```")),
        ("```json\n{\"a\": 1}\n```", PRE.format("json",
         '{<span class="t-named">"a"</span>: <span class="t-number">1</span>}')),
        ("| a | b |\n|:-:|--:|\n| `x\\|y` | **2** |",
         '<div class="table" tabindex="0" role="group" aria-label="Table"><table><thead><tr>'
         '<th class="center" scope="col">a</th><th class="right" scope="col">b</th></tr></thead>'
         '<tbody><tr><td class="center"><code>x|y</code></td><td class="right"><strong>2</strong>'
         "</td></tr></tbody></table></div>"),
    ],
)  # fmt: skip
def test_markdown(page: Page, text: str, html: str) -> None:
    shown = page.module(RENDER, text)
    assert shown.replace(' class=""', "") == html


HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "<svg onload=window.hit=1><a xlink:href='javascript:window.hit=1'>x</a></svg>",
    "[click](javascript:window.hit=1)",
    "[click](JaVaScRiPt:window.hit=1)",
    "[click](java\tscript:window.hit=1)",
    "[click](<javascript:window.hit=1>)",
    "[click](data:text/html,<script>window.hit=1</script>)",
    "[click](vbscript:x) [click](file:///etc/passwd) [click](//evil.example) [click](/v1/models)",
    "![x](javascript:window.hit=1) ![x](data:image/svg+xml,<svg/onload=window.hit=1>)",
    "<javascript:window.hit=1> <https://ok.example/\"onmouseover=window.hit=1>",
    "```\"><script>window.hit = 1</script>\nx\n```",
    "```html\n<script>window.hit = 1</script>\n```",
    "| <b>x</b> |\n|---|\n| <iframe srcdoc='<script>parent.hit=1</script>'> |",
    "&lt;script&gt; &#60;script&#62;",
]  # fmt: skip


def test_hostile_answers_do_nothing(page: Page) -> None:
    page.say("Attack", "\n\n".join(HOSTILE))
    names = "b, script, img, iframe, svg:not([aria-hidden])"
    handlers = "[onerror], [onload], [onmouseover], [srcdoc]"
    assert page.all(f".markdown :is({names}, {handlers})") == []
    links = [link.get_attribute("href") for link in page.all(".markdown a")]
    assert links, "the one good address is a link"
    assert all(link.startswith("https://ok.example/") for link in links)
    assert "<script>window.hit = 1</script>" in page.text(".markdown")
    for element in page.all(".markdown a, .markdown p"):
        page.js("arguments[0].dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))", element)
    assert page.js("return window.hit ?? null") is None


def test_names_and_results_are_text_as_well(page: Page) -> None:
    page.set(tools=json.dumps([TOOL]))
    page.say("<b>me</b>", call(0, "c", "<i>x</i>", '{"a": "<script>window.hit=1</script>"}'),
             finish="tool_calls")  # fmt: skip
    assert page.text(".bubble") == "<b>me</b>"
    assert page.text(".card strong") == "<i>x</i>"
    assert page.text("#chats .open") == "<b>me</b>"
    assert page.js("return window.hit ?? null") is None


GROWING = """
const { Markdown } = await import('/static/markdown.js');
const root = document.createElement('div');
const growing = new Markdown(root);
for (let end = 1; end <= values[0].length; end++) {
  const text = values[0].slice(0, end);
  const first = root.firstElementChild;
  growing.update(text);
  const whole = document.createElement('div');
  new Markdown(whole).update(text);
  if (root.innerHTML !== whole.innerHTML) return [text, root.innerHTML, whole.innerHTML];
  if (end > 60 && root.firstElementChild !== first) return 'the first block was built again';
}
return 'same';
"""


@pytest.mark.parametrize(
    "text",
    [
        "A first paragraph that is here to stay, whatever follows it.\n\n" + SAMPLE,
        "A first paragraph that is here to stay, whatever follows it.\n\nA line\n- item\n\n  more"
        "\n\n1. x\n\n\n2. y\ntext\n---\n***\n~~~\n`a`\n~~~\nA | B\n-|-\n1\n\n> q\nlazy\n\n#\n# h"
        "\n-\n--\n+ z\r\n"
        "\r\n    deep\r\nend **open `and [on](https://a.b",
    ],
)
def test_growing_text_shows_as_the_whole_would(page: Page, text: str) -> None:
    assert page.module(GROWING, text) == "same"


@pytest.mark.parametrize("piece", ["*", "**a ", "*a **b ", "[", "[a](", "`", "`a``", "> ", "- ",
                                   "_a", "![", "<https://", "|", "a|b\n-|-\n", "\\", "~~a", "(https://a.b/(",
                                   "```\n", "1. "])  # fmt: skip
def test_nonsense_takes_no_forever(page: Page, piece: str) -> None:
    text = piece * (20_000 // len(piece))
    assert "failed" not in page.module(RENDER, text)[:10]


COLOURED = """
const { highlight } = await import('/static/highlight.js');
const spans = highlight(values[1], values[0]).filter((node) => node.className);
return spans.map((span) => [span.className.slice(2), span.textContent]);
"""


@pytest.mark.parametrize(
    ("language", "code", "coloured"),
    [
        ("python", 'def f():\n    """two\n    lines"""\n    return 0x1F  # so',
         [["keyword", "def"], ["named", "f"], ["string", '"""two\n    lines"""'],
          ["keyword", "return"], ["number", "0x1F"], ["comment", "# so"]]),
        ("py", 's = """open\nto the end', [["string", '"""open\nto the end']]),
        ("ts", "/* a\nb */ const x = `in\n${y}`; // c",
         [["comment", "/* a\nb */"], ["keyword", "const"], ["string", "`in\n${y}`"],
          ["comment", "// c"]]),
        ("cpp", '#include <x>\nint f("\\"if");',
         [["comment", "#include"], ["keyword", "int"], ["named", "f"], ["string", '"\\"if"']]),
        ("bash", "echo $HOME 'a # b' # c",
         [["keyword", "echo"], ["keyword", "$HOME"], ["string", "'a # b'"], ["comment", "# c"]]),
        ("json", '{"a": "b", "c": [1.5e3, null]}',
         [["named", '"a"'], ["string", '"b"'], ["named", '"c"'], ["number", "1.5e3"],
          ["keyword", "null"]]),
        ("html", '<!-- a\nb --><p id="x">it\'s</p>',
         [["comment", "<!-- a\nb -->"], ["keyword", "<p"], ["named", "id"], ["string", '"x"'],
          ["keyword", ">"], ["keyword", "</p"], ["keyword", ">"]]),
        ("sql", "select count(*) from t -- all",
         [["keyword", "select"], ["named", "count"], ["keyword", "from"], ["comment", "-- all"]]),
        ("constructor", "if 1", []),
    ],
)  # fmt: skip
def test_colours_of_code(page: Page, language: str, code: str, coloured: list[list[str]]) -> None:
    assert page.module(COLOURED, language, code) == coloured
