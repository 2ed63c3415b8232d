from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import CONFIG, write_gguf

from pronk.backends import reference
from pronk.core.errors import MemoryLimitError, PronkError, UserError
from pronk.engine import bench
from pronk.engine.bench import Demand, Limits, Plan, Subject, load_subject
from pronk.engine.request import Request


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf")


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
    speed = bench.measure_prefill(subject, plan)
    assert len(speed.runs) == 2
    assert speed.median > 0
    measured = [request for request in made if request.params is not None]
    assert len(measured) == 3 * 2  # a warm-up and two runs
    assert all(request.n_prompt == 110 for request in measured)
    assert all(request.cached == 64 for request in measured)  # whole blocks of the 70
    assert all(request.n_output == 1 and not request.preemptions for request in measured)


def test_decode_writes_what_was_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(prompt=5, generate=60, depth=0, batch=3, repeat=1)
    subject = subject_for(path, plan)
    made = recorded(monkeypatch)
    bench.measure_decode(subject, plan)
    assert len(made) == 2 * 3
    assert all((r.n_prompt, r.n_output) == (1, 61) for r in made)
    assert all(not r.preemptions and not r.cached for r in made)


def test_runs_never_share_a_prompt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(prompt=40, generate=3, depth=0, batch=2, repeat=2)
    subject = subject_for(path, plan)
    made = recorded(monkeypatch)
    bench.measure_prefill(subject, plan)
    assert all(request.cached == 0 for request in made)
    assert len({tuple(request.ids[:40]) for request in made}) == len(made)


def test_demand_by_hand(path: Path) -> None:
    plan = Plan(prompt=600, generate=100, depth=50, batch=2)
    subject = Subject(engine=None, config=CONFIG, weight_bytes=10_000, kv_bytes=100, threads=1)  # type: ignore[arg-type]
    layers = 2 * (32 * (32 + 32 + 16 + 16) + 3 * 32 * 64)  # q, o, k, v and the three of the MLP
    head = 32 * CONFIG.vocab_size
    decode = bench.decode_demand(subject, plan)
    assert decode.nbytes == 10_000 / 2 + 100 * 100
    assert decode.macs == layers + 2 * 2 * 100 * 32 + head
    prefill = bench.prefill_demand(subject, plan)
    assert prefill.nbytes == (3 * 10_000 + 3 * 2 * 350 * 100) / 1200  # 1200 rows: three steps
    assert prefill.macs == pytest.approx(layers + 2 * 2 * 350 * 32 + head / 600)


def test_fractions() -> None:
    used = Demand(nbytes=1e6, macs=1e8).fraction(50.0, Limits(bandwidth=1e9, int8=1e11))
    assert used == {"bandwidth": pytest.approx(0.05), "int8": pytest.approx(0.05)}


def test_sizes_of_a_real_subject(path: Path) -> None:
    plan = Plan(prompt=8, generate=4, repeat=1)
    subject = subject_for(path, plan)
    linear = CONFIG.n_params - 32 * CONFIG.vocab_size - 5 * 32  # neither embedding nor norms
    assert subject.weight_bytes == 4 * linear
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
