"""LoRA adapters in the engine: what merged weights would compute, whatever runs beside, and nothing
of an adapter that is gone."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny_models import CONFIG, random_checkpoint, random_tensors, write_gguf

from peft_folders import lora_tensors, merged, write_adapter
from pronk import LLM
from pronk.backends.protocol import BLOCK, F32, KvDtype
from pronk.backends.select import select_backend
from pronk.checkpoints.checkpoint import Checkpoint, Stored
from pronk.checkpoints.names import native_name
from pronk.core.errors import CheckpointError, MemoryLimitError, PronkError, UserError
from pronk.engine import adapters as adapters_module
from pronk.engine import llm as llm_module
from pronk.engine.draft import Speculator
from pronk.engine.engine import Engine
from pronk.engine.load import load_model
from pronk.engine.request import Request, SamplingParams
from pronk.engine.runner import Runner
from pronk.model.llama import LlamaWeights

HELLO = [{"role": "user", "content": "hello world"}]


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    try:
        return select_backend(request.param)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def weights(ops: ModuleType) -> LlamaWeights:
    return load_model(random_checkpoint(), ops, n_positions=CONFIG.context)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of several ranks, one of q and v only, as is PEFT's default, and one of nothing."""
    root = tmp_path_factory.mktemp("adapters")
    quarter = {"rank_pattern": {}, "target_modules": ["q_proj", "v_proj"]}
    zero = {n: t * ("lora_A" in n) for n, t in lora_tensors(CONFIG, seed=4).items()}
    return {
        "all": write_adapter(root / "all", lora_tensors(CONFIG, seed=1)),
        "some": write_adapter(
            root / "some", lora_tensors(CONFIG, parts=("wq", "wv"), seed=2, rank=3), r=3,
            lora_alpha=6, **quarter,
        ),
        "wide": write_adapter(root / "wide", lora_tensors(CONFIG, seed=3, rank=40), r=40,
                              lora_alpha=80),
        "zero": write_adapter(root / "zero", zero),
    }  # fmt: skip


def make_engine(
    ops: ModuleType,
    weights: LlamaWeights,
    folders: dict[str, Path],
    *,
    n_blocks: int = 64,
    kv_dtype: KvDtype = "f16",
    threads: int = 1,
    **options: Any,
) -> Engine:
    backend: Any = ops
    runner = Runner(
        backend, CONFIG, weights, n_blocks=n_blocks, n_tokens=CONFIG.vocab_size, threads=threads,
        kv_dtype=kv_dtype,
    )  # fmt: skip
    engine = Engine(
        runner,
        vocab_size=CONFIG.vocab_size,
        context=CONFIG.context,
        n_blocks=n_blocks,
        adapters=runner.adapters,
        **options,
    )
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    return engine


def logits_of(engine: Engine, prompt: list[int], adapter: str | None) -> F32:
    logits_TV = np.full((len(prompt), CONFIG.vocab_size), np.nan, np.float32)

    def observer(start: int, logits: F32) -> None:
        logits_TV[start : start + len(logits)] = logits

    engine.run([Request(prompt, None, observer=observer, adapter=adapter)])
    return logits_TV


def make_prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, n).tolist()


def merged_weights(ops: ModuleType, tensors: dict[str, F32]) -> LlamaWeights:
    """The random model with an adapter merged into its weights."""

    def stored(values: F32) -> Stored:
        raw = np.atleast_2d(values).view(np.uint8)
        return Stored("F32", values.shape, raw.nbytes, lambda: (raw, lambda: None))

    by_name = {
        native_name(name, "gguf"): stored(values)
        for name, values in merged(random_tensors(), tensors, CONFIG).items()
    }
    checkpoint = Checkpoint(Path("merged"), "gguf", CONFIG, {}, by_name, [])
    return load_model(checkpoint, ops, n_positions=CONFIG.context)


