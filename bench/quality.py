"""What Pronk's CPU path costs in quality, for every type of weights: each file beside the same
weights dequantized to float32, over real text. Needs llama-cpp-python, whose quantizer makes the
files and whose own arithmetic is measured beside Pronk's.

    python bench/quality.py SMOLLM2.gguf --folder /tmp/quality --raw RAW.jsonl \\
        --out docs/results/quality.md
    python bench/quality.py --raw RAW.jsonl --out docs/results/quality.md

Files are made in --folder, one at a time, and removed once they are measured. A file is computed in
several ways: by Pronk with an f16 or an int8 cache, by llama.cpp. The figures of each are appended
to RAW as they are found; what is there already is not measured again, unless --again says so. The
second command only writes the page again.

Blocks of 256 weights do not fit SmolLM2's rows of 576: `widen` gives the same model rows of 768.
"""

import argparse
import ctypes
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

import pronk
from peer_worker import LlamaCpp
from pronk.backends.formats import dequantize
from pronk.backends.protocol import F32, KvDtype, RawTensor
from pronk.checkpoints.checkpoint import Checkpoint
from pronk.checkpoints.export import GgufWriter, TensorSpec
from pronk.checkpoints.names import native_name, tensor_names, tensor_shape
from pronk.checkpoints.open import open_checkpoint
from pronk.core.config import ModelConfig
from pronk.core.errors import PronkError, UserError
from pronk.core.progress import Progress
from pronk.engine.load import load_tokenizer, use_threads
from pronk.eval.divergence import (
    compare,
    dequantized,
    documentation_ids,
    predictor,
)
from pronk.eval.perplexity import Predict

CTX, WINDOWS = 512, 21
MOST_KL, MOST_CHANGE = 0.002, 0.003
"""The bounds that Pronk sets itself, with an f16 cache."""
LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class Case:
    """A file to be made and measured."""

    family: str
    """"plain": SmolLM2's shape; "wide": its rows spread to multiples of 256."""
    type: str
    ftype: int = -1
    """llama.cpp's number; -1: the given file as it is."""
    pure: bool = True
    """All matrices of one type, as far as their columns allow."""
    ways: tuple[str, ...] = ("f16", LLAMA_CPP)
    """How it is computed: Pronk's types of KV cache, llama.cpp."""
    every: int = 1
    """One layer of so many has this type; the other matrices have Q8_0."""

    @property
    def name(self) -> str:
        return f"{self.family}/{self.type}" + f":{self.every}" * (self.every > 1)

    @property
    def title(self) -> str:
        return self.type + f" in 1 layer of {self.every}" * (self.every > 1)


ALL = ("f16", "int8", LLAMA_CPP)

CASES = (
    Case("plain", "as published", ways=ALL),
    Case("plain", "F16", 1),
    Case("plain", "BF16", 32),
    Case("plain", "Q8_0", 7, ways=ALL),
    Case("plain", "Q5_1", 9),
    Case("plain", "Q5_0", 8),
    Case("plain", "Q4_1", 3),
    Case("plain", "Q4_0", 2, ways=ALL),
    Case("plain", "IQ4_NL", 25),
    Case("plain", "MXFP4", 38),
    Case("plain", "Q4_K_M", 15, pure=False),
    Case("wide", "Q4_0", 2),
    Case("wide", "Q6_K", 18),
    Case("wide", "Q5_K", 16),
    Case("wide", "Q4_K", 14, ways=ALL),
    Case("wide", "Q3_K", 11),
    Case("wide", "Q2_K", 10),
    Case("wide", "IQ4_XS", 30),
    Case("wide", "Q1_0", 40),
    Case("wide", "TQ2_0", 37),
    Case("wide", "TQ1_0", 36),
    Case("wide", "Q2_K mix", 10, pure=False),
    Case("wide", "Q2_K", 10, every=6),
    Case("wide", "Q1_0", 40, every=15),
    Case("wide", "TQ2_0", 37, every=15),
    Case("wide", "TQ1_0", 36, every=15),
)


