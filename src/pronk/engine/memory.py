"""How much memory a model will take, how much there is, and what fits: decided before anything is
loaded. Arithmetic and a few files of the operating system; no arrays.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pronk.backends.protocol import BLOCK, KvDtype
from pronk.core.config import ModelConfig
from pronk.core.errors import MemoryLimitError
from pronk.engine.blocks import blocks_for
from pronk.engine.scheduler import MOST_DRAFTED, OBSERVED_CHUNK

DEFAULT_CONTEXT = 8192
SMALLEST_CONTEXT = 512
"""Below this the default context is not cut to fit the memory: the load is refused instead."""
SHARED_POSITIONS = 1024
"""KV positions for each further request of a batch. More are found by preemption."""
_PROCESS_BYTES = 100 << 20
"""Interpreter, libraries, tokenizer."""


def free_memory(
    meminfo: Path = Path("/proc/meminfo"),
    membership: Path = Path("/proc/self/cgroup"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> int | None:
    """Bytes that this process can still take: what the system has available, or less where a
    control group (version 1 or 2) limits it. None where the system does not tell (not Linux)."""
    available = _fields(meminfo).get("MemAvailable:")
    if available is None:
        return None
    rooms = map(_room, _groups(membership, cgroups))
    return max(0, min([available * 1024, *(room for room in rooms if room is not None)]))


def _groups(membership: Path, cgroups: Path) -> Iterator[Path]:
    """Folders of this process's memory groups and of all groups around them."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = cgroups / "memory" if controllers else cgroups
            parts = [part for part in name.split("/") if part not in ("", "..")]
            yield from (root.joinpath(*parts[:n]) for n in range(len(parts), -1, -1))


def _room(group: Path) -> int | None:
    """What a group may still take, its page cache counted as free; None without a limit."""
    stat = _fields(group / "memory.stat")
    for limit_file, usage_file, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit, usage = _number(group / limit_file), _number(group / usage_file)
        if limit is not None and usage is not None:
            cache = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
            return limit - usage + cache
    return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file; "max"
        return None


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a run takes, as a function of its context and its KV cache."""

    config: ModelConfig
    weights: int
    kv_bytes: Callable[[int, KvDtype], int]
    """Of so many blocks in a dtype."""
    token_budget: int = 512
    max_batch: int = 8
    draft: "Need | None" = None
    """Of a model that runs beside this one. Its weights and KV cache are counted in those above."""

    def with_draft(self, draft: "Need") -> "Need":
        """Of this model and one that drafts for it, with as many KV blocks."""
        return replace(
            self,
            weights=self.weights + draft.weights,
            kv_bytes=lambda n, dtype: self.kv_bytes(n, dtype) + draft.kv_bytes(n, dtype),
            draft=draft,
        )

    def pool_blocks(self, context: int) -> int:
        """KV blocks for one request of the whole context and a little for each of the others."""
        others = (self.max_batch - 1) * min(SHARED_POSITIONS, context)
        return blocks_for(context) + blocks_for(others)

    def slack(self, context: int) -> int:
        """Everything that is neither weights nor KV: activations of a full step, logits (drawn from
        and observed), the rotary table, the process itself."""
        c = self.config
        width = 4 * c.dim + 3 * c.ffn_dim + 3 * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
        n_logits = 3 * (self.max_batch + MOST_DRAFTED) + min(OBSERVED_CHUNK, self.token_budget)
        numbers = self.token_budget * width + n_logits * c.vocab_size
        beside = self.draft.slack(context) - _PROCESS_BYTES if self.draft else 0
        return 4 * numbers + 12 * context * c.head_dim + _PROCESS_BYTES + beside

    def total(self, context: int, n_blocks: int, kv_dtype: KvDtype) -> int:
        return self.weights + self.slack(context) + self.kv_bytes(n_blocks, kv_dtype)

    def largest_context(self, free: int, kv_dtype: KvDtype) -> int:
        """Most positions that fit into `free` bytes with one request at a time, a multiple of
        BLOCK, at most the model's own context; 0 if none do."""
        low, high = 0, blocks_for(self.config.context)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.total(middle * BLOCK, middle, kv_dtype) <= free
            low, high = (middle, high) if fits else (low, middle - 1)
        return min(low * BLOCK, self.config.context)


def fit(
    need: Need, context: int | None, kv_dtype: KvDtype, free: int | None, *, roomy: bool = False
) -> tuple[int, int]:
    """The context and the number of KV blocks of a run with `free` bytes of memory.

    Without a given context it is the model's own, at most DEFAULT_CONTEXT (if `roomy`: as far as
    half of the memory goes that the weights leave), or what there is memory for. Raises
    MemoryLimitError with the numbers, and with what would fit.
    """
    wanted = min(need.config.context, DEFAULT_CONTEXT) if context is None else context
    if context is None and roomy and free is not None:
        half = need.weights + max(0, free - need.weights) // 2
        wanted = max(wanted, need.largest_context(half, kv_dtype))
    blocks = need.pool_blocks(wanted)
    if free is None or need.total(wanted, blocks, kv_dtype) <= free:
        return wanted, blocks
    largest = need.largest_context(free, kv_dtype)
    if context is None and largest >= min(wanted, SMALLEST_CONTEXT):
        wanted = min(wanted, largest)
    if wanted > largest:
        raise MemoryLimitError(_refusal(need, wanted, kv_dtype, free, largest))
    spare = free - need.total(wanted, blocks_for(wanted), kv_dtype)
    extra = spare // need.kv_bytes(1, kv_dtype)
    return wanted, min(blocks_for(wanted) + extra, need.pool_blocks(wanted))


def check_logits(n_tokens: int, vocab_size: int, free: int | None) -> None:
    """Raises MemoryLimitError where float32 logits `[n_tokens, vocab_size]` do not fit."""
    n_bytes = 4 * n_tokens * vocab_size
    if free is not None and n_bytes > free:
        raise MemoryLimitError(
            f"logits: those of {n_tokens} tokens take {_gb(n_bytes)}, {_gb(free)} are free;"
            f" at most {free // (4 * vocab_size)} tokens would fit"
        )


def check_adapter(name: str, needed: int, free: int | None) -> None:
    """Raises MemoryLimitError where an adapter of so many bytes does not fit."""
    if free is not None and needed > free:
        raise MemoryLimitError(
            f"adapter: {name!r} takes {_gb(needed)}, {_gb(max(0, free))} are free; unload another"
            " one, or load the model with a smaller context"
        )


def _refusal(need: Need, context: int, kv_dtype: KvDtype, free: int, largest: int) -> str:
    kv = need.kv_bytes(blocks_for(context), kv_dtype)
    total = need.total(context, blocks_for(context), kv_dtype)
    hints = []
    if largest >= BLOCK:
        hints.append(f"--ctx {largest}")
    if kv_dtype != "int8" and need.largest_context(free, "int8") >= context:
        hints.append(f"--kv-dtype int8 at --ctx {context}")
    fits = " or ".join(hints) or "a smaller or more strongly quantized model"
    return (
        f"memory: {_gb(total)} are needed (weights {_gb(need.weights)}, KV cache {_gb(kv)} at"
        f" --ctx {context}), {_gb(free)} are free; {fits} would fit"
    )


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n < 10e9 else f"{n / 1e9:.1f} GB"