# What is computed


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("all", {"seed": 1}),
        ("some", {"seed": 2, "rank": 3, "parts": ("wq", "wv")}),
        ("wide", {"seed": 3, "rank": 40}),
    ],
)
def test_logits_are_those_of_merged_weights(
    ops: ModuleType,
    weights: LlamaWeights,
    folders: dict[str, Path],
    name: str,
    tensors: dict[str, Any],
) -> None:
    """Within 2e-5, float32 rounding, on logits of order 3 that the adapter changes by order 1."""
    prompt = make_prompt(50)
    engine = make_engine(ops, weights, folders, kv_dtype="f32")
    found, base = logits_of(engine, prompt, name), logits_of(engine, prompt, None)
    other = merged_weights(ops, lora_tensors(CONFIG, **tensors))
    expected = logits_of(make_engine(ops, other, {}, kv_dtype="f32"), prompt, None)
    assert np.abs(expected - base).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_an_adapter_of_zeros_changes_nothing_at_all(
    ops: ModuleType, weights: LlamaWeights, folders: dict[str, Path]
) -> None:
    engine = make_engine(ops, weights, folders)
    prompt = make_prompt(50)
    np.testing.assert_array_equal(
        logits_of(engine, prompt, "zero"), logits_of(engine, prompt, None)
    )


NAMES = ("all", None, "all", "some", "wide", None, "some", "zero", "all")
"""Adapters of the requests of a batch: rows of one adapter lie apart."""


def make_requests(sampled: bool) -> list[Request]:
    lengths = (1, 33, 5, 64, 31, 130, 70, 32, 75)
    common = make_prompt(70, seed=9)
    prompts = [make_prompt(n, seed=n) for n in lengths[:6]] + [common, [*common, 3], common]

    def params(i: int) -> SamplingParams:
        n = 45 if i % 2 else 20
        if not sampled:
            return SamplingParams(max_tokens=n, logprobs=2)
        return SamplingParams(
            max_tokens=n, temperature=1.3, top_p=0.95, seed=i, logprobs=2, repetition_penalty=1.1
        )

    return [
        Request(prompt, params(i), adapter=name)
        for i, (prompt, name) in enumerate(zip(prompts, NAMES, strict=True))
    ]


def answers(requests: Sequence[Request]) -> list[tuple[object, ...]]:
    return [(request.output, request.logprobs, request.finish_reason) for request in requests]


VARIANTS: list[dict[str, Any]] = [
    {"max_batch": 16},
    {"token_budget": 1},
    {"token_budget": 7},
    {"max_batch": 3, "token_budget": 33},
    {"prefix_cache": False},
    {"n_blocks": 8},
    {"threads": 3},
]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
def test_answers_do_not_depend_on_what_runs_beside(
    ops: ModuleType,
    weights: LlamaWeights,
    folders: dict[str, Path],
    sampled: bool,
    kv_dtype: KvDtype,
) -> None:
    """Each as if it ran alone, exactly; those without an adapter go through the backend's own call
    for all layers then."""
    expected = []
    for i in range(len(NAMES)):
        engine = make_engine(ops, weights, folders, kv_dtype=kv_dtype, prefix_cache=False)
        alone = make_requests(sampled)[i]
        engine.run([alone])
        expected += answers([alone])
    assert len({str(answer) for answer in expected}) == len(expected)
    for variant in VARIANTS:
        for drafts in (None, Speculator()):
            engine = make_engine(
                ops, weights, folders, kv_dtype=kv_dtype, speculator=drafts, **variant
            )
            requests = make_requests(sampled)
            engine.run(requests)
            assert answers(requests) == expected, variant


def test_guesses_are_made_and_right_with_adapters(
    ops: ModuleType, weights: LlamaWeights, folders: dict[str, Path]
) -> None:
    drafts = Speculator()
    engine = make_engine(ops, weights, folders, speculator=drafts)
    for _ in range(3):
        requests = [
            Request(make_prompt(40), SamplingParams(max_tokens=60), adapter=name)
            for name in ("all", None)
        ]
        engine.run(requests)
    assert drafts.accepted > 0


