"""Engine and forward together on tiny random models: exact equality of every answer, however the
work was cut into steps."""

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny_models import CONFIG, random_checkpoint

from pronk.backends.protocol import BLOCK, F32, KvDtype
from pronk.backends.select import select_backend
from pronk.core.errors import PronkError, UserError
from pronk.engine import runner as runner_module
from pronk.engine.engine import Engine
from pronk.engine.load import load_model
from pronk.engine.request import Request, SamplingParams
from pronk.engine.runner import Runner
from pronk.engine.sampling import token_logprobs
from pronk.model.llama import LlamaWeights


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    try:
        return select_backend(request.param)
    except UserError as error:
        pytest.skip(str(error))


def random_weights(ops: ModuleType) -> LlamaWeights:
    return load_model(random_checkpoint(), ops, n_positions=CONFIG.context)


@pytest.fixture
def weights(ops: ModuleType) -> LlamaWeights:
    return random_weights(ops)


def make_engine(
    ops: ModuleType,
    weights: LlamaWeights,
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
    return Engine(
        runner,
        vocab_size=CONFIG.vocab_size,
        context=CONFIG.context,
        n_blocks=n_blocks,
        **options,
    )


def make_prompts() -> list[list[int]]:
    """Of lengths around the block size, some with a common beginning."""
    rng = np.random.default_rng(1)
    common = rng.integers(0, CONFIG.vocab_size, 70).tolist()
    lengths = (1, 5, 31, 32, 33, 64, 75, 130)
    alone = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]
    return [*alone, common, [*common, 7], common[:64]]


def make_requests(sampled: bool) -> list[Request]:
    """Half of them long answers; sampled ones use every parameter."""

    def params(i: int) -> SamplingParams:
        n = 45 if i % 2 else 10
        if not sampled:
            return SamplingParams(max_tokens=n, logprobs=2)
        return SamplingParams(
            max_tokens=n, temperature=1.3, top_k=40, top_p=0.95, min_p=0.01, seed=i, logprobs=2,
            repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1,
            logit_bias=((3, 1.0), (4, -100.0)),
        )  # fmt: skip

    return [Request(prompt, params(i)) for i, prompt in enumerate(make_prompts())]


def answers(engine: Engine, sampled: bool) -> list[tuple[object, ...]]:
    requests = make_requests(sampled)
    engine.run(requests)
    return [(request.output, request.logprobs, request.finish_reason) for request in requests]


VARIANTS: list[dict[str, Any]] = [
    {"token_budget": 1},
    {"token_budget": 7},
    {"max_batch": 1},
    {"max_batch": 3, "token_budget": 33},
    {"prefix_cache": False},
    {"n_blocks": 6},
    {"n_blocks": 6, "token_budget": 40, "prefix_cache": False},
    {"threads": 2},
    {"threads": 3},
]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8"])
def test_answers_do_not_depend_on_how_the_work_is_cut(
    ops: ModuleType, weights: LlamaWeights, sampled: bool, kv_dtype: KvDtype
) -> None:
    plain = answers(make_engine(ops, weights, kv_dtype=kv_dtype), sampled)
    assert len({str(answer) for answer in plain}) == len(plain)
    for variant in VARIANTS:
        engine = make_engine(ops, weights, kv_dtype=kv_dtype, **variant)
        assert answers(engine, sampled) == plain, variant


def test_preemption_really_happens_in_these_tests(ops: ModuleType, weights: LlamaWeights) -> None:
    requests = make_requests(sampled=False)
    make_engine(ops, weights, n_blocks=6).run(requests)
    assert sum(request.preemptions for request in requests) > 0
    assert sum(request.cached or 0 for request in requests) > 0


def test_a_second_turn_answers_as_if_nothing_were_stored(
    ops: ModuleType, weights: LlamaWeights
) -> None:
    warm, cold = make_engine(ops, weights), make_engine(ops, weights, prefix_cache=False)
    first = Request(make_prompts()[7], SamplingParams(max_tokens=40))
    warm.run([first])
    turn = [*first.ids, 9, 8, 7]
    found, anew = (Request(turn, SamplingParams(max_tokens=30)) for _ in "12")
    warm.run([found])
    cold.run([anew])
    assert (found.cached, anew.cached) == (5 * BLOCK, 0)
    assert found.output == anew.output


