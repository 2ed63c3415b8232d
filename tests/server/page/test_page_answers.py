"""Answers on the page: streamed, stopped, asked for again, edited."""

import threading

import pytest
from fake_openai import Answer, call
from page_driver import PATIENCE, Page
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select


def test_an_answer_streams_in_and_is_counted(page: Page) -> None:
    gate = threading.Event()
    page.fake.answers.append(Answer(["Hello ", "**wor", gate, "ld**"]))
    page.send("Hi there")
    page.wait(lambda: "Hello" in page.text(".assistant .markdown"))
    assert page.one("#send").accessible_name == "Stop"
    assert not page.all(".assistant strong"), "half of the answer is still to come"
    gate.set()
    page.settled()
    assert page.text(".assistant strong") == "world"
    assert page.text(".user .bubble") == "Hi there"
    assert page.one("#input").get_property("value") == ""
    assert page.one("#send").accessible_name == "Send"
    stats = page.text(".stats")
    assert "tokens/s" in stats
    assert "31 (16 stored) in, 12 out" in stats
    assert page.fake.bodies == [
        {
            "model": "smollm2-135m",
            "messages": [{"role": "user", "content": "Hi there"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert "Hello world" in page.one("#live").get_property("textContent")  # for screen readers


def test_a_conversation_sends_all_of_itself(page: Page) -> None:
    page.say("One", "first")
    page.say("Two", "second")
    assert page.fake.bodies[1]["messages"] == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "Two"},
    ]
    assert page.text("#title") == "One"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_what_came(page: Page, how: str) -> None:
    page.fake.answers.append(Answer(["So far", threading.Event()]))
    page.send("Go on")
    page.wait(lambda: page.text(".assistant .markdown") == "So far")
    if how == "button":
        page.button("Stop").click()
    else:
        page.press(Keys.ESCAPE)
    page.settled()
    assert page.text(".assistant .note") == "Stopped."
    assert page.fake.gone.wait(PATIENCE), "the server was not told"
    page.say("And then?", "more")
    assert page.fake.bodies[1]["messages"][1] == {"role": "assistant", "content": "So far"}


def test_answering_again_keeps_both_answers(page: Page) -> None:
    page.say("Pick a number", "one")
    page.fake.answers.append(Answer(["two"]))
    page.button("Answer again").click()
    page.settled()
    assert page.text(".assistant .markdown") == "two"
    assert page.text(".branches") == "2 / 2"
    assert page.fake.bodies[1]["messages"] == page.fake.bodies[0]["messages"]
    page.button("Version before").click()
    assert page.text(".assistant .markdown") == "one"


def test_an_edited_message_begins_a_branch(page: Page) -> None:
    page.say("Say red", "red")
    page.say("Again", "red again")
    page.js("document.querySelector('.user .buttons').style.opacity = 1")
    page.all(".user [aria-label='Edit this message']")[0].click()
    area = page.one(".edit textarea")
    area.clear()
    page.fake.answers.append(Answer(["blue"]))
    area.send_keys("Say blue" + Keys.ENTER)
    page.settled()
    assert page.texts(".bubble") == ["Say blue"]
    assert page.fake.bodies[2]["messages"] == [{"role": "user", "content": "Say blue"}]
    page.button("Version before").click()
    assert page.texts(".bubble") == ["Say red", "Again"]
    assert page.texts(".assistant .markdown") == ["red", "red again"]


def test_an_answer_can_be_edited(page: Page) -> None:
    page.say("Spell it", "teh")
    page.button("Edit this message", ".assistant").click()
    area = page.one(".edit textarea")
    area.clear()
    area.send_keys("the")
    page.button("Save").click()
    page.say("Thanks", "ok")
    assert page.fake.bodies[1]["messages"][1]["content"] == "the"


def test_what_an_edit_typed_survives_cancelling(page: Page) -> None:
    page.say("Hello", "hi")
    page.press(Keys.ARROW_UP)
    page.one(".edit textarea").send_keys(" there")
    page.press(Keys.ESCAPE)
    assert page.text(".bubble") == "Hello"
    page.one("#input").click()
    page.press(Keys.ARROW_UP)
    assert page.one(".edit textarea").get_property("value") == "Hello there"


def test_lines_and_growth_of_the_box(page: Page) -> None:
    box = page.one("#input")
    before = box.size["height"]
    for _ in range(4):
        box.send_keys("line", Keys.SHIFT, Keys.ENTER)
    assert box.size["height"] > before
    assert box.get_property("value") == "line\n" * 4
    assert page.fake.bodies == []


def test_examples_fill_the_box(page: Page) -> None:
    page.all("#examples button")[2].click()
    assert "tea and coffee" in page.one("#input").get_property("value")


def test_the_model_is_chosen_and_remembered(page: Page) -> None:
    Select(page.one("#model")).select_by_value("llama-3.1-8b")
    page.say("Hi", "hello")
    assert page.fake.bodies[0]["model"] == "llama-3.1-8b"
    page.open()
    assert page.one("#model").get_property("value") == "llama-3.1-8b"


def test_another_chat_while_an_answer_comes_in(page: Page) -> None:
    gate = threading.Event()
    page.fake.answers.append(Answer(["slow", gate, " end"]))
    page.send("First chat")
    page.wait(lambda: page.text(".assistant .markdown") == "slow")
    page.button("New chat").click()
    page.say("Second chat", "quick")
    assert page.text(".assistant .markdown") == "quick"
    gate.set()
    page.wait(lambda: not page.all("#chats .dot"))
    page.all("#chats .open[title='First chat']")[0].click()
    assert page.text(".assistant .markdown") == "slow end"


TO_END = """const box = document.querySelector('#scroller');
return box.scrollHeight - box.clientHeight - box.scrollTop;"""


def test_the_view_follows_until_somebody_scrolls_up(page: Page) -> None:
    gate = threading.Event()
    lines = [f"line {i}\n\n" for i in range(80)]
    page.fake.answers.append(Answer([*lines, gate, *lines]))
    page.send("Long")
    page.wait(lambda: "line 79" in page.text(".assistant .markdown") and page.js(TO_END) < 8)
    page.js("document.querySelector('#scroller').scrollTop -= 300")
    page.wait(lambda: page.one("#down").is_displayed())
    top = page.js("return document.querySelector('#scroller').scrollTop")
    gate.set()
    page.settled()
    assert page.js("return document.querySelector('#scroller').scrollTop") == top
    page.one("#down").click()
    page.wait(lambda: page.js(TO_END) < 8)


def test_the_view_follows_when_something_above_shrinks(page: Page) -> None:
    calls = [call(i, f"call_{i}", "look", "{}") for i in range(6)]
    page.say("Look around", *calls, finish="tool_calls")
    page.fake.answers.append(Answer([f"line {i}\n\n" for i in range(40)]))
    page.button("Send the results").click()  # fields become shorter texts, and an answer comes in
    page.settled()
    assert "line 39" in page.texts(".assistant .markdown")[-1]
    page.wait(lambda: page.js(TO_END) < 8)
