"""`LLM` on tiny random models: what INTERFACE promises, and what bad input is told."""

import itertools
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import CONFIG, SPECIAL, write_gguf, write_hf

import pronk
from pronk import LLM
from pronk.backends import reference
from pronk.backends.protocol import BLOCK, Batch, KvDtype, Sampled
from pronk.backends.select import select_backend
from pronk.checkpoints.checkpoint import Checkpoint
from pronk.checkpoints.open import open_checkpoint
from pronk.core.errors import CheckpointError, ContextLengthError, MemoryLimitError, UserError
from pronk.engine import llm as llm_module
from pronk.engine import prompts as prompts_module
from pronk.engine.engine import Engine
from pronk.engine.load import load_model, recommended_sampling
from pronk.engine.replies import ReplyText
from pronk.engine.scheduler import Slice
from pronk.model.llama import forward
from pronk.text.messages import Message, ToolCall
from vocabularies import N

HELLO = [{"role": "user", "content": "hello world"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module", params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        select_backend(request.param)
    except UserError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
def llm(path: Path, backend: str) -> Iterator[LLM]:
    with LLM(path, backend=backend) as llm:
        yield llm


@pytest.fixture
def base(tmp_path: Path) -> Iterator[LLM]:
    with LLM(write_gguf(tmp_path / "base.gguf", chat=False), backend="reference") as llm:
        yield llm


# Chat


def test_the_pieces_of_a_stream_are_the_reply(llm: LLM) -> None:
    *pieces, last = llm.stream(HELLO, max_tokens=40, seed=3, logprobs=2)
    assert last.reply is not None
    assert not any(piece.reply for piece in pieces)
    whole = llm.chat(HELLO, max_tokens=40, seed=3, logprobs=2)
    assert "".join(piece.text for piece in [*pieces, last]) == whole.text == last.reply.text
    assert len(pieces) > 10
    assert last.reply.token_ids == whole.token_ids
    assert last.reply.logprobs == whole.logprobs
    assert [entry.token for entry in whole.logprobs or []] == whole.token_ids


def test_a_reply_tells_what_it_took(llm: LLM) -> None:
    reply = llm.chat(HELLO, max_tokens=20, ignore_eos=True)
    form = llm.chat_format
    assert form is not None
    prompt = form.render([Message("user", "hello world")]).ids
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == len(reply.token_ids) == 20
    assert (reply.finish_reason, reply.tool_calls, reply.logprobs) == ("length", (), None)
    assert reply.text == llm.tokenizer.decode(reply.token_ids, skip_special=True)
    assert reply.timings.prompt_seconds > 0
    assert reply.timings.decode_speed > 0
    assert reply.message == Message("assistant", reply.text)
    assert reply.timings.decode_tokens == 19


def test_the_seed_that_is_reported_gives_the_same_again(llm: LLM) -> None:
    reply = llm.chat(HELLO, max_tokens=20, temperature=1.5)
    again = llm.chat(HELLO, max_tokens=20, temperature=1.5, seed=reply.seed)
    assert again.token_ids == reply.token_ids
    others = [llm.chat(HELLO, max_tokens=20, temperature=1.5).token_ids for _ in range(3)]
    assert any(other != reply.token_ids for other in others)


def test_a_chat_does_not_compute_its_history_again(llm: LLM, path: Path, backend: str) -> None:
    turns: list[Any] = [{"role": "user", "content": "hello the world " * 8}]
    first = llm.chat(turns, max_tokens=30, temperature=0)
    turns += [first.message, {"role": "user", "content": "123"}]
    second = llm.chat(turns, max_tokens=10, temperature=0)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens // BLOCK * BLOCK > 0
    assert second.timings.prompt_tokens == second.usage.prompt_tokens - second.usage.cached_tokens
    with LLM(path, backend=backend, prefix_cache=False) as cold:
        anew = cold.chat(turns, max_tokens=10, temperature=0)
    assert anew.usage.cached_tokens == 0
    assert anew.token_ids == second.token_ids


def test_messages_may_be_objects_or_dictionaries(llm: LLM) -> None:
    as_dicts = llm.chat([{"role": "system", "content": "x"}, *HELLO], max_tokens=3, seed=1)
    as_objects = llm.chat(
        [Message("system", "x"), Message("user", "hello world")], max_tokens=3, seed=1
    )
    assert as_dicts.token_ids == as_objects.token_ids


def test_a_stream_that_is_closed_early_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream(HELLO, max_tokens=100, ignore_eos=True)
    next(stream)
    engine = llm.engine
    assert engine.has_work
    stream.close()
    assert not engine.has_work
    assert engine.scheduler.pool.n_referenced == 0


def test_threads_get_the_answers_that_they_would_get_alone(llm: LLM) -> None:
    def answer(i: int) -> list[int]:
        messages = [{"role": "user", "content": f"hello {i}" * (i + 1)}]
        return llm.chat(messages, max_tokens=15, seed=i).token_ids

    alone = [answer(i) for i in range(6)]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(answer, range(6))) == alone


def test_a_base_model_says_how_to_use_it(base: LLM) -> None:
    assert base.chat_format is None
    with pytest.raises(UserError, match=r"base\.gguf is a base model .*; use generate"):
        base.chat(HELLO)
    assert base.generate("hello", max_tokens=2).text != ""


def test_chat_samples_as_the_model_recommends(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"general.sampling.temp": 0.0}
    path = write_gguf(tmp_path / "m.gguf", **keys)
    with LLM(path, backend="reference") as llm:
        greedy = [llm.chat(HELLO, max_tokens=20).token_ids for _ in range(3)]
        assert greedy[0] == greedy[1] == greedy[2]
        hot = llm.chat(HELLO, max_tokens=20, temperature=5.0, top_p=1.0)
        assert hot.token_ids != greedy[0]


# Tools: a model that writes what it is told


class Scripted:
    """Draws the given tokens, whatever it is asked."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def run(self, slices: Sequence[Slice]) -> list[list[Sampled]]:
        return [[Sampled(self._tokens[s.request.n_output])] if s.sample else [] for s in slices]


def script(llm: LLM, text: str) -> list[int]:
    """From now on `llm` writes `text`."""
    tokens = llm.tokenizer.encode(text, special=True)
    llm._engine = Engine(Scripted(tokens), vocab_size=CONFIG.vocab_size, context=2048, n_blocks=64)
    return tokens


CALL = '{"name": "weather", "parameters": {"city": "日本"}}'


@pytest.mark.parametrize(
    ("written", "text", "calls", "reason"),
    [
        (f"<|python_tag|>{CALL}<|eom_id|>", "", ["日本"], "tool_calls"),
        (f"{CALL}<|eot_id|>", "", ["日本"], "tool_calls"),
        (f"hello the {CALL}; {CALL}<|eot_id|>", "hello the", ["日本", "日本"], "tool_calls"),
        ("hello {world<|eot_id|>", "hello {world", [], "stop"),
        ('{"name": "other", "parameters": {}}<|eot_id|>',
         '{"name": "other", "parameters": {}}', [], "stop"),
    ],
)  # fmt: skip
def test_tool_calls_are_read_from_the_answer(
    path: Path, written: str, text: str, calls: list[str], reason: str
) -> None:
    with LLM(path, backend="reference") as llm:
        tokens = script(llm, written)
        reply = llm.chat(HELLO, tools=[TOOL])
        *pieces, last = llm.stream(HELLO, tools=[TOOL])
    assert (reply.text, reply.finish_reason, reply.token_ids) == (text, reason, tokens)
    assert [call.arguments for call in reply.tool_calls] == [{"city": city} for city in calls]
    assert all(isinstance(call, ToolCall) and call.name == "weather" for call in reply.tool_calls)
    assert last.reply is not None
    assert [c.arguments for c in last.reply.tool_calls] == [c.arguments for c in reply.tool_calls]
    assert "".join(piece.text for piece in [*pieces, last]) == text


@pytest.mark.parametrize("options", [{}, {"tools": [TOOL], "tool_choice": "none"}])
def test_without_offered_tools_a_call_is_text(path: Path, options: dict[str, Any]) -> None:
    with LLM(path, backend="reference") as llm:
        script(llm, f"{CALL}<|eot_id|>")
        reply = llm.chat(HELLO, **options)
    assert (reply.text, reply.tool_calls, reply.finish_reason) == (CALL, (), "stop")


def test_a_call_cut_by_max_tokens_is_no_call(path: Path) -> None:
    with LLM(path, backend="reference") as llm:
        tokens = script(llm, f"{CALL}<|eot_id|>")
        reply = llm.chat(HELLO, tools=[TOOL], max_tokens=len(tokens) - 3)
    assert (reply.tool_calls, reply.finish_reason) == ((), "length")
    assert CALL.startswith(reply.text)


@pytest.mark.parametrize("tools", [(), ("weather",)])
def test_a_stop_string_in_a_chat(path: Path, tools: tuple[str, ...]) -> None:
    with LLM(path, backend="reference") as llm:
        tokens = llm.tokenizer.encode("hello {the} world<|python_tag|>123", special=True)
        for stop, wanted in [
            (("e} w",), "hello {th"), (("hello",), ""), (("world1",), None), (("12345",), None),
        ]:  # fmt: skip
            text = ReplyText(llm.tokenizer, stop, tools)
            pieces = []
            for token in tokens:
                pieces.append(text.feed(token))
                if text.stopped:
                    break
            pieces.append(text.finish())
            assert text.stopped == (wanted is not None or (stop == ("world1",) and not tools))
            if wanted is not None:
                assert "".join(pieces) == wanted


# Generate


def test_a_batch_is_answered_as_its_prompts_alone(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello", bos=True)
    single = llm.generate("hello", seed=1, temperature=1.0)
    assert len(single.token_ids) <= 16
    assert llm.generate(ids, seed=1, temperature=1.0).token_ids == single.token_ids
    both = llm.generate(["the world", "hello"], seed=1, temperature=1.0)
    assert both[1].token_ids == single.token_ids
    assert both[0].token_ids == llm.generate("the world", seed=1, temperature=1.0).token_ids
    assert llm.generate([ids, ids], seed=1, temperature=1.0)[0].token_ids == single.token_ids


def test_generate_is_greedy_unless_told_otherwise(llm: LLM) -> None:
    completion = llm.generate("hello", max_tokens=12, logprobs=1, ignore_eos=True)
    assert completion.logprobs is not None
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry.top == ((token, entry.logprob),)
    prompt = llm.tokenizer.encode("hello", bos=True)
    scores = llm.score(prompt + completion.token_ids)[len(prompt) - 1 :]
    np.testing.assert_allclose([e.logprob for e in completion.logprobs], scores, atol=1e-5)


def test_text_is_cut_at_a_stop_string_wherever_the_tokens_end(llm: LLM) -> None:
    plain = llm.generate("hello", max_tokens=30, temperature=1.0, seed=2, ignore_eos=True)
    for start, end in itertools.combinations(range(0, len(plain.text), 3), 2):
        stop = plain.text[start:end]
        cut = llm.generate(
            "hello", max_tokens=30, temperature=1.0, seed=2, ignore_eos=True, stop=stop
        )
        assert cut.text == plain.text[: plain.text.index(stop)]
        assert cut.finish_reason == "stop"
        assert plain.token_ids[: len(cut.token_ids)] == cut.token_ids
        if end > 12:
            break


def test_stop_ids_end_an_answer_before_themselves(llm: LLM) -> None:
    plain = llm.generate("hello", max_tokens=30, ignore_eos=True)
    end = plain.token_ids[3]
    cut = llm.generate("hello", max_tokens=30, ignore_eos=True, stop_ids=[end])
    first = plain.token_ids.index(end)
    assert cut.token_ids == plain.token_ids[: first + 1]
    assert cut.text == llm.tokenizer.decode(cut.token_ids[:-1], skip_special=True)
    assert cut.finish_reason == "stop"


def test_a_forced_end_token_ends_and_a_forbidden_one_does_not(llm: LLM) -> None:
    eot = llm.tokenizer.special_ids["<|eot_id|>"]
    ended = llm.generate("hello", logit_bias={eot: 100})
    assert (ended.token_ids, ended.text, ended.finish_reason) == ([eot], "", "stop")
    deaf = llm.generate("hello", logit_bias={eot: 100}, ignore_eos=True, max_tokens=4)
    assert (deaf.token_ids, deaf.text, deaf.finish_reason) == ([eot] * 4, "", "length")


def test_a_prompt_text_gets_one_bos_and_no_other_special_token(llm: LLM) -> None:
    text = "<|eot_id|>hello"
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(text)]
    assert N + 3 not in ids
    assert llm.generate(text).usage.prompt_tokens == len(ids)


def test_tokens_that_the_tokenizer_does_not_have(tmp_path: Path) -> None:
    """A model padded to a rounder vocabulary never draws them, nor takes them."""
    path = write_hf(tmp_path / "padded", padding=500)
    with LLM(path, backend="reference") as llm:
        known, pad = llm.tokenizer.vocab_size, llm.config.vocab_size - 1
        assert pad == known + 499
        options: dict[str, Any] = {"temperature": 10.0, "max_tokens": 50, "logprobs": 5, "seed": 1}
        out = llm.generate("hello", **options)
        reply = llm.chat(HELLO, **options)
        for answer in (out, reply):
            assert max(answer.token_ids) < known
            assert all(max(dict(e.top)) < known for e in answer.logprobs or ())
        for call in (llm.generate, llm.score, llm.logits):
            with pytest.raises(
                UserError, match=f"prompt: token id {pad} is not in 0 to {known - 1}"
            ):
                call([1, pad])
        with pytest.raises(UserError, match=f"logit_bias: token id {pad} is not in"):
            llm.generate("hello", logit_bias={pad: 100})
        prompt = llm.tokenizer.encode("hello", bos=llm.tokenizer.add_bos)
        scores = llm.score(prompt + out.token_ids)[len(prompt) - 1 :]
        np.testing.assert_allclose([e.logprob for e in out.logprobs or ()], scores, atol=1e-5)
        assert llm.logits([1, 2]).shape == (2, llm.config.vocab_size)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"abc", "prompt: b'abc' is not a list of token ids"),
        (5, "prompt: 5 is not a list of token ids"),
        (None, "prompt: None is not a list of token ids"),
        ({"a": 1}, "prompt: {'a': 1} is not a list of token ids"),
        ([1, True], "prompt[1]: True is not a whole number of at least 0"),
        ([0.5], "prompt[0]: 0.5 is not a whole number of at least 0"),
        ([b"abc"], "prompt[0]: b'abc' is not a whole number of at least 0"),
        (["hello", b"abc"], "prompt: b'abc' is not a list of token ids"),
        (["hello", None], "prompt: None is not a list of token ids"),
        ([[1], [2, None]], "prompt[1]: None is not a whole number of at least 0"),
    ],
)
def test_what_is_no_prompt_is_named(path: Path, prompt: Any, message: str) -> None:
    with LLM(path, backend="reference") as llm, pytest.raises(UserError) as caught:
        llm.generate(prompt)
    assert str(caught.value) == message


def test_ids_may_be_arrays(llm: LLM) -> None:
    ids = [1, 2, 3]
    wanted = llm.generate(ids).token_ids
    assert llm.generate(np.array(ids)).token_ids == wanted  # type: ignore[call-overload]
    both = llm.generate(np.array([ids, ids]))  # type: ignore[call-overload]
    assert [completion.token_ids for completion in both] == [wanted] * 2
    np.testing.assert_array_equal(llm.score(np.array(ids)), llm.score(ids))  # type: ignore[arg-type]
    np.testing.assert_array_equal(llm.logits(tuple(ids)), llm.logits(ids))


def test_max_tokens_none_is_the_default(path: Path) -> None:
    """16 for generate, the room in the context for a chat."""
    with LLM(path, backend="reference", ctx=100) as llm:
        out = llm.generate([1] * 10, max_tokens=None, ignore_eos=True)
        assert (len(out.token_ids), out.finish_reason) == (16, "length")
        reply = llm.chat(HELLO, max_tokens=None, ignore_eos=True)
        assert reply.usage.prompt_tokens + reply.usage.completion_tokens == 100


@pytest.mark.parametrize("how", ["generate", "chat", "stream"])
def test_a_text_that_fails_is_raised_to_its_caller_only(
    llm: LLM, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another caller's stream goes on, although the failing call does the steps meanwhile."""
    wanted = llm.chat(HELLO, max_tokens=30, seed=3, ignore_eos=True)
    other = llm.stream(HELLO, max_tokens=30, seed=3, ignore_eos=True)
    pieces = [next(other)]

    class Unreadable:
        stopped = False

        def feed(self, token: int) -> str:
            raise ZeroDivisionError("unreadable")

    def unreadable(*_: object, **__: object) -> Unreadable:
        return Unreadable()

    with monkeypatch.context() as patch:
        patch.setattr(prompts_module, "TextOut", unreadable)
        patch.setattr(prompts_module, "ReplyText", unreadable)
        call: dict[str, Callable[[], object]] = {
            "generate": lambda: llm.generate(["hello", "the"]),
            "chat": lambda: llm.chat(HELLO),
            "stream": lambda: list(llm.stream(HELLO)),
        }
        with pytest.raises(ZeroDivisionError, match="unreadable"):
            call[how]()
    *more, last = other
    assert last.reply is not None
    assert last.reply.token_ids == wanted.token_ids
    assert "".join(p.text for p in [*pieces, *more, last]) == wanted.text == last.reply.text
    assert not llm.engine.has_work


def test_one_bad_prompt_stops_the_batch_before_it_begins(llm: LLM) -> None:
    with pytest.raises(UserError, match="prompt: token id 100000"):
        llm.generate([[1, 2], [100000]])
    assert not llm.engine.has_work


# Scores


def test_scores_and_logits_agree_with_the_plain_forward(path: Path, backend: str) -> None:
    """Across several chunks and blocks, against one pass without any cache."""
    ops: Any = select_backend(backend)
    checkpoint = open_checkpoint(path)
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 300)
    rows = np.arange(300, dtype=np.int32)
    batch = Batch(
        rows, np.array([0, 300], np.int32), np.array([300], np.int32), np.empty((1, 0), np.int32)
    )
    weights = load_model(checkpoint, ops, n_positions=300)
    plain = forward(ops, CONFIG, weights, ids.astype(np.int32), batch, None)
    with LLM(path, backend=backend, kv_dtype="f32") as llm:
        logits = llm.logits(ids.tolist())
        scores = llm.score(ids.tolist())
    assert (logits.dtype.name, logits.shape) == ("float32", (300, CONFIG.vocab_size))
    np.testing.assert_allclose(logits, plain, atol=2e-5)
    wide = logits.astype(np.float64)
    logprobs = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    assert (scores.dtype.name, scores.shape) == ("float32", (299,))
    np.testing.assert_allclose(scores, logprobs[np.arange(299), ids[1:]], atol=1e-5)


