"""What fits is decided before loading, and a refusal says what would fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from pronk.backends import reference
from pronk.backends.protocol import BLOCK, KvDtype
from pronk.core.config import ModelConfig
from pronk.core.errors import MemoryLimitError
from pronk.engine.blocks import blocks_for
from pronk.engine.memory import DEFAULT_CONTEXT, Need, check_logits, fit, free_memory
from pronk.engine.scheduler import MOST_DRAFTED, OBSERVED_CHUNK

LLAMA_8B = ModelConfig(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, ffn_dim=14336,
    vocab_size=128256, context=131072,
)  # fmt: skip
GB = 10**9


def need_8b(max_batch: int = 8) -> Need:
    def kv_bytes(n_blocks: int, dtype: KvDtype) -> int:
        return reference.kv_bytes(LLAMA_8B, n_blocks, dtype)

    return Need(LLAMA_8B, weights=4_650_000_000, kv_bytes=kv_bytes, max_batch=max_batch)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    write(tmp_path, meminfo="MemTotal:  32000000 kB\nMemFree: 1 kB\nMemAvailable: 20000000 kB\n")
    return tmp_path / "meminfo"


def test_free_memory_is_what_the_system_has_available(meminfo: Path, tmp_path: Path) -> None:
    assert free_memory(meminfo, tmp_path / "none", tmp_path) == 20_480_000_000
    assert free_memory(tmp_path / "none") is None


def test_free_memory_on_this_machine() -> None:
    free = free_memory()
    if not Path("/proc/meminfo").exists():
        assert free is None
    else:
        assert free is not None
        assert 0 < free < 1 << 50


def test_the_tightest_group_around_us_counts_version_2(meminfo: Path, tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    stat = "anon 5\ninactive_file 1000\nactive_file 500\n"
    write(groups / "a" / "b", memory__max="max", memory__current="77", memory__stat=stat)
    write(groups / "a", memory__max="1000000", memory__current="400000", memory__stat=stat)
    write(tmp_path, self="0::/a/b\n")
    assert free_memory(meminfo, tmp_path / "self", groups) == 1_000_000 - 400_000 + 1500
    write(groups / "a" / "b", memory__max="100", memory__current="9999999")
    assert free_memory(meminfo, tmp_path / "self", groups) == 0


def test_the_tightest_group_around_us_counts_version_1(meminfo: Path, tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    write(
        groups / "memory" / "job",
        memory__limit_in_bytes="9223372036854771712",
        memory__usage_in_bytes="5",
    )
    write(
        groups / "memory",
        memory__limit_in_bytes="3000000",
        memory__usage_in_bytes="1000000",
        memory__stat="inactive_file 1\ntotal_inactive_file 200000\ntotal_active_file 100000\n",
    )
    write(tmp_path, self="5:cpu,cpuacct:/elsewhere\n4:memory:/job\n0::/\n")
    assert free_memory(meminfo, tmp_path / "self", groups) == 2_300_000


def test_enough_memory_gives_the_wish() -> None:
    need = need_8b()
    for free in (None, 64 * GB):
        context, n_blocks = fit(need, None, "f16", free)
        assert context == DEFAULT_CONTEXT
        assert n_blocks == 256 + 7 * 32
    assert fit(need, 131072, "f16", 64 * GB)[0] == 131072
    assert fit(need_8b(max_batch=1), 4096, "f16", None) == (4096, 128)


def test_a_tight_memory_shrinks_the_pool_first_then_the_default_context() -> None:
    need = need_8b()
    alone = need.total(8192, 256, "f16")
    assert fit(need, 8192, "f16", alone) == (8192, 256)
    one_block = need.kv_bytes(1, "f16")
    assert fit(need, 8192, "f16", alone + 5 * one_block) == (8192, 261)
    context, n_blocks = fit(need, None, "f16", alone - GB // 2)
    assert 512 <= context < 8192
    assert n_blocks >= blocks_for(context)
    assert need.total(context, n_blocks, "f16") <= alone - GB // 2
    grown = context + BLOCK
    assert need.total(grown, blocks_for(grown), "f16") > alone - GB // 2


def test_a_context_that_was_asked_for_is_never_cut() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        fit(need_8b(), 32768, "f16", 8 * GB)
    message = str(caught.value)
    assert "weights 4.65 GB, KV cache 4.29 GB at --ctx 32768" in message
    assert "8.00 GB are free" in message
    assert "--kv-dtype int8 at --ctx 32768 would fit" in message
    offered = int(message.split("; --ctx ")[1].split()[0])
    assert fit(need_8b(), offered, "f16", 8 * GB)[0] == offered
    assert fit(need_8b(), 32768, "int8", 8 * GB)[0] == 32768
    with pytest.raises(MemoryLimitError):
        fit(need_8b(), offered + BLOCK, "f16", 8 * GB)


def test_weights_that_do_not_fit_are_said_so() -> None:
    with pytest.raises(MemoryLimitError, match="a smaller or more strongly quantized model would"):
        fit(need_8b(), None, "f16", 4 * GB)


def test_the_plan_counts_the_logits_that_are_observed() -> None:
    """66 MB at this vocabulary, beside the rows that tokens are drawn from or guessed in."""
    need = need_8b(max_batch=1)
    narrow = replace(need, config=replace(LLAMA_8B, vocab_size=256))
    assert (
        need.slack(512) - narrow.slack(512)
        == 4 * (OBSERVED_CHUNK + 3 * (1 + MOST_DRAFTED)) * 128_000
    )


def test_logits_that_do_not_fit_are_refused_with_the_numbers() -> None:
    check_logits(1000, 128256, None)
    check_logits(1000, 128256, 4 * 1000 * 128256)
    with pytest.raises(MemoryLimitError) as caught:
        check_logits(8192, 128256, GB)
    assert str(caught.value) == (
        "logits: those of 8192 tokens take 4.20 GB, 1.00 GB are free; at most 1949 tokens would fit"
    )
    check_logits(1949, 128256, GB)


def test_a_draft_model_is_counted_with_the_other() -> None:
    small = replace(LLAMA_8B, dim=2048, n_layers=16, ffn_dim=8192, n_heads=32, head_dim=64)

    def kv_bytes(n_blocks: int, dtype: KvDtype) -> int:
        return reference.kv_bytes(small, n_blocks, dtype)

    need, draft = need_8b(), Need(small, weights=800_000_000, kv_bytes=kv_bytes)
    both = need.with_draft(draft)
    assert both.weights == 5_450_000_000
    assert both.kv_bytes(3, "f16") == need.kv_bytes(3, "f16") + kv_bytes(3, "f16")
    assert need.slack(8192) < both.slack(8192) < need.slack(8192) + draft.slack(8192)
    free = need.total(8192, need.pool_blocks(8192), "f16")
    assert fit(need, None, "f16", free)[1] == need.pool_blocks(8192)
    assert fit(both, None, "f16", free) != fit(need, None, "f16", free)
    with pytest.raises(MemoryLimitError, match=r"weights 5\.45 GB"):
        fit(both, 8192, "f16", 6 * GB)
