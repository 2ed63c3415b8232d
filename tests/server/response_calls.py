"""Requests to /v1/responses that several tests make, and what is common to their answers."""

from typing import Any

import httpx
from openai_strict import response

HI = {"input": "Hi", "max_output_tokens": 12, "seed": 7}
CITIES = ["Paris", "Rome"]
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": CITIES}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TIME = {
    "type": "function",
    "name": "get_time",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}
YES_NO = {
    "type": "json_schema",
    "name": "answer",
    "schema": {"type": "string", "enum": ["yes", "no"]},
}
LOGPROBS = "message.output_text.logprobs"


def post(url: str, path: str = "/v1/responses", **body: Any) -> httpx.Response:
    return httpx.post(url + path, json={"model": "tiny"} | body, timeout=60)


def made(url: str, **body: Any) -> dict[str, Any]:
    answer = post(url, **HI | body)
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()
    response(data)
    return data


def refused(url: str, **body: Any) -> dict[str, Any]:
    answer = post(url, **HI | body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def text_of(data: dict[str, Any]) -> str:
    return "".join(part["text"] for item in data["output"] for part in item.get("content", ()))
