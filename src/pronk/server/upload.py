"""Reads a form with one file (multipart/form-data) as it arrives: the file goes where its caller
wants it piece by piece, the fields, which are short, are kept.

Starlette's own reader puts a file into the system's temporary folder, which may be memory, and has
no limit for its size before all of it is there.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from python_multipart.exceptions import FormParserError, MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from pronk.server.errors import ApiError

_FIELD_BYTES = 1 << 10
_NAME_LENGTH = 255


def boundary_of(content_type: str | None) -> bytes:
    """The boundary of a form; 415 where a body is none."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise ApiError(415, f"body: must be multipart/form-data, is {content_type!r:.100}")
    if not options.get(b"boundary"):
        raise ApiError(400, "body: Content-Type names no boundary")
    return options[b"boundary"]


class Form:
    """A form of one file and some fields. `write` gets the bytes of the file `file_field`; `fields`
    names the others that may be there."""

    def __init__(
        self,
        boundary: bytes,
        file_field: str,
        fields: frozenset[str],
        write: Callable[[bytes], None],
    ) -> None:
        self.values: dict[str, str] = {}
        self.filename: str | None = None
        self.complete = False
        self._file_field = file_field
        self._fields = fields
        self._write = write
        self._name = ""
        self._value = bytearray()
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._headers: dict[bytes, str] = {}
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_begin": self._begin_header,
                    "on_header_field": lambda data, a, b: self._header[0].extend(data[a:b]),
                    "on_header_value": lambda data, a, b: self._header[1].extend(data[a:b]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise ApiError(400, f"body: {error}") from None

    def feed(self, data: bytes) -> None:
        """The next bytes of the body; ApiError where they make no such form."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise ApiError(400, f"body: no form as multipart/form-data: {error}") from None

    def finish(self) -> Mapping[str, str]:
        """The fields, once the body has ended."""
        if not self.complete:
            raise ApiError(400, "body: the form ends in the middle")
        if self.filename is None:
            raise ApiError(
                400, f"{self._file_field}: is missing", param=self._file_field,
                code="missing_required_parameter",
            )  # fmt: skip
        return self.values

    def _begin_part(self) -> None:
        self._headers = {}
        self._value = bytearray()

    def _begin_header(self) -> None:
        self._header = (bytearray(), bytearray())

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value).decode("latin-1")

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == self._file_field:
            if self.filename is not None:
                raise ApiError(400, f"{name}: is there twice", param=name)
            if b"filename" not in options:
                raise ApiError(400, f"{name}: must be a file with a name, is a text", param=name)
            self.filename = _checked_name(options[b"filename"], name)
        elif name not in self._fields:
            raise ApiError(
                400,
                f"{name[:100]}: this server does not know this field; nothing is ever ignored",
                param=name[:100],
                code="unknown_parameter",
            )
        elif name in self.values:
            raise ApiError(400, f"{name}: is there twice", param=name)
        self._name = name

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == self._file_field:
            self._write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > _FIELD_BYTES:
            raise ApiError(400, f"{self._name}: longer than {_FIELD_BYTES} bytes", param=self._name)

    def _end_part(self) -> None:
        if self._name != self._file_field:
            try:
                self.values[self._name] = self._value.decode()
            except UnicodeDecodeError:
                raise ApiError(400, f"{self._name}: not UTF-8", param=self._name) from None

    def _end(self) -> None:
        self.complete = True


def _checked_name(raw: bytes, field: str) -> str:
    """A file's name without folders."""
    try:
        name = raw.decode().replace("\\", "/").rsplit("/", 1)[-1]
    except UnicodeDecodeError:
        raise ApiError(400, f"{field}: its name is not UTF-8", param=field) from None
    if not name or len(name) > _NAME_LENGTH or not name.isprintable():
        raise ApiError(
            400,
            f"{field}: the name {name!r:.100} is not 1 to {_NAME_LENGTH} printable characters",
            param=field,
        )
    return name


async def read_form(
    stream: AsyncIterator[bytes], form: Form, after_each: Callable[[], Awaitable[None]]
) -> Mapping[str, str]:
    """Feeds a form and awaits `after_each()` behind every piece."""
    async for piece in stream:
        form.feed(piece)
        await after_each()
    return form.finish()
