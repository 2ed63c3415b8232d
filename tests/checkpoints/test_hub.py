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
from pronk.core.errors import PronkError, UserError

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
        self.commit = "c0ffee"
        self.stop_after: int | None = None

    def model_info(self, repo: str, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        if self.error:
            raise self.error
        siblings = [
            SimpleNamespace(rfilename=name, size=len(data))
            for name, data in self.repos[repo].items()
        ]
        return SimpleNamespace(siblings=siblings, tags=self.tags, sha=self.commit)

    def snapshot_download(self, repo: str, revision: str, allow_patterns: list[str]) -> str:
        """Like the real one it notes no branch when it is asked for a commit."""
        self.downloads.append(sorted(allow_patterns))
        if self.error:
            raise self.error
        names = sorted(allow_patterns)
        snapshot = self.place(repo, names[: self.stop_after], revision)
        if self.stop_after is not None:
            raise ConnectionError("the line broke")
        return str(snapshot)

    def lay_out(self, repo: str, names: list[str], commit: str = "c0ffee") -> Path:
        """A snapshot of another program."""
        refs = hub.repo_folder(repo) / "refs"
        refs.mkdir(parents=True, exist_ok=True)
        (refs / "main").write_text(commit)
        return self.place(repo, names, commit)

    def place(self, repo: str, names: list[str], commit: str) -> Path:
        folder = hub.repo_folder(repo)
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        snapshot = folder / "snapshots" / commit
        for name in names:
            blob = folder / "blobs" / f"blob-of-{name.replace('/', '-')}"
            if not blob.exists():
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


SPLIT = ["Q8/m-Q8-00001-of-00002.gguf", "Q8/m-Q8-00002-of-00002.gguf"]
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
        (["README.md", *SPLIT], "", set(SPLIT), SPLIT[0]),
        ([*SPLIT, "m-Q4.gguf"], "q8", set(SPLIT), SPLIT[0]),
        ([*SPLIT, "Q8/m-Q8.gguf"], "of-00002", set(SPLIT), SPLIT[0]),
        ([*SPLIT, "m-Q4-00001-of-00003.gguf", "LICENSE"], "q8", {*SPLIT, "LICENSE"}, SPLIT[0]),
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
        (["a-Q4.gguf", *SPLIT], "", r"2 GGUF files; .*m-Q8-\*-of-00002.gguf, a-Q4.gguf"),
        ([SPLIT[1]], "", r"only some parts of Q8/m-Q8-\*-of-00002.gguf: m-Q8-00002-of-00002"),
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


def test_removing_a_model_removes_its_packed_weights(fake: FakeHub) -> None:
    """Also where the model's path is a link, which is gone by then."""
    fake.repos["a/b"] = {"m-Q4_0.gguf": b"four", "m-Q8_0.gguf": b"eight"}
    small, large = resolve_model("a/b:q4"), resolve_model("a/b:q8")
    layouts = [cache.layout_path(pull.pull(ref).path) for ref in (small, large)]
    for layout in layouts:
        layout.parent.mkdir(parents=True, exist_ok=True)
        layout.write_bytes(bytes(5000))
    kept = [cache.kv_folder(pull.pull(ref).path, "00") for ref in (small, large)]
    for folder in kept:
        folder.mkdir(parents=True)
        (folder / "block").write_bytes(bytes(700))
    assert pull.remove(small) >= 5000
    assert [layout.exists() for layout in layouts] == [False, True]
    assert [folder.exists() for folder in kept] == [False, True]


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


WHOLE = ["config.json", "model.safetensors", "tokenizer.json"]


def hub_files(repo: str = LLAMA) -> set[str]:
    folder = hub.repo_folder(repo)
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_all_parts_of_a_split_gguf_are_pulled(fake: FakeHub) -> None:
    fake.repos["a/b"] = {name: name.encode() for name in [*SPLIT, "m-Q4.gguf"]}
    model = pull.pull(resolve_model("a/b:q8"))
    assert fake.downloads == [SPLIT]
    assert model.path.name == "m-Q8-00001-of-00002.gguf"
    assert (model.path.parent / "m-Q8-00002-of-00002.gguf").read_text() == SPLIT[1]


def test_a_split_gguf_of_another_program_must_be_whole(fake: FakeHub) -> None:
    fake.repos["a/b"] = dict.fromkeys([*SPLIT, "m-Q4.gguf"], b"x")
    fake.lay_out("a/b", [SPLIT[0], "m-Q4.gguf"])
    with pytest.raises(UserError, match="is not on disk"):
        pull.locate("a/b:q8")
    assert pull.locate("a/b:q4").name == "m-Q4.gguf"
    fake.lay_out("a/b", SPLIT)
    assert pull.locate("a/b:q8").name == "m-Q8-00001-of-00002.gguf"


def test_the_commit_that_was_listed_is_downloaded(fake: FakeHub) -> None:
    """And its branch is noted, so that programs without network find it."""
    fake.commit = "abc123"
    model = pull.pull(resolve_model(LLAMA))
    assert model.path.name == "abc123"
    assert (hub.repo_folder(LLAMA) / "refs" / "main").read_text() == "abc123"


def test_a_model_of_another_program_is_not_removed(fake: FakeHub) -> None:
    fake.lay_out(LLAMA, WHOLE)
    before = hub_files()
    ref = resolve_model(LLAMA)
    for _ in range(2):  # without a manifest, and with one
        with pytest.raises(UserError, match="was not fetched by pull but by another program"):
            pull.remove(ref)
    assert hub_files() == before
    assert pull.locate(LLAMA).name == "c0ffee"


def test_only_what_was_fetched_is_removed(fake: FakeHub) -> None:
    """Another program had the configuration, and needs the tokenizer for a snapshot of its own."""
    fake.lay_out(LLAMA, ["config.json"])
    ref = resolve_model(LLAMA)
    pull.pull(ref)
    fake.lay_out(LLAMA, ["tokenizer.json"], "0ther")
    kept = sum(len(FILES[name]) for name in ("config.json", "tokenizer.json"))
    wanted = [*WHOLE, "LICENSE.txt", "USE_POLICY.md"]
    freed = pull.remove(ref)
    assert freed >= sum(len(FILES[name]) for name in wanted) - kept
    assert hub_files() == {
        "refs/main", "blobs/blob-of-config.json", "blobs/blob-of-tokenizer.json",
        "snapshots/c0ffee/config.json", "snapshots/0ther/tokenizer.json",
    }  # fmt: skip
    with pytest.raises(UserError, match="is not on disk"):
        pull.locate(LLAMA)


def test_what_a_first_try_fetched_is_still_ours(fake: FakeHub) -> None:
    fake.lay_out(LLAMA, ["config.json"])
    fake.stop_after = 3
    ref = resolve_model(LLAMA)
    with pytest.raises(PronkError, match="the line broke"):
        pull.pull(ref)
    fake.stop_after = None
    model = pull.pull(ref)
    theirs = {Path(file.path).name for file in model.files if not file.fetched}
    assert theirs == {"config.json"}
    pull.remove(ref)
    assert hub_files() == {
        "refs/main", "blobs/blob-of-config.json", "snapshots/c0ffee/config.json",
    }  # fmt: skip


def test_a_pull_that_fetched_nothing_claims_nothing(fake: FakeHub, caches: Path) -> None:
    fake.stop_after = 0
    with pytest.raises(PronkError, match="the line broke"):
        pull.pull(resolve_model(LLAMA))
    fake.lay_out(LLAMA, WHOLE)
    with pytest.raises(UserError, match="was not fetched by pull"):
        pull.remove(resolve_model(LLAMA))


def test_a_pull_killed_before_its_manifest_is_ours(fake: FakeHub, monkeypatch: Any) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    ref = resolve_model(LLAMA)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            pull.pull(ref)
    assert pull.find(ref) is not None
    pull.remove(ref)
    assert hub_files() == set()


def test_two_models_of_a_repository_share_its_licence(fake: FakeHub) -> None:
    fake.repos["a/b"] = {"m-Q4.gguf": b"four", "m-Q8.gguf": b"eight", "LICENSE": b"words"}
    small, large = resolve_model("a/b:q4"), resolve_model("a/b:q8")
    pull.pull(small)
    pull.pull(large)
    pull.remove(small)
    assert [model.name for model in cache.installed_models()] == ["a/b:q8"]
    pull.remove(large)
    assert not hub.repo_folder("a/b").exists()


def test_a_model_that_lost_a_file_can_be_removed(fake: FakeHub) -> None:
    ref = resolve_model(LLAMA)
    (pull.pull(ref).path / "config.json").unlink()
    assert pull.find(ref) is None
    pull.remove(ref)
    assert hub_files() == {"blobs/blob-of-config.json"}  # nothing tells any more whose it is


def test_reading_needs_no_cache_that_can_be_written(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.lay_out(LLAMA, WHOLE)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert pull.locate(LLAMA).name == "c0ffee"
    assert [model.name for model in pull.on_disk()] == ["llama-3.2-1b-instruct"]


def test_a_cache_that_cannot_be_looked_into_holds_no_models(monkeypatch: Any) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "glob", denied)
    assert cache.installed_models() == []


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
    with pytest.raises(PronkError, match=said) as caught:
        pull.pull(resolve_model(LLAMA))
    assert "\n" not in str(caught.value)
    assert cache.installed_models() == []


def test_a_failure_during_the_download(fake: FakeHub, monkeypatch: Any) -> None:
    def broken(repo: str, revision: str, allow_patterns: list[str]) -> str:
        raise hub_error(errors.GatedRepoError, 403)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(UserError, match="is gated"):
        pull.pull(resolve_model(LLAMA))
    assert cache.installed_models() == []
