"""What rounding costs: how far a model's predictions are from those of the same weights
dequantized to float32.

The text is cut into windows of `ctx` tokens, each of which begins with the last token of the one
before, so that every token but the first is scored once and hardly any is computed twice. Figures
are those of perplexity.py; here many models stand beside one reference, and one window is held at a
time: the logits of a whole text would take gigabytes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from pronk.backends.formats import dequantize
from pronk.backends.protocol import BLOCK, F32, U8, Batch, KvDtype, Ops
from pronk.checkpoints.checkpoint import Checkpoint, Stored
from pronk.checkpoints.names import native_name
from pronk.core.progress import Progress, silent
from pronk.engine.load import load_model
from pronk.eval.perplexity import Perplexity, Predict, Scores, score, summary, windows
from pronk.model.llama import forward
from pronk.text.tokenizer import Tokenizer

Key = TypeVar("Key")


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with all tensors in float32. It reads through `checkpoint`, which must stay
    open meanwhile."""

    def stored(name: str) -> Stored:
        def read() -> tuple[U8, Callable[[], None]]:
            raw = checkpoint.get(name)
            return dequantize(raw.kind, raw.data).view(np.uint8), raw.release

        rows, columns = checkpoint.shape(name)
        return Stored("F32", (rows, columns), 4 * rows * columns, read)

    fmt = checkpoint.format
    tensors = {native_name(name, fmt): stored(name) for name in checkpoint.names()}
    return Checkpoint(checkpoint.path, fmt, checkpoint.config, checkpoint.metadata, tensors, [])


def predictor(checkpoint: Checkpoint, ops: Ops, *, ctx: int, kv_dtype: KvDtype) -> Predict:
    """A model on a backend, for up to `ctx` tokens at a time. It keeps its KV cache, and nothing of
    a call outlives it."""
    config = checkpoint.config
    weights = load_model(checkpoint, ops, n_positions=ctx)
    blocks_B = np.arange(-(-ctx // BLOCK), dtype=np.int32)
    kv = ops.make_kv(config, len(blocks_B), kv_dtype)

    def predict(ids: Sequence[int]) -> F32:
        n = len(ids)
        batch = Batch(
            np.arange(n, dtype=np.int32),
            np.array([0, n], np.int32),
            np.array([n], np.int32),
            np.where(blocks_B * BLOCK < n, blocks_B, np.int32(-1))[None],
        )
        logits: F32 = ops.to_host(forward(ops, config, weights, np.array(ids, np.int32), batch, kv))
        return logits

    return predict


def compare(
    exact: Predict,
    models: Mapping[Key, Predict],
    ids: Sequence[int],
    *,
    ctx: int,
    progress: Progress = silent,
) -> dict[Key, Perplexity]:
    """Each of `models` against `exact`, over the text `ids`."""
    scores: dict[Key, list[Scores]] = {key: [] for key in models}
    plan = list(windows(len(ids), ctx, ctx - 1, bos=False))
    for done, window in enumerate(plan):
        progress(done, len(plan), "windows")
        tokens = ids[window.start : window.stop]
        targets = np.array(tokens[1:])
        want = exact(tokens)[:-1]
        for key, predict in models.items():
            scores[key].append(score(targets, predict(tokens)[:-1], want))
    progress(len(plan), len(plan), "windows")
    return {key: summary(parts) for key, parts in scores.items()}


def change_of_perplexity(found: Perplexity) -> float:
    """Relative to the reference: 0.01 is one percent worse."""
    assert found.comparison is not None
    return found.perplexity / found.comparison.reference_perplexity - 1


def documentation_ids(tokenizer: Tokenizer, n: int) -> list[int]:
    """The first `n` tokens of real English prose that every Python brings along: its language
    reference."""
    from pydoc_data.topics import topics

    text = "\n".join(topics.values())[: 8 * n]
    ids = tokenizer.encode(text)[:n]
    assert len(ids) == n, f"the language reference has {len(ids)} tokens, {n} are wanted"
    return ids