@dataclass(frozen=True)
class Measured:
    """A line of the raw file: a model computed in one way, beside its float32 twin."""

    case: str
    way: str
    kinds: dict[str, int]
    """Tensors of each block format."""
    scored: int
    exact_perplexity: float
    perplexity: float
    kl: float
    kl_p99: float
    same_top: float
    about: dict[str, str]

    @property
    def change(self) -> float:
        return self.perplexity / self.exact_perplexity - 1

    @property
    def holds(self) -> bool:
        return self.kl <= MOST_KL and abs(self.change) <= MOST_CHANGE


Raw: TypeAlias = dict[tuple[str, str], Measured]
"""By case and way."""


# The files


def spread(n: int) -> tuple[np.ndarray[Any, np.dtype[np.intp]], int]:
    """Where each of `n` channels lies among the channels of the wide model, and their number: the
    first 192 of every 256, so that three quarters of each block of 256 are real."""
    if n % 192:
        raise UserError(f"MODEL: {n} channels cannot be spread; a multiple of 192 can")
    channels = np.arange(n)
    return channels // 192 * 256 + channels % 192, n // 192 * 256


def wide_config(config: ModelConfig) -> ModelConfig:
    """Query heads grow with the channels: 64 wide, three to a key/value head, they are 192 channels
    that get an idle fourth one beside them."""
    if (config.head_dim, config.n_heads) != (64, 3 * config.n_kv_heads):
        raise UserError("MODEL: only three query heads of 64 to a key/value head can be spread")
    _, dim = spread(config.dim)
    eps = config.norm_eps * config.dim / dim
    return replace(config, dim=dim, n_heads=4 * config.n_kv_heads, norm_eps=eps)


def widened(name: str, weights: F32, config: ModelConfig) -> F32:
    """A tensor of the wide model, which computes the same function: channels that are always 0
    come between the real ones, and the norms make up for the smaller mean."""
    channels, dim = spread(config.dim)
    heads, _ = spread(config.n_heads * config.head_dim)
    rows: Any = slice(None)
    columns: Any = channels
    match name.rpartition(".")[2]:
        case "norm" | "attn_norm" | "ffn_norm":
            weights = weights * np.float32(np.sqrt(config.dim / dim))
        case "wq":
            rows = heads
        case "wo":
            rows, columns = channels, heads
        case "w_down":
            rows, columns = channels, slice(None)
    out = np.zeros(tensor_shape(name, wide_config(config)), np.float32)
    if isinstance(rows, slice) or isinstance(columns, slice):
        out[rows, columns] = weights
    else:
        out[np.ix_(rows, columns)] = weights
    return out


def write_float32(checkpoint: Checkpoint, path: Path, *, wide: bool) -> None:
    """What the quantizer reads."""
    config, keys = checkpoint.config, dict(checkpoint.metadata)
    shape = wide_config(config) if wide else config
    keys |= {
        "general.file_type": 0,
        "llama.embedding_length": shape.dim,
        "llama.attention.head_count": shape.n_heads,
        "llama.attention.layer_norm_rms_epsilon": shape.norm_eps,
    }
    specs = []
    for name in tensor_names(shape):
        rows, columns = tensor_shape(name, shape)
        size = (columns,) if rows == 1 else (rows, columns)
        specs.append(TensorSpec(native_name(name, "gguf"), "F32", size))
    with GgufWriter(path, keys, specs) as out:
        for name in tensor_names(shape):
            weights = decoded(checkpoint.get(name))
            out.write([np.ascontiguousarray(widened(name, weights, config) if wide else weights)])


def decoded(raw: RawTensor) -> F32:
    weights = dequantize(raw.kind, raw.data)
    raw.release()
    return weights


