"""lm-eval, as its users run it, over HTTP: what it finds for a small task of our own is what
`LLM.score` finds."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pronk.engine.llm import LLM
from pronk.text.tokenizer import Tokenizer
from server.live import live_server

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("no lm-eval: pip install 'lm_eval[api]'", allow_module_level=True)
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

ATOL = 1e-3

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
    "China": "Beijing", "Brazil": "Brasília", "Iceland": "Reykjavík", "Austria": "Vienna",
    "Egypt": "Cairo", "Peru": "Lima", "Norway": "Oslo", "Poland": "Warsaw", "Kenya": "Nairobi",
    "Greece": "Αθήνα", "Russia": "Москва", "Korea": "서울",
}  # fmt: skip
OPPOSITES = ("hot cold", "big small", "up down", "old new", "fast slow", "day night", "open closed",
             "light dark", "wet dry", "early late", "rich poor", "loud quiet", "full empty",
             "hard soft", "high low", "first last", "north south")  # fmt: skip

TASK = """task: pronk_facts
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def items() -> list[dict[str, Any]]:
    """50 questions with four choices, the right one in any place."""
    found: list[tuple[str, str, list[str]]] = []
    for day, after in zip(DAYS, DAYS[1:] + DAYS[:1], strict=True):
        found.append((f"The day after {day} is", after, list(DAYS)))
    for n, (number, more) in enumerate(pairwise(NUMBERS), 1):
        found.append((f"Count: {n} is {number}, {n + 1} is", more, list(NUMBERS)))
    for country, capital in CAPITALS.items():
        found.append((f"The capital of {country} is", capital, list(CAPITALS.values())))
    pairs = [pair.split() for pair in OPPOSITES]
    for word, other in pairs:
        found.append((f"The opposite of “{word}” is", other, [b for _, b in pairs]))
    questions = []
    for n, (question, right, of) in enumerate(found):
        at = of.index(right)
        wrong = [of[(at + step) % len(of)] for step in (1, 2, 3)]
        place = n % 4
        choices = [*wrong[:place], right, *wrong[place:]]
        questions.append({"question": question, "choices": choices, "answer": place})
    return questions[:50]


def save_tokenizer(path: Path, folder: Path) -> None:
    """SmolLM2's tokenizer as transformers reads it, from the vocabulary of the GGUF."""
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(path).fields
    vocab = {token: id for id, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    pre = tokenizers.pre_tokenizers
    core.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    core.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>"
    ).save_pretrained(folder)


def run_lm_eval(url: str, folder: Path, tokenizer: Path) -> tuple[dict[str, Any], list[Any]]:
    """The results, and what is found for each question."""
    data = folder / "facts.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items()))
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "facts.yaml").write_text(TASK.format(data=data))
    model = {
        "model": "smollm2", "base_url": f"{url}/v1/completions", "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface", "num_concurrent": 4, "max_retries": 1,
    }  # fmt: skip
    home = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args",
         ",".join(f"{name}={value}" for name, value in model.items()), "--tasks", "pronk_facts",
         "--include_path", tasks, "--output_path", folder / "out", "--log_samples"],
        env={**os.environ, **home, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"]["pronk_facts"], lines


def log_likelihood(llm: LLM, tokenizer: Tokenizer, question: str, choice: str) -> float:
    """Of a choice behind a question."""
    ids = tokenizer.encode(f"{question} {choice}")
    return float(llm.score(ids)[len(tokenizer.encode(question)) - 1 :].sum())


def test_log_likelihoods_equal_score(
    smollm2_path: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tokenizer = tmp_path / "tokenizer"
    save_tokenizer(smollm2_path, tokenizer)
    names = {"smollm2": smollm2_path.stem}
    with live_server([smollm2_path], tmp_path / "data", aliases=names) as live:
        results, samples = run_lm_eval(live.url, tmp_path, tokenizer)
    right, furthest = 0, 0.0
    with LLM(smollm2_path) as llm:
        for sample in samples:
            doc = sample["doc"]
            found = [float(resp[0][0]) for resp in sample["resps"]]
            ours = [
                log_likelihood(llm, llm.tokenizer, doc["question"], choice)
                for choice in doc["choices"]
            ]
            furthest = max(furthest, *(abs(a - b) for a, b in zip(found, ours, strict=True)))
            right += ours.index(max(ours)) == doc["answer"]
    record_property("questions", len(samples))
    record_property("largest difference of log-likelihoods", f"{furthest:.2g}")
    record_property("right", right)
    assert len(samples) == 50
    assert furthest < ATOL
    assert results["acc,none"] == pytest.approx(right / len(samples))
    assert right > len(samples) / 2  # four choices: one that knows nothing has a quarter
