"""Environment variables that are 0 or 1."""

import pytest

from pronk.core.errors import UserError
from pronk.core.switches import switch


@pytest.mark.parametrize("default", [False, True])
def test_switch(default: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRONK_X", raising=False)
    assert switch("PRONK_X", default=default) is default
    for value, meaning in (("", default), ("0", False), ("1", True)):
        monkeypatch.setenv("PRONK_X", value)
        assert switch("PRONK_X", default=default) is meaning
    for value in ("true", "on", "00", " 1", "-1"):
        monkeypatch.setenv("PRONK_X", value)
        with pytest.raises(UserError, match=f"PRONK_X: '{value}' is neither 0 nor 1"):
            switch("PRONK_X", default=default)
