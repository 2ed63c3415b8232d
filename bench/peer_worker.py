"""One engine in a process of its own, for `cpu_peers.py`, which runs it under the interpreter that
the engine is installed for. Needs the engine and NumPy; Pronk only to measure Pronk.

    python bench/peer_worker.py serve ENGINE FILE THREADS CONTEXT ROWS
    python bench/peer_worker.py first ENGINE FILE THREADS

`serve` loads FILE and answers tasks, one JSON object a line on stdin and stdout: {"phase":
"prefill" or "decode", "tokens", "depth", "rows"} becomes {"seconds", "tokens", "steps"}. Between
tasks it sleeps. `first` loads FILE, picks the first token of an answer and prints the time of the
system's monotonic clock at that moment. The engine "limits" loads nothing and measures the machine.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

CHUNK = 512
"""Tokens of a batch, n_batch and n_ubatch."""
ROOM = 2048
"""Most tokens of a run; also the context of a start."""
PROMPT = "The quick brown fox jumps over the lazy dog."
PROMPT_TOKENS = 10


class Timed(NamedTuple):
    seconds: float
    tokens: int
    steps: int


class Engine(Protocol):
    about: dict[str, str]
    """Version and build."""

    def prefill(self, tokens: int, depth: int, rows: int) -> Timed:
        """Reads a prompt of random tokens behind `depth` others that are not read anew, and picks
        the next one. `rows` sequences side by side."""
        ...

    def decode(self, tokens: int, depth: int, rows: int) -> Timed:
        """Writes greedily behind `depth` tokens, after a first token that does not count."""
        ...


class Pronk:
    """Through its engine, as `pronk bench` does."""

    def __init__(self, path: str, threads: int, context: int, rows: int) -> None:
        from dataclasses import replace

        import pronk
        from pronk.backends import cpu, reference
        from pronk.engine.bench import Meter, Plan, load_subject

        plan = Plan(prompt=context - 1, generate=1, batch=rows)
        subject = load_subject(Path(path), plan, ops=cpu, threads=threads, kv_dtype="f16")
        # who asks measures the machine, in a process of its own
        self._subject = replace(subject, meter=Meter(reference, threads))
        self._runs = 0
        self.about = {"version": f"pronk {pronk.__version__}", "build": f"kernels for {cpu.isa()}"}

    def prefill(self, tokens: int, depth: int, rows: int) -> Timed:
        from pronk.engine.bench import Plan, prefill_run

        self._runs += 1
        run = prefill_run(self._subject, Plan(prompt=tokens, depth=depth, batch=rows), self._runs)
        return Timed(run.timing.seconds, run.tokens, run.timing.steps)

    def decode(self, tokens: int, depth: int, rows: int) -> Timed:
        from pronk.engine.bench import Plan, decode_run

        run = decode_run(self._subject, Plan(generate=tokens, depth=depth, batch=rows))
        return Timed(run.timing.seconds, run.tokens, run.timing.steps)


class Limits:
    """The machine's read bandwidth and int8 rate, by Pronk's loops."""

    def __init__(self, path: str, threads: int, context: int, rows: int) -> None:
        from pronk.backends import cpu
        from pronk.engine.bench import Meter

        cpu.set_threads(threads)
        self._meter = Meter(cpu, threads)
        self._meter.read()
        self.about = {"version": "", "build": f"loops for {cpu.isa()}"}

    def read(self) -> dict[str, float]:
        found = self._meter.read()
        assert found is not None
        return {"bandwidth": found.bandwidth, "int8": found.int8}


class LlamaApi:
    """What llama.cpp and its fork share: llama_decode on batches, and the argmax of the logits. A
    context for each depth, so that what lies there stays from run to run."""

    def __init__(self, api: Any, path: str, threads: int) -> None:
        self.api = api
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.adjust_model(params)
        self.model = api.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise RuntimeError(f"cannot load {path}")
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.threads = threads
        self.contexts: dict[int, Any] = {}
        self.batch = api.llama_batch_init(CHUNK, 0, 1)
        self.rng = np.random.default_rng(0)

    def adjust_model(self, params: Any) -> None: ...

    def adjust_context(self, params: Any) -> None: ...

    def forget(self, context: Any, position: int) -> None:
        """Drops keys and values from `position` on."""
        raise NotImplementedError

    def make_context(self, length: int) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx = length
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = self.threads
        self.adjust_context(params)
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError(f"cannot make a context of {length} tokens")
        return context

    def at(self, depth: int) -> Any:
        """A context that holds `depth` tokens."""
        if depth not in self.contexts:
            self.contexts[depth] = self.make_context(depth + ROOM)
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
        return Timed(time.perf_counter() - began, tokens, -(-tokens // CHUNK))

    def decode(self, tokens: int, depth: int, rows: int) -> Timed:
        assert rows == 1
        context = self.at(depth)
        token = self.read(context, self.random_ids(1), depth)
        began = time.perf_counter()
        for i in range(tokens):
            token = self.read(context, [token], depth + 1 + i)
        return Timed(time.perf_counter() - began, tokens, tokens)


class LlamaCpp(LlamaApi):
    """`llama-cpp-python`: its defaults, which repack weights at load and use flash attention."""

    def __init__(self, path: str, threads: int, context: int, rows: int) -> None:
        import llama_cpp

        self.about = {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "build": llama_cpp.llama_print_system_info().decode(),
        }
        super().__init__(llama_cpp, path, threads)

    def forget(self, context: Any, position: int) -> None:
        memory = self.api.llama_get_memory(context)
        self.api.llama_memory_seq_rm(memory, 0, position, -1)


class IkLlamaCpp(LlamaApi):
    """`ik-llama-cpp-python`, with the options that its users are told to take on a CPU: weights
    repacked at load (-rtr, which reads the file instead of mapping it), flash attention (-fa)."""

    def __init__(self, path: str, threads: int, context: int, rows: int) -> None:
        _load_beside("ik_llama_cpp", "libggml.so")
        api = importlib.import_module("ik_llama_cpp._ctypes_api")
        library = api._lib
        library.llama_kv_cache_seq_rm.argtypes = [ctypes.c_void_p, *[ctypes.c_int32] * 3]
        library.llama_kv_cache_seq_rm.restype = ctypes.c_bool
        library.llama_print_system_info.restype = ctypes.c_char_p
        self.remove = library.llama_kv_cache_seq_rm
        self.about = {
            "version": f"ik-llama-cpp-python {metadata.version('ik-llama-cpp-python')}",
            "build": library.llama_print_system_info().decode(),
        }
        super().__init__(api, path, threads)

    def adjust_model(self, params: Any) -> None:
        params.repack_tensors = True
        params.use_mmap = False

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


ENGINES: dict[str, Callable[[str, int, int, int], Any]] = {
    "pronk": Pronk,
    "limits": Limits,
    "llama.cpp": LlamaCpp,
    "ik_llama.cpp": IkLlamaCpp,
}


def serve(engine: str, path: str, threads: int, context: int, rows: int) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        loaded = ENGINES[engine](path, threads, context, rows)
    except ImportError as error:
        say({"missing": str(error)})
        return
    say(loaded.about)
    for line in sys.stdin:
        task = json.loads(line)
        phase = task.pop("phase")
        result = getattr(loaded, phase)(**task)
        say(result if phase == "read" else result._asdict())


def first(engine: str, path: str, threads: int) -> None:
    """Until the first token of an answer is known: Pronk's to a text, with its tokenizer, the
    others' to random tokens."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if engine == "pronk":
        from pronk import LLM

        LLM(path, threads=threads, ctx=ROOM).generate(PROMPT, max_tokens=1)
    else:
        loaded = ENGINES[engine](path, threads, ROOM, 1)
        loaded.read(loaded.make_context(ROOM), loaded.random_ids(PROMPT_TOKENS), 0)
    out.write(f"{time.monotonic()}\n")
    out.flush()
    os._exit(0)  # nothing of the end is measured


def main() -> None:
    mode, engine, path, *numbers = sys.argv[1:]
    if mode == "serve":
        threads, context, rows = map(int, numbers)
        serve(engine, path, threads, context, rows)
    else:
        first(engine, path, int(numbers[0]))


if __name__ == "__main__":
    main()
