"""Tokens to blocks: prefixes found by hash, block tables, and what moves between tiers for them.

Beside `block_hash` the only module that maps tokens to blocks. It never touches a tensor.
"""

import secrets
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hotset.cost.prefix import PrefixPolicy
from hotset.kv.block_hash import DIGEST_BYTES, block_hash, root_hash
from hotset.kv.pool import BlockPool
from hotset.memory.tier import Answer, EndedTransfer, Found, TierInfo
from hotset.memory.tiers import TierStack
from hotset.metrics import Metrics
from hotset.sequence import ArrivedBlock, Kind, Request, SpilledTail

# How many last, partial blocks of ended requests are remembered, and the least filled share that is
# worth a copy: below it recomputing is faster.
_MOST_PARTIALS = 2**16
_LEAST_PARTIAL = 0.25
# Keys of a prefix that tiers are asked for at first; twice as many each time that all are there.
_KEYS_AT_ONCE = 32

_DEVICE = "device"  # as `TierInfo.name`, for metrics
_ON_DEVICE = Found(Answer.HIT)
_MISS = Found(Answer.MISS)


@dataclass(slots=True)
class _Known:
    """Content that need not be computed, of a block or of the first tokens of one.

    Attributes:
        tier: that has it; None where the device has.
        is_computed: whether it is to be computed nevertheless.
    """

    key: bytes
    tier: TierInfo | None
    num_tokens: int
    is_computed: bool = False


@dataclass(slots=True)
class _Loading:
    """A block whose content is on its way up, and who waits for it."""

    block: int
    tier: TierInfo
    num_tokens: int
    is_private: bool
    waiters: list[tuple[Request, int]] = field(default_factory=list)


