"""From chats to requests: what is kept from one to the next."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_gguf

from pronk import LLM
from pronk.core.errors import UserError
from pronk.engine import prompts
from pronk.engine.prompts import Chat
from pronk.text import calling
from pronk.text.messages import Message
from pronk.text.tools import Tool

HELLO = [Message("user", "hello")]
ODD = {"type": "object", "properties": {"x": {"uniqueItems": True}}}


def tool(name: str, **parameters: Any) -> Tool:
    return Tool(name, "", {"type": "object", **parameters})


def test_tools_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[calling.AnswerForm] = []
    grammar = calling.answer_grammar

    def counted(form: calling.AnswerForm, strict: Any) -> Any:
        checked.append(form)
        return grammar(form, strict)

    monkeypatch.setattr(calling, "answer_grammar", counted)
    monkeypatch.setattr(prompts, "_KEPT", 2)
    with LLM(write_gguf(tmp_path / "tiny.gguf"), backend="reference") as llm:

        def ask(*tools: Tool, **more: Any) -> set[str]:
            chat = Chat(HELLO, tools, **more)
            assert llm.prompter.chat(chat, {}).constraint is not None
            return chat.unenforced

        odd, even = Tool("odd", "", ODD), tool("even")
        assert [ask(odd, even) for _ in range(3)] == [{"odd"}] * 3
        assert len(checked) == 1
        assert ask(even) == set()
        assert ask(even, tool_choice="required") == set()
        assert len(checked) == 3
        assert ask(odd, even) == {"odd"}, "it was forgotten, and is checked again"
        assert len(checked) == 4
        assert ask(tool("even", properties={"x": {"type": "integer"}})) == set()
        assert len(checked) == 5, "another schema is another tool"
        for _ in range(2):
            with pytest.raises(UserError, match="uniqueItems"):
                ask(odd, strict_tools=["odd"])