def collect(engine: Engine, prompt: list[int]) -> F32:
    logits_TV = np.full((len(prompt), CONFIG.vocab_size), np.nan, np.float32)

    def observer(start: int, logits: F32) -> None:
        logits_TV[start : start + len(logits)] = logits

    engine.run([Request(prompt, None, observer=observer)])
    return logits_TV


def test_observed_logits_are_the_same_in_any_chunks(ops: ModuleType, weights: LlamaWeights) -> None:
    prompt = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 300).tolist()
    whole = collect(make_engine(ops, weights), prompt)
    assert np.isfinite(whole).all()
    for budget in (1, 7, 50):
        np.testing.assert_array_equal(
            collect(make_engine(ops, weights, token_budget=budget), prompt), whole
        )


def test_observed_and_sampled_at_once(ops: ModuleType, weights: LlamaWeights) -> None:
    """A request may be watched and answered; others in the step are not disturbed."""
    prompt = make_prompts()[6]
    seen: dict[int, F32] = {}
    watched = Request(
        prompt,
        SamplingParams(max_tokens=5, logprobs=0),
        observer=lambda start, logits: seen.update({start: logits.copy()}),
    )
    other = Request(make_prompts()[7], SamplingParams(max_tokens=5))
    make_engine(ops, weights, token_budget=50).run([other, watched])
    alone, quiet = (Request(p, SamplingParams(max_tokens=5)) for p in (other.ids[:130], prompt))
    make_engine(ops, weights).run([alone, quiet])
    assert (other.output, watched.output) == (alone.output, quiet.output)
    logits_TV = np.concatenate([seen[start] for start in sorted(seen)])
    np.testing.assert_array_equal(logits_TV, collect(make_engine(ops, weights), prompt))
    assert watched.output[0] == logits_TV[-1].argmax()
    expected = token_logprobs(logits_TV[-1:], watched.output[:1])
    assert watched.logprobs[0].logprob == pytest.approx(float(expected[0]), abs=1e-6)


def test_logprobs_are_the_log_softmax_of_the_logits(ops: ModuleType, weights: LlamaWeights) -> None:
    """Also where penalties, temperature and bias change what is drawn."""
    params = SamplingParams(
        max_tokens=8, temperature=2.0, seed=5, logprobs=3, repetition_penalty=1.5,
        logit_bias=((11, 5.0),),
    )  # fmt: skip
    request = Request(make_prompts()[4], params)
    make_engine(ops, weights).run([request])
    logits_TV = collect(make_engine(ops, weights), list(request.ids))[request.n_prompt - 1 : -1]
    wide = logits_TV.astype(np.float64)
    logprobs_TV = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    assert [entry.token for entry in request.logprobs] == request.output
    for entry, logprobs_V in zip(request.logprobs, logprobs_TV, strict=True):
        assert entry.logprob == pytest.approx(logprobs_V[entry.token], abs=1e-5)
        best = np.argsort(-logprobs_V)[:3]
        assert [token for token, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in entry.top], logprobs_V[best], atol=1e-5)


def test_two_engines_live_in_one_process(ops: ModuleType) -> None:
    models = [
        load_model(random_checkpoint(seed=seed), ops, n_positions=CONFIG.context) for seed in (1, 2)
    ]
    alone = [answers(make_engine(ops, weights), sampled=True) for weights in models]
    assert alone[0] != alone[1]
    engines = [make_engine(ops, w, threads=t) for w, t in zip(models, (1, 2), strict=True)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda engine: answers(engine, sampled=True), engines))
    assert together == alone


def test_a_step_without_finished_prompts_wants_no_logits(
    ops: ModuleType, weights: LlamaWeights
) -> None:
    engine = make_engine(ops, weights, token_budget=16)
    engine.add(Request(make_prompts()[7], SamplingParams(max_tokens=1)))
    assert engine.step() == []
    assert engine.scheduler.running[0].computed == 16


# One request's trouble

DAMAGED = 11
"""A token whose embedding is not a number."""


