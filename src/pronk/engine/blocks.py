"""The paged KV cache's book-keeping: which block belongs to whom, and which hold what.

Integers, lists and dicts only; the arrays that the numbers stand for are the backend's. A block is
in exactly one of three states, so that free + cached + referenced = total at every moment:
    free         holds nothing that anybody could want
    referenced   is in the block table of at least one request
    cached       is in no table, but holds the keys and values of known tokens: it is handed out to
                 a prompt that starts with the same tokens, or overwritten, the longest unused first

A full block is found by its key: a hash of its own tokens chained with the key of the block before
it, so equal keys mean equal content at equal positions.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from pronk.backends.protocol import BLOCK


def blocks_for(n_tokens: int) -> int:
    """Blocks that hold `n_tokens` positions."""
    return -(-n_tokens // BLOCK)


def extend_keys(keys: list[bytes], ids: "array[int]", n_blocks: int, salt: bytes = b"") -> None:
    """Appends to `keys` until it has those of the first `n_blocks` full blocks of `ids`. Texts of
    another `salt` have other keys."""
    for i in range(len(keys), n_blocks):
        before = keys[i - 1] if i else salt
        tokens = ids[i * BLOCK : (i + 1) * BLOCK].tobytes()
        keys.append(hashlib.blake2b(before + tokens, digest_size=16).digest())


class BlockPool:
    """Hands out the `n_blocks` blocks of a KV cache and takes them back."""

    def __init__(self, n_blocks: int, *, prefix_cache: bool = True) -> None:
        self.n_blocks = n_blocks
        self.prefix_cache = prefix_cache
        self.n_touched = 0
        """Blocks that were ever handed out; the others' memory has not been written to."""
        self._free = list(range(n_blocks - 1, -1, -1))  # a stack: memory is touched as it is needed
        self._cached: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._refs = [0] * n_blocks
        self._key_of: list[bytes | None] = [None] * n_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_cached(self) -> int:
        return len(self._cached)

    @property
    def n_referenced(self) -> int:
        return sum(1 for refs in self._refs if refs)

    @property
    def available(self) -> int:
        """Blocks that `take` can hand out."""
        return len(self._free) + len(self._cached)

    def take_prefix(
        self, keys: list[bytes], ids: "array[int]", salt: bytes = b""
    ) -> tuple[list[int], int]:
        """The longest run of stored blocks that `ids` starts with, now referenced, and the tokens
        they hold. Whatever is stored, at least one token of `ids` is left to compute."""
        blocks: list[int] = []
        if self.prefix_cache:
            extend_keys(keys, ids, len(ids) // BLOCK, salt)
            for key in keys[: (len(ids) - 1) // BLOCK]:
                block = self._block_of.get(key)
                if block is None:
                    break
                blocks.append(block)
        for block in blocks:
            self._cached.pop(block, None)
            self._refs[block] += 1
        return blocks, len(blocks) * BLOCK

    def first_missing(
        self, keys: list[bytes], ids: "array[int]", salt: bytes = b""
    ) -> bytes | None:
        """The key of the first block that `take_prefix` would look for in vain; None: of none."""
        if not self.prefix_cache:
            return None
        extend_keys(keys, ids, len(ids) // BLOCK, salt)
        wanted = keys[: (len(ids) - 1) // BLOCK]
        return next((key for key in wanted if key not in self._block_of), None)

    def take(self, n: int) -> list[int] | None:
        """`n` blocks to write to, referenced once each; None, and nothing taken, if too few."""
        if n > self.available:
            return None
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(n)]
        for block in blocks:
            self._refs[block] = 1
            self.n_touched = max(self.n_touched, block + 1)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Makes a block that has been computed findable; where another block already holds the
        same tokens, that one stays the one to be found."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def give_back(self, blocks: Sequence[int]) -> None:
        """Drops one reference of each. The end of a text goes stale before its beginning, since
        later blocks are of no use without the earlier ones."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} was given back twice"
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if self._key_of[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def findable(self) -> list[tuple[bytes, int]]:
        """Keys and blocks of all that is stored, the most recently used first."""
        keys = {block: key for key, block in self._block_of.items()}
        unused = [block for block in reversed(self._cached) if block in keys]
        used = [block for block in keys if self._refs[block]]
        return [(keys[block], block) for block in (*used, *unused)]

    def forget_references(self) -> None:
        """No block is in any table now. What is stored can still be found, and the accounts
        balance, whatever an exception has left half done: all else follows from `_block_of`."""
        stored = dict.fromkeys(reversed(self._block_of.values()))
        unused = [block for block in self._cached if block in stored]
        self._key_of = [None] * self.n_blocks
        for key, block in self._block_of.items():
            self._key_of[block] = key
        self._refs = [0] * self.n_blocks
        self._cached = OrderedDict.fromkeys([*unused, *stored])
        self._free = [b for b in range(self.n_blocks - 1, -1, -1) if self._key_of[b] is None]

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._key_of[block]
        assert key is not None
        del self._block_of[key]
        self._key_of[block] = None
        return block
