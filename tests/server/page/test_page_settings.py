"""Settings of a chat and tools."""

import json
import threading

import pytest
from fake_openai import Answer, call
from page_driver import TOOL, Page
from selenium.webdriver.common.keys import Keys


def test_settings_reach_the_request(page: Page) -> None:
    page.set(system="Be brief.", temperature="0.5", top_p="0.9", top_k="40", min_p="0.05",
             max_tokens="64", seed="7")  # fmt: skip
    page.say("Hi", "hello")
    body = page.fake.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 64,
                "seed": 7}  # fmt: skip
    assert {name: body[name] for name in sampling} == sampling
    page.button("New chat").click()
    page.say("Hi", "hello")
    assert "temperature" not in page.fake.bodies[1]


def test_settings_for_new_chats(page: Page) -> None:
    page.button("Settings of this chat").click()
    page.one("#settings [name=seed]").send_keys("3")
    page.button("Use for new chats").click()
    page.button("Done").click()
    page.button("New chat").click()
    page.say("Hi", "hello")
    assert page.fake.bodies[0]["seed"] == 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"format": "json_object"}, {"type": "json_object"}),
        (
            {"format": "json_schema", "schema": '{"type": "object"}'},
            {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": {"type": "object"}},
            },
        ),
    ],
)
def test_response_formats(page: Page, settings: dict[str, str], expected: object) -> None:
    page.set(**settings)
    page.say("Hi", "{}")
    assert page.fake.bodies[0]["response_format"] == expected


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", "hot", "Must be a number"),
        ("temperature", "3", "from 0 to 2"),
        ("top_p", "0", "above 0, at most 1"),
        ("max_tokens", "0", "at least 1"),
        ("seed", "1.5", "whole number"),
        ("tools", "{", "Not JSON"),
        ("tools", "{}", "list"),
        ("tools", '[{"type": "function", "function": {"name": "a b"}}]', "Tool 1: its name"),
        ("tools", json.dumps([TOOL, TOOL]), "taken"),
    ],
)
def test_wrong_settings_stop_the_message_not_the_typing(
    page: Page, name: str, value: str, words: str
) -> None:
    page.set(**{name: value})
    page.send("Hi")
    page.wait(lambda: page.one("#settings").is_displayed())
    assert words in page.text(f"#problem-{name}")
    field = page.driver.switch_to.active_element
    assert field.get_attribute("name") == name
    assert field.get_attribute("aria-describedby") == f"problem-{name}"
    assert field.get_property("value") == value
    assert page.fake.bodies == []
    page.press(Keys.ESCAPE)
    assert page.one("#input").get_property("value") == "Hi"


def test_a_tool_call_goes_round(page: Page) -> None:
    page.set(tools=json.dumps([TOOL]), tool_choice="required")
    gate = threading.Event()
    pieces = [call(0, "call_1", "get_weather"), call(0, arguments='{"city": '), gate,
              call(0, arguments='"Oslo"}'), call(1, "call_2", "get_weather", "{}")]  # fmt: skip
    page.fake.answers.append(Answer(pieces, finish="tool_calls"))
    page.send("Weather?")
    page.wait(lambda: [text.strip() for text in page.texts(".card pre")] == ['{"city":'])
    assert page.text(".card strong") == "get_weather"
    assert "being written" in page.text(".card-head")
    gate.set()
    page.settled()
    assert "Calls the tool get_weather" in page.one("#live").get_property("textContent")
    assert page.fake.bodies[0]["tools"] == [TOOL]
    assert page.fake.bodies[0]["tool_choice"] == "required"
    assert json.loads(page.texts(".card pre")[0]) == {"city": "Oslo"}

    page.send("Well?")  # the result comes first
    assert page.one("#input").get_property("value") == "Well?"
    page.one("#input").clear()
    areas = page.all(".card textarea")
    areas[0].send_keys('{"rain": true}')
    areas[1].send_keys("no such city")
    page.fake.answers.append(Answer(["It rains."]))
    page.button("Send the results").click()
    page.settled()
    assert page.texts(".assistant .markdown")[-1] == "It rains."
    assert page.texts(".result pre") == ['{"rain": true}', "no such city"]
    messages = page.fake.bodies[1]["messages"]
    assert messages[1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
            },
            {
                "id": "call_2",
                "type": "function",
                "function": {"name": "get_weather", "arguments": "{}"},
            },
        ],
    }
    assert messages[2:] == [
        {"role": "tool", "content": '{"rain": true}', "tool_call_id": "call_1"},
        {"role": "tool", "content": "no such city", "tool_call_id": "call_2"},
    ]


def test_results_can_be_changed_and_the_old_branch_stays(page: Page) -> None:
    page.set(tools=json.dumps([TOOL]))
    page.say("Weather?", call(0, "call_1", "get_weather", "{}"), finish="tool_calls")
    page.one(".card textarea").send_keys("sun")
    page.fake.answers.append(Answer(["Sunny"]))
    page.button("Send the result").click()
    page.settled()
    page.button("Change the results").click()
    area = page.one(".card textarea")
    assert area.get_property("value") == "sun"
    area.clear()
    area.send_keys("snow")
    page.fake.answers.append(Answer(["Snowy"]))
    page.button("Send the result").click()
    page.settled()
    assert page.texts(".assistant .markdown")[-1] == "Snowy"
    assert page.text(".result pre") == "snow"
    page.button("Version before").click()
    assert page.texts(".assistant .markdown")[-1] == "Sunny"
    assert page.text(".result pre") == "sun"


def test_a_call_that_was_cut_off_is_not_sent_back(page: Page) -> None:
    page.set(tools=json.dumps([TOOL]))
    page.say("Weather?", "Let me see", call(0, "call_1", "get_weather", '{"ci'), cut=True)
    assert "cut off" in page.text(".card-head")
    assert not page.all(".card textarea")
    page.say("Never mind", "fine")
    assert page.fake.bodies[1]["messages"][1] == {"role": "assistant", "content": "Let me see"}
