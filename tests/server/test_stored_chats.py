"""/v1/chat/completions by id: chats that were stored."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from store_samples import ON_SQLITE
from stored_app import ME, YOU, make_app

from pronk.server import stored_chats
from pronk.server.openai_types import (
    AnsweredMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    CompletionTokensDetails,
    CompletionUsage,
    PromptTokensDetails,
)
from pronk.server.store import Store

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.", "name": "boss"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b\0"}]},
    {"role": "assistant", "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": "42", "tool_call_id": "call_1"},
]  # fmt: skip


def add(store: Store, id: str, owner: str = "me", model: str = "m", **metadata: str) -> None:
    """Stores a chat as the route that makes it does."""
    completion = ChatCompletion(
        id=id, created=5, model=model, metadata=metadata,
        choices=[ChatChoice(
            index=0, finish_reason="stop", logprobs=None, message=AnsweredMessage(content="hi")
        )],
        usage=CompletionUsage(
            prompt_tokens=1, completion_tokens=2, total_tokens=3,
            prompt_tokens_details=PromptTokensDetails(),
            completion_tokens_details=CompletionTokensDetails(),
        ),
    ).model_dump(mode="json")  # fmt: skip
    body = ChatRequest.model_validate(
        {"model": model, "messages": MESSAGES, "store": True, "metadata": metadata}
    )
    call: Any = SimpleNamespace(
        caller=SimpleNamespace(id=owner), service=SimpleNamespace(store=store)
    )
    asyncio.run(stored_chats.keep(call, completion, body))


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    with TestClient(make_app(store, [stored_chats.router]), headers=ME) as client:
        yield client


def test_official_client(store: Store, client: TestClient) -> None:
    sdk = openai.OpenAI(base_url="http://testserver/v1", api_key="pk-me", http_client=client)
    add(store, "chatcmpl-1", a="1")
    add(store, "chatcmpl-2", a="1", b="é [x]&\0")
    add(store, "chatcmpl-3", model="n")
    add(store, "chatcmpl-4", owner="you")
    completions = sdk.chat.completions

    def ids(**query: Any) -> list[str]:
        return [chat.id for chat in completions.list(**query)]

    assert ids() == ["chatcmpl-1", "chatcmpl-2", "chatcmpl-3"]
    assert ids(limit=1, order="desc") == ["chatcmpl-3", "chatcmpl-2", "chatcmpl-1"]
    assert ids(after="chatcmpl-2") == ["chatcmpl-3"]
    assert ids(model="n") == ["chatcmpl-3"]
    assert ids(metadata={"a": "1"}) == ["chatcmpl-1", "chatcmpl-2"]
    assert ids(metadata={"a": "1", "b": "é [x]&\0"}) == ["chatcmpl-2"]
    assert ids(metadata={"a": "2"}) == []
    found = completions.retrieve("chatcmpl-2")
    assert found.choices[0].message.content == "hi"
    assert found.metadata == {"a": "1", "b": "é [x]&\0"}
    changed = completions.update("chatcmpl-2", metadata={"c": "3"})
    assert changed.metadata == {"c": "3"}
    assert completions.retrieve("chatcmpl-2") == changed
    assert ids(metadata={"c": "3"}) == ["chatcmpl-2"]
    assert completions.update("chatcmpl-2", metadata=None).metadata == {}
    deleted = completions.delete("chatcmpl-2")
    assert (deleted.id, deleted.object, deleted.deleted) == (
        "chatcmpl-2", "chat.completion.deleted", True,
    )  # fmt: skip
    with pytest.raises(openai.NotFoundError):
        completions.retrieve("chatcmpl-2")


def test_messages(store: Store, client: TestClient) -> None:
    sdk = openai.OpenAI(base_url="http://testserver/v1", api_key="pk-me", http_client=client)
    add(store, "chatcmpl-1")
    messages = list(sdk.chat.completions.messages.list("chatcmpl-1", limit=2))
    assert [message.id for message in messages] == [f"chatcmpl-1-{i}" for i in range(4)]
    assert [str(message.role) for message in messages] == ["system", "user", "assistant", "tool"]
    assert [message.content for message in messages] == ["Be brief.", None, None, "42"]
    parts = messages[1].content_parts
    assert parts is not None
    assert [part.model_dump()["text"] for part in parts] == ["a", "b\0"]
    assert messages[2].tool_calls is not None
    assert messages[2].tool_calls[0].id == "call_1"
    assert messages[3].model_dump()["tool_call_id"] == "call_1"
    last = sdk.chat.completions.messages.list("chatcmpl-1", order="desc", limit=1)
    assert (last.data[0].id, last.has_more) == ("chatcmpl-1-3", True)


def test_chats_of_others_are_not_there(store: Store, client: TestClient) -> None:
    add(store, "chatcmpl-1")
    path = "/v1/chat/completions/chatcmpl-1"
    for answer in (
        client.get(path, headers=YOU),
        client.get(f"{path}/messages", headers=YOU),
        client.post(path, headers=YOU, json={"metadata": {}}),
        client.delete(path, headers=YOU),
        client.get("/v1/chat/completions/%00"),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
    assert client.get(path).status_code == 200


@ON_SQLITE
@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"), ("limit=101", "limit"), ("order=up", "order"), ("after=x", "after"),
        ("colour=red", "colour"), ("metadata=x", "metadata"),
        ("metadata[a]=1&metadata[a]=2", "metadata"),
        (f"metadata[a]={'x' * 513}", "metadata.a"),
    ],
)  # fmt: skip
def test_bad_queries(client: TestClient, query: str, param: str) -> None:
    answer = client.get(f"/v1/chat/completions?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@ON_SQLITE
@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "metadata"), ({"metadata": {"a": 1}}, "metadata.a"), ({"metadata": {}, "x": 1}, "x")],
)
def test_bad_changes(client: TestClient, body: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/chat/completions/chatcmpl-1", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
