"""Pictures of the page in use: python tests/server/page/screenshots.py URL OUTDIR

URL is a running server. Without URL (python tests/server/page/screenshots.py OUTDIR) a server with
scripted answers takes its place.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from browser import browser
from fake_openai import Answer, running
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

# Without a mouse on the machine a headless browser takes the desktop for a touch screen.
MOUSE = "--blink-settings=primaryHoverType=2,availableHoverTypes=2"
SIZES = {"light": (1280, 860), "dark": (1280, 860), "phone": (390, 844)}
QUESTION = "Write a Python function that counts the words of a text, and explain it briefly."
FOLLOW_UP = "Which of its parts matter most?"

CODE = '''A word is what `split` leaves when **white space** is gone:

```python
from collections import Counter

def count_words(text: str) -> Counter[str]:
    """How often each word stands in the text."""
    return Counter(text.lower().split())

print(count_words("to be or not to be")["be"])  # 2
```

1. `lower` makes *Be* and *be* one word.
2. `split` cuts at any white space, so lines count as well.
3. `Counter` does the counting.
'''
TABLE = """In this order:

| Part | What it does | Without it |
|:-----|:-------------|-----------:|
| `split` | finds the words | nothing works |
| `Counter` | counts | ten lines more |
| `lower` | ignores case | *Be* is not *be* |

> Commas still stick to their words: strip punctuation where that matters.
"""
ANSWERS = [
    Answer(pieces=[CODE[i : i + 9] for i in range(0, len(CODE), 9)], pause=0.01),
    Answer(pieces=[TABLE[i : i + 9] for i in range(0, len(TABLE), 9)], pause=0.01),
]


def say(driver: Chrome, text: str) -> None:
    """Sends a message and waits for the whole answer."""
    driver.find_element(By.ID, "input").send_keys(text + "\n")
    WebDriverWait(driver, 600).until(
        lambda d: not d.find_elements(By.CSS_SELECTOR, "#send.running, [aria-busy]")
    )


def resize(driver: Chrome, name: str) -> None:
    width, height = SIZES[name]
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": name == "phone"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    theme = "dark" if name == "dark" else "light"
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": theme}]},
    )


def shoot(driver: Chrome, path: Path) -> None:
    driver.execute_async_script("setTimeout(arguments[0], 400)")  # transitions
    driver.save_screenshot(str(path))
    print(path)


def main(arguments: Sequence[str]) -> None:
    folder = Path(arguments[-1])
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        driver = stack.enter_context(browser(MOUSE))
        if len(arguments) > 1:
            url = arguments[0]
        else:
            fake = stack.enter_context(running())
            fake.answers.extend(ANSWERS)
            url = fake.url
        resize(driver, "light")
        driver.get(url)
        WebDriverWait(driver, 60).until(
            lambda d: d.execute_script("return document.querySelector('#model').value")
        )
        shoot(driver, folder / "page-empty.png")
        for text in (QUESTION, FOLLOW_UP):
            say(driver, text)
            if text is QUESTION:
                shoot(driver, folder / "page-light.png")
        for name in ("dark", "phone"):
            resize(driver, name)
            if name == "phone":
                driver.refresh()
                WebDriverWait(driver, 60).until(
                    lambda d: d.find_elements(By.CSS_SELECTOR, ".assistant")
                )
            shoot(driver, folder / f"page-{name}.png")


if __name__ == "__main__":
    if not 1 <= len(sys.argv[1:]) <= 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
