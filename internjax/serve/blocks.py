"""The blocks of the cache's pool: who holds which, and which full ones can be found again.

Plain Python, no arrays. A block is free, held by one or more sequences, or cached: full, held by
nobody, and kept until its room is needed, the one used longest ago first (PagedAttention,
arXiv:2309.06180). Full blocks are named by all that their keys and values depend on, so a prompt
that begins like an earlier one finds them. Law: free + held + cached = all, after every call, and a
call that raises has changed nothing.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence

type Key = bytes
"""The name of a full block, from `block_key`."""


class OutOfBlocks(RuntimeError):
    """Fewer blocks are free or cached than were asked for."""


def block_key(parent: Key, tokens: Sequence[int]) -> Key:
    """Names a full block by its tokens and, through its parent's name, all tokens before.

    Args:
      parent: of the block before; of the first one a digest of what else decides keys and values:
        model and adapter with their versions, rotary base, number format, window.
    """
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(b"".join(token.to_bytes(4, "little") for token in tokens))
    return digest.digest()


def salt_of(frequencies: bytes, kv_dtype: str, adapter: int) -> bytes:
    """Names what a request's keys and values depend on besides weights and tokens.

    Args:
      frequencies: of its rotary embedding; adapter: version of its adapter, 0 for none.
    """
    digest = hashlib.blake2b(frequencies, digest_size=16)
    digest.update(f"{kv_dtype} {adapter}".encode())
    return digest.digest()


class BlockPool:
    """Hands out the blocks 0..total-1."""

    def __init__(self, total: int):
        if total < 1:
            raise ValueError(f"a pool of {total} blocks; it takes at least one.")
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._holders: Counter[int] = Counter()
        self._cached: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Full blocks that nobody holds."""
        return len(self._cached)

    @property
    def held(self) -> int:
        """Blocks that a sequence holds."""
        return len(self._holders)

    @property
    def available(self) -> int:
        """How many `allocate` can hand out."""
        return self.free + self.cached

    def match(self, keys: Sequence[Key]) -> list[int]:
        """Takes hold of the blocks named by the longest prefix of `keys` that is there."""
        found = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            self._holders[block] += 1
            self._cached.pop(block, None)
            found.append(block)
        return found

    def allocate(self, count: int) -> list[int]:
        """Takes hold of `count` blocks with no content; cached ones are forgotten where need be.

        Raises:
          OutOfBlocks: there are not as many.
        """
        if count > self.available:
            raise OutOfBlocks(
                f"{count} blocks were asked for; {self.free} are free, {self.cached} cached."
            )
        while len(self._free) < count:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            self._free.append(block)
        taken = [self._free.pop() for _ in range(count)]
        self._holders.update(taken)
        return taken

    def name(self, block: int, key: Key) -> None:
        """Says that a held block is full, so that it can be found.

        Where another block has the name already, this one stays without and is freed when its
        holders let go.
        """
        self._check_held(block)
        if block not in self._key_of and key not in self._block_of:
            self._block_of[key], self._key_of[block] = block, key

    def unname(self, blocks: Sequence[int]) -> None:
        """Takes the names off held blocks whose content is not to be found by others."""
        for block in blocks:
            self._check_held(block)
            self._block_of.pop(self._key_of.pop(block, b""), None)

    def holders(self, block: int) -> int:
        """Returns how many sequences hold a block."""
        return self._holders.get(block, 0)

    def release(self, blocks: Sequence[int]) -> None:
        """Lets go of a sequence's blocks, given in their order.

        Later ones are forgotten first: without those before them nothing finds them.
        """
        for block, times in Counter(blocks).items():
            self._check_held(block, times)
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def forget(self) -> None:
        """Frees all cached blocks and every name: what they were computed with has changed."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._key_of.clear()

    def _check_held(self, block: int, times: int = 1) -> None:
        if self._holders.get(block, 0) < times:
            raise ValueError(
                f"block {block} is held {self._holders.get(block, 0)} times, not {times}."
            )