def test_scoring_fills_the_context_and_not_more(llm: LLM) -> None:
    assert llm.score([1]).shape == (0,)
    assert llm.score([1] * llm.context).shape == (llm.context - 1,)
    with pytest.raises(ContextLengthError):
        llm.score([1] * (llm.context + 1))
    with pytest.raises(UserError, match="no tokens"):
        llm.logits([])


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
def test_a_smaller_cache_changes_scores_a_little(path: Path, kv_dtype: KvDtype) -> None:
    ids = list(range(100))
    with LLM(path, backend="reference", kv_dtype="f32") as llm:
        exact = llm.score(ids)
    with LLM(path, backend="reference", kv_dtype=kv_dtype) as llm:
        rounded = llm.score(ids)
    assert 0 < np.abs(rounded - exact).max() < 0.2


def test_logits_are_checked_against_the_free_memory(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_module, "free_memory", lambda: 4 * 10 * CONFIG.vocab_size)
    assert len(llm.logits([1] * 10)) == 10
    with pytest.raises(MemoryLimitError, match=r"those of 11 tokens take .* at most 10 tokens"):
        llm.logits([1] * 11)
    with pytest.raises(UserError, match="no tokens"):
        llm.logits([])


# Loading and refusals


def test_all_cores_are_used_unless_told_otherwise(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the packing of the weights on, and in every step."""
    happened: list[object] = []
    monkeypatch.setattr(reference, "default_threads", lambda: 5)
    monkeypatch.setattr(reference, "set_threads", happened.append)
    options: dict[str, Any] = {
        "backend": "reference",
        "progress": lambda done, total, what: happened.append(what),
    }
    with LLM(path, **options) as llm:
        assert llm.threads == 5
        assert happened[:2] == [5, "loading"]
        happened.clear()
        llm.generate("a", max_tokens=3, ignore_eos=True)
        assert happened == [5, 5, 5]
    with LLM(path, threads=2, **options) as llm:
        assert llm.threads == 2
        llm.generate("a", max_tokens=1)
    assert set(happened) == {5, 2, "loading"}


@pytest.mark.parametrize("where", ["fit", "load_tokenizer", "load_model", "Runner", "Engine"])
def test_a_load_that_fails_closes_its_file(
    path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Path] = []
    close = Checkpoint.close

    def closing(checkpoint: Checkpoint) -> None:
        closed.append(checkpoint.path)
        close(checkpoint)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "close", closing)
    monkeypatch.setattr(llm_module, where, fail)
    with pytest.raises(KeyboardInterrupt):
        LLM(path, backend="reference")
    assert closed == [path]


def test_what_a_model_tells_of_itself(llm: LLM, backend: str) -> None:
    assert llm.config == CONFIG
    assert (llm.context, llm.backend_name) == (CONFIG.context, backend)
    assert llm.tokenizer.vocab_size == N + len(SPECIAL)
    assert llm.chat_format is llm.chat_format


def test_loading_reports_progress_up_to_the_end(path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    LLM(path, backend="reference", progress=lambda *call: calls.append(call)).close()
    done, totals, words = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]} == {open_checkpoint(path).nbytes}
    assert set(words) == {"loading"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctx": 0}, "ctx: 0 is not a whole number from 1 to 512"),
        ({"ctx": 513}, "ctx: 513 is not a whole number from 1 to 512"),
        ({"ctx": 1.5}, "ctx: 1.5 is not"),
        ({"threads": 0}, "threads: 0 is not a whole number from 1 to 1024"),
        ({"max_batch": 0}, "max_batch: 0 is not"),
        ({"token_budget": True}, "token_budget: True is not"),
        ({"kv_dtype": "q4"}, "kv_dtype: 'q4' is not one of f32, f16, int8"),
        ({"backend": "tpu"}, "backend: unknown name 'tpu'"),
    ],
)
def test_a_bad_option_is_named(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        LLM(path, **options)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        LLM(tmp_path / "none.gguf")


def test_memory_is_looked_at_before_anything_is_loaded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(llm_module, "free_memory", lambda: 1000)
    monkeypatch.setattr(llm_module, "load_model", never)
    with pytest.raises(MemoryLimitError, match=r"0\.00 GB are free"):
        LLM(path, backend="reference")


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m")
    spec = (path / "tokenizer.json").read_text().replace(f'"id": {N},', f'"id": {N + 99},')
    (path / "tokenizer.json").write_text(spec)
    with pytest.raises(UserError, match="they do not belong together"):
        LLM(path)


def test_an_unknown_argument_is_an_error(llm: LLM) -> None:
    wrong: Any = {"temprature": 1.0}
    for call in (llm.chat, llm.stream):
        with pytest.raises(TypeError, match="unknown argument 'temprature'"):
            call(HELLO, **wrong)
    with pytest.raises(TypeError, match="unknown argument 'temprature'"):
        llm.generate("hello", **wrong)


def test_bad_values_are_refused_before_the_stream_begins(llm: LLM) -> None:
    with pytest.raises(UserError, match="temperature: -1"):
        llm.stream(HELLO, temperature=-1)
    with pytest.raises(UserError, match=r"messages\[0\].role"):
        llm.stream([{"role": "king", "content": "x"}])
    with pytest.raises(ContextLengthError, match=f"do not fit the context of {llm.context}"):
        llm.stream([{"role": "user", "content": "x" * 600}])
    with pytest.raises(UserError, match="tools"):
        llm.stream(HELLO, tools=[{"type": "function"}])


def test_the_context_that_was_asked_for_is_the_limit(path: Path) -> None:
    with LLM(path, ctx=40, backend="reference") as llm:
        assert llm.context == 40
        out = llm.generate([1] * 30, max_tokens=100, ignore_eos=True)
        assert (len(out.token_ids), out.finish_reason) == (10, "length")
        with pytest.raises(ContextLengthError, match="40 tokens do not fit the context of 40"):
            llm.generate([1] * 40)


def test_a_closed_model_says_so(path: Path) -> None:
    llm = LLM(path, backend="reference")
    llm.close()
    llm.close()
    for call in (llm.score, llm.logits, llm.generate):
        with pytest.raises(UserError, match="has been closed"):
            call([1, 2])


def test_the_package_offers_llm_lazily() -> None:
    assert pronk.LLM is LLM
    assert set(dir(pronk)) == {"LLM", "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'GPT'"):
        _ = pronk.GPT


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert pronk.__version__ == project["project"]["version"]


# Recommended sampling


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [N]},
         {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0}),
        ({"top_k": 20, "min_p": None, "repetition_penalty": 1.1},
         {"top_k": 20, "repetition_penalty": 1.1}),
    ],
)  # fmt: skip
def test_recommended_sampling_of_a_folder(
    tmp_path: Path, files: dict[str, Any], expected: dict[str, float]
) -> None:
    others: dict[str, Any] = {"generation_config": files} if files else {}
    path = write_hf(tmp_path / "m", **others)
    assert recommended_sampling(open_checkpoint(path)) == expected


def test_recommended_sampling_of_a_gguf(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"general.sampling.top_k": 7, "general.sampling.penalty_repeat": 1.5}
    path = write_gguf(tmp_path / "m.gguf", **keys)
    found = recommended_sampling(open_checkpoint(path))
    assert found == {"top_k": 7, "repetition_penalty": 1.5}


def test_recommended_sampling_of_the_wrong_type(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", generation_config={"temperature": "hot"})
    with pytest.raises(CheckpointError, match="temperature is 'hot', not a number"):
        recommended_sampling(open_checkpoint(path))
