"""Stored objects to test with, and a clock that stands still."""

import pytest

from pronk.server.storage.batches import StoredBatch
from pronk.server.store import StoredChat, StoredFile, StoredResponse

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For tests of what never reaches the database."""


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, time: float = 1_800_000_000.0) -> None:
        self.time = time

    def __call__(self) -> float:
        return self.time


def file(id: str, owner: str = "me", **more: object) -> StoredFile:
    values = {"created_at": 1, "expires_at": None, "purpose": "batch", "bytes": 3, "filename": "f"}
    return StoredFile(id=id, owner=owner, **(values | more))  # type: ignore[arg-type]


def response(id: str, owner: str = "me", **more: object) -> StoredResponse:
    values = {"created_at": 1, "model": "m", "status": "completed", "body": {"id": id}}
    return StoredResponse(id=id, owner=owner, **(values | more))  # type: ignore[arg-type]


def chat(id: str, owner: str = "me", **more: object) -> StoredChat:
    values = {"created_at": 1, "model": "m", "metadata": {}, "body": {"id": id}, "messages": []}
    return StoredChat(id=id, owner=owner, **(values | more))  # type: ignore[arg-type]


def batch(id: str, input: str = "file-1", owner: str = "me", **more: object) -> StoredBatch:
    values = {"endpoint": "/v1/completions", "completion_window": "24h",
              "created_at": 1, "expires_at": 2}  # fmt: skip
    return StoredBatch(id=id, owner=owner, input_file_id=input, **(values | more))  # type: ignore[arg-type]
