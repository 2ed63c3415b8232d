"""Models of the Hugging Face hub: which files of a repository to take, and what went wrong.

The transfer itself, its resume and its checksums are `huggingface_hub`'s; files land in its cache
(`HF_HOME`), where other programs find them too.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pronk.checkpoints import cache
from pronk.checkpoints.cache import Installed
from pronk.checkpoints.catalog import ModelRef, licence_by_name
from pronk.core.errors import CheckpointError, PronkError, UserError
from pronk.core.files import read_json, read_regular_file
from pronk.core.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_SPARE = 16 << 20


@dataclass(frozen=True, slots=True)
class Selection:
    """The files of a repository that make up one model."""

    names: tuple[str, ...]
    open_path: str
    """What to open, relative to the snapshot folder; "" is the folder itself."""


def choose_files(names: list[str], repo: str, wanted: str = "") -> Selection:
    """Of all files of a repository those of the Hugging Face format, else of Meta's, else its
    GGUF file; `wanted` asks for the GGUF file whose name contains it.

    A GGUF split into parts counts as one. Raises UserError where there is nothing to run, or
    several GGUF files and no word on which.
    """
    papers = [name for name in names if re.match(r"(LICENSE|USE_POLICY|NOTICE)", name, re.I)]
    if wanted:
        return _one_gguf(names, repo, wanted, papers)
    weights = [name for name in names if re.fullmatch(r"[^/]+\.safetensors", name)]
    # A few repositories carry the weights a second time as one file of another layout.
    weights = [name for name in weights if name.startswith("model")] or weights
    if weights and "config.json" in names:
        small = re.compile(r"[^/]+\.json|[^/]+\.jinja|tokenizer\.model")
        return Selection((*weights, *filter(small.fullmatch, names), *papers), "")
    for folder in ("", "original/"):
        if f"{folder}params.json" in names:
            meta = re.compile(
                re.escape(folder) + r"(consolidated\.\d+\.pth|params\.json|tokenizer\.model)"
            )
            return Selection((*filter(meta.fullmatch, names), *papers), folder.rstrip("/"))
    return _one_gguf(names, repo, wanted, papers)


def _one_gguf(names: list[str], repo: str, wanted: str, papers: list[str]) -> Selection:
    splits = _split_ggufs(names)
    found = sorted(
        head for head, parts in splits.items() if any(wanted.lower() in n.lower() for n in parts)
    )
    if len(found) == 1:
        parts = splits[found[0]]
        if not _has_all_shards(parts):
            raise UserError(f"MODEL: {repo} has only some parts of {found[0]}: {_few(parts)}")
        return Selection((*parts, *papers), parts[0])
    if not found:
        asked = f"GGUF file with {wanted!r} in its name" if wanted else "safetensors, pth or GGUF"
        raise UserError(f"MODEL: {repo} has no {asked}")
    raise UserError(
        f"MODEL: {repo} has {len(found)} GGUF files; say which as {repo}:PART-OF-ITS-NAME"
        f" ({_few(found)})"
    )


def _split_ggufs(names: list[str]) -> dict[str, list[str]]:
    """The GGUF files, each with its parts in order: NAME-00001-of-00003.gguf is one of
    NAME-*-of-00003.gguf, a file that is whole its own only part."""
    splits: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf"):
            head = re.sub(r"-\d{5}(?=-of-\d{5}\.\w+$)", "-*", name)
            splits.setdefault(head, []).append(name)
    return splits


def _few(names: list[str]) -> str:
    return ", ".join(Path(name).name for name in names[:8]) + (", ..." if len(names) > 8 else "")


def fetch(ref: ModelRef, progress: Progress) -> Installed:
    """Downloads what is missing of a repository and records it."""
    assert ref.repo
    info = _model_info(ref.repo)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    chosen = choose_files(list(sizes), ref.repo, ref.select)
    with _noting_others(ref) as others:
        wanted = {name: sizes[name] for name in chosen.names}
        snapshot = _download(ref.repo, info.sha, wanted, progress)
    licence = ref.licence or licence_by_name(*(info.tags or []))
    model = _describe(ref, snapshot, chosen, licence.id if licence else "", others)
    cache.record(ref, model)
    _note(ref).unlink(missing_ok=True)
    return model


def repo_folder(repo: str) -> Path:
    """Where the hub's cache keeps a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def find_snapshot(ref: ModelRef) -> Installed | None:
    """A complete copy in the hub's cache that has no manifest: another program left it, or `pull`
    was killed at its very end. It is recorded where that is possible."""
    assert ref.repo
    folder = repo_folder(ref.repo)
    try:
        commit = read_regular_file(folder / "refs" / "main", 1000).decode().strip()
        snapshot = folder / "snapshots" / commit
        names = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
        chosen = choose_files(names, ref.repo, ref.select)
        if not (_has_all_shards(chosen.names) and _has_tokenizer(chosen)):
            return None
        licence = ref.licence.id if ref.licence else ""
        model = _describe(ref, snapshot, chosen, licence, _read_note(ref))
    except (OSError, ValueError, UserError):
        return None
    with contextlib.suppress(OSError):  # a cache that cannot be written: looked up again next time
        cache.record(ref, model)
    return model


