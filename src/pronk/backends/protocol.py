"""The ops contract: what a backend must offer, and the plain data that crosses it.

A backend is a module whose functions have the signatures of `Ops`; it is passed as an argument,
never looked up. `backends/reference.py` (NumPy) is the specification of each op.

Legend of dimension letters, one for the whole package:
    T packed tokens (rows of all sequences, one after another)   S sequences   R rows wanted
    D model width   H query heads   G key/value heads   K head size   F hidden width
    V vocabulary   O outputs of a linear layer   B blocks of a block table   L layers
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from pronk.core.config import ModelConfig

F32: TypeAlias = npt.NDArray[np.float32]
I32: TypeAlias = npt.NDArray[np.int32]
U8: TypeAlias = npt.NDArray[np.uint8]

KvDtype = Literal["f32", "f16", "int8"]
KV_DTYPES: tuple[KvDtype, ...] = ("f32", "f16", "int8")

BLOCK = 32
"""Positions of one KV block, on every backend."""


def _nothing() -> None: ...


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A weight as its file stores it: `rows` of `kind` blocks, not yet decoded.

    `data` is uint8 `[rows, bytes_per_row]`, usually a view of the mapped file. A vector has one
    row. `kind` is a name of `backends.formats.KINDS` ("F32", "BF16", "Q4_K", ...).
    """

    name: str
    kind: str
    shape: tuple[int, int]
    """(rows, columns) in elements: (out, in) of a linear layer."""
    data: U8
    release: Callable[[], None] = field(default=_nothing, repr=False, compare=False)
    """Tells the operating system that the mapped bytes are not needed any more."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the packed rows of one step belong. Sequence s owns rows starts_S[s] to starts_S[s+1];
    they are the newest tokens of its context, in order."""

    positions_T: I32
    """Position of each row in its own sequence, from 0."""
    starts_S: I32
    """`[S+1]` row offsets."""
    lengths_S: I32
    """`[S]` tokens of each sequence that have KV once this step is done (last position + 1)."""
    blocks_SB: I32
    """`[S, B]` KV block of positions b*BLOCK to (b+1)*BLOCK; entries past the length are -1."""


@dataclass(frozen=True, slots=True)
class SampleParams:
    """How one row of logits becomes a token. `temperature` 0 is greedy: the smallest id of the
    largest logit. The uniform number of draw n is a pure function of (seed, n)."""

    temperature: float = 0.0
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    draw: int = 0
    """Tokens of this request that were drawn before."""
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    """Penalties look at these: repetition at both, presence and frequency at the output."""
    top_logprobs: int = -1
    """-1: no log probabilities; n: of the chosen token and the n most likely ones."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled token. Log probabilities are those of the model (log-softmax of the logits as
    they came, before penalties and temperature)."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


Weight: TypeAlias = Any
"""An opaque handle made by the same backend's `make_weight`."""
KvLayer: TypeAlias = Any
"""An opaque handle: one element of the list that the same backend's `make_kv` returned."""


class Ops(Protocol):
    """Functions of a backend. Activations are float32 arrays of the backend (NumPy on the CPU)."""

    name: str

    def make_weight(self, tensors: Sequence[RawTensor]) -> Weight:
        """One linear weight from tensors stacked along their rows (q, k, v or gate, up)."""
        ...

    def make_table(self, tensor: RawTensor) -> Weight:
        """An embedding table `[V, D]`; only `embed` reads it, so it may stay in its file."""
        ...

    def make_vector(self, tensor: RawTensor) -> Any:
        """A norm weight `[D]`, float32."""
        ...

    def make_kv(self, config: ModelConfig, n_blocks: int, dtype: KvDtype) -> list[KvLayer]: ...

    def block_bytes(self, kv: Sequence[KvLayer]) -> int:
        """Bytes of what `read_block` returns."""
        ...

    def read_block(self, kv: Sequence[KvLayer], block: int) -> U8:
        """A copy of all that the layers store of the positions of one block. The bytes mean
        something to `write_block` only, of the same backend, shapes and dtype. ValueError for a
        block that the cache does not have."""
        ...

    def write_block(self, kv: Sequence[KvLayer], block: int, data: U8) -> None:
        """Makes a block what the one was that `data` was read from, byte for byte. ValueError,
        and nothing written, for a block that the cache does not have or another number of bytes."""
        ...

    def checksum(self, data: U8) -> int:
        """64 bits at most that tell damaged bytes. For any thread."""
        ...

    def numerics(self) -> str:
        """What results depend on besides inputs: equal texts, equal bits. It tells versions of
        the code and what it chose on this processor."""
        ...

    def embed(self, ids_T: I32, table: Weight) -> Any: ...

    def rms_norm(self, x_TD: Any, w_D: Any, eps: float, residual: Any = None) -> Any:
        """`y_TD`, or `(y_TD, x + residual)` when a residual is given; y is of the sum then."""
        ...

    def linear(self, x_TD: Any, weight: Weight) -> Any: ...

    def rope(self, q_THK: Any, k_TGK: Any, cos_sin: Any, positions_T: I32) -> tuple[Any, Any]:
        """Rotates adjacent pairs (x[2j], x[2j+1]), Meta's convention. cos_sin `[P, K/2, 2]`."""
        ...

    def attention(
        self, q_THK: Any, k_TGK: Any, v_TGK: Any, kv: KvLayer | None, batch: Batch
    ) -> Any:
        """Causal attention; writes k and v at the rows' positions, then reads by block table.
        Without kv each sequence of the batch attends to its own rows only (training, scoring)."""
        ...

    def swiglu(self, gate_up_T2F: Any) -> Any:
        """silu(gate) * up, gate being the first half of the columns."""
        ...

    def take_rows(self, x_TD: Any, rows_R: I32) -> Any: ...

    def sample(
        self, logits_RV: Any, params: Sequence[SampleParams], mask_RV: Any = None
    ) -> list[Sampled]:
        """mask_RV bool: False tokens cannot be chosen."""
        ...

    def to_host(self, x: Any) -> F32: ...

    def from_host(self, x: F32) -> Any: ...

    def default_threads(self) -> int:
        """Threads that use this machine well."""
        ...

    def set_threads(self, n: int) -> None:
        """Threads of the steps that follow; results never depend on it."""
        ...


class Stack(Protocol):
    """All layers of a model and the norm behind them as one call: what
    `model.llama.forward_hidden` computes from the embeddings, bit for bit. A backend that has it
    makes one with `make_stack(config, layers, norm, cos_sin)`."""

    def __call__(self, x_TD: Any, batch: Batch, kv: Sequence[KvLayer], rows_R: I32 | None) -> Any:
        """Normalized hidden states `[R, D]` of the wanted rows, which must rise."""
        ...
