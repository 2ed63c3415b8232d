"""What the page says and keeps when something goes wrong."""

import json

import pytest
from fake_openai import Answer
from page_driver import Page
from selenium.webdriver.common.keys import Keys


@pytest.mark.parametrize(("status", "code"), [(429, "rate_limit_exceeded"), (503, None)])
def test_a_busy_server_says_when_to_come_back(page: Page, status: int, code: str | None) -> None:
    error = {"message": "too many requests", "type": "x", "param": None, "code": code}
    page.say("Hi", status=status, error=error, headers={"Retry-After": "1"})
    assert page.text(".error strong") == "The server is busy"
    assert "too many requests" in page.text(".error")
    page.fake.answers.append(Answer(["at last"]))
    retry = page.one(".error button")
    page.wait(lambda: retry.text == "Try again" and retry.is_enabled())
    retry.click()
    page.settled()
    assert page.texts(".assistant .markdown") == ["at last"]
    assert page.fake.bodies[1]["messages"] == [{"role": "user", "content": "Hi"}]
    assert not page.all(".error")


def test_retry_after_is_counted_down(page: Page) -> None:
    error = {"message": "full"}
    page.say("Hi", status=503, error=error, headers={"Retry-After": "3600"})
    assert page.text(".error button").startswith("Try again in 3")
    assert not page.one(".error button").is_enabled()


def test_a_chat_too_long_says_what_to_do(page: Page) -> None:
    error = {"message": "9000 tokens, 8192 fit", "code": "context_length_exceeded"}
    page.say("Hi", status=400, error=error)
    assert page.text(".error strong") == "The chat is too long for the model"
    assert "9000 tokens, 8192 fit" in page.text(".error")


def test_a_broken_stream_keeps_what_came(page: Page) -> None:
    page.say("Hi", "half an ans", cut=True)
    assert page.text(".assistant .markdown") == "half an ans"
    assert page.text(".error strong") == "No connection"
    page.fake.answers.append(Answer(["whole"]))
    page.button("Try again").click()
    page.settled()
    assert page.text(".assistant .markdown") == "whole"
    assert page.text(".branches") == "2 / 2"


def test_an_error_in_the_middle_of_a_stream(page: Page) -> None:
    page.say("Hi", "half", error={"message": "the model fell over", "code": None})
    assert "the model fell over" in page.text(".error")
    assert page.text(".assistant .markdown") == "half"


def test_a_lost_server_is_told_apart_and_found_again(page: Page) -> None:
    page.js("window.real = fetch; window.fetch = () => Promise.reject(new TypeError('down'))")
    page.send("Are you there?")
    page.settled()
    assert page.text(".error strong") == "No connection"
    assert page.text(".bubble") == "Are you there?"
    page.js("window.fetch = window.real")
    page.fake.answers.append(Answer(["yes"]))
    page.button("Try again").click()
    page.settled()
    assert page.text(".assistant .markdown") == "yes"


def test_a_server_that_starts_later_is_waited_for(page: Page) -> None:
    page.fake.models, kept = [], page.fake.models
    try:
        page.driver.refresh()
        page.wait(lambda: "no model" in page.text("#notice"))
        page.send("Kept?")
        assert page.one("#input").get_property("value") == "Kept?"
        assert page.fake.bodies == []
    finally:
        page.fake.models = kept


def test_a_key_is_asked_for_and_kept_only_if_wanted(page: Page) -> None:
    page.fake.key = "sk-right"
    page.driver.refresh()
    page.wait(lambda: page.one("#key").is_displayed())
    assert "API key" in page.text("#key-why")
    page.one("#key [name=key]").send_keys("sk-wrong" + Keys.ENTER)
    page.wait(lambda: page.one("#key").is_displayed() and page.fake.paths.count("/v1/models") >= 3)
    page.one("#key [name=key]").clear()
    page.one("#key [name=key]").send_keys("sk-right")
    page.button("Use this key").click()
    page.wait(lambda: page.js("return document.querySelector('#model').value"))
    page.say("Hi", "welcome")
    assert page.text(".assistant .markdown") == "welcome"
    assert "sk-right" not in json.dumps(page.js("return {...localStorage}"))
    page.driver.refresh()
    page.wait(lambda: page.one("#key").is_displayed())
    page.one("#key [name=keep]").click()
    page.one("#key [name=key]").send_keys("sk-right" + Keys.ENTER)
    page.wait(lambda: page.js("return document.querySelector('#model').value"))
    assert page.js("return localStorage['pronk.key']") == "sk-right"
    page.open()
    assert not page.one("#key").is_displayed()


def test_a_key_that_runs_out_is_asked_for_in_the_chat(page: Page) -> None:
    page.fake.key = "sk-new"
    page.send("Hi")
    page.wait(lambda: page.one("#key").is_displayed())
    page.fake.answers.append(Answer(["welcome"]))
    page.one("#key [name=key]").send_keys("sk-new" + Keys.ENTER)
    page.wait(lambda: page.texts(".assistant .markdown") == ["welcome"])
    page.settled()
    assert page.texts(".bubble") == ["Hi"]
