"""Parameters are checked; draws have the distribution that the parameters say; text is cut at stop
strings, the same whether it streams or not."""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.backends import reference
from pronk.backends.protocol import F32, Sampled, SampleParams
from pronk.backends.select import select_backend
from pronk.core.errors import UserError
from pronk.engine.request import MAX_SEED, Request, SamplingParams
from pronk.engine.sampling import TextOut, fresh_seed, token_logprobs


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    try:
        return select_backend(request.param)
    except UserError as error:
        pytest.skip(str(error))


# Parameters


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("temperature", -0.1, "from 0 to 100"),
        ("temperature", math.nan, "from 0 to 100"),
        ("temperature", "hot", "from 0 to 100"),
        ("temperature", True, "from 0 to 100"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_k", -1, "of at least 0"),
        ("top_k", 2.5, "of at least 0"),
        ("min_p", 1.5, "from 0 to 1"),
        ("repetition_penalty", 0, "above 0 and at most 100"),
        ("repetition_penalty", math.inf, "above 0 and at most 100"),
        ("presence_penalty", -2.1, "from -2 to 2"),
        ("frequency_penalty", 3, "from -2 to 2"),
        ("max_tokens", 0, "of at least 1"),
        ("seed", -1, f"from 0 to {MAX_SEED}"),
        ("seed", MAX_SEED + 1, f"from 0 to {MAX_SEED}"),
        ("logprobs", 101, "from 0 to 100"),
        ("logprobs", -1, "from 0 to 100"),
        ("ignore_eos", 1, "neither True nor False"),
        ("stop", "", "non-empty string"),
        ("stop", ["a", ""], "non-empty string"),
        ("stop", 5, "non-empty string"),
        ("stop_ids", 5, "list of token ids"),
        ("stop_ids", [1, -2], "of at least 0"),
        ("logit_bias", {1: 101.0}, "from -100 to 100"),
        ("logit_bias", {-1: 1.0}, "of at least 0"),
        ("logit_bias", [1, 2], "does not map token ids"),
    ],
)
def test_a_bad_value_is_named_with_its_limit(name: str, value: Any, limit: str) -> None:
    with pytest.raises(UserError) as caught:
        SamplingParams.of({name: value}, {})
    message = str(caught.value)
    assert message.startswith(name)
    assert limit in message
    assert "\n" not in message
    assert repr(value) in message or name in ("stop_ids", "logit_bias")


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match=r"unknown argument 'temprature'; known are temperature"):
        SamplingParams.of({"temprature": 1.0}, {})


def test_values_are_normalized_and_none_takes_the_default() -> None:
    params = SamplingParams.of(
        {"temperature": None, "top_p": np.float64(0.5), "top_k": np.int64(3), "stop": "end",
         "stop_ids": [7], "logit_bias": {5: 1}, "seed": None},
        {"temperature": 0.6, "top_p": 0.9},
    )  # fmt: skip
    assert params == SamplingParams(
        temperature=0.6, top_p=0.5, top_k=3, stop=("end",), stop_ids=(7,), logit_bias=((5, 1.0),)
    )
    assert (type(params.top_p), type(params.top_k)) == (float, int)


def test_penalties_get_the_ids_without_a_copy_for_each_token() -> None:
    request = Request(range(500), SamplingParams(repetition_penalty=1.5))
    request.limit = 600
    first = request.sample_params()
    for token in range(50):
        request.append(Sampled(token))  # also while the parameters of the step before are around
    last = request.sample_params()
    assert last.prompt_ids is first.prompt_ids
    assert last.output_ids is first.output_ids
    assert np.asarray(last.output_ids).dtype == np.int32
    assert (list(last.prompt_ids), list(last.output_ids)) == ([*range(500)], [*range(50)])
    assert (list(request.ids), request.output) == ([*range(500), *range(50)], [*range(50)])


