"""Writes a synthetic GGUF model of any Llama shape and block format, to measure speed and memory
without real weights, and to give tests something small to load.

    python bench/make_model.py /tmp/8b.gguf --shape 8b --type Q4_0
    python bench/make_model.py /tmp/tiny.gguf --shape tiny --type q4_k_m --layers 4

Weights are random, scaled so that activations stay about as large as in a trained model; the text
such a model writes is noise. Needs Pronk installed, and nothing else.
"""

import argparse
import base64
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pronk.backends.formats import KINDS, dequantize
from pronk.backends.protocol import U8
from pronk.checkpoints.export import GgufWriter, TensorSpec
from pronk.checkpoints.names import native_name, tensor_names, tensor_shape
from pronk.core.config import ModelConfig, RopeScaling
from pronk.core.errors import PronkError, UserError
from pronk.core.progress import silent
from pronk.model.rope import rope_frequencies
from pronk.text.tokenizer_bpe import in_byte_alphabet

_LLAMA = ModelConfig(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, ffn_dim=14336,
    vocab_size=128_256, context=131_072, rope_scaling=RopeScaling(),
)  # fmt: skip
_FACTOR_32 = RopeScaling(factor=32.0)

SHAPES = {
    "8b": _LLAMA,
    "70b": replace(_LLAMA, dim=8192, n_layers=80, n_heads=64, ffn_dim=28672),
    "405b": replace(_LLAMA, dim=16384, n_layers=126, n_heads=128, ffn_dim=53248),
    "1b": replace(
        _LLAMA, dim=2048, n_layers=16, head_dim=64, ffn_dim=8192, rope_scaling=_FACTOR_32,
        tied_embeddings=True,
    ),
    "3b": replace(
        _LLAMA, dim=3072, n_layers=28, n_heads=24, ffn_dim=8192, rope_scaling=_FACTOR_32,
        tied_embeddings=True,
    ),
    "smollm2": ModelConfig(
        dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536,
        vocab_size=49_152, context=8192, rope_theta=100_000.0, tied_embeddings=True,
    ),
    "tiny": ModelConfig(
        dim=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=512, vocab_size=384,
        context=512, rope_theta=10_000.0,
    ),
}  # fmt: skip

SCALE_BYTES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "Q1_0": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
"""Where a block has its float16 scale and, if any, its minimum."""

FALLBACK = {
    "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q1_0": "Q4_0",
}  # fmt: skip
"""What llama.cpp takes where the columns are no whole number of blocks; F16 where this fails."""


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary. `tokens` are written in GPT-2's byte characters; the last
    `n_special` are control tokens."""

    tokens: list[str]
    merges: list[str]
    n_special: int


SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
]  # fmt: skip


def special_tokens(count: int) -> list[str]:
    """Llama 3.1's control tokens in their order: the named ones, then reserved ones."""
    n_reserved = count - len(SPECIAL_TOKENS)
    return SPECIAL_TOKENS + [f"<|reserved_special_token_{3 + n}|>" for n in range(n_reserved)]


def synthetic_vocabulary(size: int) -> Vocabulary:
    """All bytes, then all pairs, triples and quadruples of lower-case letters (the first may be a
    space) until `size` is reached, the control tokens included."""
    n_special = 256 if size >= 2048 else 16
    if not 256 + n_special <= size <= 400_000:
        raise UserError(f"--vocab: {size} tokens; from 272 to 400000 are possible")
    base = [in_byte_alphabet(bytes([byte])) for byte in range(256)]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = (
        "".join(word)
        for length in (2, 3, 4)
        for word in product(base[ord(" ")] + letters, *[letters] * (length - 1))
    )
    merged = list(islice(words, size - 256 - n_special))
    merges = [f"{word[:-1]} {word[-1]}" for word in merged]
    return Vocabulary(base + merged + special_tokens(n_special), merges, n_special)


