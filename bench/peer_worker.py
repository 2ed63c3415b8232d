"""One engine in a process of its own, for `cpu_peers.py`, which runs it under the interpreter that
the engine is installed for. Needs the engine and NumPy; Pronk only to measure Pronk.

    python bench/peer_worker.py serve ENGINE FILE THREADS CONTEXT ROWS DEPTH
    python bench/peer_worker.py first ENGINE FILE THREADS

`serve` loads FILE for runs at DEPTH or none that take up to CONTEXT positions, says what it is
({"version", "build", "options"}) and answers tasks, one JSON object a line on stdin and stdout:
{"phase": "prefill" or "decode", "tokens", "depth", "rows"} becomes {"seconds", "work"}. Between
tasks it sleeps. `first` loads FILE, picks the first token of an answer and prints what it is, with
the time of the system's monotonic clock at that moment as "clock". What goes wrong is {"error"}.
The engine "limits" loads nothing and measures the machine.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

CHUNK = 512
"""Tokens of a batch, n_batch and n_ubatch."""
START_CONTEXT = 2048
"""Positions that a start has room for."""
PROMPT = "The quick brown fox jumps over the lazy dog."
PROMPT_TOKENS = 10


Work: TypeAlias = list[list[tuple[int, int, bool]]]
"""By step and sequence: from which position on how many tokens were computed, and whether the last
of them needed logits."""


class Timed(NamedTuple):
    seconds: float
    work: Work


class Engine(Protocol):
    about: dict[str, str]
    """Version, build, and the options that matter."""

    def prefill(self, tokens: int, depth: int, rows: int) -> Timed:
        """Reads a prompt of random tokens behind `depth` others that are not read anew, and picks
        the next one. `rows` sequences side by side."""
        ...

    def decode(self, tokens: int, depth: int, rows: int) -> Timed:
        """Writes greedily behind `depth` tokens, after a first token that does not count."""
        ...


class Pronk:
    """Through its engine, as `pronk bench` does."""

    def __init__(
        self, path: str, threads: int, context: int, rows: int, depth: int = 0, *,
        kv_dtype: Literal["f16", "int8"],
    ) -> None:  # fmt: skip
        from dataclasses import replace

        from pronk.backends import cpu, reference
        from pronk.engine.bench import Meter, Plan, load_subject

        plan = Plan(prompt=context - 1, generate=1, batch=rows)
        subject = load_subject(Path(path), plan, ops=cpu, threads=threads, kv_dtype=kv_dtype)
        # who asks measures the machine, in a process of its own
        self._subject = replace(subject, meter=Meter(reference, threads))
        self._runs = 0
        self.about = about_pronk(kv_dtype)

    def prefill(self, tokens: int, depth: int, rows: int) -> Timed:
        from pronk.engine.bench import Plan, prefill_run

        self._runs += 1
        run = prefill_run(self._subject, Plan(prompt=tokens, depth=depth, batch=rows), self._runs)
        return Timed(run.timing.seconds, plain(run.work))

    def decode(self, tokens: int, depth: int, rows: int) -> Timed:
        from pronk.engine.bench import Plan, decode_run

        run = decode_run(self._subject, Plan(generate=tokens, depth=depth, batch=rows))
        return Timed(run.timing.seconds, plain(run.work))


def plain(work: Sequence[Sequence[tuple[int, int, bool]]]) -> Work:
    return [[(start, n, answer) for start, n, answer in step] for step in work]


def about_pronk(kv_dtype: str) -> dict[str, str]:
    import pronk
    from pronk.backends import cpu

    version, build = f"pronk {pronk.__version__}", f"kernels for {cpu.isa()}"
    return {"version": version, "build": build, "options": f"kv_dtype={kv_dtype}"}


class Limits:
    """The machine's read bandwidth and int8 rate, by Pronk's loops."""

    def __init__(self, path: str, threads: int, context: int, rows: int, depth: int = 0) -> None:
        from pronk.backends import cpu
        from pronk.engine.bench import Meter

        cpu.set_threads(threads)
        self._meter = Meter(cpu, threads)
        self._meter.read()
        self.about = {"version": "", "build": f"loops for {cpu.isa()}", "options": ""}

    def read(self) -> dict[str, float]:
        found = self._meter.read()
        assert found is not None
        return {"bandwidth": found.bandwidth, "int8": found.int8}


class LlamaApi:
    """What llama.cpp and its fork share: llama_decode on batches, and the argmax of the logits. A
    context for each depth, so that what lies there stays from run to run."""

    OPTIONS: tuple[str, ...] = ()
    """Fields of the parameters to tell."""

    def __init__(self, api: Any, path: str, threads: int, room: int) -> None:
        """`room`: most positions of a run behind its depth."""
        self.api, self.room = api, room
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.adjust_model(params)
        self.model = api.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise RuntimeError(f"cannot load {path}")
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.threads = threads
        self.options = ", ".join(
            f"{name}={int(getattr(each, name))}"
            for each in (params, self.context_params(room))
            for name in self.OPTIONS
            if hasattr(each, name)
        )
        self.contexts: dict[int, Any] = {}
        self.batch = api.llama_batch_init(CHUNK, 0, 1)
        self.rng = np.random.default_rng(0)

    def adjust_model(self, params: Any) -> None: ...

    def adjust_context(self, params: Any) -> None: ...

    def forget(self, context: Any, position: int) -> None:
        """Drops keys and values from `position` on."""
        raise NotImplementedError

    def context_params(self, length: int) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx = length
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = self.threads
        self.adjust_context(params)
        return params

    def make_context(self, length: int) -> Any:
        context = self.api.llama_init_from_model(self.model, self.context_params(length))
        if not context:
            raise RuntimeError(f"cannot make a context of {length} tokens")
        return context

    def at(self, depth: int) -> Any:
        """A context that holds `depth` tokens."""
        if depth not in self.contexts:
            self.contexts[depth] = self.make_context(depth + self.room)
            self.read(self.contexts[depth], self.random_ids(depth), 0)
        self.forget(self.contexts[depth], depth)
        return self.contexts[depth]

    def random_ids(self, n: int) -> list[int]:
        return list(map(int, self.rng.integers(0, self.n_vocab, n)))

    def read(self, context: Any, ids: Sequence[int], position: int) -> int:
        """The likeliest token after `ids`, the first of which stands at `position`; -1 for none."""
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            self.fill(chunk, position + start, last=start + len(chunk) == len(ids))
            if self.api.llama_decode(context, self.batch):
                raise RuntimeError("llama_decode failed")
        if not ids:
            return -1
        logits = self.api.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (self.n_vocab,)).argmax())

    def fill(self, ids: Sequence[int], position: int, *, last: bool) -> None:
        self.batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            self.batch.token[i] = token
            self.batch.pos[i] = position + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = 0
            self.batch.logits[i] = last and i + 1 == len(ids)

    def prefill(self, tokens: int, depth: int, rows: int) -> Timed:
        assert rows == 1
        context, ids = self.at(depth), self.random_ids(tokens)
        began = time.perf_counter()
        self.read(context, ids, depth)
        return Timed(time.perf_counter() - began, chunks(tokens, depth))

    def decode(self, tokens: int, depth: int, rows: int) -> Timed:
        assert rows == 1
        context = self.at(depth)
        token = self.read(context, self.random_ids(1), depth)
        began = time.perf_counter()
        for i in range(tokens):
            token = self.read(context, [token], depth + 1 + i)
        seconds = time.perf_counter() - began
        return Timed(seconds, [[(depth + 1 + i, 1, True)] for i in range(tokens)])


def chunks(tokens: int, depth: int) -> Work:
    """What `LlamaApi.read` computes of a prompt."""
    return [
        [(depth + at, min(CHUNK, tokens - at), at + CHUNK >= tokens)]
        for at in range(0, tokens, CHUNK)
    ]


class LlamaCpp(LlamaApi):
    """`llama-cpp-python` with its defaults: it maps the file, repacks the weights that it has
    layouts for into memory of its own, and uses flash attention where it can."""

    OPTIONS = ("use_mmap", "load_mode", "use_extra_bufts", "flash_attn_type")

    def __init__(self, path: str, threads: int, context: int, rows: int, depth: int = 0) -> None:
        import llama_cpp

        super().__init__(llama_cpp, path, threads, context - depth)
        self.about = {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "build": llama_cpp.llama_print_system_info().decode(),
            "options": self.options,
        }

    def forget(self, context: Any, position: int) -> None:
        memory = self.api.llama_get_memory(context)
        self.api.llama_memory_seq_rm(memory, 0, position, -1)


class IkLlamaCpp(LlamaApi):
    """`ik-llama-cpp-python`, with the options that its users are told to take on a CPU: weights
    repacked at load (-rtr, which reads the file instead of mapping it), q, k and v in one product
    (-mqkv), flash attention (-fa).

    Its use_thp maps the file into pages of hugetlbfs, if the system has set some aside, and so
    does nothing where weights are repacked. Huge pages it gets from the C library instead
    (HUGE_PAGES of cpu_peers.py)."""

    OPTIONS = ("use_mmap", "repack_tensors", "merge_qkv", "flash_attn")

    def __init__(self, path: str, threads: int, context: int, rows: int, depth: int = 0) -> None:
        _load_beside("ik_llama_cpp", "libggml.so")
        api = importlib.import_module("ik_llama_cpp._ctypes_api")
        library = api._lib
        library.llama_kv_cache_seq_rm.argtypes = [ctypes.c_void_p, *[ctypes.c_int32] * 3]
        library.llama_kv_cache_seq_rm.restype = ctypes.c_bool
        library.llama_print_system_info.restype = ctypes.c_char_p
        self.remove = library.llama_kv_cache_seq_rm
        super().__init__(api, path, threads, context - depth)
        self.about = {
            "version": f"ik-llama-cpp-python {metadata.version('ik-llama-cpp-python')}",
            "build": library.llama_print_system_info().decode(),
            "options": self.options,
        }

    def adjust_model(self, params: Any) -> None:
        params.repack_tensors = True
        params.use_mmap = False
        params.merge_qkv = True

    def adjust_context(self, params: Any) -> None:
        params.flash_attn = True

    def forget(self, context: Any, position: int) -> None:
        self.remove(context, 0, position, -1)


def _load_beside(package: str, library: str) -> None:
    """A library that the package's own one needs and does not always find."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"no module named {package!r}")
    path = Path(spec.origin).parent / "lib" / library
    if path.exists():
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