class KVCache:
    """Gives requests their blocks, finds prefixes, and asks the tiers to move what is needed.

    Every full block is spilled as soon as it is full (write-behind), so that evicting it later
    moves nothing. A block on its way up is loaded once, however many requests wait for it, and a
    block that another request has computed meanwhile is taken over instead of computed again.
    What a preempted request has in host memory is kept there until it is back. The last, partial
    block of a request that has ended is found too, one for what precedes it, until restart.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        fingerprint: str,
        metrics: Metrics,
        tiers: TierStack | None = None,
        policy: PrefixPolicy | None = None,
        prefix_caching: bool = True,
    ) -> None:
        assert (tiers is None) == (policy is None), "tiers need a policy and a policy tiers"
        self.pool = pool
        self.block_size = block_size
        self.metrics = metrics
        self.prefix_caching = prefix_caching
        self._fingerprint = fingerprint
        self._tiers = tiers
        self._policy = policy
        self._loading: dict[bytes, _Loading] = {}
        self._spilling: set[int] = set()
        # Hash of what precedes it -> tokens of the last block of a request that has ended.
        self._partials: OrderedDict[bytes, int] = OrderedDict()
        self._copies: list[tuple[int, int]] = []

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def num_blocks_after_spills(self) -> int:
        """Blocks that only a spill under way holds."""
        return sum(self.pool.ref_count(block) == 1 for block in self._spilling)

    def moving_blocks(self) -> tuple[set[int], set[int]]:
        """Device blocks whose content is on its way up, and those being copied down."""
        return {loading.block for loading in self._loading.values()}, set(self._spilling)

    def admit(self, request: Request, *, spare_blocks: int, queued_tokens: int) -> bool:
        """Find what is known of the request's tokens and give it blocks for that.

        Blocks in the device pool are shared; of blocks in slower tiers, the policy has
        some computed and the rest fetched. Needs room for all the request's tokens so far, plus
        `spare_blocks`; without it nothing changes and the result is False. So it is while a tier
        cannot say yet what it has of the tokens.
        """
        known, is_pending = self._find_prefix(request)
        if is_pending:
            return False
        keys = [part.key for part in known]
        num_chosen = self._choose_recompute(known, queued_tokens)
        while known and known[-1].is_computed:
            known.pop()

        shared: dict[int, int] = {}
        for i, part in enumerate(known):
            if part.tier is None:
                shared[i] = self._acquire(part)
            elif part.key in self._loading and not part.is_computed:
                shared[i] = self._loading[part.key].block
                self.pool.hold(shared[i])
        num_missing = self.num_blocks_for(request.num_tokens) - len(shared)
        if num_missing + spare_blocks > self.pool.num_available:
            for block in shared.values():
                self.pool.release(block)
            return False

        fresh = iter(self.pool.allocate(len(known) - len(shared)))
        request.kv.num_shared_blocks = len(shared)
        request.kv.block_table = [
            shared[i] if i in shared else next(fresh) for i in range(len(known))
        ]
        for i, part in enumerate(known):
            if part.tier is None:
                request.kv.arrived[i] = ArrivedBlock(_DEVICE, part.num_tokens)
            elif not part.is_computed:
                self._wait_for(request, i, part, part.tier)
        if self._tiers is not None:
            self._tiers.touch(keys[::-1])  # the tail is evicted before the head
        self._unkeep(request)  # its fetches hold what they read
        self.metrics.recompute_chosen_tokens += num_chosen
        self.advance(request)
        return True

    def look_ahead(self, requests: Sequence[Request], *, spare_blocks: int) -> None:
        """`_look_ahead` for each of the `requests` that wait, as far as there is room for them."""
        if self._tiers is None or self._policy is None or self._policy.mode == "recompute":
            return
        num_left = self._tiers.most_staged()
        for request in requests:
            self._look_ahead(request, spare_blocks=spare_blocks)
            num_left -= self.num_blocks_for(request.num_tokens)
            if num_left < 0:
                break

    def _look_ahead(self, request: Request, *, spare_blocks: int) -> None:
        """Bring what is known of a waiting request's tokens closer, ahead of its turn.

        Into host memory, once; and, when nothing else is being fetched, from host memory to device
        blocks that have no content, as long as `spare_blocks` others are available.
        """
        tiers = self._tiers
        assert tiers is not None
        room = min(self.pool.num_free, self.pool.num_available - spare_blocks)
        can_fetch = room > 0 and tiers.queued_fetch_bytes() == 0
        if request.kv.was_fetched or (request.kv.was_staged and not can_fetch):
            return
        tail_key = None if request.kv.resume is None else request.kv.resume.key
        known, is_pending = self._find_prefix(request)
        request.kv.was_staged = request.kv.was_fetched = not is_pending
        for part in known:
            key, tier = part.key, part.tier
            if tier is None or key in self._loading or key == tail_key:
                continue
            # A partial block is found on the device only if it was computed there.
            is_full = part.num_tokens == self.block_size
            if tier.feeds_device and can_fetch and room > 0 and is_full:
                [block] = self.pool.allocate(1)  # released when the transfer ends
                self._loading[key] = _Loading(block, tier, part.num_tokens, is_private=False)
                tiers.fetch(key, block)
                room -= 1
            else:
                tiers.stage(key)
                request.kv.was_fetched = False

    def advance(self, request: Request) -> None:
        """Move the request past the content that is there already."""
        if request.kind is not Kind.PROMPT:
            return  # at least one token is left to compute
        while request.kv.num_computed_tokens % self.block_size == 0:
            index = request.kv.num_computed_tokens // self.block_size
            if index in request.kv.arrived:
                found = request.kv.arrived.pop(index)
            elif self._take_over(request, index):
                found = ArrivedBlock(_DEVICE, self.block_size)
            else:
                break
            start = request.kv.num_computed_tokens
            self.metrics.found(request, start, found.num_tokens, found.tier)
            request.kv.num_computed_tokens += found.num_tokens
        request.kv.high_water_tokens = max(
            request.kv.high_water_tokens, request.kv.num_computed_tokens
        )

    def num_blocks_short(self, requests: Iterable[Request], more_tokens: int) -> int:
        """Blocks that requests lack for their tokens and `more_tokens` more each, if allowed."""
        size, blocks = self.block_size, 0
        for request in requests:
            num_tokens = len(request.token_ids) + more_tokens
            if num_tokens > request.max_total_tokens:
                num_tokens = request.max_total_tokens
            blocks -= -num_tokens // size + len(request.kv.block_table)
        return blocks

    def next_key(self, request: Request) -> bytes | None:
        """Key of the block that starts at the request's next token; None within a block."""
        index, offset = divmod(request.kv.num_computed_tokens, self.block_size)
        if offset or index >= self._num_findable(request):
            return None
        return request.kv.block_hashes[index]

    def key_within(self, request: Request) -> bytes | None:
        """Key of the block that the request has computed a part of; None between blocks."""
        index, offset = divmod(request.kv.num_computed_tokens, self.block_size)
        self._extend_hashes(request)
        if not offset or index >= len(request.kv.block_hashes):
            return None
        return request.kv.block_hashes[index]

    def keys_reached_by(self, request: Request, num_tokens: int) -> list[bytes]:
        """Keys of the blocks that the next `num_tokens` are in."""
        start = request.kv.num_computed_tokens
        end = self.num_blocks_for(start + num_tokens)
        return request.kv.block_hashes[start // self.block_size : end]

    def can_park(self, victim: Request, running: Sequence[Request], more_tokens: int) -> bool:
        """Whether host memory has room for `victim`, a running request, and for a reserve.

        The reserve is 3 x (the blocks by which all running requests will overflow the device after
        `more_tokens` more tokens + the largest request): requests go down as a whole, several in a
        row, and some slots are always being written to.
        """
        if self._tiers is None:
            return False
        num_blocks = [
            len(request.kv.block_table) + self.num_blocks_short([request], more_tokens)
            for request in running
        ]
        num_over = max(0, sum(num_blocks) - self.pool.num_usable)
        needed = len(victim.kv.block_table) + 3 * (num_over + max(num_blocks))
        return needed <= self._tiers.num_evictable()

    def fetch_s(self, request: Request) -> float:
        """Time to fetch all KV of the request from host memory; 0 without tiers."""
        if self._policy is None or self._tiers is None:
            return 0.0
        return self._policy.fetch_s(request.num_tokens, self._tiers.infos[0].name)

    def num_runnable_tokens(self, request: Request) -> int:
        """Tokens the request can compute before it meets content that is there or arriving."""
        limit = request.num_tokens
        if request.kv.arriving or request.kv.arrived:
            limit = min(limit, min((*request.kv.arriving, *request.kv.arrived)) * self.block_size)
        return limit - request.kv.num_computed_tokens

    def num_lacking_tokens(self, request: Request) -> int:
        """Tokens the request has to compute, about: what is there or arriving counts as blocks."""
        num_there = len(request.kv.arriving) + len(request.kv.arrived)
        lacking = request.num_uncomputed_tokens - num_there * self.block_size
        return max(1, lacking)

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Make room to write `num_tokens` more; False (nothing changed) if there is none.

        A block that others hold or can find is replaced by a copy before it is written to.
        """
        table = request.kv.block_table
        end = self.num_blocks_for(request.kv.num_computed_tokens + num_tokens)
        first = request.kv.num_computed_tokens // self.block_size
        if first + 1 == end == len(table) and not self.pool.is_shared(table[first]):
            return True  # within its last block, as most decodes are
        to_copy = [i for i in range(first, min(end, len(table))) if self.pool.is_shared(table[i])]
        num_new = max(0, end - len(table))
        if len(to_copy) + num_new > self.pool.num_available:
            return False
        for i, block in zip(to_copy, self.pool.allocate(len(to_copy)), strict=True):
            self._copies.append((table[i], block))
            self.pool.release(table[i])
            table[i] = block
        table.extend(self.pool.allocate(num_new))
        return True

    def take_copies(self) -> list[tuple[int, int]]:
        """Block copies (from, to) within the device that must run before the next step."""
        copies, self._copies = self._copies, []
        return copies

    def commit(self, request: Request, num_tokens: int) -> None:
        """`num_tokens` more have their KV: publish and spill the blocks that became full."""
        start = request.kv.num_computed_tokens
        end = start + num_tokens
        if start < request.kv.high_water_tokens:
            self.metrics.recomputed_tokens += min(end, request.kv.high_water_tokens) - start
        request.kv.num_computed_tokens = end
        request.kv.high_water_tokens = max(request.kv.high_water_tokens, end)
        first, last = start // self.block_size, end // self.block_size
        if first == last:
            return
        self._extend_hashes(request)
        for i in range(first, last):
            self.pool.publish(request.kv.block_table[i], request.kv.block_hashes[i])
            self._spill(request.kv.block_hashes[i], request.kv.block_table[i])

    def fork(self, parent: Request, child: Request) -> None:
        """Let `child` share the blocks of the prompt it has in common with `parent`.

        All but the last token of the prompt counts as computed, so that the child's first step
        yields logits of its own; the block it writes to is copied then (`reserve`).
        """
        num_shared = child.prompt_len - 1
        child.kv.block_table = parent.kv.block_table[: self.num_blocks_for(num_shared)]
        child.kv.num_shared_blocks = len(child.kv.block_table)
        child.kv.block_hashes = parent.kv.block_hashes[: num_shared // self.block_size]
        child.kv.num_computed_tokens = num_shared
        child.kv.high_water_tokens = num_shared
        for block in child.kv.block_table:
            self.pool.hold(block)
        child.kv.num_cached_tokens = parent.kv.num_cached_tokens
        self.metrics.forked_tokens += num_shared

    def preempt(self, request: Request) -> None:
        """Take the request's blocks; spill what no tier has yet, its last partial block too."""
        num_full, num_partial = divmod(request.kv.num_computed_tokens, self.block_size)
        tail = request.kv.resume
        if tail is not None and request.kv.num_computed_tokens >= (
            tail.index * self.block_size + tail.num_tokens
        ):
            self._drop_tail(request)  # computed past it
        for i in range(num_full):
            self._spill(request.kv.block_hashes[i], request.kv.block_table[i])
        if num_partial and request.kv.resume is None:
            key = secrets.token_bytes(DIGEST_BYTES)
            if self._spill(key, request.kv.block_table[num_full], private=True):
                request.kv.resume = SpilledTail(key, num_full, num_partial)
        self._keep(request)
        request.kv.was_staged = request.kv.was_fetched = False
        self._give_up_blocks(request)
        request.queue.num_preemptions += 1
        self.metrics.preemptions += 1

    def release(self, request: Request) -> None:
        """Take the blocks of a request that has ended; published ones stay findable."""
        self._publish_partial(request)
        if self._tiers is not None:  # the tail is evicted before the head
            self._tiers.touch(request.kv.block_hashes[::-1])
        self._give_up_blocks(request)
        self._unkeep(request)
        self._drop_tail(request)

    def poll(self) -> None:
        """Take note of the transfers that ended."""
        if self._tiers is None:
            return
        for ended in self._tiers.poll():
            if ended.is_fetch:
                self._end_fetch(ended)
            else:
                self._spilling.discard(ended.block)
            self.pool.release(ended.block)

    def _find_prefix(self, request: Request) -> tuple[list[_Known], bool]:
        """What is known somewhere of the request's leading tokens, block by block.

        At least one token is always left to compute: its logits are what the step is for. Also
        returns whether a tier cannot say yet what it has of the tokens after these.
        """
        known: list[_Known] = []
        keys = request.kv.block_hashes[: self._num_findable(request)]
        num_asked = _KEYS_AT_ONCE
        while len(known) < len(keys):
            asked = keys[len(known) : len(known) + num_asked]
            for key, found in zip(asked, self._lookup(asked), strict=True):
                if found.answer is not Answer.HIT:
                    break
                known.append(_Known(key, found.tier, self.block_size))
            else:
                num_asked *= 2
                continue
            if found.answer is Answer.PENDING:
                return known, True
            break
        tail = request.kv.resume
        if tail is None:
            partial = self._find_partial(request, len(known))
        else:
            partial = (tail.key, tail.num_tokens) if len(known) == tail.index else None
        if partial is None:
            return known, False
        [found] = self._lookup([partial[0]])
        if found.answer is Answer.HIT:
            known.append(_Known(partial[0], found.tier, partial[1]))
        return known, found.answer is Answer.PENDING

    def _find_partial(self, request: Request, index: int) -> tuple[bytes, int] | None:
        """Key and tokens of what a request that has ended left where block `index` begins.

        None where another request has it: both would write to it, each to a copy of its own.
        """
        parent = self._parent(request, index)
        num_tokens = self._partials.get(parent)
        start = index * self.block_size
        if num_tokens is None or start + num_tokens > request.num_findable_tokens:
            return None
        key = block_hash(parent, request.token_ids[start : start + num_tokens])
        block = self.pool.lookup(key)
        is_held = block is not None and self.pool.ref_count(block) > 0
        return None if key in self._loading or is_held else (key, num_tokens)

    def _publish_partial(self, request: Request) -> None:
        """Have the last block of a request that ends found, and spill it, though it is not full."""
        num_tokens = min(request.kv.num_computed_tokens, request.num_known_tokens)
        index, num_partial = divmod(num_tokens, self.block_size)
        if not self.prefix_caching or index >= len(request.kv.block_table):
            return
        if num_partial < max(1, _LEAST_PARTIAL * self.block_size):
            return
        block = request.kv.block_table[index]
        if self.pool.is_shared(block):
            return
        self._extend_hashes(request)
        parent = self._parent(request, index)
        key = block_hash(parent, request.token_ids[index * self.block_size : num_tokens])
        self.pool.publish(block, key)
        self._spill(key, block)
        self._partials[parent] = num_partial
        self._partials.move_to_end(parent)
        if len(self._partials) > _MOST_PARTIALS:
            self._partials.popitem(last=False)

    def _num_findable(self, request: Request) -> int:
        """How many leading blocks may be found instead of computed."""
        self._extend_hashes(request)
        return min(len(request.kv.block_hashes), request.num_findable_tokens // self.block_size)

    def _take_over(self, request: Request, index: int) -> bool:
        """Use the block at `index` of another request that has computed it meanwhile."""
        if index in request.kv.arriving or index >= self._num_findable(request):
            return False
        block = self.pool.acquire(request.kv.block_hashes[index])
        if block is None:
            return False
        if index < len(request.kv.block_table):  # its own has no content yet
            self.pool.release(request.kv.block_table[index])
            request.kv.block_table[index] = block
        else:
            request.kv.block_table.append(block)
        return True

    def _lookup(self, keys: Sequence[bytes]) -> list[Found]:
        """What is known of each key; a HIT without a tier is on the device."""
        found: list[Found | None] = [None] * len(keys)
        for i, key in enumerate(keys):
            if self.pool.lookup(key) is not None:
                found[i] = _ON_DEVICE
            elif key in self._loading:
                found[i] = Found(Answer.HIT, self._loading[key].tier)
        elsewhere = [key for key, one in zip(keys, found, strict=True) if one is None]
        if self._tiers is None or not elsewhere:
            return [one or _MISS for one in found]
        answers = iter(self._tiers.lookup(elsewhere))
        return [next(answers) if one is None else one for one in found]

    def _choose_recompute(self, known: list[_Known], queued_tokens: int) -> int:
        """Choose what is cheaper computed than fetched.

        Returns how many tokens that is.
        """
        cold = [p for p in known if p.tier is not None and p.key not in self._loading]
        if not cold:
            return 0
        assert self._tiers is not None and self._policy is not None
        num_tokens = self._policy.tokens_to_compute(
            len(cold) * self.block_size,
            {part.tier.name for part in cold if part.tier is not None},
            queued_bytes=self._tiers.queued_fetch_bytes(),
            queued_tokens=queued_tokens,
        )
        chosen = cold[: num_tokens // self.block_size]
        for part in chosen:
            part.is_computed = True
        return sum(part.num_tokens for part in chosen)

    def _wait_for(self, request: Request, index: int, part: _Known, tier: TierInfo) -> None:
        assert self._tiers is not None
        key = part.key
        loading = self._loading.get(key)
        if loading is None:
            block = request.kv.block_table[index]
            is_private = request.kv.resume is not None and key == request.kv.resume.key
            loading = _Loading(block, tier, part.num_tokens, is_private=is_private)
            self._loading[key] = loading
            self.pool.hold(block)  # released when the transfer ends
            self._tiers.fetch(key, block)
        loading.waiters.append((request, index))
        request.kv.arriving[index] = key

    def _end_fetch(self, ended: EndedTransfer) -> None:
        loading = self._loading.pop(ended.key)
        for request, index in loading.waiters:
            del request.kv.arriving[index]
            if ended.ok:
                request.kv.arrived[index] = ArrivedBlock(loading.tier.name, loading.num_tokens)
            if loading.is_private:
                self._drop_tail(request)
        if not ended.ok:
            return
        self.metrics.fetched_blocks += 1
        if loading.num_tokens == self.block_size:
            self.pool.publish(ended.block, ended.key)
            if any(index in request.kv.fetched for request, index in loading.waiters):
                assert self._policy is not None
                self.metrics.refetched_bytes += self.block_size * self._policy.bytes_per_token
            for request, index in loading.waiters:
                request.kv.fetched.add(index)

    def _spill(self, key: bytes, block: int, *, private: bool = False) -> bool:
        tiers = self._tiers
        if tiers is None or tiers.lookup([key])[0].answer is Answer.HIT:
            return False
        if not tiers.spill(key, block, private=private):
            return False
        self.pool.hold(block)  # released when the transfer ends
        self._spilling.add(block)
        self.metrics.spilled_blocks += 1
        return True

    def _give_up_blocks(self, request: Request) -> None:
        for index, key in request.kv.arriving.items():
            self._loading[key].waiters.remove((request, index))
        request.kv.arriving.clear()
        request.kv.arrived.clear()
        for block in reversed(request.kv.block_table):  # the tail is evicted before the head
            self.pool.release(block)
        request.kv.block_table = []
        request.kv.num_computed_tokens = 0

    def _keep(self, request: Request) -> None:
        """Keep in host memory what a request that is preempted has there, fetched yet or not."""
        if self._tiers is not None:
            keys = list(request.kv.block_hashes)
            if request.kv.resume is not None:
                keys.append(request.kv.resume.key)
            request.kv.kept = [key for key in keys if self._tiers.keep(key)]

    def _unkeep(self, request: Request) -> None:
        if self._tiers is not None:
            for key in reversed(request.kv.kept):  # the tail is evicted before the head
                self._tiers.unkeep(key)
        request.kv.kept = []

    def _drop_tail(self, request: Request) -> None:
        if request.kv.resume is not None and self._tiers is not None:
            self._tiers.drop(request.kv.resume.key)
        request.kv.resume = None

    def _acquire(self, part: _Known) -> int:
        is_full = part.num_tokens == self.block_size
        # A block that will be written to is found by no other request from here on.
        block = self.pool.acquire(part.key) if is_full else self.pool.claim(part.key)
        assert block is not None, "a block vanished between lookup and acquire"
        return block

    def _extend_hashes(self, request: Request) -> None:
        hashes, size = request.kv.block_hashes, self.block_size
        if not hashes and request.num_known_tokens < size:
            return
        parent = self._parent(request, len(hashes))
        for start in range(len(hashes) * size, request.num_known_tokens - size + 1, size):
            parent = block_hash(parent, request.token_ids[start : start + size])
            hashes.append(parent)

    def _parent(self, request: Request, index: int) -> bytes:
        """Hash of all that precedes the request's block `index`."""
        if index:
            return request.kv.block_hashes[index - 1]
        # Without prefix caching each request has a chain of its own: after a preemption it finds
        # its own blocks again, and no other request's.
        own = f"{request.request_id}#{request.index}".encode()
        return root_hash(self._fingerprint, request.salt if self.prefix_caching else own)

    def check(self) -> None:
        """Assert that the pool is consistent and that loads and their waiters agree."""
        self.pool.check()
        waiting: Counter[bytes] = Counter()
        for key, loading in self._loading.items():
            assert self.pool.ref_count(loading.block) >= 1, "a loading block is not held"
            for request, index in loading.waiters:
                assert request.kv.arriving.get(index) == key
                assert request.kv.block_table[index] == loading.block
                waiting[key] += 1
