"""Models of the Hugging Face hub: which files of a repository to take, and what went wrong.

The transfer itself, its resume and its checksums are `huggingface_hub`'s; files land in its cache
(`HF_HOME`), where other programs find them too.
"""

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pronk.checkpoints import cache
from pronk.checkpoints.cache import Installed
from pronk.checkpoints.catalog import ModelRef, licence_by_name
from pronk.core.errors import UserError
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

    Raises UserError where there is nothing to run, or several GGUF files and no word on which.
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
    found = sorted(n for n in names if n.lower().endswith(".gguf") and wanted.lower() in n.lower())
    if len(found) == 1:
        return Selection((found[0], *papers), found[0])
    if not found:
        asked = f"GGUF file with {wanted!r} in its name" if wanted else "safetensors, pth or GGUF"
        raise UserError(f"MODEL: {repo} has no {asked}")
    listed = ", ".join(Path(name).name for name in found[:8]) + (", ..." if len(found) > 8 else "")
    raise UserError(
        f"MODEL: {repo} has {len(found)} GGUF files; say which as {repo}:PART-OF-ITS-NAME"
        f" ({listed})"
    )


def fetch(ref: ModelRef, progress: Progress) -> Installed:
    """Downloads what is missing of a repository and records it."""
    assert ref.repo
    info = _model_info(ref.repo)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    chosen = choose_files(list(sizes), ref.repo, ref.select)
    snapshot = _download(ref.repo, {name: sizes[name] for name in chosen.names}, progress)
    files = [snapshot / name for name in chosen.names]
    licence = ref.licence or licence_by_name(*(info.tags or []))
    return cache.record(
        ref, snapshot / chosen.open_path, ref.repo, licence.id if licence else "", files
    )


def repo_folder(repo: str) -> Path:
    """Where the hub's cache keeps a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def find_snapshot(ref: ModelRef) -> Installed | None:
    """A complete copy that another program left in the hub's cache; recorded when there is one."""
    assert ref.repo
    folder = repo_folder(ref.repo)
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
        names = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
        chosen = choose_files(names, ref.repo, ref.select)
        if not (_has_all_shards(names) and _has_tokenizer(chosen)):
            return None
    except (OSError, ValueError, UserError):
        return None
    files = [snapshot / name for name in chosen.names]
    licence = ref.licence.id if ref.licence else ""
    return cache.record(ref, snapshot / chosen.open_path, ref.repo, licence, files)


def _has_all_shards(names: list[str]) -> bool:
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


def remove(ref: ModelRef, found: Installed | None) -> int:
    """Deletes a repository from the hub's cache, or the one file of it that `ref` selects;
    returns the bytes freed."""
    if ref.select:
        return sum(_remove_file(Path(file.path)) for file in found.files) if found else 0
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return 0
    for cached_repo in cached.repos:
        if cached_repo.repo_id == ref.repo and cached_repo.repo_type == "model":
            revisions = (revision.commit_hash for revision in cached_repo.revisions)
            cached.delete_revisions(*revisions).execute()
            return cached_repo.size_on_disk
    return 0


def _remove_file(link: Path) -> int:
    """Deletes a file of a snapshot and the blob that it links to."""
    blob = link.resolve()
    freed = blob.stat().st_size
    link.unlink()
    blob.unlink(missing_ok=True)
    return freed


def _model_info(repo: str) -> "ModelInfo":
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(repo, files_metadata=True)
    except Exception as error:  # whatever its HTTP library raises today
        raise _hub_error(repo, error) from error


def _download(repo: str, sizes: Mapping[str, int], progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    folder = repo_folder(repo)
    total = sum(sizes.values())
    have = cache.folder_bytes(folder / "blobs")
    cache.require_free(folder, max(total - have, 0) + _SPARE, f"fetching {repo}")
    disable_progress_bars()
    try:
        with cache.watched(folder / "blobs", total, f"fetching {repo}", progress):
            return Path(snapshot_download(repo, allow_patterns=list(sizes)))
    except Exception as error:  # as above
        raise _hub_error(repo, error) from error


def _hub_error(repo: str, error: Exception) -> UserError:
    """One line on why the hub did not give a repository, and what the user can do about it."""
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
    return UserError(
        f"fetching {repo} failed: {reason}; check the connection and pull again, the download goes"
        " on where it stopped"
    )
