import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronk.checkpoints.catalog import (
    CATALOG,
    DEFAULT_MODEL,
    HubSource,
    WheelSource,
    close_names,
    find_entry,
    licence_by_name,
    licence_terms,
    looks_like_model,
    resolve_model,
)
from pronk.checkpoints.open import open_checkpoint
from pronk.core.errors import UserError


def test_names_and_aliases_belong_to_one_entry_each() -> None:
    names = [n.casefold() for e in CATALOG.values() for n in {e.name, *map(str.lower, e.aliases)}]
    assert len(names) == len(set(names))
    assert all(name == entry.name == name.lower() for name, entry in CATALOG.items())


@pytest.mark.parametrize("entry", CATALOG.values(), ids=lambda entry: entry.name)
def test_an_entry_is_found_by_each_of_its_names(entry) -> None:
    for name in (entry.name, *entry.aliases, entry.name.upper()):
        ref = resolve_model(name)
        assert ref.entry is entry
        assert ref.name == entry.name
        assert ref.path is None
        assert ref.repo == (entry.source.repo if isinstance(entry.source, HubSource) else None)


def test_llama_entries_state_what_the_reference_says() -> None:
    entry = find_entry("meta-llama/Meta-Llama-3.1-8B-Instruct-Turbo")
    assert entry is not None
    assert entry.source == HubSource("meta-llama/Llama-3.1-8B-Instruct", gated=True)
    assert (entry.parameters, entry.nbytes, entry.context) == (
        8_030_261_248,
        16_060_522_496,
        131072,
    )
    assert {e.licence.id for e in CATALOG.values()} == {
        "apache-2.0",
        "llama3.1",
        "llama3.2",
        "llama3.3",
    }


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("smollm2:135m", "smollm2-135m"),
        ("smollm2:135m-instruct", "smollm2-135m"),
        ("llama3.1", "llama-3.1-8b-instruct"),
        ("llama3.1:8b", "llama-3.1-8b-instruct"),
        ("llama3.1:8b-instruct", "llama-3.1-8b-instruct"),
        ("llama3.1:8b-text", "llama-3.1-8b"),
        ("Llama3.1:70B", "llama-3.1-70b-instruct"),
        ("llama3.1:405b", "llama-3.1-405b-instruct"),
        ("llama3.2", "llama-3.2-3b-instruct"),
        ("llama3.2:1b", "llama-3.2-1b-instruct"),
        ("llama3.2:1b-text", "llama-3.2-1b"),
        ("llama3.3", "llama-3.3-70b-instruct"),
        ("llama-guard3", "llama-guard-3-8b"),
        ("llama-guard3:1b", "llama-guard-3-1b"),
    ],
)
def test_names_of_ollama(name: str, entry: str) -> None:
    assert resolve_model(name).entry is CATALOG[entry]


def test_the_default_model_is_what_the_catalog_says(smollm2_path: Path) -> None:
    entry = CATALOG[DEFAULT_MODEL]
    assert isinstance(entry.source, WheelSource)
    data = smollm2_path.read_bytes()
    assert len(data) == entry.nbytes
    assert hashlib.sha256(data).hexdigest() == entry.source.sha256
    with open_checkpoint(smollm2_path) as checkpoint:
        assert checkpoint.format == entry.format
        assert checkpoint.config.n_params == entry.parameters
        assert checkpoint.config.context == entry.context


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("Llama-3.1-8B-Instruct", "llama3.1"),
        ("Meta-Llama-3.1-70B-Instruct-Q4_K_M", "llama3.1"),
        ("llama3.2", "llama3.2"),
        ("Llama 3.3 70B", "llama3.3"),
        ("Hermes-3-Llama-3_1-8B", "llama3.1"),
        ("Llama-Guard-3-8B", "llama3.1"),
        ("llama-guard-3-1b", "llama3.2"),
        ("smollm2-135m", None),
        ("llama", None),
        ("llama-2-7b", None),
        ("llama-3.10", None),
        ("TinyLlama-1.1B", None),
        ("ollama3.1", None),
    ],
)
def test_licence_by_name(name: str, licence: str | None) -> None:
    found = licence_by_name(name)
    assert (found.id if found else None) == licence
    assert licence_by_name("x", name) == found


