"""Tokens to blocks: prefixes found by hash, block tables, and what moves between tiers for them.

The only module of `memory` that knows tokens. It never touches a tensor.
"""

import hashlib
import secrets
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hotset.memory.block_pool import BlockPool
from hotset.memory.policy import PrefixPolicy
from hotset.metrics import Metrics
from hotset.request import Request, SpilledTail

_DIGEST_BYTES = 16


def root_hash(fingerprint: str, salt: bytes) -> bytes:
    """The start of a hash chain: equal only for the same model, layout and tenant."""
    return hashlib.blake2b(
        fingerprint.encode() + b"\0" + salt, digest_size=_DIGEST_BYTES, person=b"hotset-root"
    ).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of one full block: of its tokens and, through `parent`, of all tokens before it."""
    digest = hashlib.blake2b(parent, digest_size=_DIGEST_BYTES, person=b"hotset-block")
    digest.update(array("i", token_ids).tobytes())
    return digest.digest()


@dataclass(frozen=True, slots=True)
class EndedTransfer:
    """A copy between the device and a colder tier that has ended, well or not."""

    key: bytes
    block: int
    is_fetch: bool
    ok: bool


class ColderTiers(Protocol):
    """The tiers below the device, as one. Called from the engine thread; nothing blocks."""

    def locate(self, key: bytes) -> str | None:
        """Name of the fastest tier that has the payload of `key`, or will shortly."""
        ...

    def spill(self, key: bytes, block: int, *, private: bool = False) -> bool:
        """Start copying `block` down; False where there is no room. Its content must stay still.

        A private payload stays in host memory: nobody else can ask for it.
        """
        ...

    def fetch(self, key: bytes, block: int) -> None:
        """Start copying the payload of `key` into `block`, which nobody else may touch."""
        ...

    def drop(self, key: bytes) -> None:
        """Forget a private payload."""
        ...

    def touch(self, keys: Sequence[bytes]) -> None:
        """Mark payloads as just used, so that they are evicted last."""
        ...

    def stage(self, key: bytes) -> bool:
        """Start bringing a payload from disk into host memory, ahead of a fetch."""
        ...

    def queued_fetch_bytes(self) -> int:
        """Bytes asked for by `fetch` that have not arrived."""
        ...

    def poll(self) -> list[EndedTransfer]:
        """What ended since the last call."""
        ...


@dataclass(slots=True)
class _Loading:
    """A block whose content is on its way up, and who waits for it."""

    block: int
    tier: str
    num_tokens: int
    is_private: bool
    waiters: list[tuple[Request, int]] = field(default_factory=list)


class KVCache:
    """Gives requests their blocks, finds prefixes, and asks the tiers to move what is needed.

    Every full block is spilled as soon as it is full (write-behind), so that evicting it later
    moves nothing. A block on its way up is loaded once, however many requests wait for it.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        fingerprint: str,
        metrics: Metrics,
        tiers: ColderTiers | None = None,
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
        self._copies: list[tuple[int, int]] = []

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def num_blocks_after_spills(self) -> int:
        """Blocks that nothing but a spill under way holds."""
        return sum(self.pool.ref_count(block) == 1 for block in self._spilling)

    def moving_blocks(self) -> tuple[set[int], set[int]]:
        """Device blocks whose content is on its way up, and those being copied down."""
        return {loading.block for loading in self._loading.values()}, set(self._spilling)

    def admit(self, request: Request, *, spare_blocks: int, queued_tokens: int) -> bool:
        """Find what is known of the request's tokens and give it blocks for that.

        Blocks in the device pool are shared; of those in colder tiers, the policy has some
        computed and the rest fetched. Needs room for all the request's tokens so far, plus
        `spare_blocks`; without it nothing changes and the result is False.
        """
        keys, places = self._find_prefix(request)
        self._choose_recompute(keys, places, request, queued_tokens)
        while places and places[-1] is None:
            places.pop()

        shared: dict[int, int] = {}
        for i, place in enumerate(places):
            if place == "device":
                shared[i] = self._acquire(keys[i])
            elif keys[i] in self._loading and place is not None:
                shared[i] = self._loading[keys[i]].block
                self.pool.hold(shared[i])
        num_missing = self.num_blocks_for(request.num_tokens) - len(shared)
        if num_missing + spare_blocks > self.pool.num_available:
            for block in shared.values():
                self.pool.release(block)
            return False

        fresh = iter(self.pool.allocate(len(places) - len(shared)))
        request.block_table = [
            shared[i] if i in shared else next(fresh) for i in range(len(places))
        ]
        for i, place in enumerate(places):
            if place == "device":
                request.arrived[i] = self.block_size
                self._count_cached(request, "device", self.block_size)
            elif place is not None:
                self._wait_for(request, i, keys[i], place)
        if self._tiers is not None:
            self._tiers.touch(keys)
        self.advance(request)
        return True

    def stage(self, request: Request) -> None:
        """Bring what the disk has of a waiting request's tokens into host memory ahead of time."""
        if self._tiers is None or self._policy is None or self._policy.mode == "recompute":
            return
        keys, places = self._find_prefix(request)
        for key, place in zip(keys, places, strict=True):
            if place not in ("device", "host"):
                self._tiers.stage(key)

    def advance(self, request: Request) -> None:
        """Move the request past the content that is there already."""
        while request.num_computed_tokens % self.block_size == 0:
            index = request.num_computed_tokens // self.block_size
            if index not in request.arrived:
                break
            request.num_computed_tokens += request.arrived.pop(index)
        request.high_water_tokens = max(request.high_water_tokens, request.num_computed_tokens)

    def num_runnable_tokens(self, request: Request) -> int:
        """Tokens the request can compute before it meets content that is there or arriving."""
        limit = request.num_tokens
        if request.arriving or request.arrived:
            limit = min(limit, min((*request.arriving, *request.arrived)) * self.block_size)
        return limit - request.num_computed_tokens

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Make room to write `num_tokens` more; False (nothing changed) if there is none.

        A block that others hold or can find is replaced by a copy before it is written to.
        """
        table = request.block_table
        end = self.num_blocks_for(request.num_computed_tokens + num_tokens)
        first = request.num_computed_tokens // self.block_size
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
        start = request.num_computed_tokens
        end = start + num_tokens
        recomputed = max(0, min(end, request.high_water_tokens) - start)
        self.metrics.recomputed_tokens += recomputed
        request.num_computed_tokens = end
        request.high_water_tokens = max(request.high_water_tokens, end)
        self._extend_hashes(request)
        for i in range(start // self.block_size, end // self.block_size):
            self.pool.publish(request.block_table[i], request.block_hashes[i])
            self._spill(request.block_hashes[i], request.block_table[i])

    def fork(self, parent: Request, child: Request) -> None:
        """Let `child` share the blocks of the prompt it has in common with `parent`.

        All but the last token of the prompt counts as computed, so that the child's first step
        yields logits of its own; the block it writes to is copied then (`reserve`).
        """
        num_shared = child.prompt_len - 1
        child.block_table = parent.block_table[: self.num_blocks_for(num_shared)]
        child.block_hashes = parent.block_hashes[: num_shared // self.block_size]
        child.num_computed_tokens = num_shared
        child.high_water_tokens = num_shared
        for block in child.block_table:
            self.pool.hold(block)
        self._count_cached(child, "device", num_shared)

    def preempt(self, request: Request) -> None:
        """Take the request's blocks; spill what no tier has yet, its last partial block too."""
        num_full, num_partial = divmod(request.num_computed_tokens, self.block_size)
        tail = request.resume
        if tail is not None and request.num_computed_tokens >= (
            tail.index * self.block_size + tail.num_tokens
        ):
            self._drop_tail(request)  # computed past it
        for i in range(num_full):
            self._spill(request.block_hashes[i], request.block_table[i])
        if num_partial and request.resume is None:
            key = secrets.token_bytes(_DIGEST_BYTES)
            if self._spill(key, request.block_table[num_full], private=True):
                request.resume = SpilledTail(key, num_full, num_partial)
        self._give_up_blocks(request)
        request.num_preemptions += 1
        self.metrics.preemptions += 1

    def release(self, request: Request) -> None:
        """Take the blocks of a request that has ended; published ones stay findable."""
        self._give_up_blocks(request)
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

    def _find_prefix(self, request: Request) -> tuple[list[bytes], list[str | None]]:
        """Keys of the leading blocks that are known somewhere, and where.

        At least one token is always left to compute: its logits are what the step is for.
        """
        self._extend_hashes(request)
        keys: list[bytes] = []
        places: list[str | None] = []
        for key in request.block_hashes[: (request.num_tokens - 1) // self.block_size]:
            place = self._locate(key)
            if place is None:
                break
            keys.append(key)
            places.append(place)
        tail = request.resume
        if tail is not None and len(keys) == tail.index:
            place = self._locate(tail.key)
            if place is not None:
                keys.append(tail.key)
                places.append(place)
        return keys, places

    def _locate(self, key: bytes) -> str | None:
        if self.pool.lookup(key) is not None:
            return "device"
        if key in self._loading:
            return self._loading[key].tier
        return self._tiers.locate(key) if self._tiers is not None else None

    def _choose_recompute(
        self, keys: list[bytes], places: list[str | None], request: Request, queued_tokens: int
    ) -> None:
        """Set the place of the blocks to None that are cheaper computed than fetched."""
        cold = [
            i
            for i, (key, place) in enumerate(zip(keys, places, strict=True))
            if place != "device" and key not in self._loading
        ]
        if not cold:
            return
        assert self._tiers is not None and self._policy is not None
        num_tokens = self._policy.tokens_to_compute(
            len(cold) * self.block_size,
            {place for i in cold if (place := places[i]) is not None},
            queued_bytes=self._tiers.queued_fetch_bytes(),
            queued_tokens=queued_tokens,
        )
        for i in cold[: num_tokens // self.block_size]:
            places[i] = None
        self.metrics.recompute_chosen_tokens += num_tokens

    def _wait_for(self, request: Request, index: int, key: bytes, tier: str) -> None:
        assert self._tiers is not None
        loading = self._loading.get(key)
        if loading is None:
            block = request.block_table[index]
            tail = request.resume
            if tail is not None and key == tail.key:
                loading = _Loading(block, tier, tail.num_tokens, is_private=True)
            else:
                loading = _Loading(block, tier, self.block_size, is_private=False)
            self._loading[key] = loading
            self.pool.hold(block)  # released when the transfer ends
            self._tiers.fetch(key, block)
        loading.waiters.append((request, index))
        request.arriving[index] = key

    def _end_fetch(self, ended: EndedTransfer) -> None:
        loading = self._loading.pop(ended.key)
        for request, index in loading.waiters:
            del request.arriving[index]
            if ended.ok:
                request.arrived[index] = loading.num_tokens
                self._count_cached(request, loading.tier, loading.num_tokens)
            if loading.is_private:
                self._drop_tail(request)
        if ended.ok:
            self.metrics.fetched_blocks += 1
            if not loading.is_private:
                self.pool.publish(ended.block, ended.key)

    def _spill(self, key: bytes, block: int, *, private: bool = False) -> bool:
        tiers = self._tiers
        if tiers is None or tiers.locate(key) is not None:
            return False
        if not tiers.spill(key, block, private=private):
            return False
        self.pool.hold(block)  # released when the transfer ends
        self._spilling.add(block)
        self.metrics.spilled_blocks += 1
        return True

    def _give_up_blocks(self, request: Request) -> None:
        for index, key in request.arriving.items():
            self._loading[key].waiters.remove((request, index))
        request.arriving.clear()
        request.arrived.clear()
        for block in reversed(request.block_table):  # the tail is evicted before the head
            self.pool.release(block)
        request.block_table = []
        request.num_computed_tokens = 0

    def _drop_tail(self, request: Request) -> None:
        if request.resume is not None and self._tiers is not None:
            self._tiers.drop(request.resume.key)
        request.resume = None

    def _acquire(self, key: bytes) -> int:
        block = self.pool.acquire(key)
        assert block is not None, "a block vanished between lookup and acquire"
        return block

    def _count_cached(self, request: Request, tier: str, num_tokens: int) -> None:
        request.num_cached_tokens += num_tokens
        self.metrics.cached_tokens[tier] += num_tokens

    def _extend_hashes(self, request: Request) -> None:
        hashes, size = request.block_hashes, self.block_size
        if not hashes and request.num_known_tokens < size:
            return
        if hashes:
            parent = hashes[-1]
        else:
            # Without prefix caching each request has a chain of its own: it finds its own
            # blocks again after a preemption, and nobody else's.
            salt = request.salt if self.prefix_caching else request.request_id.encode()
            parent = root_hash(self._fingerprint, salt)
        for start in range(len(hashes) * size, request.num_known_tokens - size + 1, size):
            parent = block_hash(parent, request.token_ids[start : start + size])
            hashes.append(parent)

    def check(self) -> None:
        """Assert that the pool is consistent and that loads and their waiters agree."""
        self.pool.check()
        waiting: Counter[bytes] = Counter()
        for key, loading in self._loading.items():
            assert self.pool.ref_count(loading.block) >= 1, "a loading block is not held"
            for request, index in loading.waiters:
                assert request.arriving.get(index) == key
                assert request.block_table[index] == loading.block
                waiting[key] += 1