def mix(few: Path, many: Path, path: Path, every: int) -> None:
    """A model with one layer of `every` from `few`, the rest from `many`."""
    with open_checkpoint(few) as low, open_checkpoint(many) as high:

        def source(name: str) -> Checkpoint:
            _, _, rest = name.partition("layers.")
            return low if rest and int(rest.split(".")[0]) % every == every // 2 else high

        names = high.names()
        specs = []
        for name in names:
            rows, columns = high.shape(name)
            size = (columns,) if rows == 1 else (rows, columns)
            specs.append(TensorSpec(native_name(name, "gguf"), source(name).kind(name), size))
        with GgufWriter(path, high.metadata, specs) as out:
            for name in names:
                out.write([np.ascontiguousarray(source(name).get(name).data)])


_FILE_NAME = str.maketrans("/: ", "---")


class Files:
    """Makes the files of the cases, out of a published one."""

    def __init__(self, published: Path, folder: Path, threads: int) -> None:
        self.published, self.folder, self.threads = published, folder, threads
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, case: Case) -> Path:
        if case.ftype < 0:
            return self.published
        path = self._place(case)
        if path.exists():
            return path
        if case.every > 1:
            few, many = replace(case, every=1), Case(case.family, "Q8_0", 7)
            mix(self.path(few), self.path(many), path, case.every)
        else:
            self._quantize(self._float32(case.family), path, case)
        return path

    def drop(self, case: Case) -> None:
        if case.ftype >= 0:
            self._place(case).unlink()

    def _place(self, case: Case) -> Path:
        return self.folder / f"{case.name.translate(_FILE_NAME)}.gguf"

    def _float32(self, family: str) -> Path:
        path = self.folder / f"{family}-F32.gguf"
        if not path.exists():
            with open_checkpoint(self.published) as checkpoint:
                write_float32(checkpoint, path, wide=family == "wide")
        return path

    def _quantize(self, source: Path, path: Path, case: Case) -> None:
        import llama_cpp

        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.pure, params.nthread = case.ftype, case.pure, self.threads
        partial = path.with_suffix(".partial")
        names = os.fsencode(source), os.fsencode(partial)
        if llama_cpp.llama_model_quantize(*names, ctypes.byref(params)):
            partial.unlink(missing_ok=True)
            raise UserError(f"{case.name}: llama.cpp cannot quantize it")
        partial.replace(path)


# Measuring


class LlamaCppPredictor(LlamaCpp):
    """llama.cpp's logits of every position, with its defaults; its KV cache is f16."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(str(path), threads, CTX, 1)
        self._context = self.make_context(CTX)

    def __call__(self, ids: Sequence[int]) -> F32:
        api, n = self.api, len(ids)
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        self.fill(ids, 0, last=True)
        for i in range(n):
            self.batch.logits[i] = True
        if api.llama_decode(self._context, self.batch):
            raise RuntimeError("llama_decode failed")
        logits = api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (n, self.n_vocab)).copy()

    def close(self) -> None:
        self.api.llama_free(self._context)
        self.api.llama_batch_free(self.batch)
        self.api.llama_model_free(self.model)


def measure(case: Case, path: Path, ways: Sequence[str], threads: int) -> Iterator[Measured]:
    from pronk.backends import cpu

    use_threads(cpu, threads)
    with open_checkpoint(path) as checkpoint, ExitStack() as stack:
        about = {
            "Pronk": f"{pronk.__version__}, kernels for {cpu.isa()}",
            "Python": platform.python_version(),
        }
        models: dict[str, Predict] = {}
        for way in ways:
            if way == LLAMA_CPP:
                peer = models[way] = LlamaCppPredictor(path, threads)
                stack.callback(peer.close)
                about["llama-cpp-python"] = peer.about["version"].split()[-1]
            else:
                models[way] = predictor(checkpoint, cpu, ctx=CTX, kv_dtype=cast(KvDtype, way))
        exact = predictor(dequantized(checkpoint), cpu, ctx=CTX, kv_dtype="f32")
        ids = documentation_ids(load_tokenizer(checkpoint), WINDOWS * (CTX - 1) + 1)
        found = compare(exact, models, ids, ctx=CTX, progress=teller(case.name))
        kinds = checkpoint.kinds()
    for way, result in found.items():
        against = result.comparison
        assert against is not None
        yield Measured(
            case.name, way, kinds, result.n_scored, against.reference_perplexity,
            result.perplexity, against.kl_divergence, against.kl_divergence_p99,
            against.top1_agreement, about,
        )  # fmt: skip


def teller(case: str) -> Progress:
    def tell(done: int, total: int, what: str) -> None:
        end = "\n" if done == total else ""
        print(f"\r{case}: {done} of {total} {what} ", end=end, file=sys.stderr, flush=True)

    return tell


def read_raw(path: Path) -> Raw:
    """The last line counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [Measured(**json.loads(line)) for line in lines]
    return {(m.case, m.way): m for m in found}


