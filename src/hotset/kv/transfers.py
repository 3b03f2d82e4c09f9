"""Blocks on their way between the device and slower tiers, and which requests wait for them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hotset.cost.prefix import PrefixPolicy
from hotset.kv.index_blocks import IndexBlocks
from hotset.kv.pool import BlockPool
from hotset.memory.tier import Answer, EndedTransfer, Found, TierInfo
from hotset.memory.tiers import TierStack
from hotset.metrics import Metrics
from hotset.sequence import ArrivedBlock, Request

_ON_DEVICE = Found(Answer.HIT)
_MISS = Found(Answer.MISS)


@dataclass(frozen=True, slots=True)
class Known:
    """Content that need not be computed, of a block or of the first tokens of one.

    Attributes:
        tier: that has it; None where the device has.
    """

    key: bytes
    tier: TierInfo | None
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Loading:
    """A block whose content is on its way up, and who waits for it: at which index."""

    block: int
    tier: TierInfo
    num_tokens: int
    waiters: list[tuple[Request, int]] = field(default_factory=list)


class BlockTransfers:
    """Asks the tiers to move blocks, and holds each block in the pool until its transfer ends.

    A block on its way up is loaded once, however many requests wait for it.

    Args:
        tiers: None where all that is not on the device has to be computed.
        policy: when to compute what a tier has; given if `tiers` is.
        index_blocks: see `BlockTables`.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        metrics: Metrics,
        tiers: TierStack | None,
        policy: PrefixPolicy | None,
        index_blocks: IndexBlocks | None = None,
    ) -> None:
        assert (tiers is None) == (policy is None), "tiers need a policy and a policy tiers"
        self.policy = policy
        self._pool, self._block_size, self._metrics = pool, block_size, metrics
        self._tiers, self._index_blocks = tiers, index_blocks
        self._loading: dict[bytes, _Loading] = {}
        # Index blocks on their way up, and the request that waits; None: to be given back.
        self._bringing: dict[int, tuple[Request, int] | None] = {}
        self._spilling: Counter[int] = Counter()  # copies of a block that are under way

    @property
    def num_index_blocks_left(self) -> int:
        """Index blocks that only a transfer has, as the request that waited is gone."""
        return sum(waiter is None for waiter in self._bringing.values())

    @property
    def num_blocks_after_spills(self) -> int:
        """Blocks that only a spill under way holds."""
        return sum(map(self.is_held_by_spills_alone, self._spilling))

    def is_held_by_spills_alone(self, block: int) -> bool:
        """Whether all that hold a block, if any do, are spills under way."""
        return self._pool.ref_count(block) == self._spilling[block]

    def moving_blocks(self) -> tuple[set[int], set[int]]:
        """Device blocks whose content is on its way up, and those being copied down."""
        return {loading.block for loading in self._loading.values()}, set(self._spilling)

    def loading_block(self, key: bytes) -> int | None:
        """The block that the content of `key` is on its way to."""
        return self._loading[key].block if key in self._loading else None

    def lookup(self, keys: Sequence[bytes], num_tokens: int) -> list[Found]:
        """What is known of each key; a HIT without a tier is on the device.

        Without these, `num_tokens` have to be computed: see `TierStack.lookup`.
        """
        found: list[Found | None] = [None] * len(keys)
        for i, key in enumerate(keys):
            if self._pool.lookup(key) is not None:
                found[i] = _ON_DEVICE
            elif key in self._loading:
                found[i] = Found(Answer.HIT, self._loading[key].tier)
        elsewhere = [key for key, one in zip(keys, found, strict=True) if one is None]
        if self._tiers is None or self.policy is None or not elsewhere:
            return [one or _MISS for one in found]
        saved_s = self.policy.saved_s(num_tokens)
        answers = iter(self._tiers.lookup(elsewhere, saved_s=saved_s))
        return [next(answers) if one is None else one for one in found]

    def cheaper_computed(self, known: Sequence[Known], queued_tokens: int) -> dict[bytes, int]:
        """Keys and tokens of what is cheaper computed than fetched, after `queued_tokens`."""
        cold = [p for p in known if p.tier is not None and p.key not in self._loading]
        if not cold:
            return {}
        assert self._tiers is not None and self.policy is not None
        split = self.policy.split(
            len(cold) * self._block_size,
            {part.tier.name for part in cold if part.tier is not None},
            queued_bytes=self._tiers.queued_fetch_bytes(),
            queued_tokens=queued_tokens,
        )
        chosen = cold[: split.computed_tokens // self._block_size]
        return {part.key: part.num_tokens for part in chosen}

    def wait_for(self, request: Request, index: int, part: Known) -> None:
        """Bring content of a slower tier to the request's block `index`, unless it comes already.

        `request.kv` notes its arrival, or that it is lost.
        """
        if part.key not in self._loading:
            self._pool.hold(request.kv.block_table[index])
            self._load(part, request.kv.block_table[index])
        self._loading[part.key].waiters.append((request, index))
        request.kv.arriving[index] = part.key

    def stop_waiting(self, request: Request) -> None:
        """Forget what is there or on its way for the request, which gives back its blocks.

        The loads go on. Its index blocks that are on their way up are its own no longer.
        """
        kv = request.kv
        left = {kv.block_table[i] for i in kv.arriving} & self._bringing.keys()
        for index, key in kv.arriving.items():
            if kv.block_table[index] not in left:
                self._loading[key].waiters.remove((request, index))
        if left:
            self._bringing.update(dict.fromkeys(left))
            assert self._index_blocks is not None
            for own in map(self._index_blocks.own_block, left):
                if own is not None:  # a slot of the request, to be written until then
                    self._pool.hold(own)
            kv.block_table = [block for block in kv.block_table if block not in left]
            kv.num_index_blocks -= len(left)
        kv.arriving.clear()
        kv.arrived.clear()

    def bring_index_keys(self, request: Request, index: int) -> None:
        """Bring the index keys of a block that host memory keeps to the request's index block.

        `request.kv` notes their arrival.
        """
        assert self._tiers is not None
        key, block = request.kv.block_hashes[index], request.kv.block_table[index]
        self._bringing[block] = (request, index)
        request.kv.arriving[index] = key
        self._tiers.fetch(key, block)

    def most_ahead(self) -> int | None:
        """Blocks that may be brought closer for requests that wait; None: nothing is fetched."""
        if self._tiers is None or self.policy is None or self.policy.mode == "recompute":
            return None
        return self._tiers.most_staged()

    def room_ahead(self, spare_blocks: int) -> int:
        """Empty blocks, beside `spare_blocks`, to be filled ahead: 0 while others are filled."""
        if self._tiers is None or self._tiers.queued_fetch_bytes():
            return 0
        return max(0, min(self._pool.num_free, self._pool.num_available - spare_blocks))

    def bring_closer(self, known: Iterable[Known], room: int) -> bool:
        """Bring known content to blocks of the device, up to `room`, the rest into host memory.

        Only full blocks, and from host memory. Returns whether all of it is or comes to the device.
        """
        tiers, is_all = self._tiers, True
        assert tiers is not None
        for part in known:
            if part.tier is None or part.key in self._loading:
                continue
            # A partial block is found on the device only if it was computed there.
            if part.tier.feeds_device and room > 0 and part.num_tokens == self._block_size:
                self._load(part, *self._pool.allocate(1))
                room -= 1
            else:
                tiers.stage(part.key)
                is_all = False
        return is_all

    def _load(self, part: Known, block: int) -> None:
        """Fetch content into a held block, which is released when the transfer ends."""
        assert self._tiers is not None and part.tier is not None
        self._loading[part.key] = _Loading(block, part.tier, part.num_tokens)
        self._tiers.fetch(part.key, block)

    def spill(self, key: bytes, block: int, *, private: bool = False) -> bool:
        """Copy a block down; False where a tier has its content, or host memory no room."""
        tiers = self._tiers
        if tiers is None or tiers.lookup([key], may_ask=False)[0].answer is Answer.HIT:
            return False
        if not tiers.spill(key, block, slowest=0 if private else None):
            return False
        self._pool.hold(block)  # released when the transfer ends
        self._spilling[block] += 1
        self._metrics.spilled_blocks += 1
        return True

    def end(self, ended: EndedTransfer) -> None:
        """Take note of the transfer of a block that ended."""
        if ended.block in self._bringing:
            self._end_bringing(ended)
            return
        if ended.is_fetch:
            self._end_fetch(ended)
        else:
            self._spilling[ended.block] -= 1
            if not self._spilling[ended.block]:
                del self._spilling[ended.block]
        self._pool.release(ended.block)

    def _end_bringing(self, ended: EndedTransfer) -> None:
        assert self._tiers is not None and self._index_blocks is not None
        assert ended.ok, "what host memory keeps did not come"
        waiter = self._bringing.pop(ended.block)
        if waiter is None:
            own = self._index_blocks.own_block(ended.block)
            self._index_blocks.give_back(ended.block)
            if own is not None:
                self._pool.release(own)
            return
        request, index = waiter
        del request.kv.arriving[index]
        request.kv.arrived[index] = ArrivedBlock(self._tiers.infos[0].name, self._block_size)

    def _end_fetch(self, ended: EndedTransfer) -> None:
        loading = self._loading.pop(ended.key)
        for request, index in loading.waiters:
            del request.kv.arriving[index]
            if ended.ok:
                request.kv.arrived[index] = ArrivedBlock(loading.tier.name, loading.num_tokens)
            resume = request.kv.resume
            if resume is not None and resume.key == ended.key and request.kv.awaited is None:
                self.drop_tail(request)
        if not ended.ok:
            return
        self._metrics.fetched_blocks += 1
        if loading.num_tokens == self._block_size:
            self._pool.publish(ended.block, ended.key)
            if any(index in request.kv.fetched for request, index in loading.waiters):
                assert self.policy is not None
                self._metrics.refetched_bytes += self._block_size * self.policy.bytes_per_token
            for request, index in loading.waiters:
                request.kv.fetched.add(index)

    def touch(self, keys: Sequence[bytes], *, came_back: bool = False) -> None:
        """Note that payloads of a chain were used: its tail is evicted before its head.

        `came_back`: by a later request than the one that made them.
        """
        if self._tiers is not None and keys:
            self._tiers.touch(keys[::-1], came_back=came_back)

    def keep(self, request: Request, more: Sequence[bytes] = ()) -> None:
        """Keep in host memory what a request that is preempted has there, fetched yet or not.

        And `more`, the keys of what is its own beside KV.
        """
        if self._tiers is not None:
            tails = [] if request.kv.resume is None else [request.kv.resume.key]
            keys, former = [*request.kv.block_hashes, *tails, *more], request.kv.kept
            request.kv.kept = [key for key in keys if self._tiers.keep(key)]
            for key in former:  # of a hot request
                self._tiers.unkeep(key)

    def bring_tail(self, request: Request) -> None:
        """Bring what was spilled of a preempted request's last, partial block, as `wait_for`.

        To a block that is appended to its table: where it is coming already, to that one.
        """
        tail = request.kv.resume
        assert tail is not None and self._tiers is not None
        block = self.loading_block(tail.key)
        if block is None:
            [block] = self._pool.allocate(1)
        else:
            self._pool.hold(block)
        request.kv.block_table.append(block)
        self.wait_for(request, tail.index, Known(tail.key, self._tiers.infos[0], tail.num_tokens))
        request.kv.kept.remove(tail.key)  # its fetch holds it
        self._tiers.unkeep(tail.key)

    def host_slot(self, key: bytes) -> int | None:
        """The slot of host memory with a whole copy; None where there is none."""
        return None if self._tiers is None else self._tiers.host_slot(key)

    def keep_slot(self, request: Request, index: int) -> int | None:
        """Keep the copy of a request's block in host memory, and say in which slot.

        None where there is no whole copy, or no room to keep it.
        """
        key = request.kv.block_hashes[index]
        slot = self.host_slot(key)
        if slot is None or self._tiers is None or not self._tiers.keep(key):
            return None
        request.kv.kept.append(key)
        return slot

    def bring_down(self, key: bytes, block: int) -> None:
        """Have host memory get a copy of `block`, unless it comes already or there is no room."""
        tiers = self._tiers
        if tiers is not None and not tiers.stage(key) and self.can_take(1):
            self.spill(key, block)

    def unkeep(self, request: Request) -> None:
        """Undo `keep`."""
        if self._tiers is not None:
            for key in reversed(request.kv.kept):  # the tail is evicted before the head
                self._tiers.unkeep(key)
        request.kv.kept = []

    def drop_tail(self, request: Request) -> None:
        """Forget the last, partial block that was spilled when the request was preempted."""
        if request.kv.resume is not None and self._tiers is not None:
            self._tiers.discard([request.kv.resume.key])
        request.kv.resume = None

    def discard(self, keys: Sequence[bytes]) -> None:
        """Have content found no more, on the device or in a tier."""
        for key in keys:
            self._pool.discard(key)
        if self._tiers is not None:
            self._tiers.discard(keys)

    def can_take(self, num_blocks: int) -> bool:
        """Whether host memory has room for `num_blocks` blocks."""
        return self._tiers is not None and num_blocks <= self._tiers.num_evictable()

    def fetch_s(self, num_tokens: int) -> float:
        """Time to fetch the KV of tokens from host memory; 0 without tiers."""
        if self.policy is None or self._tiers is None:
            return 0.0
        return self.policy.fetch_s(num_tokens, self._tiers.infos[0].name)

    def check(self) -> None:
        """Assert that loads and their waiters agree."""
        for block, waiter in self._bringing.items():
            if waiter is not None:
                request, index = waiter
                assert request.kv.block_table[index] == block and index in request.kv.arriving
        for key, loading in self._loading.items():
            assert self._pool.ref_count(loading.block) >= 1, "a loading block is not held"
            for request, index in loading.waiters:
                assert request.kv.arriving.get(index) == key
                assert request.kv.block_table[index] == loading.block