def test_a_request_without_a_seed_gets_one_and_keeps_it() -> None:
    seeds = {Request([1], SamplingParams()).seed for _ in range(20)}
    assert len(seeds) > 15
    assert Request([1], SamplingParams(seed=9)).seed == 9
    request = Request([1], SamplingParams())
    assert request.sample_params().seed == request.seed
    assert 0 <= fresh_seed() < 2**32


def test_penalties_see_the_prompt_and_the_output() -> None:
    request = Request([1, 2], SamplingParams(presence_penalty=1.0))
    request.limit = 10
    request.append(Sampled(5))
    params = request.sample_params()
    assert (list(params.prompt_ids), list(params.output_ids), params.draw) == ([1, 2], [5], 1)
    plain = Request([1, 2], SamplingParams())
    plain.limit = 10
    plain.append(Sampled(5))
    params = plain.sample_params()
    assert (len(params.prompt_ids), len(params.output_ids), params.draw) == (0, 0, 1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("text", r"prompt: 'text' is not a list of token ids"),
        (b"abc", r"prompt: b'abc' is not a list of token ids"),
        (b"abcd", r"prompt: b'abcd' is not a list of token ids"),
        (5, r"prompt: 5 is not a list of token ids"),
        (None, r"prompt: None is not a list of token ids"),
        ({1: 2}, r"prompt: \{1: 2\} is not a list of token ids"),
        ([1, "a"], r"prompt\[1\]: 'a' is not a whole number"),
        ([1, 2, 1.0], r"prompt\[2\]: 1.0 is not a whole number"),
        ([1, True], r"prompt\[1\]: True is not a whole number"),
        (np.array([0.5]), r"prompt\[0\]: .*0.5.* is not a whole number"),
        (np.array([True]), r"prompt\[0\]: .*True.* is not a whole number"),
        ([1, 2**40], r"prompt\[1\]: 1099511627776 is not a token id"),
    ],
)
def test_a_prompt_of_something_else_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        Request(prompt, SamplingParams())


@pytest.mark.parametrize(
    "prompt", [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), [np.int32(1), 2]]
)
def test_a_prompt_of_whole_numbers_is_taken_as_it_comes(prompt: Any) -> None:
    assert list(Request(prompt, SamplingParams()).ids) == [1, 2]


@pytest.mark.parametrize(
    ("given", "used"), [(0.0, 0.0), (1e-9, 0.0), (9e-6, 0.0), (1e-5, 1e-5), (0.7, 0.7)]
)
def test_the_lowest_temperatures_are_greedy(given: float, used: float) -> None:
    assert Request([1], SamplingParams(temperature=given)).sample_params().temperature == used


# Draws

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -1.5, -3.0, 1.0], np.float32)


def draws(ops: ModuleType, logits_V: F32, n: int = 4000, **values: Any) -> F32:
    """Frequencies of n draws of one request."""
    params = [SampleParams(**{"temperature": 1.0, "seed": 3, **values}, draw=i) for i in range(n)]
    rows = ops.from_host(np.tile(logits_V, (n, 1)))
    tokens = [sampled.token for sampled in ops.sample(rows, params)]
    return np.asarray(np.bincount(tokens, minlength=len(logits_V)) / n, np.float32)


def softmax(logits_V: F32, temperature: float = 1.0) -> F32:
    exp_V = np.exp((logits_V - logits_V.max()) / temperature)
    return np.asarray(exp_V / exp_V.sum(), np.float32)


