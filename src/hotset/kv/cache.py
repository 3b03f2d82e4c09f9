"""The KV of sequences on the device: what is found instead of computed, and what is written.

It asks: `prefix` names blocks, `prefix_search` finds them, `table` has them, `transfers` moves
them between tiers.
"""

import secrets
from collections.abc import Sequence

from hotset.cost.prefix import PrefixPolicy
from hotset.kv.asking import Asking
from hotset.kv.block_hash import DIGEST_BYTES
from hotset.kv.hot_set import HotSet
from hotset.kv.index_blocks import IndexBlocks
from hotset.kv.pool import BlockPool
from hotset.kv.prefix import LEAST_TAIL, Prefixes
from hotset.kv.prefix_search import PrefixSearch
from hotset.kv.seats import Seats
from hotset.kv.state_slots import StateSlots
from hotset.kv.state_transfers import StateTransfers
from hotset.kv.states import Start, States
from hotset.kv.table import BlockTables
from hotset.kv.transfers import BlockTransfers, Known
from hotset.memory.state_pieces import StatePieces
from hotset.memory.tiers import TierStack
from hotset.metrics import Metrics
from hotset.sequence import ArrivedBlock, Kind, Request, Tail

_DEVICE = "device"  # as `TierInfo.name`, for metrics