def test_observed_and_sampled_beside_each_other(
    ops: ModuleType, weights: LlamaWeights, folders: dict[str, Path]
) -> None:
    """Rows that are wanted and rows that are not, of several adapters in one step."""
    engine = make_engine(ops, weights, folders, token_budget=40)
    seen: dict[str | None, dict[int, F32]] = {"all": {}, None: {}, "some": {}}
    prompt = make_prompt(60)
    watched = [
        Request(prompt, None, adapter=name, observer=lambda i, x, to=to: to.update({i: x.copy()}))
        for name, to in seen.items()
    ]
    answered = Request(make_prompt(9), SamplingParams(max_tokens=20), adapter="wide")
    engine.run([watched[0], answered, *watched[1:]])
    for name, parts in seen.items():
        logits_TV = np.concatenate([parts[start] for start in sorted(parts)])
        np.testing.assert_array_equal(logits_TV, logits_of(engine, prompt, name))
    alone = Request(make_prompt(9), SamplingParams(max_tokens=20), adapter="wide")
    engine.run([alone])
    assert alone.output == answered.output


def test_an_adapter_that_overflows_ends_its_own_requests_only(
    ops: ModuleType, weights: LlamaWeights, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors = {n: t * np.float32(1e30) for n, t in lora_tensors(CONFIG).items()}
    engine = make_engine(
        ops, weights, {**folders, "huge": write_adapter(tmp_path / "huge", tensors)}
    )
    bad, good, alone = (
        Request(make_prompt(9), SamplingParams(max_tokens=20), adapter=name)
        for name in ("huge", "all", "all")
    )
    for request in (bad, good):
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert bad.finish_reason == "error"
    with pytest.raises(PronkError, match="not finite"):
        bad.raise_error()
    engine.run([alone])
    assert good.output == alone.output


# What is stored


def test_stored_prefixes_belong_to_an_adapter(
    ops: ModuleType, weights: LlamaWeights, folders: dict[str, Path]
) -> None:
    engine = make_engine(ops, weights, folders)
    prompt = make_prompt(3 * BLOCK + 1)

    def cached(name: str | None, salt: bytes = b"") -> int | None:
        request = Request(prompt, SamplingParams(max_tokens=1), adapter=name, salt=salt)
        engine.run([request])
        return request.cached

    for name in (None, "all", "some"):
        assert cached(name) == 0
        assert cached(name) == 3 * BLOCK
    assert cached("all", b"somebody's") == 0
    assert cached("all", b"somebody's") == 3 * BLOCK


def test_what_an_unloaded_adapter_computed_is_not_found_by_its_successor(
    ops: ModuleType, weights: LlamaWeights, folders: dict[str, Path]
) -> None:
    engine = make_engine(ops, weights, {"a": folders["all"]})
    prompt = make_prompt(3 * BLOCK + 1)

    def ask() -> Request:
        request = Request(prompt, SamplingParams(max_tokens=20), adapter="a")
        engine.run([request])
        return request

    first = ask()
    engine.unload_adapter("a")
    engine.load_adapter("a", folders["wide"])
    second = ask()
    assert second.cached == 0
    cold = make_engine(ops, weights, {"a": folders["wide"]})
    alone = Request(prompt, SamplingParams(max_tokens=20), adapter="a")
    cold.run([alone])
    assert second.output == alone.output != first.output
    engine.unload_adapter("a")
    engine.load_adapter("a", folders["all"])
    again = ask()  # the same numbers as at first, so what was computed then holds
    assert (again.cached, again.output) == (3 * BLOCK, first.output)


# Loading and unloading


def test_names(ops: ModuleType, weights: LlamaWeights, folders: dict[str, Path]) -> None:
    engine = make_engine(ops, weights, {})
    assert engine.adapters == ()
    engine.load_adapter("all", folders["all"])
    engine.load_adapter("me/some:1", str(folders["some"]))
    assert engine.adapters == ("all", "me/some:1")
    with pytest.raises(UserError, match=r"^adapter: 'all' is loaded already; unload it first$"):
        engine.load_adapter("all", folders["some"])
    for name in ("", " a", "a b", "a\n", "x" * 201, "\ud800", None, 3):
        bad: Any = name
        with pytest.raises(UserError, match=r"^adapter: .* is no name; 1 to 200 characters"):
            engine.load_adapter(bad, folders["all"])
    engine.unload_adapter("all")
    assert engine.adapters == ("me/some:1",)
    for name in ("all", ["all"]):
        bad = name
        with pytest.raises(UserError, match=r"is not loaded; loaded are me/some:1$"):
            engine.unload_adapter(bad)


def test_a_request_for_an_adapter_that_is_not_there(
    ops: ModuleType, weights: LlamaWeights, folders: dict[str, Path]
) -> None:
    engine = make_engine(ops, weights, folders)
    with pytest.raises(UserError, match="'other' is not loaded; loaded are all, some, wide, zero"):
        engine.add(Request([1], None, adapter="other"))
    without = Engine(engine._model, vocab_size=9, context=64, n_blocks=2)
    with pytest.raises(UserError, match=r"^adapter: 'all' is not loaded; none are$"):
        without.check(Request([1], None, adapter="all"))
    with pytest.raises(UserError, match="'x' cannot be loaded: this model takes none"):
        without.load_adapter("x", folders["all"])
    assert without.adapters == ()


def test_an_adapter_in_use_stays(
    ops: ModuleType, weights: LlamaWeights, folders: dict[str, Path]
) -> None:
    engine = make_engine(ops, weights, folders, max_batch=1)
    requests = [
        Request([1, 2], SamplingParams(max_tokens=5), adapter=name) for name in ("some", "all")
    ]
    for request in requests:
        engine.add(request)
    engine.step()
    for name in ("some", "all"):  # one runs, the other one waits
        with pytest.raises(UserError, match=f"'{name}' is in use by 1 unfinished request;"):
            engine.unload_adapter(name)
    engine.unload_adapter("wide")
    engine.abort(requests[1])
    engine.unload_adapter("all")
    while engine.has_work:
        engine.step()
    engine.unload_adapter("some")
    assert (engine.adapters, len(requests[0].output)) == (("zero",), 5)


def test_a_bad_folder_changes_nothing(
    ops: ModuleType, weights: LlamaWeights, folders: dict[str, Path], tmp_path: Path
) -> None:
    engine = make_engine(ops, weights, {"all": folders["all"]})
    expected = logits_of(engine, [1, 2, 3], "all")
    tensors = lora_tensors(CONFIG)
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][3, 2] = np.nan
    with pytest.raises(CheckpointError, match="not finite"):  # the last one that is read
        engine.load_adapter("bad", write_adapter(tmp_path / "bad", tensors))
    with pytest.raises(CheckpointError, match="no such folder"):
        engine.load_adapter("none", tmp_path / "none")
    assert engine.adapters == ("all",)
    np.testing.assert_array_equal(logits_of(engine, [1, 2, 3], "all"), expected)