KV_DTYPES: dict[str, Literal["f16", "int8"]] = {"pronk": "f16", "pronk-int8": "int8"}
ENGINES: dict[str, Callable[..., Any]] = {
    **{name: partial(Pronk, kv_dtype=kv_dtype) for name, kv_dtype in KV_DTYPES.items()},
    "limits": Limits,
    "llama.cpp": LlamaCpp,
    "ik_llama.cpp": IkLlamaCpp,
}


Say: TypeAlias = Callable[[dict[str, Any]], None]


def serve(say: Say, engine: str, path: str, *numbers: int) -> None:
    loaded = ENGINES[engine](path, *numbers)
    say(loaded.about)
    for line in sys.stdin:
        task = json.loads(line)
        phase = task.pop("phase")
        result = getattr(loaded, phase)(**task)
        say(result if phase == "read" else result._asdict())


def first(say: Say, engine: str, path: str, threads: int) -> None:
    """Until the first token of an answer is known: Pronk's to a text, with its tokenizer, the
    others' to random tokens."""
    if engine in KV_DTYPES:
        from pronk import LLM

        kv_dtype = KV_DTYPES[engine]
        llm = LLM(path, threads=threads, ctx=START_CONTEXT, kv_dtype=kv_dtype)
        llm.generate(PROMPT, max_tokens=1)
        clock, about = time.monotonic(), about_pronk(kv_dtype)
    else:
        loaded = ENGINES[engine](path, threads, START_CONTEXT, 1)
        loaded.read(loaded.make_context(START_CONTEXT), loaded.random_ids(PROMPT_TOKENS), 0)
        clock, about = time.monotonic(), loaded.about
    say({"clock": clock, **about})


def main() -> None:
    mode, engine, path, *numbers = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        (serve if mode == "serve" else first)(say, engine, path, *map(int, numbers))
    except Exception as error:  # whoever asked has the words for a person
        say({"error": str(error) or type(error).__name__})
    os._exit(0)  # however long the libraries would take to end


if __name__ == "__main__":
    main()
