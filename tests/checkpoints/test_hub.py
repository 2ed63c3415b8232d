import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from pronk.checkpoints import cache, hub, pull
from pronk.checkpoints.catalog import resolve_model
from pronk.core.errors import UserError

LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 1000,
    "tokenizer.json": b"{}",
    "LICENSE.txt": b"licence",
    "USE_POLICY.md": b"policy",
    "README.md": b"read me",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"p" * 1000,
}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


class FakeHub:
    """Repositories in memory; downloads lay them out as the hub's cache does."""

    def __init__(self, cache_folder: Path) -> None:
        self.cache = cache_folder
        self.repos: dict[str, dict[str, bytes]] = {}
        self.tags: list[str] = []
        self.error: Exception | None = None
        self.downloads: list[list[str]] = []

    def model_info(self, repo: str, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        if self.error:
            raise self.error
        siblings = [
            SimpleNamespace(rfilename=name, size=len(data))
            for name, data in self.repos[repo].items()
        ]
        return SimpleNamespace(siblings=siblings, tags=self.tags)

    def snapshot_download(self, repo: str, allow_patterns: list[str]) -> str:
        self.downloads.append(sorted(allow_patterns))
        if self.error:
            raise self.error
        return str(self.lay_out(repo, allow_patterns))

    def lay_out(self, repo: str, names: list[str], commit: str = "c0ffee") -> Path:
        folder = hub.repo_folder(repo)
        for sub in ("blobs", "refs"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        snapshot = folder / "snapshots" / commit
        for name in names:
            blob = folder / "blobs" / f"blob-of-{name.replace('/', '-')}"
            blob.write_bytes(self.repos[repo][name])
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        return snapshot


@pytest.fixture
def fake(caches: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(caches / "hub")
    fake.repos[LLAMA] = dict(FILES)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("names", "wanted", "chosen", "opened"),
    [
        (
            list(FILES), "",
            {"config.json", "model.safetensors", "tokenizer.json", "LICENSE.txt", "USE_POLICY.md"},
            "",
        ),
        (
            ["config.json", *SHARDS, "consolidated.safetensors", "chat_template.jinja", "a/b.json"],
            "", {"config.json", *SHARDS, "chat_template.jinja"}, "",
        ),
        (["config.json", "adapter.safetensors"], "", {"config.json", "adapter.safetensors"}, ""),
        (
            ["original/params.json", "original/consolidated.00.pth", "original/consolidated.01.pth",
             "original/tokenizer.model", "original/checklist.chk", "tokenizer.json", "LICENSE"],
            "",
            {"original/params.json", "original/consolidated.00.pth", "original/consolidated.01.pth",
             "original/tokenizer.model", "LICENSE"},
            "original",
        ),
        (
            ["params.json", "consolidated.00.pth", "tokenizer.model"], "",
            {"params.json", "consolidated.00.pth", "tokenizer.model"}, "",
        ),
        (["m.gguf", "README.md"], "", {"m.gguf"}, "m.gguf"),
        (["m-Q4.gguf", "m-Q8.gguf", "LICENSE"], "q4", {"m-Q4.gguf", "LICENSE"}, "m-Q4.gguf"),
        ([*FILES, "m-Q4.gguf"], "Q4", {"m-Q4.gguf", "LICENSE.txt", "USE_POLICY.md"}, "m-Q4.gguf"),
    ],
)  # fmt: skip
def test_files_of_a_repository(
    names: list[str], wanted: str, chosen: set[str], opened: str
) -> None:
    selection = hub.choose_files(names, "a/b", wanted)
    assert set(selection.names) == chosen
    assert len(selection.names) == len(chosen)
    assert selection.open_path == opened


@pytest.mark.parametrize(
    ("names", "wanted", "said"),
    [
        (["README.md", "pytorch_model.bin"], "", "a/b has no safetensors, pth or GGUF"),
        ([], "", "a/b has no safetensors"),
        (["model.safetensors"], "", "a/b has no safetensors"),  # without config.json
        (["a-Q4.gguf", "a-Q8.gguf"], "", r"2 GGUF files; say which as a/b:PART.*a-Q4.gguf, a-Q8"),
        (["a-Q4_K_S.gguf", "a-Q4_K_M.gguf"], "Q4", "2 GGUF files"),
        (["a-Q4.gguf"], "Q5", "no GGUF file with 'Q5' in its name"),
        ([f"{i}.gguf" for i in range(20)], "", r", \.\.\.\)"),
    ],
)
def test_repositories_with_nothing_or_too_much(names: list[str], wanted: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        hub.choose_files(names, "a/b", wanted)


def test_a_llama_model_is_pulled_with_its_licence(fake: FakeHub) -> None:
    told: list[tuple[int, int]] = []
    ref = resolve_model("llama-3.2-1b-instruct")
    model = pull.pull(ref, progress=lambda done, total, what: told.append((done, total)))
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "LICENSE.txt", "USE_POLICY.md"}
    assert {path.name for path in model.path.iterdir()} == wanted
    assert fake.downloads == [sorted(wanted)]
    assert (model.source, model.licence) == (LLAMA, "llama3.2")
    size = sum(len(FILES[name]) for name in wanted)
    assert model.nbytes == size
    assert told[-1] == (size, size)
    assert pull.pull(ref) == model
    assert pull.locate(LLAMA) == model.path
    assert len(fake.downloads) == 1
    assert cache.installed_models() == [model]


def test_the_licence_of_another_repository_comes_from_its_tags(fake: FakeHub) -> None:
    fake.repos["a/b"] = dict(FILES)
    fake.tags = ["transformers", "license:llama3.1"]
    assert pull.pull(resolve_model("a/b")).licence == "llama3.1"


def test_one_gguf_of_several(fake: FakeHub) -> None:
    fake.repos["a/b"] = {"m-Q4_0.gguf": b"four", "m-Q8_0.gguf": b"eight"}
    small, large = resolve_model("a/b:q4"), resolve_model("a/b:q8")
    model = pull.pull(small)
    assert model.path.read_bytes() == b"four"
    assert model.name == "a/b:q4"
    assert pull.pull(large).path.read_bytes() == b"eight"
    assert [m.name for m in cache.installed_models()] == ["a/b:q4", "a/b:q8"]
    pull.remove(small)
    assert not model.path.exists()
    assert [m.name for m in cache.installed_models()] == ["a/b:q8"]


def test_removing_a_repository_empties_the_hubs_cache(fake: FakeHub) -> None:
    ref = resolve_model(LLAMA)
    model = pull.pull(ref)
    assert pull.remove(ref) >= model.nbytes
    assert not hub.repo_folder(LLAMA).exists()
    assert cache.installed_models() == []


def test_a_snapshot_of_another_program_is_found_without_network(fake: FakeHub) -> None:
    fake.lay_out(LLAMA, ["config.json", "model.safetensors", "tokenizer.json"])
    fake.error = AssertionError("no network, please")
    found = pull.locate("llama-3.2-1b-instruct")
    assert (found / "model.safetensors").read_bytes() == b"w" * 1000
    assert [model.name for model in cache.installed_models()] == ["llama-3.2-1b-instruct"]


@pytest.mark.parametrize(
    "names",
    [
        ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"],
        ["config.json", "model.safetensors"],
        ["model.safetensors", "tokenizer.json"],
        ["config.json", "tokenizer.json"],
    ],
    ids=["a shard is missing", "no tokenizer", "no configuration", "no weights"],
)
def test_half_a_snapshot_is_no_model(fake: FakeHub, names: list[str]) -> None:
    fake.repos[LLAMA]["model-00001-of-00002.safetensors"] = b"1"
    fake.lay_out(LLAMA, names)
    with pytest.raises(UserError, match="is not on disk"):
        pull.locate(LLAMA)


def test_disk_full_is_said_before_the_download(fake: FakeHub, monkeypatch: Any) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=f"disk full: fetching {LLAMA} needs 17 MB free"):
        pull.pull(resolve_model(LLAMA))
    assert fake.downloads == []


def hub_error(kind: type[Exception], status: int, message: str = "no") -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(message, response=response)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            hub_error(errors.GatedRepoError, 403),
            f"{LLAMA} is gated: accept its licence at https://huggingface.co/{LLAMA} .*"
            "HF_TOKEN or run `hf auth login`",
        ),
        (
            hub_error(errors.RepositoryNotFoundError, 404),
            f"MODEL: no repository {LLAMA} that you may read .*HF_TOKEN",
        ),
        (hub_error(errors.HfHubHTTPError, 401), r"refuses access \(401\).*HF_TOKEN"),
        (hub_error(errors.HfHubHTTPError, 403), r"refuses access \(403\)"),
        (
            hub_error(errors.HfHubHTTPError, 500, "down\nagain"),
            "failed: down again; check the conn",
        ),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE forbids"),
        (errors.LocalEntryNotFoundError("cannot\nfind"), "failed: cannot find; check"),
        (OSError(errno.ENOSPC, "No space"), "disk full: .* the download goes on where it stopped"),
        (ConnectionError(), "failed: ConnectionError; check the connection"),
        (RuntimeError("x" * 999), "failed: x{200}; check"),
    ],
)
def test_every_failure_is_one_line(fake: FakeHub, error: Exception, said: str) -> None:
    fake.error = error
    with pytest.raises(UserError, match=said) as caught:
        pull.pull(resolve_model(LLAMA))
    assert "\n" not in str(caught.value)
    assert cache.installed_models() == []


def test_a_failure_during_the_download(fake: FakeHub, monkeypatch: Any) -> None:
    def broken(repo: str, allow_patterns: list[str]) -> str:
        raise hub_error(errors.GatedRepoError, 403)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(UserError, match="is gated"):
        pull.pull(resolve_model(LLAMA))
    assert cache.installed_models() == []
