"""Words out of a file, made safe for a terminal: escape sequences could recolour it, rename its
window or overwrite what was printed before. Not for --json, where JSON escapes them."""

import re

_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # all but tab and newline, also those of 8 bits
    r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # which turn the direction of a line
    r"\ud800-\udfff]"
)


def printable(text: str) -> str:
    """`text` with control characters written out, such as \\x1b; newlines and tabs stay."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """`printable`, with any white space between words as one space."""
    return printable(" ".join(text.split()))
