"""The page by keyboard, for screen readers, in both themes and on a phone."""

import json

import pytest
from fake_openai import Answer, call
from page_driver import SAMPLE, TOOL, Page
from selenium.webdriver.common.keys import Keys


def test_typing_goes_on_after_a_dialog(page: Page) -> None:
    page.one("#input").click()
    page.press("one ")
    page.press(Keys.CONTROL, "/")
    page.wait(lambda: page.one("#help").is_displayed())
    page.press(Keys.ESCAPE)
    page.press("two")
    page.wait(lambda: page.one("#input").get_property("value") == "one two")


OUTLINE = "const s = getComputedStyle(arguments[0]); return s.outlineStyle + s.outlineWidth"


def test_all_by_keyboard(page: Page) -> None:
    """No mouse: a chat is opened, asked, its settings changed, and left for another."""
    order = []
    page.js("document.querySelector('.skip').focus()")
    for _ in range(20):
        focused = page.driver.switch_to.active_element
        order.append(focused.accessible_name)
        if focused.get_attribute("id") == "input":
            break
        assert page.js(OUTLINE, focused) == "solid2px", f"{order[-1]} does not show the focus"
        page.press(Keys.TAB)
    assert order[0] == "Skip to the message box"
    assert order.index("New chat") < order.index("Model") < order.index("Settings of this chat")
    assert order[-1] == "Message"
    page.fake.answers.append(Answer(["one"]))
    page.press("First" + Keys.ENTER)
    page.wait(lambda: page.texts(".assistant .markdown") == ["one"])
    page.settled()
    page.press(Keys.CONTROL, ".")
    page.wait(lambda: page.one("#settings").is_displayed())
    page.press(Keys.TAB)
    page.press("Be kind")
    page.press(Keys.ESCAPE)
    page.fake.answers.append(Answer(["two"]))
    page.press("Second" + Keys.ENTER)
    page.wait(lambda: page.texts(".assistant .markdown") == ["one", "two"])
    page.settled()
    assert page.fake.bodies[1]["messages"][0] == {"role": "system", "content": "Be kind"}
    page.press(Keys.CONTROL, Keys.SHIFT, "o")
    page.wait(lambda: page.one("#empty").is_displayed())
    assert page.driver.switch_to.active_element.get_attribute("id") == "input"


AUDIT = """
const problems = [];
const shown = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility === 'visible';
for (const e of document.querySelectorAll('button, input, select, textarea, a, [tabindex="0"]')) {
  if (!shown(e)) continue;
  const name = e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent;
  if (!name.trim()) problems.push('no name: ' + e.outerHTML);
}
const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) problems.push('twice: ' + id);
for (const e of document.querySelectorAll('*')) {
  for (const name of ['aria-labelledby', 'aria-describedby', 'aria-controls']) {
    const id = e.getAttribute(name);
    if (id && !document.getElementById(id)) problems.push(name + ' of nothing: ' + id);
  }
}
if (document.querySelector('img:not([alt])')) problems.push('no alt');
if (document.querySelectorAll('h1').length !== 1) problems.push('not one h1');
if (!document.documentElement.lang) problems.push('no language');
return problems;
"""

CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const rgba = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
};
const over = ([r, g, b, a], below) => [r, g, b].map((v, i) => v * a + below[i] * (1 - a));
const behind = (e) => {
  const colours = [];
  for (; e; e = e.parentElement) colours.push(rgba(getComputedStyle(e).backgroundColor));
  return colours.reverse().reduce((below, colour) => over(colour, below), [255, 255, 255]);
};
const light = (colour) => {
  const [r, g, b] = colour.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92
    : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const low = [];
for (const e of document.querySelectorAll('body *')) {
  const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!text || e.closest('.hidden, :disabled, option, .skip') || !e.getClientRects().length) {
    continue;
  }
  const style = getComputedStyle(e);
  if (style.visibility !== 'visible') continue;
  const back = behind(e);
  const [a, b] = [light(over(rgba(style.color), back)), light(back)].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  const large = parseFloat(style.fontSize) >= 24;
  if (ratio < (large ? 3 : 4.5)) low.push(`${ratio.toFixed(2)} ${e.outerHTML.slice(0, 120)}`);
}
return low;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_controls_are_named_and_colours_can_be_read(page: Page, theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.set(tools=json.dumps([TOOL]))
    page.say(
        "Show all", SAMPLE, call(0, "c1", "get_weather", '{"city": "Oslo"}'), finish="tool_calls"
    )
    for dialog in ("", "Settings of this chat", "Help", "Options of “Show all”"):
        if dialog:
            page.button(dialog).click()
        assert page.js(AUDIT) == []
        assert page.js(CONTRAST) == []
        if dialog:
            page.press(Keys.ESCAPE)
    page.button("New chat").click()
    assert page.js(CONTRAST) == []
    page.say("Fail", status=429, error={"message": "no"}, headers={"Retry-After": "0"})
    assert page.js(CONTRAST) == []


def test_the_theme_is_switched_and_remembered(page: Page) -> None:
    features = [{"name": "prefers-color-scheme", "value": "light"}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    colour = "return getComputedStyle(document.body).backgroundColor"
    light = page.js(colour)
    page.button("Switch between light and dark").click()
    dark = page.js(colour)
    assert light != dark
    page.driver.refresh()
    assert page.js(colour) == dark
    page.button("Switch between light and dark").click()
    assert page.js(colour) == light
    assert page.js("return localStorage['pronk.theme'] ?? null") is None


def test_a_phone_of_360_pixels(page: Page) -> None:
    size = {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open()
        wide = "return document.documentElement.scrollWidth"
        assert page.js(wide) == 360
        page.set(tools=json.dumps([TOOL]))
        word = "x" * 200
        page.say(
            f"{word} please",
            f"{SAMPLE}\n{word} https://example.com/{word}\n\n```\n{word}\n```\n",
            call(0, "c1", "get_weather", json.dumps({"city": word})),
            finish="tool_calls",
        )
        assert page.js(wide) == 360
        assert page.js("const s = document.querySelector('#scroller'); return s.scrollWidth") == 360
        small = """return [...document.querySelectorAll('input, textarea, select')]
            .filter((e) => !['file', 'checkbox'].includes(e.type)
              && parseFloat(getComputedStyle(e).fontSize) < 16).map((e) => e.outerHTML)"""
        assert page.js(small) == [], "phones zoom into small fields"
        page.button("Settings of this chat").click()
        assert page.js("return document.querySelector('#settings').scrollWidth") <= 360
        page.button("Done").click()
        assert not page.one("#sidebar").is_displayed()
        page.button("List of chats").click()
        page.button("New chat").click()
        page.wait(lambda: not page.one("#sidebar").is_displayed())
        assert page.one("#empty").is_displayed()
        assert page.js(wide) == 360
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