def llama_vocabulary() -> Vocabulary:
    """Meta's 128,256 tokens, out of the tokenizer.model of an installed `llama-models` package.
    Its merges: each split of a token into two others, by the ranks of the token and its parts."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None or spec.origin is None:
        raise UserError("--vocab llama: needs the package llama-models, which is not installed")
    lines = (Path(spec.origin).parent / "llama3" / "tokenizer.model").read_bytes().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = sorted((ranks[a], ranks[b]) for a, b in splits if a in ranks and b in ranks)
        merges += [f"{in_byte_alphabet(tokens[a])} {in_byte_alphabet(tokens[b])}" for a, b in pairs]
    return Vocabulary([*map(in_byte_alphabet, tokens), *special_tokens(256)], merges, 256)


def metadata(config: ModelConfig, vocabulary: Vocabulary, name: str) -> dict[str, Any]:
    """GGUF's keys of a model, its tokenizer included."""
    n_normal = len(vocabulary.tokens) - vocabulary.n_special
    ids = {token: n_normal + n for n, token in enumerate(SPECIAL_TOKENS)}
    return {
        "general.architecture": "llama",
        "general.name": name,
        "general.quantization_version": 2,
        "llama.context_length": config.context,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.vocab_size": config.vocab_size,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": [1] * n_normal + [3] * vocabulary.n_special,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.bos_token_id": ids["<|begin_of_text|>"],
        "tokenizer.ggml.eos_token_id": ids["<|eot_id|>"],
        "tokenizer.ggml.add_bos_token": True,
    }


def kind_of(name: str, config: ModelConfig, wanted: str, pure: bool) -> str:
    """Block format of a tensor in a model of type `wanted`. As llama.cpp does, norms are F32 and
    the output matrix is at least Q6_K, unless `pure`; q4_k_m also has Q6_K in half of the layers'
    wv and w_down."""
    rows, columns = tensor_shape(name, config)
    kind = "Q4_K" if wanted == "q4_k_m" else wanted
    if rows == 1:
        return "F32"
    is_output = name == "output" or (name == "embed" and config.tied_embeddings)
    if is_output and not pure and kind not in ("F32", "F16", "BF16", "Q8_0"):
        kind = "Q6_K"
    if wanted == "q4_k_m" and name.endswith((".wv", ".w_down")):
        kind = "Q6_K" if _has_more_bits(int(name.split(".")[1]), config.n_layers) else "Q4_K"
    while columns % KINDS[kind].elements:
        kind = FALLBACK.get(kind, "F16")
    return kind


