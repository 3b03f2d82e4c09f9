"""States that are kept, on the device and in slower tiers: where requests can go on from.

Imports no torch.
"""

import secrets
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from operator import itemgetter
from typing import NamedTuple

from hotset.cost.prefix import PrefixPolicy, StatePlace
from hotset.kv.block_hash import DIGEST_BYTES
from hotset.kv.leaders import Leaders
from hotset.kv.prefix import Prefixes
from hotset.kv.state_slots import StateSlots
from hotset.kv.state_transfers import StateTransfers
from hotset.kv.transfers import Known
from hotset.memory.tier import Answer, EndedTransfer, Found, TierInfo
from hotset.metrics import Metrics
from hotset.sequence import AwaitedState, KeptState, ParkedState, Request

_ON_DEVICE = Found(Answer.HIT)
_MISS = Found(Answer.MISS)
# Places to go on from that are compared for a request, and keys that are looked up together.
_MOST_PLACES = 3
_AT_ONCE = 64
# States whose slowest tier, or number of uses, is remembered; those of them counted in a status.
_MOST_NOTED = 2**16
_MOST_SHOWN = 1024
# One in this number of slots may be on its way down at a time.
_SPILLING_PART = 4


class Start(NamedTuple):
    """Where a request goes on.

    Attributes:
        num_blocks: that are known before it.
        num_tokens: these have.
        key: of the state; None for zeros.
        tier: that has it; None where the device has.
        is_own: whether the request has left it when it was preempted.
        num_lost: tokens behind the deepest state that was found whose KV is known, to no use.
        num_chosen: tokens between that state and this one, which are cheaper to compute.
    """

    num_blocks: int = 0
    num_tokens: int = 0
    key: bytes | None = None
    tier: TierInfo | None = None
    is_own: bool = False
    num_lost: int = 0
    num_chosen: int = 0


_ZEROS = Start()


