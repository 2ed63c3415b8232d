"""Chats in the browser's storage."""

import json
import threading
from pathlib import Path

import pytest
from fake_openai import Answer
from page_driver import Page


def test_chats_and_drafts_survive_a_reload(page: Page) -> None:
    page.set(seed="5")
    page.say("Remember me", "I *do*")
    page.one("#input").send_keys("half a thought")
    page.driver.refresh()
    assert page.text(".bubble") == "Remember me"
    assert page.text(".assistant em") == "do"
    assert page.one("#input").get_property("value") == "half a thought"
    page.wait(lambda: page.js("return document.querySelector('#model').value"))
    page.say("", "still here")
    assert page.fake.bodies[1]["seed"] == 5
    assert len(page.fake.bodies[1]["messages"]) == 3


def test_a_reload_in_the_middle_of_an_answer_keeps_what_came(page: Page) -> None:
    page.fake.answers.append(Answer(["as far as this", threading.Event()]))
    page.send("Go")
    page.wait(lambda: page.text(".assistant .markdown") == "as far as this")
    page.driver.refresh()
    assert page.text(".assistant .markdown") == "as far as this"
    assert page.button("Answer again").is_enabled()


def test_rename_delete_and_undo(page: Page) -> None:
    page.say("Some chat", "yes")
    page.button("Options of “Some chat”").click()
    name = page.one("#chat [name=name]")
    name.clear()
    name.send_keys("Better name")
    page.button("Save the name").click()
    page.wait(lambda: page.text("#chats .open") == "Better name")
    assert page.store()[0]["title"] == "Better name"
    page.button("Options of “Better name”").click()
    page.button("Delete").click()
    page.wait(lambda: page.store() == [])
    assert page.one("#empty").is_displayed()
    page.button("Undo").click()
    assert page.text(".bubble") == "Some chat"
    assert page.store()[0]["title"] == "Better name"


def test_export_and_import(page: Page, downloads: Path) -> None:
    page.say("Take me along", "gladly")
    page.button("Export all").click()
    file = downloads / "pronk-chats.json"
    page.wait(file.exists)
    exported = json.loads(file.read_text())
    assert exported["format"] == "pronk-chats"
    assert exported["chats"] == page.store()
    page.one("#file").send_keys(str(file))  # there already: a copy comes in
    page.wait(lambda: len(page.store()) == 2)
    page.js("localStorage.clear()")
    page.driver.get(f"{page.fake.url}/")
    page.driver.refresh()
    page.js("localStorage.clear()")
    page.open()
    page.one("#file").send_keys(str(file))
    page.wait(lambda: page.all(".bubble"))
    assert page.text(".bubble") == "Take me along"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "not JSON"),
        ("{}", "does not hold chats"),
        ('{"format": "pronk-chats", "version": 2}', "version 2"),
        ('{"format": "pronk-chats", "version": 1, "chats": [{"id": "../x"}]}', "Chat 1"),
    ],
)
def test_a_file_that_is_no_export_is_refused(
    page: Page, tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "chats.json"
    file.write_text(text)
    page.one("#file").send_keys(str(file))
    page.wait(lambda: words in page.text("#notice"))
    assert page.store() == []


def test_an_unreadable_chat_is_left_alone(page: Page) -> None:
    page.js("localStorage['pronk.chat.cx'] = '{\"id\": 1}'")
    page.driver.refresh()
    page.wait(lambda: "cannot be read" in page.text("#notice"))
    assert page.js("return localStorage['pronk.chat.cx']") == '{"id": 1}'


def test_full_storage_is_told_and_the_chat_goes_on(page: Page) -> None:
    page.js("Storage.prototype.setItem = () => { throw new Error('full') }")
    page.say("Hi", "still talking")
    assert page.text(".assistant .markdown") == "still talking"
    assert "not kept" in page.text("#toast")
