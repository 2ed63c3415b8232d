"""From the file of a draft model to what drafts (draft_model.py)."""

from pathlib import Path
from typing import TYPE_CHECKING

from pronk.backends.protocol import KvDtype
from pronk.checkpoints.open import open_checkpoint
from pronk.checkpoints.pull import locate
from pronk.core.errors import UserError
from pronk.core.progress import Progress, silent
from pronk.engine.blocks import BlockPool
from pronk.engine.draft_model import DraftModel
from pronk.engine.load import LoadOps, load_model, load_tokenizer, need_of
from pronk.engine.memory import Need
from pronk.engine.runner import Runner

if TYPE_CHECKING:
    from pronk.text.tokenizer import Tokenizer


class DraftFile:
    """The opened checkpoint of a model that drafts for another one. Raises UserError."""

    def __init__(self, model: str | Path, ops: LoadOps, progress: Progress = silent) -> None:
        self._checkpoint = open_checkpoint(locate(model, progress=progress))
        self._ops = ops
        self._progress = progress
        self._share = 1.0
        self._pool: BlockPool | None = None

    def beside(self, need: Need) -> Need:
        """What it takes to run the other model together with this one."""
        own = need_of(
            self._checkpoint, self._ops, token_budget=need.token_budget, max_batch=need.max_batch
        )
        self._share = own.weights / need.weights
        return need.with_draft(own)

    def load(
        self,
        tokenizer: "Tokenizer",
        *,
        context: int,
        n_blocks: int,
        threads: int,
        kv_dtype: KvDtype,
        prefix_cache: bool = True,
        layout_cache: bool | None = None,
    ) -> DraftModel:
        """For a model with this tokenizer, which must be the draft model's own: UserError."""
        check_same_vocabulary(tokenizer, load_tokenizer(self._checkpoint))
        config = self._checkpoint.config
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"{self._checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, the"
                f" model only {config.vocab_size}; they do not belong together"
            )
        context = min(context, config.context)
        weights = load_model(
            self._checkpoint, self._ops, n_positions=context, layout_cache=layout_cache,
            progress=self._progress,
        )  # fmt: skip
        runner = Runner(
            self._ops, config, weights, n_blocks=n_blocks, n_tokens=tokenizer.vocab_size,
            threads=threads, kv_dtype=kv_dtype,
        )  # fmt: skip
        self._block_bytes = self._ops.kv_bytes(config, 1, kv_dtype)
        drafter = DraftModel(
            runner, context=context, n_blocks=n_blocks, stop_ids=tokenizer.stop_ids,
            share=self._share, prefix_cache=prefix_cache,
        )  # fmt: skip
        self._pool = drafter.pool
        return drafter

    @property
    def untouched_bytes(self) -> int:
        """Memory of its KV cache that has not been written to."""
        pool = self._pool
        return 0 if pool is None else (pool.n_blocks - pool.n_touched) * self._block_bytes

    def close(self) -> None:
        self._checkpoint.close()


def check_same_vocabulary(tokenizer: "Tokenizer", draft: "Tokenizer") -> None:
    """Raises UserError with the first token that differs: drafts are ids."""
    for id in range(min(tokenizer.vocab_size, draft.vocab_size)):
        ours = tokenizer.token_bytes(id), tokenizer.is_special(id)
        theirs = draft.token_bytes(id), draft.is_special(id)
        if ours != theirs:
            raise UserError(
                f"draft: its token {id} is {_shown(*theirs)}, that of the model {_shown(*ours)};"
                " a draft model needs the vocabulary of the model"
            )
    if tokenizer.vocab_size != draft.vocab_size:
        raise UserError(
            f"draft: it has {draft.vocab_size} tokens, the model {tokenizer.vocab_size};"
            " a draft model needs the vocabulary of the model"
        )


def _shown(token: bytes, special: bool) -> str:
    return f"{token!r} (special)" if special else repr(token)
