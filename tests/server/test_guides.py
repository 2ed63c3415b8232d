"""The Python of the guides runs as it stands, against a live server."""

import re
from pathlib import Path
from typing import Any

import pytest
from live import Live

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
PROGRAMS = ["openai", "anthropic", "ollama", "langchain"]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_guide(name: str, smollm2_server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    text = (GUIDES / f"{name}.md").read_text()
    program = "\n".join(_BLOCK.findall(text)).replace("http://127.0.0.1:8000", smollm2_server.url)
    program = program.replace("smollm2-135m", "smollm2")
    assert program.count(smollm2_server.url) == 1
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(program, f"{name}.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    for client in filter(None, map(names.get, ("client", "llm"))):
        close = getattr(getattr(client, "root_client", client), "close", None)
        (close or client._client.close)()