def test_an_adapter_must_fit_beside_the_cache(
    ops: Any, tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cache has not touched yet is not free."""
    path = write_gguf(tmp_path / "tiny.gguf")
    with LLM(path, backend=ops.name, ctx=256) as llm:
        cache = llm.untouched_bytes
        assert cache > 0
        monkeypatch.setattr(adapters_module, "free_memory", lambda: cache + 1000)
        message = r"^adapter: 'all' takes .* 0\.00 GB are free; unload another one"
        with pytest.raises(MemoryLimitError, match=message):
            llm.load_adapter("all", folders["all"])
        assert llm.adapters == ()
        free = cache + (1 << 20)
        monkeypatch.setattr(adapters_module, "free_memory", lambda: free)
        with pytest.raises(MemoryLimitError):
            llm.load_adapter("all", folders["all"], keep_free=1 << 20)
        llm.load_adapter("all", folders["all"])
        llm.score([1] * 200)
        touched = cache - llm.untouched_bytes
        assert touched > 0
        free -= touched  # the system does not count it as free any more, and nor do we
        llm.load_adapter("some", folders["some"])
        monkeypatch.setattr(adapters_module, "free_memory", lambda: None)
        llm.load_adapter("wide", folders["wide"])


def test_threads_load_and_unload_while_others_compute(
    ops: ModuleType, weights: LlamaWeights, folders: dict[str, Path]
) -> None:
    engine = make_engine(ops, weights, {"all": folders["all"]}, prefix_cache=False)
    prompt = make_prompt(20)
    expected = {}
    for name in ("all", None):
        alone = Request(prompt, SamplingParams(max_tokens=60), adapter=name)
        engine.run([alone])
        expected[name] = alone.output
    done = threading.Event()

    def change(name: str) -> int:
        n = 0
        while not done.is_set():
            engine.load_adapter(name, folders["wide"])
            used = Request(prompt, SamplingParams(max_tokens=2), adapter=name)
            engine.run([used])
            engine.unload_adapter(name)
            n += 1
        return n

    with ThreadPoolExecutor(2) as pool:
        changing = [pool.submit(change, name) for name in ("x", "y")]
        try:
            for _ in range(4):
                requests = [
                    Request(prompt, SamplingParams(max_tokens=60), adapter=name)
                    for name in ("all", None, "all")
                ]
                engine.run(requests)
                assert [r.output for r in requests] == [expected[r.adapter] for r in requests]
        finally:
            done.set()
        assert all(future.result() > 0 for future in changing)
    assert engine.adapters == ("all",)


# LLM


@pytest.fixture
def llm(tmp_path: Path, ops: ModuleType, folders: dict[str, Path]) -> Iterator[LLM]:
    path = write_gguf(tmp_path / "tiny.gguf")
    adapters = {"all": folders["all"], "wide": str(folders["wide"])}
    with LLM(path, backend=ops.name, adapters=adapters) as llm:
        yield llm


def test_every_way_to_ask(llm: LLM) -> None:
    assert llm.adapters == ("all", "wide")
    ids = make_prompt(30)
    asks: list[Any] = [
        lambda name: llm.chat(HELLO, max_tokens=12, seed=1, adapter=name).token_ids,
        lambda name: [*llm.stream(HELLO, max_tokens=12, seed=1, adapter=name)][-1].reply.token_ids,
        lambda name: llm.generate(ids, adapter=name, ignore_eos=True).token_ids,
        lambda name: [c.token_ids for c in llm.generate([ids, ids[:9]], adapter=name)],
        lambda name: "".join(llm.stream_generate(ids, adapter=name, ignore_eos=True)),
        lambda name: llm.score(ids, adapter=name).tolist(),
        lambda name: llm.logits(ids, adapter=name).tolist(),
    ]
    for ask in asks:
        found = [ask(name) for name in ("all", "wide", None)]
        assert all(found[i] != found[i - 1] for i in range(3))
        with pytest.raises(UserError, match="'none' is not loaded; loaded are all, wide"):
            ask("none")
    assert asks[0]("all") == asks[1]("all")


def test_an_adapter_that_goes_before_a_stream_begins(llm: LLM) -> None:
    stream = llm.stream(HELLO, adapter="all")
    llm.unload_adapter("all")
    with pytest.raises(UserError, match="'all' is not loaded; loaded are wide"):
        next(stream)
    assert llm.adapters == ("wide",)
    assert not llm.engine.has_work


def test_loading_into_a_model(llm: LLM, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="'all' is loaded already"):
        llm.load_adapter("all", folders["all"])
    llm.load_adapter("same", folders["all"])
    assert (
        llm.score([1, 2, 3], adapter="same").tolist()
        == llm.score([1, 2, 3], adapter="all").tolist()
    )
    stream = llm.stream(HELLO, adapter="same", max_tokens=100, ignore_eos=True)
    next(stream)
    with pytest.raises(UserError, match="in use by 1 unfinished"):
        llm.unload_adapter("same")
    stream.close()
    llm.unload_adapter("same")
    llm.close()
    for use in (lambda: llm.adapters, lambda: llm.unload_adapter("all")):
        with pytest.raises(UserError, match="has been closed"):
            use()


def test_adapters_are_looked_at_before_anything_is_loaded(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(llm_module, "load_model", never)
    for adapters, message in (
        ({"a": tmp_path / "none"}, "no such folder"),
        ({"a b": folders["all"]}, "is no name"),
    ):
        with pytest.raises(UserError, match=message):
            LLM(path, backend="reference", adapters=adapters)
    with pytest.raises(AssertionError, match="loaded"):
        LLM(path, backend="reference", adapters=folders)


def test_adapters_count_when_the_memory_is_planned(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    seen: list[int] = []

    def fit(need: Any, *_: object, **__: object) -> None:
        seen.append(need.weights)
        raise UserError("planned")

    monkeypatch.setattr(llm_module, "fit", fit)
    for adapters in ({}, {"all": folders["all"]}):
        with pytest.raises(UserError, match="planned"):
            LLM(path, backend="reference", adapters=adapters)
    numbers = sum(tensor.size for tensor in lora_tensors(CONFIG).values())
    assert seen[1] - seen[0] == 4 * numbers
