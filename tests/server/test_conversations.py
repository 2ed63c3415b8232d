"""The Conversations API, by OpenAI's own client and types, against a live server."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live import Live, live_server
from openai import OpenAI
from openai.types.conversations import (
    Conversation,
    ConversationDeletedResource,
    ConversationItemList,
    Message,
)
from openai_strict import events_of, strict
from response_calls import HI, LOGPROBS, WEATHER, made, post, text_of
from service_app import add_key, bearer

from engine.tiny_models import write_gguf

SAID: list[Any] = [
    {"type": "message", "role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    {"role": "assistant", "content": "Hello!"},
]


def texts(items: Any) -> list[str]:
    return [item.content[0].text for item in items if item.type == "message"]


def listed(url: str, id: str, **query: Any) -> dict[str, Any]:
    answer = httpx.get(f"{url}/v1/conversations/{id}/items", params=query)
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()
    return data


def test_a_conversation_is_made_changed_and_forgotten(openai_client: OpenAI) -> None:
    made = openai_client.conversations.create(metadata={"a": "b"})
    assert made.id.startswith("conv_")
    assert made.metadata == {"a": "b"}
    strict(Conversation, made.to_dict())
    assert openai_client.conversations.retrieve(made.id) == made
    changed = openai_client.conversations.update(made.id, metadata={"c": "d"})
    assert changed.metadata == {"c": "d"}
    assert openai_client.conversations.retrieve(made.id) == changed
    assert openai_client.conversations.update(made.id, metadata=None).metadata == {}
    deleted = openai_client.conversations.delete(made.id)
    strict(ConversationDeletedResource, deleted.to_dict())
    assert (deleted.id, deleted.deleted) == (made.id, True)
    for call in (openai_client.conversations.retrieve, openai_client.conversations.delete):
        with pytest.raises(openai.NotFoundError, match="no conversation"):
            call(made.id)
    with pytest.raises(openai.NotFoundError):
        openai_client.conversations.update(made.id, metadata={})


def test_items_are_added_listed_and_removed(openai_client: OpenAI) -> None:
    id = openai_client.conversations.create(items=SAID).id
    items = openai_client.conversations.items
    assert texts(items.list(id, order="asc")) == ["Be brief.", "Hi", "Hello!"]
    assert texts(items.list(id)) == ["Hello!", "Hi", "Be brief."]
    added = items.create(id, items=[
        {"role": "user", "content": "Weather?"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ])  # fmt: skip
    strict(ConversationItemList, added.to_dict())
    assert [item.type for item in added.data] == [
        "message", "function_call", "function_call_output",
    ]  # fmt: skip
    assert (added.first_id, added.last_id) == (added.data[0].id, added.data[-1].id)
    pages = items.list(id, limit=2, order="asc")
    assert pages.has_more
    assert [item.id for item in pages][3:] == [item.id for item in added.data]
    one = items.retrieve(added.data[0].id, conversation_id=id)
    assert isinstance(strict(Message, one.to_dict()), Message)
    assert one == added.data[0]
    left = items.delete(one.id, conversation_id=id)
    assert left.id == id
    for call in (items.retrieve, items.delete):
        with pytest.raises(openai.NotFoundError, match="no conversation item"):
            call(one.id, conversation_id=id)
    assert len(list(items.list(id))) == 5


def test_roles_keep_the_kinds_of_their_contents(server_url: str, openai_client: OpenAI) -> None:
    id = openai_client.conversations.create(items=SAID).id
    kinds = [item["content"][0]["type"] for item in listed(server_url, id, order="asc")["data"]]
    assert kinds == ["input_text", "input_text", "output_text"]


def test_a_response_goes_on_with_its_conversation(server_url: str, openai_client: OpenAI) -> None:
    id = openai_client.conversations.create(items=SAID).id
    first = made(server_url, input="One", conversation=id)
    assert first["conversation"] == {"id": id}
    second = made(server_url, input="Two", conversation={"id": id}, instructions="Shout.")
    alone = made(
        server_url,
        input=[
            {"role": "system", "content": "Shout."},
            *SAID,
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": text_of(first)},
            {"role": "user", "content": "Two"},
        ],
    )
    assert second["usage"]["input_tokens"] == alone["usage"]["input_tokens"]
    assert text_of(second) == text_of(alone)
    items = listed(server_url, id, order="asc")["data"]
    assert [item["id"] for item in items][4::2] == [
        first["output"][0]["id"], second["output"][0]["id"],
    ]  # fmt: skip
    assert len(items) == len(SAID) + 4


@pytest.mark.parametrize("more", [{"stream": True}, {"store": False}, {"background": True}])
def test_every_way_of_answering_appends(
    tiny_server: Live, openai_client: OpenAI, more: dict[str, Any]
) -> None:
    url, id = tiny_server.url, openai_client.conversations.create().id
    answer = post(url, **HI, conversation=id, **more)
    assert answer.status_code == 200, answer.text
    tiny_server.until(lambda: len(listed(url, id)["data"]) == 2)
    said, answered = listed(url, id, order="asc")["data"]
    assert said["content"][0]["text"] == "Hi"
    assert answered["role"] == "assistant"
    if "stream" in more:
        assert events_of(answer)[-1]["response"]["output"] == [answered]


def test_tools_in_a_conversation(server_url: str, openai_client: OpenAI) -> None:
    id = openai_client.conversations.create().id
    tools = {"tools": [WEATHER], "max_output_tokens": 300}
    first = made(
        server_url, conversation=id, tool_choice="required", parallel_tool_calls=False, **tools
    )
    call = first["output"][0]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    second = made(server_url, conversation=id, input=[output], tool_choice="none", **tools)
    assert second["output"][0]["type"] == "message"
    kinds = [item["type"] for item in listed(server_url, id, order="asc")["data"]]
    assert kinds == ["message", "function_call", "function_call_output", "message"]


def test_what_failed_is_not_appended(server_url: str, openai_client: OpenAI) -> None:
    id = openai_client.conversations.create().id
    slow = HI | {"max_output_tokens": 1900, "ignore_eos": True, "timeout": 0.02}
    assert post(server_url, **slow, conversation=id).status_code == 504
    assert listed(server_url, id) == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip


def test_a_conversation_that_goes_away_fails_its_response(
    tiny_server: Live, openai_client: OpenAI
) -> None:
    url, id = tiny_server.url, openai_client.conversations.create().id
    slow = HI | {"max_output_tokens": 800, "ignore_eos": True}
    begun = post(url, **slow, conversation=id, background=True).json()
    openai_client.conversations.delete(id)
    one = f"{url}/v1/responses/{begun['id']}"
    tiny_server.until(lambda: httpx.get(one).json()["status"] == "failed")
    assert "no conversation" in httpx.get(one).json()["error"]["message"]


def test_a_response_of_a_conversation_is_no_predecessor(
    server_url: str, openai_client: OpenAI
) -> None:
    first = made(server_url, conversation=openai_client.conversations.create().id)
    answer = post(server_url, **HI, previous_response_id=first["id"])
    assert answer.status_code == 400
    assert "go on with that conversation" in answer.json()["error"]["message"]


def test_items_that_are_referred_to(server_url: str, openai_client: OpenAI) -> None:
    answered = made(server_url)
    reference = {"type": "item_reference", "id": answered["output"][0]["id"]}
    id = openai_client.conversations.create(items=[reference]).id  # type: ignore[list-item]
    (item,) = listed(server_url, id)["data"]
    assert item == answered["output"][0]
    with pytest.raises(openai.BadRequestError, match=r"items\[0\].id: no item 'msg_no'"):
        openai_client.conversations.create(items=[{"type": "item_reference", "id": "msg_no"}])


def test_log_probabilities_are_shown_to_those_who_ask(
    server_url: str, openai_client: OpenAI
) -> None:
    id = openai_client.conversations.create().id
    data = made(server_url, conversation=id, include=[LOGPROBS])
    item = data["output"][0]
    assert item["content"][0]["logprobs"]
    assert listed(server_url, id)["data"][0]["content"][0]["logprobs"] == []
    assert listed(server_url, id, include=LOGPROBS)["data"][0] == item
    found = openai_client.conversations.items.retrieve(
        item["id"], conversation_id=id, include=[LOGPROBS]
    )
    assert found.to_dict()["content"] == item["content"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {"items": [{"role": "user", "content": 3}]}, "items[0].content"),
        ("", {"items": [{"type": "web_search_call"}]}, "items[0]"),
        ("", {"items": SAID * 7}, "items"),
        ("", {"metadata": {"a" * 65: "b"}}, "metadata"),
        ("", {"topic": "x"}, "topic"),
        ("/{id}", {}, "metadata"),
        ("/{id}/items", {"items": []}, "items"),
        ("/{id}/items", {"items": [{"type": "reasoning", "summary": []}]}, "items"),
        ("/{id}/items", {"items": [{"role": "user", "content": "x", "id": "taken"}]}, "items"),
    ],
)
def test_mistakes_are_named(
    server_url: str, openai_client: OpenAI, path: str, body: dict[str, Any], param: str
) -> None:
    taken: Any = [{"role": "user", "content": "x", "id": "taken"}]
    id = openai_client.conversations.create(items=taken).id
    answer = httpx.post(f"{server_url}/v1/conversations{path.format(id=id)}", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param), answer.text
    assert len(listed(server_url, id)["data"]) == 1  # all or nothing


def test_lists_refuse_what_they_do_not_know(server_url: str, openai_client: OpenAI) -> None:
    id = openai_client.conversations.create(items=SAID).id
    for query in ({"limit": 0}, {"order": "up"}, {"after": "msg_no"}, {"include": "x"}, {"q": 1}):
        answer = httpx.get(f"{server_url}/v1/conversations/{id}/items", params=query)
        assert answer.status_code == 400, query
        assert answer.json()["error"]["param"].startswith(next(iter(query)))
    assert httpx.get(f"{server_url}/v1/conversations/conv_no/items").status_code == 404


def test_nobody_sees_what_others_own(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    mine, yours = (bearer(add_key(keys, name)) for name in ("me", "you"))
    model = write_gguf(tmp_path / "tiny.gguf")
    with live_server([model], tmp_path / "data", api_key_file=keys) as server:
        url = f"{server.url}/v1/conversations"
        body = {"items": [{"role": "user", "content": "x", "id": "msg_x"}]}
        assert httpx.post(url, json=body).status_code == 401
        one = f"{url}/{httpx.post(url, json=body, headers=mine).json()['id']}"
        calls: list[tuple[str, str, Any]] = [
            ("GET", one, None), ("POST", one, {"metadata": {}}), ("GET", f"{one}/items", None),
            ("POST", f"{one}/items", body), ("GET", f"{one}/items/msg_x", None),
            ("DELETE", f"{one}/items/msg_x", None), ("DELETE", one, None),
        ]  # fmt: skip
        for method, path, json in calls:
            answer = httpx.request(method, path, json=json, headers=yours)
            assert answer.status_code == 404, path
        asked = {"model": "tiny", **HI, "conversation": one.rsplit("/", 1)[1]}
        there = f"{server.url}/v1/responses"
        assert httpx.post(there, json=asked, headers=yours).status_code == 404
        assert httpx.post(there, json=asked, headers=mine, timeout=60).status_code == 200
