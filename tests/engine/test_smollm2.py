"""The same rules on a real model, where block sizes, head counts and logits are what they are."""

from pathlib import Path
from typing import Any

import pytest

from pronk import LLM
from pronk.backends.select import select_backend
from pronk.core.errors import UserError

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a haiku about the sea, and then explain it line by line.",
]


@pytest.fixture(autouse=True)
def _needs_compiled_core() -> None:
    try:
        select_backend("cpu")
    except UserError as error:
        pytest.skip(str(error))


def load(path: Path, **options: Any) -> LLM:
    return LLM(path, backend="cpu", ctx=1024, **options)


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_the_capital_of_france(smollm2_path: Path) -> None:
    with load(smollm2_path) as llm:
        reply = llm.chat(chat(QUESTIONS[0]), temperature=0, max_tokens=30)
    assert "Paris" in reply.text
    assert reply.finish_reason == "stop"


def test_answers_do_not_depend_on_threads(smollm2_path: Path) -> None:
    answers = []
    for threads in (1, 2, 3):
        with load(smollm2_path, threads=threads) as llm:
            assert llm.threads == threads
            answers.append(llm.chat(chat(QUESTIONS[2]), max_tokens=24, seed=7).token_ids)
    assert answers[1:] == answers[:1] * 2


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 7}], ids=["greedy", "seeded"])
def test_answers_do_not_depend_on_batch_chunks_or_threads(
    smollm2_path: Path, options: dict[str, Any]
) -> None:
    with load(smollm2_path, threads=1) as llm:
        form = llm.chat_format
        assert form is not None
        alone = [llm.chat(chat(q), max_tokens=24, **options) for q in QUESTIONS]
        from pronk.text.messages import Message

        prompts = [form.render([Message("user", q)]).ids for q in QUESTIONS]
    as_generate = {"temperature": 0.6, "top_p": 0.9, **options}
    for loaded in (
        {"threads": 2},
        {"threads": 2, "token_budget": 7},
        {"threads": 3, "token_budget": 33, "max_batch": 2},
    ):
        with load(smollm2_path, **loaded) as llm:
            together = llm.generate(prompts, max_tokens=24, **as_generate)
        assert [c.token_ids for c in together] == [r.token_ids for r in alone], loaded
