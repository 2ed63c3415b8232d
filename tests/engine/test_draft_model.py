"""A draft model changes no answer, is right where it should be, and leaves nothing behind."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.test_rules import VOCAB, FakeModel, expected, mix, next_token
from engine.test_runner import answers, make_engine, make_requests
from engine.tiny_models import CONFIG, SPECIAL, random_checkpoint, write_gguf
from pronk import LLM
from pronk.backends.protocol import BLOCK, Sampled
from pronk.backends.select import select_backend
from pronk.core.errors import UserError
from pronk.engine.draft import Speculator
from pronk.engine.draft_model import DraftModel
from pronk.engine.engine import Engine
from pronk.engine.estimates import Costs
from pronk.engine.load import load_model
from pronk.engine.request import Request, SamplingParams
from pronk.engine.runner import Runner
from pronk.engine.scheduler import Outcome, Slice
from pronk.text.grammar import Grammar, Matchers


class Fixed(Costs):
    """Costs that nothing changes, so that what is guessed does not depend on the machine."""

    def __init__(self, first: float, slope: float) -> None:
        super().__init__()
        self._first, self._slope = first, slope

    def __bool__(self) -> bool:
        return True

    def book(self, rows: int, seconds: float) -> None:
        pass

    def of(self, rows: int) -> float:
        return self._first + self._slope * rows


def drafting(drafter: DraftModel, *, lookup: bool = False) -> Speculator:
    """Steps cost a second whatever is in them, and drafts nearly nothing."""
    speculator = Speculator(drafter)
    speculator.costs, drafter.costs = Fixed(1, 0.01), Fixed(0.001, 0)
    if not lookup:
        speculator._lookup.find = lambda *_: ([], 0)  # type: ignore[method-assign]
    return speculator


# With real forwards


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    try:
        return select_backend(request.param)
    except UserError as error:
        pytest.skip(str(error))


def make_drafter(ops: Any, *, seed: int, n_blocks: int = 64) -> DraftModel:
    weights = load_model(random_checkpoint(seed=seed), ops, n_positions=CONFIG.context)
    runner = Runner(
        ops, CONFIG, weights, n_blocks=n_blocks, n_tokens=CONFIG.vocab_size, threads=1
    )  # fmt: skip
    return DraftModel(
        runner, context=CONFIG.context, n_blocks=n_blocks, stop_ids=frozenset(), share=0.1
    )


def check_nothing_left(drafter: DraftModel) -> None:
    assert not drafter.shadows
    pool = drafter.pool
    assert pool.n_referenced == 0
    assert pool.available == pool.n_blocks


VARIANTS: list[dict[str, Any]] = [
    {}, {"n_blocks": 6}, {"token_budget": 9}, {"max_batch": 1}, {"prefix_cache": False},
]  # fmt: skip


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("same", [True, False], ids=["same model", "another"])
def test_answers_are_the_same_with_and_without(ops: Any, sampled: bool, same: bool) -> None:
    weights = load_model(random_checkpoint(), ops, n_positions=CONFIG.context)
    wanted = answers(make_engine(ops, weights), sampled)
    for options in VARIANTS:
        for draft_blocks in (64, 7):
            drafter = make_drafter(ops, seed=0 if same else 1, n_blocks=draft_blocks)
            speculator = drafting(drafter, lookup=draft_blocks == 64)
            engine = make_engine(ops, weights, speculator=speculator, **options)
            assert answers(engine, sampled) == wanted, (options, draft_blocks)
            assert speculator.drafter is drafter
            check_nothing_left(drafter)
            tally = speculator.sources["model"]
            assert tally.drafted > 20
            if same:  # bit for bit the same logits
                assert tally.accepted == tally.drafted
            else:
                assert tally.accepted < tally.drafted / 2


def test_preemption_happens_in_these_tests(ops: Any) -> None:
    weights = load_model(random_checkpoint(), ops, n_positions=CONFIG.context)
    requests = make_requests(sampled=False)
    drafter = make_drafter(ops, seed=0)
    make_engine(ops, weights, n_blocks=6, speculator=drafting(drafter)).run(requests)
    assert sum(request.preemptions for request in requests) > 0


def test_wrong_drafts_end_drafting_but_for_trials() -> None:
    ops: Any = select_backend("reference")
    weights = load_model(random_checkpoint(), ops, n_positions=CONFIG.context)
    speculator = drafting(make_drafter(ops, seed=1))
    speculator.drafter.costs = Fixed(0.2, 0.01)  # type: ignore[union-attr]
    engine = make_engine(ops, weights, speculator=speculator)
    n_tokens = 0
    for seed in range(8):
        params = SamplingParams(max_tokens=60, temperature=1.5, seed=seed)
        request = Request([seed, 4, 5], params)
        engine.run([request])
        n_tokens += request.n_output
    assert 0 < speculator.sources["model"].drafted < n_tokens / 2


def test_a_failing_drafter_is_reported_once_and_not_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ops: Any = select_backend("reference")
    weights = load_model(random_checkpoint(), ops, n_positions=CONFIG.context)
    wanted = answers(make_engine(ops, weights), False)
    drafter = make_drafter(ops, seed=0)
    calls = 0
    run = drafter._model.run

    def fails_later(slices: Sequence[Slice]) -> Sequence[Outcome]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise MemoryError("no more")
        return run(slices)

    drafter._model.run = fails_later  # type: ignore[method-assign]
    speculator = drafting(drafter)
    with caplog.at_level(logging.ERROR):
        assert answers(make_engine(ops, weights, speculator=speculator), False) == wanted
    assert [record.message for record in caplog.records] == [
        "the draft model has failed and is not used any more"
    ]
    assert calls == 5
    assert speculator.drafter is None


@pytest.mark.parametrize("method", ["lag", "catch_up", "draft"])
def test_whatever_fails_in_a_drafter_fails_no_request(
    method: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, drafter = fake_engine(100, 100, 10_000)

    def fails(*arguments: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(drafter, method, fails)
    asked = [Request([i] * 50, SamplingParams(max_tokens=40)) for i in range(3)]
    engine.run(asked)
    assert [request.output for request in asked] == [expected([i] * 50, 40) for i in range(3)]
    assert len(caplog.records) == 1
    assert "broken" in caplog.text


def test_a_draft_that_cannot_be_drawn_concerns_its_request_only() -> None:
    ops: Any = select_backend("reference")
    weights = load_model(random_checkpoint(), ops, n_positions=CONFIG.context)
    wanted = answers(make_engine(ops, weights), False)
    drafter = make_drafter(ops, seed=0)
    run = drafter._model.run

    def refuses_some(slices: Sequence[Slice]) -> Sequence[Outcome]:
        return [
            ValueError("bad logits") if s.request.of.n_prompt == 31 else outcome  # type: ignore[attr-defined]
            for s, outcome in zip(slices, run(slices), strict=True)
        ]

    drafter._model.run = refuses_some  # type: ignore[method-assign]
    speculator = drafting(drafter)
    assert answers(make_engine(ops, weights, speculator=speculator), False) == wanted
    assert speculator.drafter is drafter
    assert speculator.sources["model"].accepted > 20
    check_nothing_left(drafter)


# On a fake model that finds every mistake in blocks and positions


class FakeDrafter(FakeModel):
    """Draws what the first model will, but every so many tokens another one."""

    def __init__(self, n_blocks: int, wrong_every: int) -> None:
        super().__init__(n_blocks)
        self._wrong_every = wrong_every

    def _run(self, s: Slice) -> list[Sampled]:
        shadow: Any = s.request
        if not super()._run(s):
            return []
        state = self.kv[self._slot(shadow, s.start + s.n - 1)]
        token = next_token(state, shadow.known - shadow.of.n_prompt)
        wrong = shadow.known % self._wrong_every == 0
        return [Sampled((token + 1) % VOCAB if wrong else token)]


def fake_engine(
    n_blocks: int, draft_blocks: int, wrong_every: int, **options: Any
) -> tuple[Engine, DraftModel]:
    drafter = DraftModel(
        FakeDrafter(draft_blocks, wrong_every), context=20 * BLOCK, n_blocks=draft_blocks,
        stop_ids=frozenset(), share=0.1, prefix_cache=options.pop("draft_prefix_cache", True),
    )  # fmt: skip
    engine = Engine(
        FakeModel(n_blocks), vocab_size=VOCAB, n_blocks=n_blocks, context=n_blocks * BLOCK,
        speculator=drafting(drafter), **options,
    )  # fmt: skip
    return engine, drafter


def check_shadows(engine: Engine, drafter: DraftModel) -> None:
    """Only running requests have one, and all blocks are in shadows or nowhere."""
    assert set(drafter.shadows) <= set(engine.scheduler.running)
    held = [block for shadow in drafter.shadows.values() for block in shadow.blocks]
    references = {block: n for block, n in enumerate(drafter.pool._refs) if n}
    assert references == {block: held.count(block) for block in held}
    pool = drafter.pool
    assert pool.n_free + pool.n_cached + pool.n_referenced == pool.n_blocks


requests = st.lists(
    st.tuples(
        st.tuples(st.sampled_from([0, 20, 32, 64, 75]), st.lists(st.integers(0, 3), min_size=1))
        .map(lambda parts: ([1] * parts[0] + parts[1])[:100]),
        st.integers(1, 60),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    batch=requests,
    n_blocks=st.sampled_from([6, 100]),
    draft_blocks=st.sampled_from([4, 100]),
    wrong_every=st.sampled_from([3, 7, 10_000]),
    draft_prefix_cache=st.booleans(),
    abort_at=st.integers(0, 40),
)
def test_blocks_and_positions_of_the_draft_model(
    batch: list[tuple[list[int], int]], n_blocks: int, draft_blocks: int, wrong_every: int,
    draft_prefix_cache: bool, abort_at: int,
) -> None:  # fmt: skip
    engine, drafter = fake_engine(
        n_blocks, draft_blocks, wrong_every, max_batch=4, draft_prefix_cache=draft_prefix_cache
    )
    asked = [Request(prompt, SamplingParams(max_tokens=n)) for prompt, n in batch]
    for request in asked:
        engine.add(request)
    n_steps = 0
    while engine.has_work:
        engine.step()
        check_shadows(engine, drafter)
        n_steps += 1
        if n_steps == abort_at:
            engine.abort(asked[0])
            assert asked[0] not in drafter.shadows
    check_nothing_left(drafter)
    for request, (prompt, n) in zip(asked, batch, strict=True):
        assert request.output == expected(prompt, n)[: request.n_output]
        assert request.finish_reason in ("length", "abort")
    tally = engine._speculator.sources["model"]  # type: ignore[union-attr]
    if wrong_every == 10_000:
        assert tally.accepted == tally.drafted


def test_only_what_the_drafter_is_meant_to_get_wrong_is_wrong() -> None:
    """After a wrong draft the cache is right again: between two wrong ones all are accepted."""
    engine, _ = fake_engine(100, 100, 11)
    request = Request([1, 2, 3], SamplingParams(max_tokens=400))
    engine.run([request])
    assert request.output == expected([1, 2, 3], 400)
    speculator = engine._speculator
    assert speculator is not None
    model = engine._model
    assert isinstance(model, FakeModel)
    for step in model.steps[2:]:
        (s,) = step
        right = [t == request.ids[s.start + 1 + i] for i, t in enumerate(s.draft)]
        wrong_at = [s.start + 1 + i for i, ok in enumerate(right) if not ok]
        assert not wrong_at or wrong_at[0] % 11 == 0
    assert speculator.sources["model"].accepted > 250


def test_a_second_turn_reads_only_what_is_new() -> None:
    engine, drafter = fake_engine(100, 100, 10_000)
    first = Request([5] * 200, SamplingParams(max_tokens=40))
    engine.run([first])
    second = Request([*first.ids, 1, 2, 3], SamplingParams(max_tokens=40))
    model = drafter._model
    assert isinstance(model, FakeDrafter)
    before = len(model.steps)
    engine.run([second])
    assert model.steps[before][0].start >= 6 * BLOCK
    check_nothing_left(drafter)


def test_a_long_prompt_is_read_in_parts() -> None:
    """Not more of it in one step than takes about as long as the step."""
    engine, drafter = fake_engine(100, 100, 10_000)
    drafter.row_seconds = 0.01
    request = Request([5] * 600, SamplingParams(max_tokens=100))
    engine.run([request])
    model = drafter._model
    assert isinstance(model, FakeDrafter)
    sizes = [s.n for step in model.steps for s in step]
    assert max(sizes) > 100
    assert sum(size > 1 for size in sizes) > 1
    assert request.output == expected([5] * 600, 100)


def test_what_does_not_fit_the_draft_model_is_not_drafted() -> None:
    engine, _ = fake_engine(100, 100, 10_000)
    request = Request([5] * (20 * BLOCK - 5), SamplingParams(max_tokens=30))
    engine.run([request])
    assert request.output == expected([5] * (20 * BLOCK - 5), 30)
    assert engine._speculator.sources["model"].drafted == 0  # type: ignore[union-attr]


def test_an_exception_of_the_first_model_leaves_the_drafter_in_order() -> None:
    engine, drafter = fake_engine(100, 100, 10_000)
    request = Request([1, 2, 3], SamplingParams(max_tokens=300))
    engine.add(request)
    for _ in range(5):
        engine.step()
    model = engine._model
    run = model.run

    def fails(slices: Sequence[Slice]) -> Sequence[Outcome]:
        raise MemoryError

    model.run = fails  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        engine.step()
    check_nothing_left(drafter)
    model.run = run  # type: ignore[method-assign]
    while engine.has_work:
        engine.step()
    assert request.output == expected([1, 2, 3], 300)
    check_nothing_left(drafter)


# As a user meets it


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "model": write_gguf(folder / "model.gguf"),
        "another": write_gguf(folder / "another.gguf", seed=5),
        "no chat": write_gguf(folder / "no_chat.gguf", chat=False),
    }


@pytest.mark.parametrize("draft", ["model", "another"])
def test_within_a_grammar(files: Mapping[str, Path], draft: str) -> None:
    grammar = Grammar.of_json_schema(
        {
            "type": "object",
            "properties": {"ab": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
            "required": ["ab", "n"],
            "additionalProperties": False,
        }
    )
    found = []
    for options in ({"speculate": False}, {"draft": files[draft]}):
        with LLM(files["model"], backend="reference", **options) as llm:  # type: ignore[arg-type]
            engine = llm.engine
            speculator = engine._speculator
            if speculator is not None:
                assert isinstance(speculator.drafter, DraftModel)
                speculator.costs, speculator.drafter.costs = Fixed(1, 0.01), Fixed(0.001, 0)
            asked = [
                Request(
                    [seed, 7, 8],
                    SamplingParams(
                        max_tokens=60, temperature=1.0, seed=seed, repetition_penalty=1.2
                    ),
                    eos_ids=llm.tokenizer.stop_ids,
                    constraint=Matchers(llm.tokenizer).matcher(grammar),
                )
                for seed in range(4)
            ]
            engine.run(asked)
            found.append([(request.output, request.finish_reason) for request in asked])
            if speculator is not None:
                assert isinstance(speculator.drafter, DraftModel)
                check_nothing_left(speculator.drafter)
                model, forced = speculator.sources["model"], speculator.sources["forced"]
                assert model.drafted > 0
                assert forced.accepted > 0
                if draft == "model":
                    assert model.accepted == model.drafted
    assert found[0] == found[1]


def test_generate_and_close(files: Mapping[str, Path]) -> None:
    options: Any = {"max_tokens": 40, "temperature": 0.9, "seed": 3}
    texts = []
    for draft in (None, files["another"]):
        with LLM(files["model"], backend="reference", draft=draft) as llm:
            texts.append([c.text for c in llm.generate(["ab", "cd ef"], **options)])
    assert texts[0] == texts[1]


def test_another_vocabulary_is_refused(files: Mapping[str, Path], tmp_path: Path) -> None:
    at = CONFIG.vocab_size - len(SPECIAL) + SPECIAL.index("<|start_header_id|>")
    with pytest.raises(UserError) as caught:
        LLM(files["model"], backend="reference", draft=files["no chat"])
    assert str(caught.value) == (
        f"draft: its token {at} is b'<|no_start_header_id|>' (special), that of the model"
        " b'<|start_header_id|>' (special); a draft model needs the vocabulary of the model"
    )
    with pytest.raises(UserError, match=r"draft: .*nothing to do without speculate"):
        LLM(files["model"], backend="reference", draft=files["another"], speculate=False)
    with pytest.raises(UserError):
        LLM(files["model"], backend="reference", draft=tmp_path / "missing.gguf")


def test_the_states_of_the_fake_model_are_what_these_tests_think() -> None:
    assert next_token(mix(0, 1), 0) == expected([1], 1)[0]