class States:
    """Says where a request goes on, which of its states are kept, and where they go.

    KV is of use up to a state that was kept. States are kept on the device after multiples of the
    grid and where requests end, without a copy. A copy goes down only where computing the tokens
    since the last one below would take longer than fetching it (write-behind), and where slots can
    be spared meanwhile. A preempted request leaves its state in host memory for itself.

    Args:
        slots: of the device.
        prefixes: names states, by the blocks that end where they are.
        metrics: to be counted in.
        transfers: None where there are no slower tiers.
        policy: what is worth a fetch; given if `transfers` is.

    Attributes:
        slots: as given.
        leaders: whose states others wait for.
    """

    def __init__(
        self,
        slots: StateSlots,
        prefixes: Prefixes,
        metrics: Metrics,
        transfers: StateTransfers | None,
        policy: PrefixPolicy | None,
    ) -> None:
        assert (transfers is None) == (policy is None)
        self.slots, self.leaders = slots, Leaders(prefixes, slots)
        self._prefixes, self._metrics = prefixes, metrics
        self._transfers, self._policy = transfers, policy
        self._due: OrderedDict[bytes, int] = OrderedDict()  # to go down -> to which tier at most
        self._noted: OrderedDict[bytes, int] = OrderedDict()  # likewise, those that did
        self._used: OrderedDict[bytes, int] = OrderedDict()  # -> requests that went on from it

    # Where a request goes on

    def find(
        self, request: Request, known: Sequence[Known], queued_bytes: int, queued_tokens: int
    ) -> Start | None:
        """Where the request is at its end soonest; None while a tier cannot say what it has.

        Args:
            request: that has no slot.
            known: its leading blocks whose KV is known.
            queued_bytes: that come to the device for others.
            queued_tokens: to be computed for others.
        """
        starts = self._starts(request, known)
        if starts is None:
            return None
        starts.append(_ZEROS)
        deepest, chosen = starts[0].num_tokens, starts[0]
        if self._policy is not None:
            places = [self._place(start, known) for start in starts]
            best = self._policy.place_to_start(
                places, queued_bytes=queued_bytes, queued_tokens=queued_tokens
            )
            chosen = starts[best]
        return chosen._replace(
            num_lost=sum(part.num_tokens for part in known) - deepest,
            num_chosen=deepest - chosen.num_tokens,
        )

    def _starts(self, request: Request, known: Sequence[Known]) -> list[Start] | None:
        """Places with a state, the deepest first; none below one that the device has."""
        kv, starts = request.kv, list[Start]()
        ends = list(accumulate(part.num_tokens for part in known))
        asked: list[tuple[int, bytes, bool]] = []
        for count in range(len(known), 0, -1):
            if kv.most_found is None or ends[count - 1] < kv.most_found:
                if kv.parked is not None and kv.parked.num_tokens == ends[count - 1]:
                    asked.append((count, kv.parked.key, True))
                asked.append((count, known[count - 1].key, False))
        for first in range(0, len(asked), _AT_ONCE):
            batch = asked[first : first + _AT_ONCE]
            answers = self._lookup([key for _, key, _ in batch], ends[-1])
            for (count, key, is_own), found in zip(batch, answers, strict=True):
                if found.answer is Answer.PENDING:
                    return None
                if found.answer is Answer.HIT:
                    starts.append(Start(count, ends[count - 1], key, found.tier, is_own))
                    if found.tier is None or len(starts) == _MOST_PLACES:
                        return starts
        return starts

    def _lookup(self, keys: Sequence[bytes], num_tokens: int) -> list[Found]:
        """What is known of states, without which `num_tokens` have to be computed."""
        found = {key: _ON_DEVICE for key in keys if self.slots.pool.lookup(key) is not None}
        elsewhere = [key for key in keys if key not in found]
        if self._transfers is not None and self._policy is not None and elsewhere:
            saved_s = self._policy.saved_s(num_tokens)
            answers = self._transfers.lookup(elsewhere, saved_s=saved_s)
            found.update(zip(elsewhere, answers, strict=True))
        return [found.get(key, _MISS) for key in keys]

    def _place(self, start: Start, known: Sequence[Known]) -> StatePlace:
        cold = [part for part in known[: start.num_blocks] if part.tier is not None]
        tiers = {part.tier.name for part in cold if part.tier is not None}
        if start.tier is not None:
            tiers.add(start.tier.name)
        cold_tokens = sum(part.num_tokens for part in cold)
        return StatePlace(start.num_tokens, cold_tokens, start.tier is not None, tiers)

    def begin(self, request: Request, start: Start, num_seen: int) -> None:
        """Give a request that has no slot one, and bring the state that it starts from.

        KV of `num_seen` of its tokens was known.
        """
        kv = request.kv
        self._want(request, num_seen)
        self.leaders.add(request)
        self._metrics.stateless_tokens += start.num_lost
        self._metrics.recompute_chosen_tokens += start.num_chosen
        if not start.is_own:
            kv.kept_states = []
        if start.key is None:
            self.slots.give(request, None)
            return
        name = "device" if start.tier is None else start.tier.name
        is_arriving = start.tier is not None
        kv.awaited = AwaitedState(start.num_tokens, name, is_arriving, start.is_own)
        if is_arriving:
            assert self._transfers is not None
            self._transfers.load(request, start.key, is_own=start.is_own)
        else:
            self.slots.give(request, start.key)
        if not start.is_own:
            kv.kept_states.append(KeptState(start.num_tokens, start.key, self._reached(start)))

    def _reached(self, start: Start) -> int:
        """The number of the slowest tier that has a state, as far as is known; -1 for none."""
        assert start.key is not None
        if self._transfers is None:
            return -1
        if start.tier is not None:
            return self._noted.get(start.key, self._transfers.number_of(start.tier))
        [found] = self._transfers.lookup([start.key], may_ask=False)
        if found.answer is not Answer.HIT:
            return self._due.get(start.key, -1)
        return self._noted.get(start.key, self._transfers.number_of(found.tier))

    def went_on(self, request: Request) -> None:
        """The request has all that it was to start from."""
        kv = request.kv
        awaited, kv.awaited, kv.most_found = kv.awaited, None, None
        assert awaited is not None and kv.num_computed_tokens == awaited.num_tokens
        if not awaited.is_own:
            self._metrics.state_hits[awaited.tier] += 1
            key = kv.kept_states[0].key
            # Another request has left it whose next turn begins with it, too.
            least = 1 if kv.followed is None else 2
            _note(self._used, key, max(least, self._used.get(key, 0) + 1))
        self._drop_parked(request)

    def bring_closer(self, start: Start) -> None:
        """Bring the state that a request that waits will start from into host memory."""
        if start.key is not None and start.tier is not None and not start.tier.feeds_device:
            assert self._transfers is not None
            self._transfers.stage(start.key)

    # Which states are kept

    def _want(self, request: Request, num_seen: int) -> None:
        """Have states kept where other requests are likely to go on.

        At the last lines of the grid before the prompt's end, before what the server knows to be
        repeated, and before the end of what was known, where that is more than a state was.
        """
        grid = self.slots.grid
        places = {request.prompt_len - 1, num_seen, *request.snapshot_at}
        request.kv.snapshots = sorted({place // grid * grid for place in places} - {0})

    def plan(self, request: Request, num_tokens: int) -> None:
        """Note the tokens of the next step, and say which states it is to keep on its way."""
        kv = request.kv
        end = kv.num_computed_tokens + num_tokens
        kv.num_planned = num_tokens
        for position in kv.snapshots:
            if kv.num_computed_tokens < position <= end:
                key = self._prefixes.extend(request)[position // self._prefixes.block_size - 1]
                self._metrics.dropped_states += not self.slots.cut(request, position, key)
        if kv.has_forks and kv.num_computed_tokens < request.prompt_len - 1 <= end:
            self.slots.cut(request, request.prompt_len - 1, None)
            kv.cuts.sort(key=itemgetter(0))

    def commit(self, request: Request) -> None:
        """A step wrote the request's state, and what was to be kept."""
        request.kv.num_planned = 0
        cuts = request.kv.cuts
        self.slots.advance(request)
        for cut in cuts:
            if cut.key is not None:
                self._offer(request, cut.position, cut.key)

    def leave(self, request: Request, tail: bytes | None) -> None:
        """Have the state of a request that ends found, where its KV is too.

        Args:
            request: that ends.
            tail: key of its last, partial block of KV, if that can be found.
        """
        kv = request.kv
        if kv.num_planned or not 0 < kv.num_computed_tokens <= request.num_known_tokens:
            return  # a token in it is not known
        index, num_partial = divmod(kv.num_computed_tokens, self._prefixes.block_size)
        key = tail if num_partial else self._prefixes.extend(request)[index - 1]
        if key is not None and self._prefixes.are_shared and self.slots.leave(request, key):
            self._offer(request, kv.num_computed_tokens, key)
        self._demote_start(request)

    def _demote_start(self, request: Request) -> None:
        """Have the state that no other request has gone on from go first, as there is a newer one.

        Not where the server says that other prompts repeat what is before it.
        """
        kept = request.kv.kept_states
        if len(kept) < 2 or self._used.get(kept[0].key) != 1:
            return
        grid = self.slots.grid
        if kept[0].num_tokens not in {place // grid * grid for place in request.snapshot_at}:
            self.slots.pool.demote(kept[0].key)
            if self._transfers is not None:
                self._transfers.demote(kept[0].key)

    def take_back(self, request: Request) -> None:
        """Take the slots of a request that does not run; what it has not left is lost."""
        if self._transfers is not None:
            self._transfers.stop_waiting(request)
        request.kv.awaited = None
        self.leaders.drop(request)
        self.slots.take_back(request)

    # What goes to slower tiers

    def _offer(self, request: Request, num_tokens: int, key: bytes) -> None:
        """Have a state that was kept go down when there is time, if it is worth it."""
        slowest = self._slowest_worth(request, num_tokens)
        request.kv.kept_states.append(KeptState(num_tokens, key, slowest))
        if slowest >= 0:
            self._due[key] = slowest

    def _slowest_worth(self, request: Request, num_tokens: int) -> int:
        """The slowest tier from which it is fetched sooner than computed from the last one there.

        As a number; -1 for none.
        """
        if self._transfers is None or self._policy is None:
            return -1
        infos = self._transfers.infos
        for number, info in enumerate(infos):
            below = [kept.num_tokens for kept in request.kv.kept_states if kept.slowest >= number]
            more = num_tokens - max((n for n in below if n < num_tokens), default=0)
            if not self._policy.is_worth_state(more, info.name):
                return number - 1
        return len(infos) - 1

    @property
    def has_due(self) -> bool:
        """Whether states that were kept wait for their turn to go down."""
        return bool(self._due)

    def spill_due(self) -> None:
        """Start copies of states that were kept and are still there, some at a time."""
        transfers = self._transfers
        if transfers is None:
            return
        most = max(1, self.slots.pool.num_blocks // _SPILLING_PART)
        while self._due and transfers.num_spilling < most:
            key, slowest = self._due.popitem(last=False)
            slot = self.slots.find(key)
            if slot is None:
                self._metrics.dropped_states += 1
            elif transfers.spill(key, slot, slowest=slowest):
                _note(self._noted, key, slowest)

    def park(self, request: Request) -> None:
        """Leave the state of a request that is preempted where the request finds it again."""
        kv, key = request.kv, secrets.token_bytes(DIGEST_BYTES)
        self._drop_parked(request)
        if self._transfers is None or not kv.num_computed_tokens:
            return
        size = self._prefixes.block_size
        if kv.num_computed_tokens % size and (
            kv.resume is None or kv.resume.end(size) != kv.num_computed_tokens
        ):
            return  # its KV is not kept up to there
        if self._transfers.spill(key, kv.state_read, slowest=0):
            kv.parked = ParkedState(kv.num_computed_tokens, key)

    def _drop_parked(self, request: Request) -> None:
        parked, request.kv.parked = request.kv.parked, None
        if parked is not None and self._transfers is not None:
            self._transfers.discard(parked.key)

    def discard(self, keys: Sequence[bytes]) -> None:
        """Have states found no more, on the device or in a tier."""
        for key in keys:
            self._due.pop(key, None)
            self.slots.pool.discard(key)
            if self._transfers is not None:
                self._transfers.discard(key)

    def forget(self, request: Request) -> None:
        """A request has ended."""
        self._drop_parked(request)

    @property
    def num_pieces(self) -> int:
        """Payloads that a state takes in slower tiers; 0 where it goes to none."""
        return 0 if self._transfers is None else self._transfers.num_pieces

    def is_piece(self, number: int) -> bool:
        """Whether a transfer was one of a state, by its number in place of a block."""
        return self._transfers is not None and self._transfers.is_piece(number)

    def end_transfer(self, ended: EndedTransfer) -> None:
        """Take note of the transfer of a piece that ended."""
        assert self._transfers is not None
        self._transfers.end(ended)

    def parked(self, request: Request) -> list[bytes]:
        """Keys of what a preempted request left of its state in host memory."""
        if request.kv.parked is None or self._transfers is None:
            return []
        return self._transfers.keys(request.kv.parked.key)

    def with_pieces(self, request: Request, keys: Iterable[bytes]) -> list[bytes]:
        """Keys of blocks, each followed by the pieces' keys of a state kept after it."""
        if self._transfers is None:
            return list(keys)
        kept = {one.key: self._transfers.keys(one.key) for one in request.kv.kept_states}
        return [each for key in keys for each in (key, *kept.get(key, ()))]

    def num_below(self) -> dict[str, int]:
        """By tier, how many of the last states that went down it has."""
        if self._transfers is None:
            return {}
        newest = list(islice(reversed(self._noted), _MOST_SHOWN))
        pieces = self._transfers.first_pieces(newest, may_ask=False)
        found = [one.tier.name for one in pieces if one.tier]
        return dict(Counter(found))

    def check(self) -> None:
        """Assert that slots and transfers are consistent."""
        self.slots.pool.check()
        if self._transfers is not None:
            self._transfers.check()


def _note(noted: OrderedDict[bytes, int], key: bytes, number: int) -> None:
    noted[key] = number
    noted.move_to_end(key)
    if len(noted) > _MOST_NOTED:
        noted.popitem(last=False)
