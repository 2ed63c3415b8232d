"""What the tests of the page do with it, and texts that they share."""

import json
from collections.abc import Callable
from typing import Any

from fake_openai import Answer, FakeServer
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

PATIENCE = 30
"""Seconds until a test gives up; nothing is measured with them."""

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


SAMPLE = """# One

Text with `code`, **bold**, [a link](https://example.com) and ~~this~~.

- a
  1. b
- c

> quoted

| a | b |
|---|--:|
| 1 | 2 |

```python
def f(x: int) -> str:  # comment
    return "text" + str(1.5)
```
"""


class Page:
    """What a test does with the page."""

    def __init__(self, driver: Chrome, fake: FakeServer) -> None:
        self.driver = driver
        self.fake = fake

    def open(self) -> None:
        self.driver.get(self.fake.url)
        self.wait(lambda: self.js("return document.querySelector('#model').value") != "")

    def js(self, code: str, *values: object) -> Any:
        return self.driver.execute_script(code, *values)

    def module(self, code: str, *values: object) -> Any:
        """The value of `code`, which may await the page's modules."""
        wrapped = (
            "const values = [...arguments]; const done = values.pop();"
            f"(async () => {{ {code} }})().then(done, (e) => done('failed: ' + e))"
        )
        return self.driver.execute_async_script(wrapped, *values)

    def wait(self, truth: Callable[[], Any]) -> Any:
        waiting = WebDriverWait(self.driver, PATIENCE, poll_frequency=0.02)
        return waiting.until(lambda _: truth())

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.wait(lambda: self.all(selector))[0]

    def button(self, label: str, within: str = "body") -> WebElement:
        """The last visible button that is called so."""

        def find() -> WebElement | None:
            try:
                for element in reversed(self.all(f"{within} button")):
                    if element.accessible_name == label and element.is_displayed():
                        return element
            except StaleElementReferenceException:
                pass  # the page was just being built
            return None

        return self.wait(find)

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus; modifiers are held until the end."""
        actions = ActionChains(self.driver)
        for key in keys[:-1]:
            actions = actions.key_down(key)
        actions = actions.send_keys(keys[-1])
        for key in reversed(keys[:-1]):
            actions = actions.key_up(key)
        actions.perform()

    def send(self, text: str) -> None:
        self.one("#input").send_keys(text + Keys.ENTER)

    def settled(self) -> None:
        self.wait(lambda: not self.all("#send.running, [aria-busy]"))

    def say(self, text: str, *pieces: str | dict[str, Any], **more: Any) -> None:
        """Sends a text and waits for an answer of these pieces."""
        self.fake.answers.append(Answer(pieces, **more))
        self.send(text)
        self.settled()

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.all(selector)]

    def set(self, **settings: str) -> None:
        """Types settings into their dialog and closes it."""
        self.button("Settings of this chat").click()
        for name, value in settings.items():
            field = self.one(f"#settings [name={name}]")
            if field.tag_name == "select":
                Select(field).select_by_value(value)
            else:
                field.clear()
                field.send_keys(value)
        self.button("Done").click()

    def store(self) -> list[dict[str, Any]]:
        """The chats in the browser's storage."""
        code = "return Object.entries(localStorage).filter(([k]) => k.startsWith('pronk.chat.'))"
        return [json.loads(value) for _, value in self.js(code)]