def damaged_weights(ops: ModuleType) -> LlamaWeights:
    checkpoint = random_checkpoint()
    table = checkpoint.get("embed").data.view(np.float32)
    table[DAMAGED] = np.nan
    return load_model(checkpoint, ops, n_positions=CONFIG.context)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_end_their_own_request_only(
    ops: ModuleType, sampled: bool
) -> None:
    params = SamplingParams(
        max_tokens=30, temperature=1.3 if sampled else 0.0, seed=4, logprobs=1,
        logit_bias=((DAMAGED, -100.0),), repetition_penalty=1.1 if sampled else 1.0,
    )  # fmt: skip

    def requests() -> list[Request]:
        return [Request(prompt, params) for prompt in make_prompts() if DAMAGED not in prompt]

    def answer(request: Request) -> object:
        return request.output, request.logprobs, request.finish_reason

    alone = []
    for request in requests():
        engine = make_engine(ops, damaged_weights(ops))
        engine.run([request])
        alone.append(answer(request))
    assert len(alone) >= 5
    engine, together = make_engine(ops, damaged_weights(ops)), requests()
    bad = Request([3, DAMAGED, 5], SamplingParams(max_tokens=20))
    for request in (*together[:2], bad, *together[2:]):
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert [answer(request) for request in together] == alone
    with pytest.raises(PronkError, match="not finite"):
        bad.raise_error()
    assert (bad.output, bad.finish_reason) == ([], "error")


def test_an_observer_that_fails_ends_its_own_request_only(
    ops: ModuleType, weights: LlamaWeights
) -> None:
    prompt = make_prompts()[7]
    seen: list[int] = []

    def failing(start: int, logits: F32) -> None:
        seen.append(start)
        if start:
            raise ZeroDivisionError("observer")

    def quiet() -> Request:
        return Request(make_prompts()[6], SamplingParams(max_tokens=30, logprobs=1))

    alone = quiet()
    make_engine(ops, weights).run([alone])
    engine = make_engine(ops, weights, token_budget=50)
    bad = Request(prompt, SamplingParams(max_tokens=5), observer=failing)
    other, watched_TV = quiet(), np.full((75, CONFIG.vocab_size), np.nan, np.float32)

    def watching(start: int, logits: F32) -> None:
        watched_TV[start : start + len(logits)] = logits

    watched = Request(make_prompts()[6], None, observer=watching)
    engine.add(bad)
    engine.add(other)
    engine.add(watched)
    while engine.has_work:
        engine.step()
    assert bad.finish_reason == "error"
    assert seen == [0, 50]
    with pytest.raises(ZeroDivisionError, match="observer"):
        bad.raise_error()
    assert (other.output, other.logprobs) == (alone.output, alone.logprobs)
    np.testing.assert_array_equal(watched_TV, collect(make_engine(ops, weights), make_prompts()[6]))
    assert engine.scheduler.pool.n_referenced == 0


def test_tokens_that_the_tokenizer_does_not_know_are_never_drawn(
    ops: ModuleType, weights: LlamaWeights
) -> None:
    n_tokens = CONFIG.vocab_size - 40
    backend: Any = ops

    def outputs(n: int) -> list[Request]:
        runner = Runner(backend, CONFIG, weights, n_blocks=64, n_tokens=n, threads=1)
        engine = Engine(runner, vocab_size=n_tokens, context=CONFIG.context, n_blocks=64)
        params = SamplingParams(max_tokens=60, temperature=5.0, seed=1, logprobs=5)
        requests = [Request([i], params) for i in range(4)]
        requests.append(Request([5], SamplingParams(max_tokens=60, logprobs=5)))
        engine.run(requests)
        return requests

    def largest(requests: list[Request]) -> int:
        tops = [id for r in requests for entry in r.logprobs for id, _ in entry.top]
        return max([*tops, *(id for r in requests for id in r.output)])

    assert largest(outputs(CONFIG.vocab_size)) >= n_tokens
    assert largest(outputs(n_tokens)) < n_tokens


# Processes and threads


def test_a_forked_child_can_step() -> None:
    """Although a thread of its parent was in the middle of a step."""
    held, done = threading.Event(), threading.Event()

    def step() -> None:
        with runner_module._step_lock:
            held.set()
            done.wait(30)

    stepping = threading.Thread(target=step)
    stepping.start()
    held.wait(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads
        child = os.fork()
    if child == 0:
        os._exit(0 if runner_module._step_lock.acquire(timeout=2) else 1)
    _, status = os.waitpid(child, 0)
    assert runner_module._step_lock.locked(), "the parent's own lock is as it was"
    done.set()
    stepping.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_every_step_sets_the_threads_of_its_own_model(
    ops: ModuleType, weights: LlamaWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(ops, "set_threads", told.append)
    engines = [make_engine(ops, weights, threads=n) for n in (1, 3)]
    for engine in (*engines, *engines):
        engine.add(Request([1, 2], SamplingParams(max_tokens=1)))
        engine.step()
    assert told == [1, 3, 1, 3]