def _has_more_bits(layer: int, n_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third of the others."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def random_blocks(kind: str, count: int, std: float, rng: np.random.Generator) -> U8:
    """`[count, bytes]` blocks whose weights have mean 0 and standard deviation `std`, about."""
    block = KINDS[kind]
    if block.elements == 1:
        values = rng.normal(0, std, (count, 1)).astype(np.float32)
        return _encode(kind, values).reshape(count, block.bytes)
    blocks = rng.integers(0, 256, (count, block.bytes), np.uint8)
    if kind == "MXFP4":
        # Its levels, -6 to 6, have a standard deviation of 2.9.
        blocks[:, 0] = 127 + round(np.log2(std / 2.9))
        return blocks
    if kind == "TQ2_0":
        # Codes 0 to 2 are -1 to 1; 3 would mean 2, which no encoder writes.
        blocks &= ~(blocks >> 1 & 0x55)
    _set_scales(kind, blocks, std, rng)
    return blocks


def _encode(kind: str, values: npt.NDArray[np.float32]) -> U8:
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(np.float16 if kind == "F16" else np.float32).view(np.uint8)


def _set_scales(kind: str, blocks: U8, std: float, rng: np.random.Generator) -> None:
    """Weights are linear in scale and minimum: decoding a sample with one of them 1 and the other
    0 tells which minimum makes the mean 0, and which scale the deviation `std`."""
    places = SCALE_BYTES[kind]
    sample = blocks[:4096].copy()
    parts = []
    for one in places:
        for place in places:
            _put(sample, place, np.full((len(sample), 1), place == one))
        parts.append(dequantize(kind, sample))
    ratios = [1.0, -float(parts[0].mean() / parts[1].mean())] if len(places) == 2 else [1.0]
    spread = np.add.reduce([ratio * p for ratio, p in zip(ratios, parts, strict=True)]).std()
    scale = rng.uniform(0.7, 1.3, (len(blocks), 1)) * std / spread
    if len(places) == 1:
        # The codes reach one further below zero than above: both signs make up for it.
        scale *= rng.choice([-1, 1], scale.shape)
    for place, ratio in zip(places, ratios, strict=True):
        _put(blocks, place, scale * ratio)


def _put(blocks: U8, place: int, values: npt.NDArray[Any]) -> None:
    blocks[:, place : place + 2] = values.astype(np.float16).view(np.uint8)


class RandomWeights:
    """Tensors cut out of pools of random blocks, each time at another place: making every block
    anew would take minutes at 8B."""

    POOL = 16 << 20

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.pools: dict[tuple[str, int], U8] = {}

    def chunks(self, spec: TensorSpec) -> Iterator[U8]:
        """Buffers of a matrix whose columns are scaled to keep the size of what they multiply."""
        columns, left = spec.shape[-1], spec.nbytes
        pool = self.pools.get((spec.kind, columns))
        if pool is None or len(pool) * pool.shape[1] < min(left, self.POOL):
            count = -(-min(left, self.POOL) // KINDS[spec.kind].bytes)
            pool = random_blocks(spec.kind, count, columns**-0.5, self.rng)
            self.pools[spec.kind, columns] = pool
        while left:
            first = int(self.rng.integers(len(pool) // 2 + 1))
            part = pool[first:].reshape(-1)[:left]
            left -= len(part)
            yield part


def make_model(
    path: Path,
    config: ModelConfig,
    wanted: str,
    vocabulary: Vocabulary | None = None,
    *,
    pure: bool = False,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = silent,
) -> None:
    """Writes a model of shape `config` to `path`. `wanted` is a name of `formats.KINDS` or
    "q4_k_m"; the vocabulary is a synthetic one if none is given. UserError when it cannot."""
    vocabulary = vocabulary or synthetic_vocabulary(config.vocab_size)
    config = replace(config, vocab_size=len(vocabulary.tokens))
    specs = list(_specs(config, wanted, pure))
    total, done = sum(spec.nbytes for spec in specs), 0
    free = shutil.disk_usage(path.absolute().parent).free if path.parent.exists() else total
    if total > free:
        raise UserError(f"{path}: needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")
    weights = RandomWeights(seed)
    keys = metadata(config, vocabulary, f"synthetic {wanted}")
    with GgufWriter(path, keys, specs) as out:
        for spec in specs:
            if spec.name == "rope_freqs.weight":
                out.write([_rope_freqs(config)])
            elif len(spec.shape) == 1:
                out.write([np.ones(spec.shape, np.float32).view(np.uint8)])
            else:
                out.write(weights.chunks(spec))
            done += spec.nbytes
            progress(done, total, spec.name)


def _specs(config: ModelConfig, wanted: str, pure: bool) -> Iterator[TensorSpec]:
    if config.rope_scaling or config.rope_divisors:
        yield TensorSpec("rope_freqs.weight", "F32", (config.head_dim // 2,))
    for name in tensor_names(config):
        rows, columns = tensor_shape(name, config)
        shape = (columns,) if rows == 1 else (rows, columns)
        yield TensorSpec(native_name(name, "gguf"), kind_of(name, config, wanted, pure), shape)


def _rope_freqs(config: ModelConfig) -> U8:
    """GGUF's way to say how the rotary frequencies are scaled: the divisor of each."""
    plain = rope_frequencies(replace(config, rope_scaling=None, rope_divisors=None))
    return (plain / rope_frequencies(config)).astype(np.float32).view(np.uint8)


def _draw(done: int, total: int, what: str) -> None:
    end = "\n" if done == total else ""
    line = f"\r{done / 1e9:6.2f} of {total / 1e9:.2f} GB  {what:40}"
    print(line, end=end, file=sys.stderr, flush=True)


SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "context")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("out", type=Path, help="the GGUF file to write")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--type", choices=[*KINDS, "q4_k_m"], default="Q4_0")
    parser.add_argument(
        "--vocab", help="number of synthetic tokens (default: the shape's), or llama: Meta's own"
    )
    parser.add_argument("--pure", action="store_true", help="no Q6_K for the output matrix")
    parser.add_argument("--seed", type=int, default=0)
    for size in SIZES:
        flag = "--" + size.removeprefix("n_").removesuffix("_dim").replace("_", "-")
        flag = {"--head": "--head-dim", "--dim": "--dim"}.get(flag, flag)
        parser.add_argument(flag, type=int, dest=size, help="instead of the shape's")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    given = {size: getattr(args, size) for size in SIZES if getattr(args, size) is not None}
    try:
        config = replace(SHAPES[args.shape], **given)
        make_model(
            args.out, config, args.type, _vocabulary(args.vocab), pure=args.pure, seed=args.seed,
            progress=_draw,
        )  # fmt: skip
    except PronkError as error:
        print(f"make_model: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _vocabulary(wanted: str | None) -> Vocabulary | None:
    if wanted is None:
        return None
    if wanted == "llama":
        return llama_vocabulary()
    if not wanted.isdecimal():
        raise UserError(f"--vocab: {wanted!r} is neither a number nor llama")
    return synthetic_vocabulary(int(wanted))


if __name__ == "__main__":
    sys.exit(main())