def only(probs_V: F32, kept: Iterable[int]) -> F32:
    out_V = np.zeros_like(probs_V)
    kept = list(kept)
    out_V[kept] = probs_V[kept]
    return np.asarray(out_V / out_V.sum(), np.float32)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, lambda: softmax(LOGITS)),
        ({"temperature": 0.5}, lambda: softmax(LOGITS, 0.5)),
        ({"temperature": 3.0}, lambda: softmax(LOGITS, 3.0)),
        ({"top_k": 1}, lambda: only(softmax(LOGITS), [0])),
        ({"top_k": 2}, lambda: only(softmax(LOGITS), [0, 1])),  # the smaller of two equal ids
        ({"top_k": 100}, lambda: softmax(LOGITS)),
        ({"top_p": 0.6}, lambda: only(softmax(LOGITS), [0, 1])),
        ({"top_p": 0.01}, lambda: only(softmax(LOGITS), [0])),
        ({"min_p": 0.3}, lambda: only(softmax(LOGITS), [0, 1, 7])),
        ({"top_k": 4, "min_p": 0.3, "top_p": 0.99}, lambda: only(softmax(LOGITS), [0, 1, 7])),
        ({"logit_bias": ((6, 4.0), (0, -100.0))},
         lambda: softmax(LOGITS + np.array([-100, 0, 0, 0, 0, 0, 4, 0], np.float32))),
        ({"output_ids": [0, 0, 1], "presence_penalty": 1.0},
         lambda: softmax(LOGITS - np.array([1, 1, 0, 0, 0, 0, 0, 0], np.float32))),
        ({"output_ids": [0, 0, 1], "frequency_penalty": 0.75},
         lambda: softmax(LOGITS - np.array([1.5, 0.75, 0, 0, 0, 0, 0, 0], np.float32))),
        ({"prompt_ids": [0, 5], "output_ids": [1], "repetition_penalty": 2.0},
         lambda: softmax(np.array([1, 0.5, 0.5, 0, -1, -3, -3, 1], np.float32))),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else "",
)  # fmt: skip
def test_draws_have_the_right_distribution(
    ops: ModuleType, values: dict[str, Any], expected: Callable[[], F32]
) -> None:
    frequencies, probs = draws(ops, LOGITS, **values), expected()
    assert not frequencies[probs == 0].any()
    # five standard deviations of a frequency over 4,000 draws
    np.testing.assert_array_less(
        np.abs(frequencies - probs), 5 * np.sqrt(probs * (1 - probs) / 4000) + 1e-6
    )


def test_greedy_takes_the_smallest_id_of_the_largest_logit(ops: ModuleType) -> None:
    logits = np.array([[0.0, 3.0, 3.0, -1.0]], np.float32)
    greedy = SampleParams(temperature=0.0, top_k=2, top_p=0.1, seed=1)
    assert ops.sample(ops.from_host(logits), [greedy])[0].token == 1


def test_a_draw_is_a_function_of_seed_and_number_alone(ops: ModuleType) -> None:
    flat = np.zeros((1, 1000), np.float32)

    def draw(seed: int, n: int) -> int:
        params = SampleParams(temperature=1.0, seed=seed, draw=n)
        return int(ops.sample(ops.from_host(flat), [params])[0].token)

    first = [draw(7, n) for n in range(50)]
    assert first == [draw(7, n) for n in range(50)]
    assert len(set(first)) > 40
    other = [draw(8, n) for n in range(50)]
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 5
    both = ops.sample(
        ops.from_host(np.zeros((2, 1000), np.float32)),
        [SampleParams(temperature=1.0, seed=s, draw=4) for s in (7, 8)],
    )
    assert [sampled.token for sampled in both] == [first[4], other[4]]
    assert draw(MAX_SEED, 0) != draw(MAX_SEED - 1, 0)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 49_152])