# The page

HEAD = f"""# What rounding costs

Written by `bench/quality.py`. Pronk's CPU path reads every type of weights exactly as its file
means it and rounds activations, keys and values; this is what that costs. Each file is compared
with the same weights dequantized to float32, computed in float32 with a float32 cache (kernels that
`tests/conformance` holds to transformers). The bounds are a mean KL divergence of {MOST_KL} and a
change of perplexity of {MOST_CHANGE:.1%}, either way, for every type with an f16 cache.

"""

EXPLAINED = """
KL is the mean over the scored tokens of the Kullback-Leibler divergence of the two distributions of
the next token, in nats, *99 %* what 99 of 100 tokens stay below, *same top* how often both find the
same token likeliest, *change* that of the perplexity against float32. How much is lost by the
weights themselves having been quantized is no part of it: *float32* is the perplexity of the
dequantized weights. llama.cpp's columns are its logits for the same file and tokens, with its own
defaults, against the same float32 reference; it rounds activations to 8 bits in blocks of 32, with
K-quants of 256. They are empty where it was not measured.
"""

FAMILIES = {
    "plain": (
        "SmolLM2-135M",
        """Its rows have 576 weights (1536 in w_down). *As published* is the file that
`pronk pull smollm2-135m` fetches; its weights, dequantized, are what llama.cpp's quantizer made the
others from, all matrices of one type where the columns allow it. Q4_K_M is the usual mix, in which
rows of 576 fall back to other types.""",
    ),
    "wide": (
        "SmolLM2-135M with rows of 768",
        """Types with blocks of 128 or 256 weights do not fit rows of 576. No package with a Llama
model whose rows are multiples of 256 is known, so this one is SmolLM2 itself with a channel that is
always 0 after every three (192 of each 256 are real) and an idle fourth query head to each
key/value head; its norms make up for the smaller mean, and it computes the same function. Pronk
gives 16 bits to activations that stand out from their row's root mean square, which zeros lower;
Q4_0 stands in both tables to show how much that flatters.

The lower part is about types of one to two bits. A model this small does not survive them in all
its matrices: a *float32* perplexity above the 49,152 of a guess among all tokens is noise, and a
damaged model enlarges whatever differs before its damaged layers, so that KL tells little of the
arithmetic. *Q2_K mix* is llama.cpp's usual file; below it a few layers have the type, the others
Q8_0, which leaves a model that predicts.""",
    ),
}

COLUMNS = (
    "weights", "matrices", "float32", "KL", "99 %", "same top", "change", "holds", "llama.cpp: KL",
    "same top", "change",
)  # fmt: skip
INT8_COLUMNS = ("model", "weights", "float32", "KL", "99 %", "same top", "change", "holds")


def page(raw: Raw) -> str:
    parts = [HEAD, about(raw), EXPLAINED]
    for family, (title, text) in FAMILIES.items():
        rows = [
            row_of(case, raw[case.name, "f16"], raw.get((case.name, LLAMA_CPP)))
            for case in CASES
            if case.family == family and (case.name, "f16") in raw
        ]
        if rows:
            parts += [f"\n## {title}\n\n{text}\n\n", *table(COLUMNS, rows)]
    rows = [
        (FAMILIES[case.family][0], case.title, plain(m.exact_perplexity), *cells(m))
        for case in CASES
        if (m := raw.get((case.name, "int8")))
    ]
    if rows:
        text = "The same bounds beside them, though they are set for f16 only."
        parts += [f"\n## int8 keys and values\n\n{text}\n\n", *table(INT8_COLUMNS, rows)]
    return "".join(parts)


