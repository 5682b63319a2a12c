"""The pool of blocks: nothing is lost or handed out twice, whatever happens in whatever order."""

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from internjax.serve.blocks import BlockPool, OutOfBlocks, block_key

TOTAL, SIZE = 8, 2
tokens = st.lists(st.integers(0, 2), min_size=0, max_size=12)


def keys_of(ids: list[int]) -> list[bytes]:
    """Names of the full blocks of a sequence."""
    keys, parent = [], b"model"
    for at in range(0, len(ids) - SIZE + 1, SIZE):
        parent = block_key(parent, ids[at : at + SIZE])
        keys.append(parent)
    return keys


class Machine(RuleBasedStateMachine):
    """Sequences come, share, grow and go; `content` is what a device would hold in each block."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.sequences: list[tuple[list[int], list[int]]] = []
        self.content: dict[int, bytes] = {}

    @rule(ids=tokens)
    def admit(self, ids):
        keys = keys_of(ids)
        blocks = self.pool.match(keys)
        for block, key in zip(blocks, keys, strict=False):
            assert self.content[block] == key, "a block was found by a name that is not its own"
        need = -(-len(ids) // SIZE) - len(blocks)
        try:
            blocks += self.pool.allocate(need)
        except OutOfBlocks:
            assert need > TOTAL - self._held_by_others(blocks)
            self.pool.release(blocks)
            return
        for block, key in list(zip(blocks, keys, strict=False)):
            self.content[block] = key
            self.pool.name(block, key)
        self.sequences.append((list(ids), blocks))

    def _held_by_others(self, mine):
        return len({b for _, blocks in self.sequences for b in blocks} | set(mine))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), token=st.integers(0, 2))
    def grow(self, data, token):
        ids, blocks = data.draw(st.sampled_from(self.sequences))
        if len(ids) % SIZE == 0:
            if not self.pool.available:
                return
            blocks += self.pool.allocate(1)
            self.content.pop(blocks[-1], None)
        ids.append(token)
        if len(ids) % SIZE == 0:
            self.content[blocks[-1]] = keys_of(ids)[-1]
            self.pool.name(blocks[-1], keys_of(ids)[-1])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data):
        at = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.release(self.sequences.pop(at)[1])

    @rule()
    def change_the_model(self):
        self.pool.forget()

    @invariant()
    def every_block_is_somewhere(self):
        pool, holders = self.pool, [b for _, blocks in self.sequences for b in blocks]
        assert pool.free + pool.cached + pool.held == TOTAL
        assert pool.held == len(set(holders)) and set(holders) <= set(range(TOTAL))

    @invariant()
    def only_full_blocks_are_shared(self):
        for ids, blocks in self.sequences:
            unfinished = blocks[len(ids) // SIZE :]
            others = [b for _, held in self.sequences if held is not blocks for b in held]
            assert not set(unfinished) & set(others)

    def teardown(self):
        for _, blocks in self.sequences:
            self.pool.release(blocks)
        assert self.pool.held == 0 and self.pool.available == TOTAL


TestBlocks = Machine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_name_holds_all_that_comes_before():
    assert block_key(b"a", [1, 2]) != block_key(b"b", [1, 2])
    assert block_key(b"a", [1, 2]) != block_key(b"a", [2, 1])
    assert keys_of([1, 2, 1, 2])[1] != keys_of([0, 2, 1, 2])[1]
    assert keys_of([1, 2, 1, 2, 1])[:2] == keys_of([1, 2, 1, 2])


def test_what_was_used_longest_ago_is_forgotten_first():
    pool = BlockPool(3)
    old, new = (pool.allocate(1) for _ in range(2))
    pool.name(*old, b"old")
    pool.name(*new, b"new")
    pool.release(old)
    pool.release(new)
    pool.release(pool.match([b"old"]))  # used again
    pool.release(pool.allocate(2))
    assert pool.match([b"new"]) == [] and pool.match([b"old"]) == old


def test_the_end_of_a_sequence_is_forgotten_before_its_beginning():
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    for block, key in zip(blocks, (b"1", b"2"), strict=True):
        pool.name(block, key)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match([b"1", b"2"]) == blocks[:1]


def test_what_cannot_be_had_changes_nothing():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    with pytest.raises(OutOfBlocks, match="2 blocks were asked for; 1 are free, 0 cached"):
        pool.allocate(2)
    with pytest.raises(ValueError, match=f"block {block} is held 1 times, not 2"):
        pool.release([block, block])
    with pytest.raises(ValueError, match="is held 0 times"):
        pool.name(1 - block, b"x")
    assert (pool.free, pool.held, pool.cached) == (1, 1, 0)
    with pytest.raises(ValueError, match="a pool of 0 blocks"):
        BlockPool(0)
