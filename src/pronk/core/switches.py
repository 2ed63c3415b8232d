"""Environment variables that switch something on or off."""

import os

from pronk.core.errors import UserError


def switch(name: str, *, default: bool) -> bool:
    """Whether the variable is 1 and not 0; `default` where it is unset or empty. Raises UserError
    for any other value."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise UserError(f"{name}: {value!r} is neither 0 nor 1; unset it for the default")
    return value == "1" if value else default
