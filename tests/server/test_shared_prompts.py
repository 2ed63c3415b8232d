"""What one key's prompts have left in the cache is not there for another's."""

from pathlib import Path

import httpx
import pytest
from live import live_server

from engine.tiny_models import write_gguf
from pronk.server.keys import KeyFile, change_keys, new_key


def keys_of(path: Path, *names: str) -> list[str]:
    secrets = []
    for name in names:
        secret, key = new_key(name=name, scopes=["inference"], now=0)

        def add(file: KeyFile, secret: str = secret, key: object = key) -> KeyFile:
            return file.added(secret, key)  # type: ignore[arg-type]

        change_keys(path, add, create=True)
        secrets.append(secret)
    return secrets


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages"])
def test_prompts_of_two_keys(tmp_path: Path, share: bool, route: str) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", **{"llama.context_length": 2048})
    alice, bob = keys_of(tmp_path / "keys.json", "alice", "bob")
    body = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "x" * 400}]}

    def cached(url: str, key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        usage = httpx.post(f"{url}{route}", json=body, headers=headers).json()["usage"]
        details = usage.get("prompt_tokens_details", usage)
        return int(details.get("cached_tokens", details.get("cache_read_input_tokens")))

    with live_server(
        [model], tmp_path / "data", api_key_file=tmp_path / "keys.json", share_prompts=share
    ) as live:
        assert cached(live.url, alice) == 0
        assert cached(live.url, alice) > 300
        assert (cached(live.url, bob) > 300) is share


def test_a_key_for_some_models_hears_of_those_only(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    secret, key = new_key(name="carol", scopes=["inference"], models=["mine"], now=0)
    change_keys(tmp_path / "keys.json", lambda file: file.added(secret, key), create=True)
    with live_server([model], tmp_path / "data", api_key_file=tmp_path / "keys.json") as live:
        answer = httpx.post(
            f"{live.url}/v1/chat/completions",
            json={"model": "other", "messages": [{"role": "user", "content": "x"}]},
            headers={"Authorization": f"Bearer {secret}"},
        )
    assert answer.status_code == 403
    assert "its models: mine" in answer.json()["error"]["message"]
    assert "tiny" not in answer.text