@pytest.mark.parametrize("n", [0, 1, 2, 15, 40, 256, 100_000])
@pytest.mark.parametrize("distinct", [2, 300, 1 << 20])
def test_the_largest_values_are_those_of_a_whole_sort(size: int, n: int, distinct: int) -> None:
    """Also where many are equal, or infinitely small."""
    draw = np.random.default_rng(size + n)
    x_V = draw.integers(0, distinct, size).astype(np.float64)
    for x in (x_V, np.where(x_V < distinct // 2, -np.inf, x_V), np.sort(x_V), np.sort(x_V)[::-1]):
        expected = np.argsort(-x, kind="stable")[:n]
        np.testing.assert_array_equal(reference._largest(x, n), expected)


def test_masked_tokens_are_never_drawn(ops: ModuleType) -> None:
    mask = np.zeros((200, 8), np.bool_)
    mask[:, [3, 5]] = True
    params = [SampleParams(temperature=t, seed=1, draw=i) for i in range(100) for t in (0.0, 1.0)]
    rows = ops.from_host(np.tile(LOGITS, (200, 1)))
    tokens = [sampled.token for sampled in ops.sample(rows, params, mask)]
    assert set(tokens[0::2]) == {3}
    assert set(tokens[1::2]) == {3, 5}


def test_token_logprobs_against_float64(ops: ModuleType) -> None:
    logits_NV = np.random.default_rng(0).normal(0, 8, (5, 3000)).astype(np.float32)
    ids = [0, 2999, 5, 7, 11]
    wide = logits_NV.astype(np.float64)
    expected = (wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))[range(5), ids]
    np.testing.assert_allclose(token_logprobs(logits_NV, ids), expected, rtol=1e-6)
    params = [SampleParams(top_logprobs=0, logit_bias=((i, 1e9),)) for i in ids]
    sampled = ops.sample(ops.from_host(logits_NV), params)
    assert [s.token for s in sampled] == ids
    np.testing.assert_allclose([s.logprob for s in sampled], expected, rtol=1e-6)


# Text


class Letters:
    """A stream whose token i is the i-th of some texts; the last characters of each token come
    with the next one, as those of an unfinished UTF-8 sequence would."""

    def __init__(self, texts: list[str], late: int = 0) -> None:
        self._texts, self._late, self._rest = texts, late, ""

    def push(self, id: int) -> str:
        text = self._rest + self._texts[id]
        cut = max(0, len(text) - self._late)
        self._rest = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        text, self._rest = self._rest, ""
        return text


def read(texts: list[str], stop: tuple[str, ...], late: int = 0) -> tuple[str, list[str], bool]:
    """The answer, its pieces, and whether a stop string ended it."""
    out = TextOut(Letters(texts, late), stop)
    pieces = []
    for id in range(len(texts)):
        pieces.append(out.feed(id))
        if out.stopped:
            break
    pieces.append(out.finish())
    return "".join(pieces), pieces, out.stopped


@pytest.mark.parametrize(
    ("texts", "stop", "answer", "stopped"),
    [
        (["one", " two"], (), "one two", False),
        (["one", " two"], ("two",), "one ", True),
        (["one t", "w", "o three"], ("two",), "one ", True),
        (["one t", "w", "e three"], ("two",), "one twe three", False),
        (["end tw"], ("two",), "end tw", False),
        (["aab", "aac"], ("aaac", "baac"), "aa", True),
        (["ab", "cd"], ("d", "bc"), "a", True),
        (["\n\nUser"], ("\n",), "", True),
    ],
)
def test_stop_strings(texts: list[str], stop: tuple[str, ...], answer: str, stopped: bool) -> None:
    text, _, ended = read(texts, stop)
    assert (text, ended) == (answer, stopped)


def test_only_what_may_still_become_a_stop_string_is_held_back() -> None:
    _, pieces, _ = read(["abc<", "/", "s", "x<"], ("</s>",))
    assert pieces == ["abc", "", "", "</sx", "<"]


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("ab<\n", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    stop=st.lists(st.text("ab<\n", min_size=1, max_size=4), max_size=3).map(tuple),
    late=st.integers(0, 2),
)
def test_any_cut_into_tokens_gives_the_text_before_a_stop_string(
    text: str, cuts: list[int], stop: tuple[str, ...], late: int
) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    tokens = [text[a:b] for a, b in pairwise(bounds)]
    answer, _, stopped = read(tokens, stop, late)
    assert text.startswith(answer)
    assert stopped == any(s in text for s in stop)
    assert not any(s in answer for s in stop)
    if stopped:
        assert any(text[len(answer) :].startswith(s) for s in stop)
    else:
        assert answer == text