def about(raw: Raw) -> str:
    versions = {f"{key} {value}" for m in raw.values() for key, value in m.about.items()}
    scored = min(m.scored for m in raw.values())
    return (
        f"Text: {scored:,} scored tokens of Python's language reference (`pydoc_data`), in\n"
        f"windows of {CTX} that overlap by one token. {'; '.join(sorted(versions))}.\n"
    )


def row_of(case: Case, m: Measured, peer: Measured | None) -> tuple[str, ...]:
    kinds = ", ".join(f"{n} {kind}" for kind, n in m.kinds.items() if kind != "F32")
    theirs = ("", "", "")
    if peer:
        theirs = f"{peer.kl:.6f}", f"{peer.same_top:.2%}", f"{peer.change:+.3%}"
    return case.title, kinds, plain(m.exact_perplexity), *cells(m), *theirs


def plain(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:,.0f}"


def cells(m: Measured) -> tuple[str, ...]:
    holds = "yes" if m.holds else "**no**"
    return f"{m.kl:.6f}", f"{m.kl_p99:.4f}", f"{m.same_top:.2%}", f"{m.change:+.3%}", holds


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |\n" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head) + "\n", *lines[1:]]


def chosen(text: str) -> list[Case]:
    cases = {case.name: case for case in CASES}
    wanted = text.split(",")
    for name in wanted:
        if name not in cases:
            raise argparse.ArgumentTypeError(f"unknown {name!r}; known are {', '.join(cases)}")
    return [cases[name] for name in wanted]


def ways_in(text: str) -> tuple[str, ...]:
    wanted = tuple(text.split(","))
    if not set(wanted) <= set(ALL):
        raise argparse.ArgumentTypeError(f"{text!r} has others than {', '.join(ALL)}")
    return wanted


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="SmolLM2-135M as a GGUF file")
    parser.add_argument("--folder", type=Path, help="for the files that are made")
    parser.add_argument("--raw", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--out", type=Path, help="Markdown page")
    parser.add_argument("--types", type=chosen, default=CASES, help="such as plain/Q4_0,wide/Q4_K")
    parser.add_argument("--ways", type=ways_in, default=ALL, help="some of " + ",".join(ALL))
    parser.add_argument("--again", action="store_true", help="measure what is known, too")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--keep", action="store_true", help="do not remove the files")
    args = parser.parse_args(argv)
    if args.model and not args.folder:
        parser.error("--folder: is needed where files are made")
    return args


def run(args: argparse.Namespace) -> None:
    known = {} if args.again else read_raw(args.raw)
    files = Files(args.model, args.folder, args.threads)
    for case in args.types:
        ways = [w for w in case.ways if w in args.ways and (case.name, w) not in known]
        if not ways:
            continue
        measured = list(measure(case, files.path(case), ways, args.threads))
        with args.raw.open("a") as raw:
            raw.writelines(json.dumps(asdict(m)) + "\n" for m in measured)
        if not args.keep:
            files.drop(case)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    code = 0
    try:
        if args.model:
            silence_llama_cpp()
            run(args)
    except KeyboardInterrupt:
        code = 130
    except (PronkError, ImportError) as error:
        print(f"quality: {error}", file=sys.stderr)
        code = 2
    found = read_raw(args.raw)
    if args.out and found:
        args.out.write_text(page(found))
    return code


def silence_llama_cpp() -> None:
    import llama_cpp

    llama_cpp.llama_log_set(_quiet(llama_cpp), None)


_callbacks: list[Any] = []


def _quiet(api: Any) -> Any:
    """A callback that must outlive its use."""
    _callbacks.append(api.llama_log_callback(lambda level, text, data: None))
    return _callbacks[-1]


if __name__ == "__main__":
    sys.exit(main())
