from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import CONFIG, write_gguf

from pronk.backends import reference
from pronk.core.errors import MemoryLimitError, PronkError, UserError
from pronk.engine import bench
from pronk.engine.bench import (
    OPERATION,
    Meter,
    Phase,
    Plan,
    Recorder,
    Run,
    Subject,
    Timing,
    load_subject,
)
from pronk.engine.demand import Chunk, Demand, Fraction, Limits, total
from pronk.engine.request import Request


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """How well the machine is measured is not what is tested here."""
    monkeypatch.setattr(Meter, "BANDWIDTH_SECONDS", 0.001)
    monkeypatch.setattr(Meter, "INT8_SECONDS", 0.001)


def subject_for(path: Path, plan: Plan) -> Subject:
    return load_subject(path, plan, ops=reference, threads=None, kv_dtype="f32")


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """All requests that are made from here on."""
    made: list[Request] = []

    class Recorded(Request):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(bench, "Request", Recorded)
    return made


def test_prefill_reads_the_prompt_at_its_depth(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(prompt=40, generate=3, depth=70, batch=2, repeat=2)
    subject = subject_for(path, plan)
    made = recorded(monkeypatch)
    phase = bench.measure_prefill(subject, plan)
    assert [run.tokens for run in phase.runs] == [2 * (40 + 70 - 64)] * 2
    assert phase.rate > 0
    measured = [request for request in made if request.params is not None]
    assert len(measured) == 3 * 2  # a warm-up and two runs
    assert all(request.n_prompt == 110 for request in measured)
    assert all(request.cached == 64 for request in measured)  # whole blocks of the 70
    assert all(request.n_output == 1 and not request.preemptions for request in measured)
    starts = [request for request in made if request.params is None]
    assert len({tuple(request.ids) for request in starts}) == 2
    computed = [request.cached for request in starts]
    assert computed == [0, 0, 64, 64, 64, 64]  # once, not for every run


def test_decode_writes_what_was_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(prompt=5, generate=60, depth=0, batch=3, repeat=1)
    subject = subject_for(path, plan)
    made = recorded(monkeypatch)
    phase = bench.measure_decode(subject, plan)
    assert len(made) == 2 * 3
    assert all((r.n_prompt, r.n_output) == (1, 61) for r in made)
    assert all(not r.preemptions and not r.cached for r in made)
    assert [(run.tokens, len(run.work)) for run in phase.runs] == [(3 * 60, 60)]
    assert phase.runs[0].work == [[Chunk(at, 1, True)] * 3 for at in range(1, 61)]


def test_decode_at_a_depth_computes_it_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(prompt=5, generate=10, depth=100, batch=2, repeat=2)
    subject = subject_for(path, plan)
    made = recorded(monkeypatch)
    phase = bench.measure_decode(subject, plan)
    assert [r.cached for r in made] == [0, 0, 96, 96, 96, 96]
    assert [run.tokens for run in phase.runs] == [20, 20]


def test_runs_never_share_a_prompt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(prompt=40, generate=3, depth=0, batch=2, repeat=2)
    subject = subject_for(path, plan)
    made = recorded(monkeypatch)
    bench.measure_prefill(subject, plan)
    assert all(request.cached == 0 for request in made)
    assert len({tuple(request.ids[:40]) for request in made}) == len(made)


def test_what_the_steps_of_a_prompt_computed(path: Path) -> None:
    """Two sequences of 300 tokens share steps of 512: the first one's answer comes before the
    second one is read to its end."""
    plan = Plan(prompt=300, generate=1, batch=2, repeat=1)
    (run,) = bench.measure_prefill(subject_for(path, plan), plan).runs
    first, second = Chunk(0, 300, True), Chunk(0, 212, False)
    assert run.work == [[first, second], [Chunk(212, 88, True)]]
    assert run.tokens == 600


def spec() -> Subject:
    """A subject that nothing runs."""
    sizes = {"wqkv": (400, 600), "wo": (900, 1100), "w_gate_up": (1200, 1800),
             "w_down": (1500, 2500), "output": (5000,)}  # fmt: skip
    return Subject(
        engine=None, recorder=Recorder(None), ops=reference, config=CONFIG, weights=sizes,  # type: ignore[arg-type]
        file_bytes=9000, kv_bytes=100, threads=1, meter=Meter(reference, 1),
    )  # fmt: skip


def test_demand_by_hand() -> None:
    qkv, wo, gate_up, down = 32 * (32 + 16 + 16), 32 * 32, 32 * 128, 64 * 32
    head = 32 * CONFIG.vocab_size
    read, pairs = 300 + 212 + 300, 300 * 301 / 2 * 2
    steps = [[Chunk(0, 300, True), Chunk(0, 212, False)], [Chunk(212, 88, True)]]
    assert bench._demands(spec(), steps) == {
        "q, k, v": Demand(2 * 1000, 1200 * qkv),
        "attention output": Demand(2 * 2000, 602 * wo),  # the last layer goes on with two rows
        "gate and up": Demand(2 * 3000, 602 * gate_up),
        "down": Demand(2 * 4000, 602 * down),
        "other linear": Demand(2 * 5000, 2 * head),
        "attention": Demand(read * 100, 2 * 2 * pairs * 32),
    }
    decode = total(bench._demands(spec(), [[Chunk(at, 1, True)] * 3 for at in (49, 50, 51)]))
    linear = 2 * 9 * (qkv + wo + gate_up + down) + 9 * head
    assert decode == Demand(3 * 15_000 + 9 * 51 * 100, linear + 2 * 2 * 9 * 51 * 32)
    silent = bench._demands(spec(), [[Chunk(0, 512, False)]])
    assert [demand.nbytes for demand in silent.values()][:5] == [1000, 900, 1200, 1500, 0]


def run_of(seconds: float, limits: Limits | None, **spent: float) -> Run:
    demands = {"down": Demand(2e9, 1e10), "attention": Demand(1e9, 3e10)}
    work = [[Chunk(at, 10, True)] for at in range(10)]
    return Run(Timing(seconds, limits, spent), work, demands)


def test_each_run_is_compared_with_its_own_limits() -> None:
    """The machine halves its speed for one of three runs; the fraction is the same in all."""
    fast, slow = Limits(6e9, 1e11), Limits(3e9, 5e10)
    phase = Phase((run_of(1.0, fast), run_of(2.0, slow), run_of(1.0, fast)))
    assert [run.used for run in phase.runs] == [Fraction(0.5, 0.4)] * 3
    assert phase.used == Fraction(0.5, 0.4)
    assert phase.rate == 100
    unknown = Phase((run_of(1.0, None),))
    assert unknown.used is None
    assert unknown.profile()[-1].used is None


def test_profile() -> None:
    limits = Limits(6e9, 1e11)
    runs = (
        run_of(1.0, limits, down=0.5, attention=0.25, rotation=0.0),
        run_of(2.0, limits, down=1.0, attention=0.5, rotation=0.0),
    )
    down, attention, rest = Phase(runs).profile()
    assert (down.name, down.seconds, down.share) == ("down", 0.075, 0.5)
    assert down.used == Fraction(pytest.approx(0.5), pytest.approx(0.15))  # 4 and 2 GB/s of 6
    assert (attention.name, attention.seconds, attention.share) == ("attention", 0.0375, 0.25)
    assert (rest.name, rest.seconds, rest.share) == (bench.REST, 0.0375, 0.25)
    assert rest.used is None


def test_limits_are_measured_before_and_after_each_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter(range(1, 100))
    monkeypatch.setattr(
        reference, "measure_bandwidth", lambda threads, _: 100.0 * threads + next(rates),
        raising=False,
    )  # fmt: skip
    monkeypatch.setattr(reference, "measure_int8", lambda *_: 5.0, raising=False)
    plan = Plan(prompt=8, generate=4, repeat=2)
    subject = load_subject(path, plan, ops=reference, threads=2, kv_dtype="f32")
    for measure in (bench.measure_prefill, bench.measure_decode):
        limits = [run.timing.limits for run in measure(subject, plan).runs]
        (first,) = [limits[0].bandwidth] if limits[0] else [0.0]
        assert first % 1 == 0.5  # the mean of two that follow one another
        assert limits == [Limits(first, 5.0), Limits(first + 2, 5.0)]


def test_what_measures_the_bandwidth_counts_as_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(prompt=8, generate=4)
    assert Meter(reference, 2).nbytes == 0
    monkeypatch.setattr(bench, "free_memory", lambda: 400e6)
    assert subject_for(path, plan).engine is not None
    monkeypatch.setattr(reference, "measure_bandwidth", lambda *_: 1.0, raising=False)
    assert Meter(reference, 2).nbytes == 512 << 20
    assert Meter(reference, 64).nbytes == 2048 << 20
    with pytest.raises(MemoryLimitError):
        subject_for(path, plan)


def test_the_compiled_core_is_measured_by_operation(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = pytest.importorskip("pronk.backends.cpu")
    plan = Plan(prompt=40, generate=4, repeat=1)
    subject = load_subject(path, plan, ops=cpu, threads=1, kv_dtype="f16")
    for measure in (bench.measure_prefill, bench.measure_decode):
        phase = measure(subject, plan)
        lines = phase.profile()
        assert {*OPERATION.values(), "attention"} <= {line.name for line in lines}
        assert sum(line.share for line in lines) == pytest.approx(1)
        assert all(line.used for line in lines if line.name in OPERATION.values())
        assert sum(line.seconds for line in lines) == pytest.approx(
            phase.runs[0].timing.seconds / len(phase.runs[0].work)
        )
    with pytest.raises(UserError, match="--profile: the backend 'reference' does not tell"):
        bench.check_profile(reference)
    bench.check_profile(cpu)
    monkeypatch.setenv("PRONK_FUSED", "0")
    with pytest.raises(UserError, match="--profile: PRONK_FUSED is 0"):
        bench.check_profile(cpu)


def test_sizes_of_a_real_subject(path: Path) -> None:
    plan = Plan(prompt=8, generate=4, repeat=1)
    subject = subject_for(path, plan)
    linear = CONFIG.n_params - 32 * CONFIG.vocab_size - 5 * 32  # neither embedding nor norms
    assert subject.weight_bytes == 4 * linear
    assert subject.file_bytes == 4 * linear
    assert subject.weights["wqkv"] == [4 * 32 * 64] * 2
    assert subject.weights["output"] == [4 * 32 * CONFIG.vocab_size]
    assert subject.kv_bytes == 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, size, float32


def test_a_plan_that_does_not_fit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(prompt=500, generate=10, depth=12)
    with pytest.raises(UserError, match="takes 513 positions, the model's context is 512"):
        subject_for(path, plan)
    assert subject_for(path, replace(plan, depth=11)).engine is not None
    monkeypatch.setattr(bench, "free_memory", lambda: 1000)
    with pytest.raises(MemoryLimitError, match=r"GB are needed, 0\.00 GB are free"):
        subject_for(path, Plan(prompt=8, generate=4))


def test_threads_are_set_before_the_weights_are_packed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[object] = []
    monkeypatch.setattr(reference, "default_threads", lambda: 5)
    monkeypatch.setattr(reference, "set_threads", happened.append)
    plan = Plan(prompt=8, generate=4, repeat=1)
    subject = load_subject(
        path, plan, ops=reference, threads=None, kv_dtype="f32",
        progress=lambda *_: happened.append("loading"),
    )  # fmt: skip
    assert subject.threads == 5
    assert happened[:2] == [5, "loading"]
    bench.measure_decode(subject, plan)
    assert set(happened) == {5, "loading"}
    assert load_subject(path, plan, ops=reference, threads=2, kv_dtype="f32").threads == 2


def test_a_model_that_computes_nonsense_ends_the_measurement(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(prompt=8, generate=4, repeat=1)
    subject = subject_for(path, plan)

    def refuse(*_: object) -> None:
        raise PronkError("not finite")

    monkeypatch.setattr(reference, "sample", refuse)
    for measure in (bench.measure_decode, bench.measure_prefill):
        with pytest.raises(PronkError, match="not finite"):
            measure(subject, plan)
