"""The output of a batch: two files, of the lines that were answered with 200 and of all others, in
the order of the input.

    {"id": "batch_req_...", "custom_id": "...", "response": {...} or null, "error": {...} or null}
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pronk.server.batch_input import Item
from pronk.server.disk import Files, Partial
from pronk.server.schema import new_id
from pronk.server.storage.batches import Line, StoredBatch
from pronk.server.storage.files import StoredFile

Json = dict[str, Any]
_SOME = 200

_UNANSWERED = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was answered."),
    "expired": ("batch_expired", "This request could not be answered before the batch expired."),
}


def answered(custom_id: str, status: int, body: Json) -> Json:
    """What stands in a file of a line with an answer."""
    response = {"status_code": status, "request_id": new_id("req_"), "body": body}
    return {
        "id": new_id("batch_req_"), "custom_id": custom_id, "response": response, "error": None,
    }  # fmt: skip


def _unanswered(custom_id: str, ending: str) -> Json:
    code, message = _UNANSWERED[ending]
    return {
        "id": new_id("batch_req_"), "custom_id": custom_id, "response": None,
        "error": {"code": code, "message": message},
    }  # fmt: skip


def write_output(
    files: Files, batch: StoredBatch, ending: str, items: Iterable[Item]
) -> tuple[StoredFile | None, StoredFile | None]:
    """Puts the bytes of both files of a finalized batch in their places; None for one that would
    be empty. `items`: the input, whose lines without an answer are told so; none where it is gone
    or was never good. Done twice, the second time counts."""
    output, failures = files.partial(), files.partial()
    try:
        for line in _merge(_finished(files, batch.id), items, ending):
            (output if line.ok else failures).write(_encode(line.output) + b"\n")
        return (
            _keep(files, batch, output, batch.output_file_id, "output"),
            _keep(files, batch, failures, batch.error_file_id, "error"),
        )
    finally:
        output.close()
        failures.close()


def _encode(value: Json) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair can only be written as an escape
        return json.dumps(value).encode()


def _finished(files: Files, id: str) -> Iterator[Line]:
    after = 0
    while lines := files.store.batches.lines(id, after=after, most=_SOME):
        yield from lines
        after = lines[-1].line


def _merge(finished: Iterator[Line], items: Iterable[Item], ending: str) -> Iterator[Line]:
    """All lines in order; each one of `finished` is of an item, or there are no items."""
    line = next(finished, None)
    for item in items:
        if line is not None and line.line == item.line:
            yield line
            line = next(finished, None)
        else:
            yield Line(item.line, False, _unanswered(item.custom_id, ending))
    if line is not None:
        yield line
        yield from finished


def _keep(
    files: Files, batch: StoredBatch, partial: Partial, id: str | None, kind: str
) -> StoredFile | None:
    if partial.size == 0:
        return None
    assert id is not None, "a batch is finalized before its files are written"
    partial.keep(id)
    now = files.store.database.now()
    lifetime = batch.output_expires_after
    return StoredFile(
        id=id,
        owner=batch.owner,
        created_at=now,
        expires_at=None if lifetime is None else now + lifetime,
        purpose="batch_output",
        bytes=partial.size,
        filename=f"{batch.id}_{kind}.jsonl",
    )
