"""`LLM`: a loaded model to talk to. Text and messages in, text out; the engine does the work.

Several threads may use one `LLM`; their requests run together in batches.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from datetime import date as Date
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypedDict, Unpack, cast, overload

import numpy as np

from pronk.backends.protocol import F32, KV_DTYPES, KvDtype
from pronk.backends.select import select_backend
from pronk.checkpoints.open import Checkpoint, open_checkpoint
from pronk.checkpoints.pull import locate
from pronk.core.config import ModelConfig
from pronk.core.errors import UserError
from pronk.core.progress import Progress, silent
from pronk.engine.adapters import adapters_bytes
from pronk.engine.disk_blocks import DiskBlocks, DiskStats, open_disk_blocks
from pronk.engine.draft import Speculator
from pronk.engine.draft_file import DraftFile
from pronk.engine.engine import Engine, pending
from pronk.engine.load import (
    load_model,
    load_tokenizer,
    need_of,
    recommended_sampling,
    use_threads,
)
from pronk.engine.memory import check_logits, fit, free_memory
from pronk.engine.prompts import (
    Chat,
    Prompt,
    Prompter,
    answer_shape,
)
from pronk.engine.replies import Completion, Piece, Reply, ReplyText, completion_of, reply_of
from pronk.engine.request import Request
from pronk.engine.runner import Runner
from pronk.engine.sampling import Pooler, Pooling, token_logprobs

if TYPE_CHECKING:
    from pronk.text.chat import ChatFormat
    from pronk.text.messages import Message
    from pronk.text.tokenizer import Tokenizer
    from pronk.text.tools import Tool


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of `chat`, `stream` and `generate`; see SamplingParams for what they mean.
    None stands for the default, the same as leaving the argument out: `max_tokens` None is 16 for
    `generate`, and as many as the context has room for in `chat` and `stream`."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None
    stop: str | Sequence[str] | None
    stop_ids: Sequence[int] | None
    ignore_eos: bool | None
    max_tokens: int | None
    seed: int | None
    logprobs: int | None


Prompts: TypeAlias = list[str] | list[list[int]] | list[Prompt]


class LLM:
    """A model in memory.

    `model` is a catalog name, a Hugging Face id or a path. `ctx` is the most tokens of a prompt and
    its answer together; without it the model's own, at most 8192 (if `roomy`, more where there is
    much memory), or what there is memory for.
    `threads` None: all that this process may use. `max_batch` requests at most share a step, which
    computes at most `token_budget` tokens; neither changes an answer, nor does `prefix_cache`,
    which keeps what has been computed for prompts that begin alike, nor `speculate`, which computes
    several tokens at once where the text repeats what came before. `draft` is a smaller model of
    the same vocabulary that guesses what comes next: more memory for more speed, where it is much
    smaller and often right. `layout_cache` keeps the packed weights on disk, as much again as the
    model, so that the next start takes a moment (None: if the environment variable
    PRONK_LAYOUT_CACHE is 1). With `kv_disk_bytes` what was computed for prompts is kept on disk and
    found again by later starts, in the cache folder, at most so many bytes for all models.
    `adapters` are LoRA adapters, PEFT folders by name: what is asked with `adapter=NAME` is
    computed with that one. `keep_free` bytes of memory are left to others. Raises UserError, and
    MemoryLimitError before anything is loaded that does not fit.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        ctx: int | None = None,
        threads: int | None = None,
        backend: str = "auto",
        kv_dtype: KvDtype = "f16",
        max_batch: int = 8,
        token_budget: int = 512,
        prefix_cache: bool = True,
        speculate: bool = True,
        draft: str | Path | None = None,
        layout_cache: bool | None = None,
        kv_disk_bytes: int = 0,
        adapters: Mapping[str, str | Path] | None = None,
        keep_free: int = 0,
        roomy: bool = False,
        progress: Progress = silent,
    ) -> None:
        _check_whole("max_batch", max_batch, 1, 4096)
        _check_whole("token_budget", token_budget, 1, 1 << 20)
        if threads is not None:
            _check_whole("threads", threads, 1, 1024)
        if kv_dtype not in KV_DTYPES:
            raise UserError(f"kv_dtype: {kv_dtype!r} is not one of {', '.join(KV_DTYPES)}")
        if draft is not None and not speculate:
            raise UserError(f"draft: {draft} has nothing to do without speculate")
        _check_whole("kv_disk_bytes", kv_disk_bytes, 0, 1 << 50)
        if kv_disk_bytes and not prefix_cache:
            raise UserError(
                f"kv_disk_bytes: {kv_disk_bytes} is of no use without prefix_cache; leave it 0"
            )
        ops: Any = select_backend(backend)
        self.backend_name: str = ops.name
        self._disk: DiskBlocks | None = None
        self._checkpoint = open_checkpoint(locate(model, progress=progress))
        self._draft: DraftFile | None = None
        try:
            self.config: ModelConfig = self._checkpoint.config
            if ctx is not None:
                _check_whole("ctx", ctx, 1, self.config.context)
            need = need_of(self._checkpoint, ops, token_budget=token_budget, max_batch=max_batch)
            self._block_bytes = need.kv_bytes(1, kv_dtype)
            if draft is not None:
                self._draft = DraftFile(draft, ops, progress)
                need = self._draft.beside(need)
            extra = adapters_bytes(adapters or {}, self.config, ops)
            need = replace(need, weights=need.weights + extra)
            free = free_memory()
            free = None if free is None else max(0, free - keep_free)
            self.context, n_blocks = fit(need, ctx, kv_dtype, free, roomy=roomy)
            self.kv_dtype = kv_dtype
            self.tokenizer: Tokenizer = load_tokenizer(self._checkpoint)
            _check_vocabulary(self._checkpoint, self.tokenizer)
            self.prompter = Prompter(
                self.tokenizer, self._checkpoint.path.name, recommended_sampling(self._checkpoint)
            )
            self.threads = use_threads(ops, threads)
            drafter = None if self._draft is None else self._draft.load(
                self.tokenizer, context=self.context, n_blocks=n_blocks, threads=self.threads,
                kv_dtype=kv_dtype, prefix_cache=prefix_cache, layout_cache=layout_cache,
            )  # fmt: skip
            runner = self._runner(ops, n_blocks, kv_dtype, layout_cache, progress)
            if kv_disk_bytes:
                self._disk = open_disk_blocks(
                    self._checkpoint, ops, kv_dtype, runner, kv_disk_bytes,
                    lambda text: progress(0, 0, text),
                )  # fmt: skip
            self._engine: Engine | None = Engine(
                runner,
                vocab_size=self.tokenizer.vocab_size,
                context=self.context,
                n_blocks=n_blocks,
                max_batch=max_batch,
                token_budget=token_budget,
                prefix_cache=prefix_cache,
                speculator=Speculator(drafter) if speculate else None,
                stored=self._disk,
                adapters=runner.adapters,
            )
            for name, folder in (adapters or {}).items():
                self.load_adapter(name, folder, keep_free=keep_free)
        except BaseException:
            if self._disk is not None:
                self._disk.close()
            self._close_files()
            raise

    def _runner(
        self,
        ops: Any,
        n_blocks: int,
        kv_dtype: KvDtype,
        layout_cache: bool | None,
        progress: Progress,
    ) -> Runner:
        """The model with its weights in memory."""
        weights = load_model(
            self._checkpoint,
            ops,
            n_positions=self.context,
            layout_cache=layout_cache,
            progress=progress,
        )
        return Runner(
            ops,
            self.config,
            weights,
            n_blocks=n_blocks,
            n_tokens=self.tokenizer.vocab_size,
            threads=self.threads,
            kv_dtype=kv_dtype,
        )

    @property
    def disk_stats(self) -> DiskStats | None:
        """What has become of blocks on disk; None without `kv_disk_bytes`."""
        return None if self._disk is None else self._disk.stats

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the checkpoint says of itself: a GGUF's keys, config.json or params.json."""
        return self._checkpoint.metadata

    @property
    def untouched_bytes(self) -> int:
        """Memory of the KV cache that has not been written to, so that the system counts it as
        free."""
        pool = self.engine.scheduler.pool
        beside = 0 if self._draft is None else self._draft.untouched_bytes
        return beside + (pool.n_blocks - pool.n_touched) * self._block_bytes

    @property
    def identity(self) -> str:
        """The file or folder that the weights came from, and their size."""
        return f"{self._checkpoint.path.name} {self._checkpoint.nbytes}"

    @property
    def chat_format(self) -> "ChatFormat | None":
        """How this model's chats are written; None for a base model."""
        return self.prompter.chat_format

    @property
    def engine(self) -> Engine:
        """What runs the requests of the `prompter`. Raises UserError for a closed model."""
        if self._engine is None:
            raise UserError("LLM: this model has been closed; load it again")
        return self._engine

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return self.engine.adapters

    def load_adapter(self, name: str, path: str | Path, *, keep_free: int = 0) -> None:
        """Loads a LoRA adapter, a PEFT folder; answers go on meanwhile, and `keep_free` bytes of
        memory are left to others. UserError for a name that is taken, and for a folder that is
        damaged, unsupported, of another model or too large."""
        promised = keep_free + self.untouched_bytes
        self.engine.load_adapter(name, path, keep_free=promised)

    def unload_adapter(self, name: str) -> None:
        """UserError for an adapter that is not loaded, or that an unfinished answer uses."""
        self.engine.unload_adapter(name)

    def chat(
        self,
        messages: "Sequence[Mapping[str, Any] | Message]",
        *,
        tools: "Sequence[Mapping[str, Any] | Tool] | None" = None,
        builtin_tools: Sequence[str] = (),
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
        date: Date | str | None = None,
        adapter: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Reply:
        """The assistant's answer to a chat.

        Messages and tools are OpenAI dictionaries (or `Message` and `Tool`). Unless told otherwise
        it samples as the model's makers recommend, else with CHAT_DEFAULTS, and stops where the
        model does or the context is full. `tool_choice` ("auto", "none", "required" or a name) and
        `response_format` (see `answer_shape`) are enforced, and arguments of calls fit the tools'
        schemas. Raises ContextLengthError for a chat that leaves no room for an answer, UserError
        for a model that cannot chat.
        """
        pieces = self.stream(
            messages, tools=tools, builtin_tools=builtin_tools, tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls, response_format=response_format, date=date,
            adapter=adapter, **options,
        )  # fmt: skip
        *_, last = pieces
        assert last.reply is not None
        return last.reply

    def stream(
        self,
        messages: "Sequence[Mapping[str, Any] | Message]",
        *,
        tools: "Sequence[Mapping[str, Any] | Tool] | None" = None,
        builtin_tools: Sequence[str] = (),
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
        date: Date | str | None = None,
        adapter: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generator[Piece, None, None]:
        """As `chat`, in pieces: their texts joined are the reply's text, and the last one carries
        the reply. Bad input is refused at the call; closing the iterator ends the generation."""
        chat = Chat(
            _checked_messages(messages), _checked_tools(tools), builtin_tools, tool_choice,
            parallel_tool_calls, answer=answer_shape(response_format), date=date,
        )  # fmt: skip
        request = self.prompter.chat(chat, options, adapter=adapter)
        self.engine.check(request)
        return self._pieces(request)

    def _pieces(self, request: Request) -> Generator[Piece, None, None]:
        engine, text = self.engine, cast(ReplyText, request.answer_text)
        n_seen = 0
        try:
            engine.add(request)
            while pending([request]):
                engine.step()
                if not request.finished and n_seen < len(request.pieces):
                    new = request.pieces[n_seen:]
                    n_seen += len(new)
                    yield Piece("".join(new))
            yield Piece("".join(request.pieces[n_seen:]), reply_of(request, text))
        finally:
            engine.abort(request)

    @overload
    def generate(
        self, prompt: Prompt, *, adapter: str | None = None, **options: Unpack[SamplingOptions]
    ) -> Completion: ...

    @overload
    def generate(
        self, prompt: Prompts, *, adapter: str | None = None, **options: Unpack[SamplingOptions]
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | Prompts,
        *,
        adapter: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion]:
        """Continues a text, a list of token ids, or several of either, which run together.

        A text gets the model's BOS if it wants one; nothing in it becomes a special token. Greedy
        and 16 tokens unless told otherwise. If one of several fails, that is raised and the others
        end with it.
        """
        if _is_one(prompt):
            return self._generate([cast(Prompt, prompt)], options, adapter)[0]
        return self._generate(cast(Prompts, prompt), options, adapter)

    def _generate(
        self, prompts: Prompts, options: Mapping[str, Any], adapter: str | None
    ) -> list[Completion]:
        requests = [self.prompter.completion(p, options, adapter=adapter) for p in prompts]
        self.engine.run(requests)
        return [completion_of(request) for request in requests]

    def stream_generate(
        self, prompt: Prompt, *, adapter: str | None = None, **options: Unpack[SamplingOptions]
    ) -> Generator[str, None, Completion]:
        """As `generate` of one prompt, in pieces of text; returns the completion. Bad input is
        refused at the call; closing the iterator ends the generation."""
        request = self.prompter.completion(prompt, options, adapter=adapter)
        self.engine.check(request)
        return self._texts(request)

    def _texts(self, request: Request) -> Generator[str, None, Completion]:
        engine = self.engine
        n_seen = 0
        try:
            engine.add(request)
            while pending([request]):
                engine.step()
                new = request.pieces[n_seen:]
                n_seen += len(new)
                if new:
                    yield "".join(new)
            return completion_of(request)
        finally:
            engine.abort(request)

    def score(self, ids: Sequence[int], *, adapter: str | None = None) -> F32:
        """Log probability of each token given those before it, float32 `[T-1]`; as in `generate`,
        among the tokens that the tokenizer has."""
        request = Request(ids, None, adapter=adapter)
        logprobs = np.empty(max(0, request.n_prompt - 1), dtype=np.float32)

        def observer(start: int, logits_NV: F32) -> None:
            following = request.ids[start + 1 : start + 1 + len(logits_NV)]
            known_NV = logits_NV[:, : self.tokenizer.vocab_size]
            logprobs[start : start + len(following)] = token_logprobs(known_NV, following)

        request.observer = observer
        self.engine.run([request])
        return logprobs

    def logits(self, ids: Sequence[int], *, adapter: str | None = None) -> F32:
        """Logits at every position, float32 `[T, V]`, V being the model's `config.vocab_size`.
        Raises MemoryLimitError if they do not fit the memory."""
        engine, request = self.engine, Request(ids, None, adapter=adapter)
        engine.check(request)
        check_logits(request.n_prompt, self.config.vocab_size, free_memory())
        logits_TV = np.empty((request.n_prompt, self.config.vocab_size), dtype=np.float32)

        def observer(start: int, logits_NV: F32) -> None:
            logits_TV[start : start + len(logits_NV)] = logits_NV

        request.observer = observer
        engine.run([request])
        return logits_TV

    def embed(
        self, texts: Prompt | Prompts, *, pooling: Pooling = "mean", adapter: str | None = None
    ) -> F32:
        """Vectors of length 1 for texts or lists of token ids, float32 `[N, D]` (`[D]` for one):
        the mean of the last layer's normalized states, or the state of the last token. A model that
        was not tuned for it makes vectors that compare texts only roughly."""
        if _is_one(texts):
            one: F32 = self.embed([cast(Prompt, texts)], pooling=pooling, adapter=adapter)[0]
            return one
        poolers = [Pooler(pooling) for _ in texts]
        requests = [
            self.prompter.embedding(text, pooler, adapter=adapter)
            for text, pooler in zip(cast(Prompts, texts), poolers, strict=True)
        ]
        self.engine.run(requests)
        return np.stack([pooler.vector for pooler in poolers])

    def close(self) -> None:
        """Frees the model, once what `kv_disk_bytes` asks for is written. Using it afterwards is a
        UserError."""
        engine, self._engine = self._engine, None
        try:
            if engine is not None:
                engine.close()
        finally:
            self._close_files()

    def _close_files(self) -> None:
        self._checkpoint.close()
        if self._draft is not None:
            self._draft.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _is_one(prompt: Prompt | Prompts) -> bool:
    """One prompt, not several; an empty list is an empty prompt, and what is no prompt at all is
    for `Request` to refuse."""
    if isinstance(prompt, np.ndarray):
        return prompt.ndim < 2
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or len(prompt) == 0:
        return True
    return not isinstance(prompt[0], (str, list, tuple, np.ndarray))


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{name}: {value!r} is not a whole number from {low} to {high}")


def _check_vocabulary(checkpoint: Checkpoint, tokenizer: "Tokenizer") -> None:
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise UserError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only"
            f" {checkpoint.config.vocab_size}; they do not belong together"
        )


def _checked_messages(messages: Sequence[Any]) -> "list[Message]":
    from pronk.text.messages import Message, messages_from_dicts, to_dict

    if isinstance(messages, list | tuple):
        messages = [to_dict(m) if isinstance(m, Message) else m for m in messages]
    return messages_from_dicts(messages)


def _checked_tools(tools: Sequence[Any] | None) -> "list[Tool]":
    from pronk.text.tools import Tool, tools_from_dicts

    if isinstance(tools, list | tuple):
        tools = [tool.to_dict() if isinstance(tool, Tool) else tool for tool in tools]
    return [] if tools is None else tools_from_dicts(tools)