def _describe(
    ref: ModelRef, snapshot: Path, chosen: Selection, licence: str, others: set[str] | None
) -> Installed:
    """`others`: files that `pull` did not fetch; None: all of them."""
    assert ref.repo
    links = [snapshot / name for name in chosen.names]
    files = {link: others is not None and str(link.resolve()) not in others for link in links}
    return cache.describe(ref, snapshot / chosen.open_path, ref.repo, licence, files)


def _note(ref: ModelRef) -> Path:
    """Names what the hub's cache had of a repository before a `pull` that is not finished. Without
    it a `pull` that goes on would take its own files of the first try for another program's."""
    return cache.cache_root() / "partial" / f"{cache.model_folder(ref).name}.json"


def _read_note(ref: ModelRef) -> set[str] | None:
    try:
        return {str(name) for name in read_json(_note(ref))["others"]}
    except (CheckpointError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _noting_others(ref: ModelRef) -> Iterator[set[str]]:
    """Gives the files of the repository that `pull` did not fetch, and notes them until the model
    is recorded, or if nothing comes of the download."""
    assert ref.repo
    folder, note, others = repo_folder(ref.repo), _note(ref), _read_note(ref)
    if others is None:
        others = _files_in(folder) - _fetched_of(ref.repo)
        note.parent.mkdir(parents=True, exist_ok=True)
        cache.write_atomically(note, json.dumps({"others": sorted(others)}).encode())
    try:
        yield others
    except BaseException:
        if _files_in(folder) <= others | _fetched_of(ref.repo):
            note.unlink(missing_ok=True)
        raise


def _files_in(folder: Path) -> set[str]:
    """The weights and other files that the hub's cache has of a repository, links followed."""
    paths = (path for sub in ("blobs", "snapshots") for path in (folder / sub).rglob("*"))
    return {str(path.resolve()) for path in paths if path.is_file()}


def _fetched_of(repo: str) -> set[str]:
    """What `pull` fetched of a repository for this and other models."""
    models = [model for model in cache.installed_models() if model.source == repo]
    return {
        str(Path(file.path).resolve()) for model in models for file in model.files if file.fetched
    }


def _has_all_shards(names: Sequence[str]) -> bool:
    """Whether every `...-0000i-of-0000n...` file has its n - 1 siblings."""
    for name in names:
        if match := re.search(r"-(\d{5})-of-(\d{5})(?=\.)", name):
            head, tail = name[: match.start()], name[match.end() :]
            shards = range(1, int(match[2]) + 1)
            if any(f"{head}-{i:05d}-of-{match[2]}{tail}" not in names for i in shards):
                return False
    return True


def _has_tokenizer(chosen: Selection) -> bool:
    names = {Path(name).name for name in chosen.names}
    return chosen.open_path.endswith(".gguf") or bool(names & {"tokenizer.json", "tokenizer.model"})


def remove(ref: ModelRef, found: Installed) -> int:
    """Deletes what `pull` fetched of a model from the hub's cache; returns the bytes freed. What
    another program fetched stays, and what another model of ours or another snapshot uses.

    Raises UserError when `pull` fetched nothing of it.
    """
    assert ref.repo
    folder = repo_folder(ref.repo)
    if not any(file.fetched for file in found.files):
        raise UserError(
            f"NAME: {ref.name} was not fetched by pull but by another program; remove it there"
            f" ({folder})"
        )
    others = [model for model in cache.installed_models() if model.name != ref.name]
    needed = {file.path for model in others for file in model.files}
    links = [Path(file.path) for file in found.files if file.fetched and file.path not in needed]
    freed = _remove_links(folder, [link for link in links if link.exists()])
    _tidy(folder)
    _note(ref).unlink(missing_ok=True)
    return freed


def _remove_links(folder: Path, links: list[Path]) -> int:
    """Deletes files of a snapshot and the blobs that nothing else links to."""
    blobs = {blob: blob.stat().st_size for blob in map(Path.resolve, links)}
    for link in links:
        link.unlink()
    linked = {path.resolve() for path in (folder / "snapshots").rglob("*") if path.is_symlink()}
    unused = blobs.keys() - linked
    for blob in unused:
        blob.unlink(missing_ok=True)  # where links are not possible it was the file itself
    return sum(blobs[blob] for blob in unused)


def _tidy(folder: Path) -> None:
    """Takes away folders that are empty and branches that point to no snapshot."""
    for parent, _, _ in os.walk(folder / "snapshots", topdown=False):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(parent)
    if not _files_in(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for ref in (folder / "refs").rglob("*"):
        if ref.is_file() and not (folder / "snapshots" / ref.read_text().strip()).is_dir():
            ref.unlink()


def _model_info(repo: str) -> "ModelInfo":
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(repo, files_metadata=True)
    except Exception as error:  # whatever its HTTP library raises today
        raise _hub_error(repo, error) from error


def _download(repo: str, commit: str | None, sizes: Mapping[str, int], progress: Progress) -> Path:
    """The snapshot folder of the commit whose files were listed (None: of the newest)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    folder = repo_folder(repo)
    total = sum(sizes.values())
    have = cache.folder_bytes(folder / "blobs")
    cache.require_free(folder, max(total - have, 0) + _SPARE, f"fetching {repo}")
    disable_progress_bars()
    try:
        with cache.watched(folder / "blobs", total, f"fetching {repo}", progress):
            snapshot = snapshot_download(repo, revision=commit, allow_patterns=list(sizes))
        if commit:
            # Programs without a network look for a branch; the hub notes only one it was asked for.
            (folder / "refs").mkdir(exist_ok=True)
            cache.write_atomically(folder / "refs" / "main", commit.encode())
    except Exception as error:  # as above
        raise _hub_error(repo, error) from error
    return Path(snapshot)


def _hub_error(repo: str, error: Exception) -> PronkError:
    """One line on why the hub did not give a repository, and what the user can do about it. Only
    what the user has to put right is a UserError; a network that fails is not."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    token = (
        "put a token of https://huggingface.co/settings/tokens into HF_TOKEN or run `hf auth login`"
    )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{repo} is gated: accept its licence at {page} with your Hugging Face account, then"
            f" {token}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"MODEL: no repository {repo} that you may read ({page}); if it is private or gated,"
            f" accept its licence there and {token}"
        )
    if status in (401, 403):
        return UserError(f"{repo}: the hub refuses access ({status}); see {page} and {token}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"disk full: no space left in {repo_folder(repo)}; free some and pull again, the"
            " download goes on where it stopped"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(f"{repo} is not on disk and HF_HUB_OFFLINE forbids to fetch it")
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return PronkError(
        f"fetching {repo} failed: {reason}; check the connection and pull again, the download goes"
        " on where it stopped"
    )
