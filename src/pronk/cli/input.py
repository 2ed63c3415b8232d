"""Text that the user gives: an argument, a file, standard input. Not what is typed in a
conversation, which is in conversation.py."""

import io
import os
import select
import stat
import sys
from pathlib import Path

from pronk.cli.common import note
from pronk.core.errors import UserError

_WAIT_S = 1.0
"""What is piped in beside a PROMPT must begin within this time: a program that never writes to us
nor closes its end (a daemon's stdin, ssh) must not make us wait forever."""
_MOST_BYTES = 64 << 20
"""No context holds a longer prompt; `yes | pronk chat` shall end."""


def on_a_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def read_text(name: str, path: str) -> str:
    """The text of a file ("-": standard input). UserError names the byte that is no UTF-8."""
    if path == "-":
        return _decoded(name, "stdin", _stdin(name))
    try:
        return _decoded(name, path, Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{name}: cannot read {path}: {error.strerror}") from None


def read_given(name: str, given: str | None, path: str | None) -> str:
    """The argument `name`, the text of --file, or what is piped in: the one that there is."""
    if given is not None and path is not None:
        raise UserError(f"{name}: give either {name} or --file FILE")
    if given is not None:
        return given
    if path is not None:
        return read_text("--file", path)
    if on_a_terminal():
        raise UserError(f"{name}: give {name} or --file FILE, or pipe the text in")
    return _piped(name)


def read_prompt(prompt: str | None, path: str | None) -> str:
    """PROMPT of `generate`; without the newline that `echo` puts behind piped text."""
    given = read_given("PROMPT", prompt, path)
    if prompt is None and path is None:
        given = without_newline(given)
    if not given:
        raise UserError("PROMPT: it is empty; at least one character is needed")
    return given


def read_chat_prompt(prompt: str | None) -> str:
    """PROMPT of `chat`, what is piped in, or both with a blank line between them."""
    if prompt is None:
        parts = [_piped("PROMPT")]
    else:
        parts = [prompt, _piped("PROMPT") if _is_piped() else ""]
    parts[-1] = without_newline(parts[-1])
    joined = "\n\n".join(part for part in parts if part.strip())
    if not joined:
        raise UserError("PROMPT: it is empty")
    return joined


def without_newline(text: str) -> str:
    """Without one newline at the end, if there is one."""
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _is_piped() -> bool:
    """Whether something is piped in, or that is still to be seen by reading, which will not
    block."""
    if sys.stdin is None or sys.stdin.isatty():
        return False
    try:
        number = sys.stdin.fileno()
    except io.UnsupportedOperation:  # not of the system, but an object of whoever calls main()
        return True
    if stat.S_ISREG(os.fstat(number).st_mode) or select.select([number], [], [], _WAIT_S)[0]:
        return True
    note(f"(nothing came on stdin within {_WAIT_S:g} s; this answers PROMPT alone)")
    return False


def _piped(name: str) -> str:
    data = _stdin(name, _MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise UserError(f"{name}: stdin has more than {_MOST_BYTES >> 20} MiB; no context holds it")
    return _decoded(name, "stdin", data)


def _stdin(name: str, most: int = -1) -> bytes:
    if sys.stdin is None:  # closed by whoever started us
        return b""
    try:
        return sys.stdin.buffer.read(most)
    except OSError as error:
        raise UserError(f"{name}: cannot read stdin: {error.strerror}") from None


def _decoded(name: str, where: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: {where} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}"
            f" ({error.reason})"
        ) from None
