import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronk.backends.protocol import F32
from pronk.core.errors import UserError
from pronk.eval.perplexity import log_softmax, measure_perplexity, windows

V = 11


def logits_of(seed: int, sharpness: float = 2.0):  # type: ignore[no-untyped-def]
    """A model whose prediction depends on the token and on how many came before it."""
    table = np.random.default_rng(seed).normal(0, sharpness, (V, V)).astype(np.float32)

    def predict(ids: list[int]) -> F32:
        return np.stack(
            [table[token] + np.float32(0.01 * i) * table[0] for i, token in enumerate(ids)]
        )

    return predict


@given(n=st.integers(1, 200), ctx=st.integers(2, 50), stride=st.integers(1, 49), bos=st.booleans())
def test_windows_score_every_token_once(n: int, ctx: int, stride: int, bos: bool) -> None:
    if stride >= ctx or n + bos < 2:
        with pytest.raises(UserError):
            list(windows(n, ctx, stride, bos=bos))
        return
    plan = list(windows(n, ctx, stride, bos=bos))
    scored = [token for window in plan for token in range(window.scored, window.stop)]
    assert scored == list(range(0 if bos else 1, n))
    for i, window in enumerate(plan):
        assert 0 < window.stop - window.start <= ctx - bos
        before = window.scored - window.start + bos
        assert before >= (ctx - stride if i else 1)
        assert window.start == i * stride


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((10, 1, 1, False), "--ctx: 1 is too small"),
        ((10, 8, 8, True), "--stride: 8 is not from 1 to 7"),
        ((10, 8, 0, True), "--stride: 0 is not from 1 to 7"),
        ((1, 8, 4, False), "FILE: 1 tokens are too few; at least 2"),
        ((0, 8, 4, True), "FILE: 0 tokens are too few; at least 1"),
    ],
)
def test_bad_plans(arguments: tuple[int, int, int, bool], said: str) -> None:
    with pytest.raises(UserError, match=said):
        next(windows(*arguments[:3], bos=arguments[3]))


def by_hand(predict, tokens: list[int]) -> list[float]:  # type: ignore[no-untyped-def]
    """Log probability of each token but the first, one window over all, in plain Python."""
    rows = predict(tokens).astype(float).tolist()
    out = []
    for row, token in zip(rows, tokens[1:], strict=False):
        total = math.fsum(math.exp(x) for x in row)
        out.append(row[token] - math.log(total))
    return out


@pytest.mark.parametrize("bos_id", [None, 3])
def test_one_window_is_the_plain_definition(bos_id: int | None) -> None:
    predict = logits_of(0)
    ids = np.random.default_rng(1).integers(0, V, 40).tolist()
    result = measure_perplexity(predict, ids, ctx=64, stride=32, bos_id=bos_id)
    logprobs = by_hand(predict, ids if bos_id is None else [bos_id, *ids])
    assert result.n_scored == len(logprobs)
    mean = math.fsum(logprobs) / len(logprobs)
    assert result.perplexity == pytest.approx(math.exp(-mean), rel=1e-6)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in logprobs) / (len(logprobs) - 1))
    error = result.perplexity * spread / math.sqrt(len(logprobs))
    assert result.standard_error == pytest.approx(error, rel=1e-6)
    assert result.comparison is None


def test_windows_give_later_tokens_less_context() -> None:
    """The sum over windows, with the positions that each window really has."""
    predict = logits_of(0)
    ids = np.random.default_rng(2).integers(0, V, 50).tolist()
    expected = []
    for start, stop, scored in ((0, 16, 1), (4, 20, 16), (8, 24, 20)):
        logprobs = by_hand(predict, ids[start:stop])
        expected += logprobs[scored - start - 1 :]
    result = measure_perplexity(predict, ids[:24], ctx=16, stride=4, bos_id=None)
    assert result.n_scored == len(expected) == 23
    mean = math.fsum(expected) / len(expected)
    assert result.perplexity == pytest.approx(math.exp(-mean), rel=1e-6)


def test_comparison_with_a_reference() -> None:
    model, reference = logits_of(0), logits_of(5)
    ids = np.random.default_rng(1).integers(0, V, 30).tolist()
    result = measure_perplexity(model, ids, ctx=64, stride=32, bos_id=None, reference=reference)
    assert result.comparison is not None
    kls, agreed = [], []
    for q_row, p_row in zip(model(ids)[:-1].tolist(), reference(ids)[:-1].tolist(), strict=True):
        p_total = math.fsum(map(math.exp, p_row))
        q_total = math.fsum(map(math.exp, q_row))
        kls.append(
            math.fsum(
                math.exp(p) / p_total * ((p - math.log(p_total)) - (q - math.log(q_total)))
                for p, q in zip(p_row, q_row, strict=True)
            )
        )
        agreed.append(p_row.index(max(p_row)) == q_row.index(max(q_row)))
    comparison = result.comparison
    assert comparison.kl_divergence == pytest.approx(math.fsum(kls) / len(kls), rel=1e-6)
    assert comparison.kl_divergence_p99 == pytest.approx(np.quantile(kls, 0.99), rel=1e-6)
    assert comparison.top1_agreement == sum(agreed) / len(agreed)
    assert 0 < comparison.top1_agreement < 1
    mean = math.fsum(by_hand(reference, ids)) / 29
    assert comparison.reference_perplexity == pytest.approx(math.exp(-mean), rel=1e-6)


def test_a_model_against_itself() -> None:
    predict = logits_of(0)
    ids = np.random.default_rng(1).integers(0, V, 100).tolist()
    result = measure_perplexity(predict, ids, ctx=16, stride=8, bos_id=1, reference=predict)
    assert result.comparison is not None
    assert result.comparison.kl_divergence == 0
    assert result.comparison.top1_agreement == 1
    assert result.comparison.reference_perplexity == result.perplexity


def test_extreme_logits() -> None:
    logits = np.array([[1e4, -1e4, 0.0], [3e38, -3e38, 0.0]], np.float32)
    assert np.isfinite(log_softmax(logits)).all()
    sure_and_wrong = lambda ids: np.tile(np.float32([0.0, 1e6]), (len(ids), 1))  # noqa: E731
    result = measure_perplexity(sure_and_wrong, [0, 0, 0], ctx=8, stride=4, bos_id=None)
    assert result.perplexity == math.inf


def test_progress_counts_windows() -> None:
    told: list[tuple[int, int]] = []
    measure_perplexity(
        logits_of(0), [1] * 40, ctx=16, stride=8, bos_id=1,
        progress=lambda done, total, what: told.append((done, total)),
    )  # fmt: skip
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] == len(list(windows(40, 16, 8, bos=True)))
