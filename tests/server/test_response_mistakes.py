"""Requests to /v1/responses that are refused, and those that fail."""

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai_strict import events_of, response
from response_calls import HI, WEATHER, post, refused


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "unsupported_parameter"),
        ({"tools": [{"type": "file_search"}]}, "tools[0]", "unsupported_parameter"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0]", "unsupported_parameter"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice", "unsupported_parameter"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}},
         "tool_choice", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name", None),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"max_tool_calls": 3}, "max_tool_calls", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", None),
        ({"text": {"verbosity": "low"}}, "text.verbosity", None),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "odd"}}}},
         "text.format", None),
        ({"n": 2}, "n", None),
        ({"temperature": "hot"}, "temperature", None),
        ({"max_output_tokens": 0}, "max_output_tokens", None),
        ({"max_tokens": 5}, "max_tokens", "unknown_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"include": ["everything"]}, "include[0]", None),
        ({"stream_options": {}}, "stream_options", None),
        ({"background": True, "store": False}, "background", None),
        ({"input": []}, "input", "missing_required_parameter"),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": 3}, "input", None),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0]", "unsupported_parameter"),
        ({"input": [{"type": "computer_call_output"}]}, "input[0]", "unsupported_parameter"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", None),
        ({"input": [{"type": "reasoning", "id": "r", "summary": [{"type": "summary_text"}]}]},
         "input[0].summary", "unsupported_parameter"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id", "item_not_found"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
         "input", None),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "no"}]},
         "input", None),
        ({"input": "word " * 3000}, "input", "context_length_exceeded"),
        ({"previous_response_id": "resp_1", "conversation": "conv_1"},
         "previous_response_id", None),
        ({"previous_response_id": "resp_1"}, "previous_response_id",
         "previous_response_not_found"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    server_url: str, body: dict[str, Any], param: str, code: str | None
) -> None:
    error = refused(server_url, **body)
    assert (error["param"], error["code"]) == (param, code), error
    assert param in error["message"]


def test_the_client_raises_what_is_wrong(openai_client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
        openai_client.responses.create(model="gpt", input="Hi")
    with pytest.raises(openai.NotFoundError, match="no conversation"):
        openai_client.responses.create(model="tiny", input="Hi", conversation="conv_1")
    with pytest.raises(openai.BadRequestError, match="web_search"):
        openai_client.responses.create(model="tiny", input="Hi", tools=[{"type": "web_search"}])


def test_a_deadline_fails_the_stream_and_the_whole(server_url: str) -> None:
    slow = HI | {"max_output_tokens": 1900, "ignore_eos": True, "timeout": 0.02}
    answer = post(server_url, **slow)
    assert answer.status_code == 504
    events = events_of(post(server_url, **slow, stream=True))
    last = events[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "server_error"
    found = httpx.get(f"{server_url}/v1/responses/{last['response']['id']}").json()
    assert response(found).status == "failed"