@pytest.mark.parametrize("version", ["3.1", "3.2", "3.3"])
def test_llama_terms_have_the_exact_notice_and_the_policy(version: str) -> None:
    licence = licence_by_name(f"llama{version}")
    assert licence is not None
    terms = licence_terms(licence)
    assert terms[0] == "Built with Llama"
    assert terms[1] == (
        f"Llama {version} is licensed under the Llama {version} Community License, Copyright ©"
        " Meta Platforms, Inc. All Rights Reserved."
    )
    assert any(f"llama{version.replace('.', '_')}/use-policy" in line for line in terms)
    assert any("700 million" in line for line in terms)


def test_other_licences_ask_for_nothing() -> None:
    assert licence_terms(CATALOG[DEFAULT_MODEL].licence) == []


def test_a_path_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Llama-3.2-1B").mkdir()
    monkeypatch.chdir(tmp_path)
    for text in ("Llama-3.2-1B/", str(tmp_path / "Llama-3.2-1B"), Path("Llama-3.2-1B")):
        ref = resolve_model(text)
        assert ref.path is not None
        assert ref.path.samefile(tmp_path / "Llama-3.2-1B")
        assert ref.name == "Llama-3.2-1B"
        assert ref.licence is not None
        assert ref.licence.id == "llama3.2"
    # A name of the catalog is never taken over by a folder that is called like it.
    assert resolve_model("Llama-3.2-1B").path is None


def test_hub_ids() -> None:
    ref = resolve_model("someone/Some-Model.v1")
    assert (ref.repo, ref.select, ref.name) == (
        "someone/Some-Model.v1",
        "",
        "someone/Some-Model.v1",
    )
    assert ref.licence is None
    ref = resolve_model("someone/Llama-3.1-8B-GGUF:Q4_K_M")
    assert (ref.repo, ref.select) == ("someone/Llama-3.1-8B-GGUF", "Q4_K_M")
    assert ref.name == "someone/Llama-3.1-8B-GGUF:Q4_K_M"
    assert ref.licence is not None
    assert resolve_model("meta-llama/llama-3.1-8b").entry is CATALOG["llama-3.1-8b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("smollm2-135", "did you mean smollm2-135m"),
        ("lama-3.1-8b-instruct", "did you mean llama-3.1-8b-instruct"),
        ("qqqq", "`pronk list --all`"),
        ("", "no model name"),
        ("  ", "no model name"),
        ("./nothing.gguf", "no such file or folder: ./nothing.gguf"),
        ("models/x.gguf", "no such file"),
        ("a/b/c", "no such file"),
        ("~nobody-here/x", "no such file"),
        ("x" * 5000, "unknown model"),
        ("/" + "x" * 5000, "no such file"),
        ("a\0b", "no model name"),
    ],
)
def test_what_is_no_model_says_what_would_work(text: str, said: str) -> None:
    with pytest.raises(UserError, match=r"^MODEL: ") as caught:
        resolve_model(text)
    assert said in str(caught.value)


@given(st.text())
def test_any_text_is_a_model_or_one_clear_line(text: str) -> None:
    try:
        ref = resolve_model(text)
    except UserError as error:
        message = str(error)
    else:
        assert ref.entry or ref.repo or (ref.path and ref.path.exists())
        return
    assert message.splitlines() == [message]


def test_words_that_can_only_mean_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my model").mkdir()
    for text in ("a/b", "x.gguf", "./x", "my model", "a/b:Q4_0"):
        assert looks_like_model(text), text
    for text in ("hello", "What is 1/2 of x.gguf", "what is a/b/c", "is it /etc/passwd ?"):
        assert not looks_like_model(text), text


def test_close_names_are_close() -> None:
    assert close_names("smollm") == ["smollm2-135m"]
    assert close_names("hello") == []
    assert len(close_names("llama-3.1")) == 3
