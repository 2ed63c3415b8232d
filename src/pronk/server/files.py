"""/v1/files: uploads, and the output of batches."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse

from pronk.server.auth import Caller, caller
from pronk.server.disk import Files
from pronk.server.errors import ApiError
from pronk.server.paging import FileQuery, ListName, cursor_of, list_body
from pronk.server.schema import Answer
from pronk.server.storage.files import StoredFile
from pronk.server.upload import Form, boundary_of, read_form

__all__ = ["Files", "router"]

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
LIFETIMES = range(3600, 30 * 86_400 + 1)
"""Seconds for which a file may be asked to live."""
_BATCH_LIFETIME = LIFETIMES[-1]
"""Seconds until the input of a batch expires unless told otherwise, as OpenAI has it."""
_FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
_FORM_BYTES = 64 << 10
"""More than the form around a file ever has."""
_FLUSH_BYTES = 1 << 20

router = APIRouter(prefix="/v1/files", tags=["files"])
FilesCaller = Annotated[Caller, Depends(caller("files"))]


class FileObject(Answer):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(Answer):
    object: ListName
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Answer):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def _object(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
    }


_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": LIFETIMES[0],
                            "maximum": LIFETIMES[-1],
                        },
                    },
                }
            }
        },
    }
}


class _Incoming:
    """The bytes of an upload on their way to the disk, some of them at a time."""

    def __init__(self, files: Files) -> None:
        self._most = files.max_bytes
        self._waiting = bytearray()
        self.partial = files.partial()

    def take(self, data: bytes) -> None:
        self._waiting += data
        if self.partial.size + len(self._waiting) > self._most:
            raise _too_large(self._most)

    async def flush(self, least: int = _FLUSH_BYTES) -> None:
        if len(self._waiting) >= least:
            data, self._waiting = self._waiting, bytearray()
            await asyncio.to_thread(self.partial.write, data)


@router.post("", response_model=FileObject, openapi_extra=_UPLOAD)
async def upload_file(request: Request, who: FilesCaller) -> dict[str, Any]:
    """Stores a file."""
    files: Files = request.app.state.service.files
    boundary = boundary_of(request.headers.get("content-type"))
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > files.max_bytes + _FORM_BYTES:
        raise _too_large(files.max_bytes)
    incoming = _Incoming(files)
    try:
        form = Form(boundary, "file", _FIELDS, incoming.take)
        values = await read_form(request.stream(), form, incoming.flush)
        await incoming.flush(0)
        assert form.filename is not None
        file = await asyncio.to_thread(
            files.new,
            who.id,
            incoming.partial,
            filename=form.filename,
            purpose=_purpose(values),
            lifetime=_lifetime(values),
        )
    finally:
        incoming.partial.close()
    return _object(file)


@router.get("", response_model=FileList)
async def list_files(
    request: Request, who: FilesCaller, query: Annotated[FileQuery, Query()]
) -> dict[str, Any]:
    """Files, the newest first unless told otherwise."""
    rows = request.app.state.service.store.files
    page = await asyncio.to_thread(rows.list, who.id, cursor_of(query), purpose=query.purpose)
    return list_body([_object(file) for file in page.data], page.has_more)


@router.get("/{id}", response_model=FileObject)
async def get_file(request: Request, who: FilesCaller, id: str) -> dict[str, Any]:
    """What a file is."""
    files: Files = request.app.state.service.files
    return _object(await asyncio.to_thread(files.get, who.id, id))


@router.delete("/{id}", response_model=FileDeleted)
async def delete_file(request: Request, who: FilesCaller, id: str) -> dict[str, Any]:
    """Removes a file that no running batch reads."""
    files: Files = request.app.state.service.files
    await asyncio.to_thread(files.delete, who.id, id)
    return {"id": id}


@router.get(
    "/{id}/content",
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def get_file_content(request: Request, who: FilesCaller, id: str) -> FileResponse:
    """The bytes of a file; `Range` is understood."""
    files: Files = request.app.state.service.files
    file = await asyncio.to_thread(files.get, who.id, id)
    # Whatever was uploaded, a browser must not take it for a page of this server.
    return FileResponse(
        await asyncio.to_thread(files.path, file),
        media_type="application/octet-stream",
        filename=file.filename,
        headers={"X-Content-Type-Options": "nosniff"},
    )


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"file: more than {most} bytes, which is the limit", param="file")


def _purpose(values: Mapping[str, str]) -> str:
    purpose = values.get("purpose")
    if purpose is None:
        raise ApiError(
            400, "purpose: is missing", param="purpose", code="missing_required_parameter"
        )
    if purpose not in PURPOSES:
        known = ", ".join(PURPOSES)
        raise ApiError(400, f"purpose: {purpose!r:.80} is not one of {known}", param="purpose")
    return purpose


def _lifetime(values: Mapping[str, str]) -> int | None:
    """Seconds until the file expires."""
    anchor, seconds = (values.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return _BATCH_LIFETIME if values.get("purpose") == "batch" else None
    if anchor != "created_at":
        param = "expires_after[anchor]"
        raise ApiError(400, f"{param}: {anchor!r:.80} is not 'created_at'", param=param)
    param = "expires_after[seconds]"
    digits = seconds is not None and seconds.isascii() and seconds.isdecimal()
    if seconds is None or not digits or len(seconds) > 9 or int(seconds) not in LIFETIMES:
        raise ApiError(
            400,
            f"{param}: {seconds!r:.80} is not a number from {LIFETIMES[0]} to {LIFETIMES[-1]}",
            param=param,
        )
    return int(seconds)