class KVCache:
    """Gives requests their blocks, finds prefixes, and asks the tiers to move what is needed.

    Every full block is spilled as soon as it is full (write-behind), so that evicting it later
    moves nothing. A block that another request has computed meanwhile is taken over instead of
    computed again. What a preempted request has in host memory is kept there until it is back. The
    last, partial block of a request that has ended is found too, one for what precedes it, until
    restart.

    Attributes:
        pool: the device's blocks.
        tables: those of each request.
        prefixes: the keys of each request's blocks.
        transfers: of blocks, to and from slower tiers.
        hot: the requests that keep few of their tokens on the device; None where none may.
        states: of what layers keep beside KV; None where they keep nothing. KV is of use up to a
            state that was kept: what is found ends there.
        asking: the requests of which tiers are still to say what they have.
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
        seats: Seats | None = None,
        index_blocks: IndexBlocks | None = None,
        states: StateSlots | None = None,
        pieces: StatePieces | None = None,
    ) -> None:
        self.pool = pool
        self.tables = BlockTables(pool, block_size, index_blocks)
        self.prefixes = Prefixes(
            fingerprint,
            block_size,
            are_shared=prefix_caching,
            # With a state at its end even a short one saves all that precedes it.
            least_tail=LEAST_TAIL if states is None else 0,
        )
        self.transfers = BlockTransfers(pool, block_size, metrics, tiers, policy, index_blocks)
        self._search = PrefixSearch(pool, self.prefixes, self.transfers)
        self.hot = None
        if seats is not None and index_blocks is not None:
            self.hot = HotSet(seats, self.tables, self.transfers, metrics)
        self.states = None
        if states is not None:
            transfers = None
            if tiers is not None and pieces is not None:
                transfers = StateTransfers(states, pieces, tiers, metrics)
            worth = None if transfers is None else policy
            self.states = States(states, self.prefixes, metrics, transfers, worth)
        self.block_size = block_size
        self._metrics, self._tiers = metrics, tiers
        self.asking = Asking(tiers, self._is_open)

    def expect(self, request: Request, url: str) -> None:
        """Another replica is said to have what a request begins with; see `TierStack.expect`."""
        if self._tiers is not None and self._tiers.expect is not None:
            self._tiers.expect(self.prefixes.findable(request), url)

    def admit(self, request: Request, *, spare_blocks: int, queued_tokens: int) -> bool:
        """Find what is known of the request's tokens and give it blocks for that.

        Blocks in the device pool are shared; of blocks in slower tiers, the policy has some
        computed and the rest fetched. Needs room for all the request's tokens so far, plus
        `spare_blocks`; without it nothing changes and the result is False. So it is while a tier
        cannot say yet what it has of the tokens, and for one that is to follow another from now
        on: see `is_following`. A request that was hot is so again, if it can.
        """
        if self.states is not None and not self.states.slots.can_give:
            return False
        if self.hot is not None:
            num_blocks = self.hot.blocks_to_go_on(request)
            if num_blocks is not None:
                fits = num_blocks + spare_blocks <= self.pool.num_available
                return fits and self.hot.go_on(request)
        known, is_pending = self._search.find(request)
        if is_pending:
            return False
        keys, computed = [part.key for part in known], dict[bytes, int]()
        start, num_seen = None, sum(part.num_tokens for part in known)
        if self.states is None:
            computed = self.transfers.cheaper_computed(known, queued_tokens)
        else:
            start = self._find_start(request, known, queued_tokens)
            if start is None or self.states.leaders.follow(request, start.num_tokens):
                return False
            known, keys = known[: start.num_blocks], keys[: start.num_blocks]
        while known and known[-1].key in computed:
            known.pop()
        num_copied = self._search.num_copied(known)
        held = [None if part.key in computed else self._search.hold(part) for part in known]
        shared = [block for block in held if block is not None]
        num_missing = self.tables.num_blocks_for(request.num_tokens) - len(shared) + num_copied
        if num_missing + spare_blocks > self.pool.num_available:
            for block in shared:
                self.pool.release(block)
            return False

        if (tail := self._search.tail_block(known)) is not None:
            self.pool.unpublish(tail)  # no other request finds what will be written to
        fresh = iter(self.pool.allocate(len(known) - len(shared)))
        if self.states is not None and start is not None:
            self.states.begin(request, start, num_seen)
            keys = self.states.with_pieces(request, keys)
        request.kv.num_shared_blocks = len(shared)
        request.kv.block_table = [next(fresh) if block is None else block for block in held]
        for i, part in enumerate(known):
            if part.tier is None:
                request.kv.arrived[i] = ArrivedBlock(_DEVICE, part.num_tokens)
            elif part.key not in computed:
                self.transfers.wait_for(request, i, part)
        self.transfers.touch(keys, came_back=not request.queue.num_preemptions)
        self.transfers.unkeep(request)  # its fetches hold what they read
        self._metrics.recompute_chosen_tokens += sum(computed.values())
        self.advance(request)
        return True

    def is_following(self, request: Request) -> bool:
        """Whether a request waits for a state that another one computes; see `Leaders`."""
        return self.states is not None and self.states.leaders.is_following(request)

    def _is_open(self, request: Request) -> bool:
        """Whether a tier cannot say yet what it has of a request."""
        known, is_pending = self._search.find(request)
        if is_pending or self.states is None:
            return is_pending
        return self._find_start(request, known, 0) is None

    def _find_start(self, request: Request, known: list[Known], queued_tokens: int) -> Start | None:
        """Where a request goes on; None while a tier cannot say what it has."""
        assert self.states is not None
        queued_bytes = 0 if self._tiers is None else self._tiers.queued_fetch_bytes()
        return self.states.find(request, known, queued_bytes, queued_tokens)

    def num_found_tokens(self, request: Request) -> int:
        """Leading tokens of a request that are known here, on the device or in a slower tier."""
        known, _ = self._search.find(request)
        return sum(part.num_tokens for part in known)

    def num_blocks_missing(self, request: Request) -> int:
        """Blocks that a request needs to be let in, beside those that the device has of it."""
        if self.hot is not None and (num := self.hot.blocks_to_go_on(request)) is not None:
            return num
        known, _ = self._search.find(request)
        num_found = sum(part.tier is None for part in known)
        num_copied = self._search.num_copied(known)
        return self.tables.num_blocks_for(request.num_tokens) - num_found + num_copied

    def look_ahead(self, requests: Sequence[Request], *, spare_blocks: int) -> None:
        """Bring what is known of requests that wait closer, ahead of their turn.

        Into host memory, once; and, when nothing else is being fetched, from host memory to device
        blocks that have no content, as long as `spare_blocks` others are available.
        """
        num_left = self.transfers.most_ahead()
        for request in requests:
            if num_left is None or num_left < 0:
                break
            num_left -= self.tables.num_blocks_for(request.num_tokens)
            num_left -= 0 if self.states is None else self.states.num_pieces
            room, kv = self.transfers.room_ahead(spare_blocks), request.kv
            if kv.was_fetched or (kv.was_staged and not room):
                continue
            if self.hot is not None and self.hot.blocks_to_go_on(request) is not None:
                continue  # host memory has all of it, and the device is to have little
            known, is_pending = self._search.find(request)
            if self.states is not None:
                start = self._find_start(request, known, 0)
                if start is None:
                    continue
                known = known[: start.num_blocks]
                self.states.bring_closer(start)
            ahead = [part for part in known if kv.resume is None or part.key != kv.resume.key]
            kv.was_staged = not is_pending
            kv.was_fetched = self.transfers.bring_closer(ahead, room) and not is_pending

    def advance(self, request: Request) -> bool:
        """Move the request past the content that is there already.

        False where some of what it was to go on from will not come: it has to be let in again.
        """
        if request.kind is not Kind.PROMPT:
            return True  # at least one token is left to compute
        kv, size = request.kv, self.block_size
        awaited = kv.awaited
        if awaited is not None:
            if kv.arriving or awaited.is_arriving:
                return True
            num_arrived = sum(found.num_tokens for found in kv.arrived.values())
            if awaited.has_failed or num_arrived != awaited.num_tokens:
                kv.most_found = awaited.num_tokens
                return False
        while kv.num_computed_tokens % size == 0:
            index = kv.num_computed_tokens // size
            if index in kv.arrived:
                found = kv.arrived.pop(index)
            elif self.states is None and self._take_over(request, index):
                found = ArrivedBlock(_DEVICE, size)
            else:
                break
            self._metrics.found(request, kv.num_computed_tokens, found.num_tokens, found.tier)
            kv.num_computed_tokens += found.num_tokens
        kv.high_water_tokens = max(kv.high_water_tokens, kv.num_computed_tokens)
        if awaited is not None and self.states is not None:
            self.states.went_on(request)
            self.transfers.drop_tail(request)
        return True

    def commit(self, request: Request, num_accepted: int) -> None:
        """The next `num_accepted` tokens have their KV: publish and spill what became full.

        Of tokens computed beyond those nothing is kept: their places are written again.
        """
        kv, size = request.kv, self.block_size
        start = kv.num_computed_tokens
        kv.num_computed_tokens = end = start + num_accepted
        if start < kv.high_water_tokens:
            self._metrics.recomputed_tokens += min(end, kv.high_water_tokens) - start
        kv.high_water_tokens = max(kv.high_water_tokens, end)
        if self.states is not None:
            self.states.commit(request)
        first, last = start // size, end // size
        if first == last:
            return
        keys = self.prefixes.extend(request)
        for i in range(first, last):
            self.pool.publish(kv.block_table[i], keys[i])
            self.transfers.spill(keys[i], kv.block_table[i])

    def can_fork(self, parent: Request) -> bool:
        """Whether `fork` works for one more: a state needs a slot, and one to start from."""
        if self.states is None:
            return True
        return parent.kv.fork_slot is not None and self.states.slots.can_give

    def end_fork(self, parent: Request) -> None:
        """All that were to fork have."""
        parent.kv.has_forks = False
        if self.states is not None:
            self.states.slots.end_fork(parent)

    def fork(self, parent: Request, child: Request) -> None:
        """Let `child` share the blocks of the prompt it has in common with `parent`."""
        if self.states is not None:
            self.states.slots.fork(parent, child)
        self._metrics.forked_tokens += self.tables.fork(parent, child)

    def can_park(self, victim: Request, running: Sequence[Request], more_tokens: int) -> bool:
        """Whether host memory has room for `victim`, a running request, and for a reserve.

        The reserve is 3 x (the blocks by which all running requests will overflow the device after
        `more_tokens` more tokens + the largest request): requests go down as a whole, several in a
        row, and some slots are always being written to.
        """
        reserve = 3 * sum(self.tables.num_over(running, more_tokens))
        if self.states is not None:
            reserve += self.states.num_pieces
        return self.transfers.can_take(len(victim.kv.block_table) + reserve)

    def preempt(self, request: Request, *, has_state: bool = True) -> None:
        """Take the request's blocks; spill what no tier has yet, its last partial block too.

        And the state after its tokens, unless it is not known: not `has_state`.
        """
        kv, size = request.kv, self.block_size
        num_full, num_partial = divmod(kv.num_computed_tokens, size)
        is_waiting = kv.awaited is not None and not kv.awaited.has_failed
        if kv.resume is not None and not is_waiting:
            is_past = kv.num_computed_tokens >= kv.resume.end(size)
            if is_past or self.states is not None:
                self.transfers.drop_tail(request)
        for i in range(num_full):
            if self.tables.is_whole(kv.block_table[i]):
                self.transfers.spill(kv.block_hashes[i], kv.block_table[i])
        if num_partial and kv.resume is None and has_state:
            key = secrets.token_bytes(DIGEST_BYTES)
            if self.transfers.spill(key, kv.block_table[num_full], private=True):
                kv.resume = Tail(key, num_full, num_partial)
        if self.states is not None and not is_waiting and has_state:
            self.states.park(request)
        self.transfers.keep(request, () if self.states is None else self.states.parked(request))
        kv.was_staged = kv.was_fetched = False
        kv.was_hot = kv.seat is not None
        self.transfers.stop_waiting(request)
        self._give_back(request)

    def release(self, request: Request) -> None:
        """Take the blocks of a request that has ended; published ones stay findable."""
        if self.states is not None:
            self._commit_in_flight(request)
        tail = self._publish_tail(request)
        used = request.kv.block_hashes
        if self.states is not None:
            self.states.leave(request, tail)
            used = self.states.with_pieces(request, used if tail is None else [*used, tail])
        self.transfers.touch(used)
        self._metrics.freed_blocks += len(request.kv.block_table)
        self._let_go(request)

    def discard(self, request: Request) -> None:
        """Take the blocks of a request whose KV is no use: none of it is found again, anywhere.

        Nor is what it shares with others, as it is not known which block is wrong.
        """
        self._let_go(request)
        keys = self.prefixes.extend(request)
        self.transfers.discard(keys)
        if self.states is not None:
            self.states.discard(keys)

    def _let_go(self, request: Request) -> None:
        self.transfers.stop_waiting(request)
        self._give_back(request)
        self.transfers.unkeep(request)
        self.transfers.drop_tail(request)
        if self.states is not None:
            self.states.forget(request)

    @property
    def has_transfers(self) -> bool:
        """Whether copies between tiers are under way, or states wait for their turn to be."""
        if self._tiers is None:
            return False
        return self._tiers.is_busy or (self.states is not None and self.states.has_due)

    def keys(self, request: Request) -> list[bytes]:
        """Of the request's full blocks, as far as computed, and of states after them."""
        keys = request.kv.block_hashes
        return keys if self.states is None else self.states.with_pieces(request, keys)

    def poll(self) -> None:
        """Take note of the transfers that ended, and start copies of states whose turn it is."""
        for ended in () if self._tiers is None else self._tiers.poll():
            if self.states is not None and self.states.is_piece(ended.block):
                self.states.end_transfer(ended)
            else:
                self.transfers.end(ended)
        if self.states is not None:
            self.states.spill_due()
        if self.hot is not None:
            self.hot.settle()

    def forget_slots(self) -> None:
        """A step did not run to its end: what the slots of hot requests hold is unknown."""
        if self.hot is not None:
            self.hot.forget_slots()

    def _give_back(self, request: Request) -> None:
        self.tables.give_back(request)
        if self.states is not None:
            self.states.take_back(request)
        if self.hot is not None:
            self.hot.leave(request)

    def _publish_tail(self, request: Request) -> bytes | None:
        """Have the last block of a request that ends found, and spill it, though it is not full.

        Returns its key; None where there is nothing to find.
        """
        table = request.kv.block_table
        index = min(request.kv.num_computed_tokens, request.num_known_tokens) // self.block_size
        if index >= len(table) or not self.tables.is_whole(table[index]):
            return None
        if self.pool.is_shared(table[index]):
            return None
        key = self.prefixes.remember_tail(request)
        if key is not None:
            self.pool.publish(table[index], key)
            self.transfers.spill(key, table[index])
        return key

    def _commit_in_flight(self, request: Request) -> None:
        """Count the tokens of a step that was submitted before the request ended.

        They are in its state: what is found of it has to end behind them.
        """
        num_planned = request.kv.num_planned
        if num_planned and request.kv.num_computed_tokens + num_planned <= request.num_known_tokens:
            self.commit(request, num_planned)

    def _take_over(self, request: Request, index: int) -> bool:
        """Use the block of another request that has computed the next one, `index`, meanwhile."""
        key = None if index in request.kv.arriving else self.prefixes.next_key(request)
        block = None if key is None else self.pool.acquire(key)
        if block is None:
            return False
        table = request.kv.block_table
        if index < len(table):  # its own has no content yet
            self.pool.release(table[index])
            table[index] = block
        else:
            table.append(block)
        return True

    def check(self) -> None:
        """Assert that the pool is consistent and that loads and their waiters agree."""
        self.pool.check()
        self.transfers.check()
        if self.states is not None:
            self.states.check()
        if self.hot is not None:
            self.hot.check()
