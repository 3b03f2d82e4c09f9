"""Routes that know where blocks are: by the cost of a request, or by its longest prefix."""

import logging
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hotset.clock import REAL_CLOCK, Clock
from hotset.engine.messages import EngineHost, Report, Submit
from hotset.fleet.index import BITS
from hotset.fleet.outlook import Estimate, Outlook, mean_speed
from hotset.fleet.route import Choice, Random, RoundRobin, Route
from hotset.fleet.status import Why
from hotset.kv.block_hash import block_hash, root_hash

_log = logging.getLogger(__name__)

# Costs that differ by less are as good as equal: they rest on loads that are 0.1 s old.
_AS_GOOD = 1.1
_MOST_WEIGHT = 5.0
# How many times a computed token is found again, before any were seen, and the number of tokens
# that this counts as. A conversation trace has 0.5. Beyond the most, older requests count half.
_PRIOR_FOUND, _PRIOR_TOKENS, _MOST_TOKENS = 0.5, 100_000.0, 20_000_000
# Of `PrefixRoute`: a match is worth following above this part of the prompt, and a replica is
# crowded with this many more requests than another, and this many times as many.
_LEAST_MATCH = 0.3
_CROWDED_BY, _CROWDED_TIMES = 64, 1.5
# A snapshot is asked for where predictions are wrong by more than this part of the prompts' tokens,
# over prompts of at least that many tokens.
_MOST_ERROR = 0.1
_ERROR_TOKENS = 20_000
_ASK_AGAIN_S = 10.0


@dataclass(eq=False, slots=True)
class _Member:
    """A replica of the fleet, and how well it was predicted since the last snapshot."""

    host: EngineHost
    outlook: Outlook
    asked_s: float
    prompt_tokens: int = 0
    wrong_tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class _Offer:
    """A replica, what a request would meet there, and where more of its prompt is, if anywhere."""

    replica_id: str
    outlook: Outlook
    estimate: Estimate
    peer: str | None


class KnowingRoute(ABC):
    """Follows the journals and loads of replicas. See `Route`.

    Args:
        clock: what the age of loads is told by.
        seed: of choices among replicas that are as good; None draws one.

    Attributes:
        num_snapshots: that were asked for, as changes were lost or predictions were wrong.
    """

    name: str

    def __init__(self, clock: Clock = REAL_CLOCK, seed: int | None = None) -> None:
        self.num_snapshots = 0
        self._clock, self._random = clock, random.Random(seed)
        self._members: dict[str, _Member] = {}  # replaced, never changed: read without a lock
        self._lock = threading.Lock()

    def join(self, replica_id: str, host: EngineHost) -> None:
        """See `Route`."""
        member = _Member(host, Outlook(host.info), self._clock.now())
        with self._lock:
            self._members = {**self._members, replica_id: member}
        host.follow(True)

    def leave(self, replica_id: str) -> None:
        """See `Route`."""
        with self._lock:
            self._members = {k: v for k, v in self._members.items() if k != replica_id}

    def take(self, replica_id: str, report: Report) -> None:
        """See `Route`."""
        member = self._members.get(replica_id)
        if member is None:
            return
        if report.load is not None:
            member.outlook.take(report.load, self._clock.now())
        if report.journal is not None:
            try:
                is_lost = member.outlook.index.take(report.journal)
            except ValueError as error:
                _log.error("replica %s: %s; asking for a snapshot", replica_id, error)
                is_lost = True
            if is_lost:
                self._ask(member)

    def choose(self, submit: Submit, replica_ids: Sequence[str]) -> Choice:
        """See `Route`."""
        members, now_s = self._members, self._clock.now()
        known = [(one, members[one].outlook) for one in replica_ids if one in members]
        if not known:
            return Choice(self._random.choice(replica_ids), Why.RANDOM)
        keys = _Keys(submit)
        outlooks = [member.outlook for member in members.values()]
        others = mean_speed([outlook.speed() for outlook in outlooks])
        in_remote: dict[tuple[str, str], int] = {}
        for one in outlooks:
            there = one.index.prefix(keys.of(one), BITS["remote"])
            in_remote[one.blocks] = max(there, in_remote.get(one.blocks, 0))
        num_tokens = len(keys.token_ids)
        peers = _Peers(keys, outlooks)
        offers = []
        for replica_id, outlook in known:
            at_peer, peer = peers.of(outlook)
            estimate = outlook.estimate(
                keys.of(outlook),
                num_tokens,
                now_s,
                in_remote=in_remote[outlook.blocks],
                at_peer=at_peer,
                others=others,
            )
            is_more = at_peer * outlook.block_size > estimate.found_tokens
            offers.append(_Offer(replica_id, outlook, estimate, peer if is_more else None))
        chosen = self._best(offers, num_tokens, now_s)
        chosen.outlook.send(submit, chosen.estimate, now_s)
        chosen.outlook.index.guess(keys.of(chosen.outlook))
        most = max(offer.estimate.found_tokens for offer in offers)
        least = min(offer.estimate.found_tokens for offer in offers)
        has_most = least < chosen.estimate.found_tokens == most
        return Choice(
            chosen.replica_id,
            Why.PREFIX if has_most else Why.LOAD,
            chosen.estimate.computed_tokens,
            chosen.estimate.ttft_s,
            chosen.peer,
        )

    def found(self, choice: Choice, submit: Submit, cached_tokens: int, ttft_s: float) -> None:
        """See `Route`. Asks for a snapshot where too many predictions were wrong."""
        member = self._members.get(choice.replica_id)
        if member is None or choice.expected_tokens is None:
            return
        member.outlook.begin(submit.request_id)
        expected = len(submit.token_ids) - choice.expected_tokens
        with member.lock:
            member.prompt_tokens += len(submit.token_ids)
            member.wrong_tokens += abs(expected - cached_tokens)
            if member.prompt_tokens < _ERROR_TOKENS:
                return
            is_wrong = member.wrong_tokens > _MOST_ERROR * member.prompt_tokens
            member.prompt_tokens = member.wrong_tokens = 0
        if is_wrong and self._clock.now() - member.asked_s >= _ASK_AGAIN_S:
            member.outlook.index.doubt()
            self._ask(member)

    def _ask(self, member: _Member) -> None:
        self.num_snapshots += 1
        member.asked_s = self._clock.now()
        member.host.follow(True)

    @abstractmethod
    def _best(self, offers: Sequence[_Offer], num_tokens: int, now_s: float) -> _Offer:
        """The one to take."""

    def _less_loaded(self, offers: Sequence[_Offer]) -> _Offer:
        """Of two of these at random, the one where fewer tokens wait.

        Source: Mitzenmacher, "The power of two choices in randomized load balancing", 2001.
        """
        two = self._random.sample(list(offers), min(2, len(offers)))
        return min(two, key=lambda offer: offer.estimate.queued_tokens)


class CostRoute(KnowingRoute):
    """The replica where a request costs least: its own time to the first token, and others'.

    The time that it takes to compute delays others. Those that wait there and are longer are
    counted. Those that come are the more the busier the fleet is, by the law of queues: by
    `busy / (1 - busy)`, 5 at most. And blocks that are computed although another replica has them
    take the place of others, which are computed again where they would have been found: as many
    times as a computed token was found again of late, 1 at most. Of costs that are as good the one
    where least is computed is taken, so that a conversation does not move for nothing.
    """

    name = "cost"

    def __init__(self, clock: Clock = REAL_CLOCK, seed: int | None = None) -> None:
        super().__init__(clock, seed)
        self._computed_tokens, self._found_tokens = _PRIOR_TOKENS, _PRIOR_TOKENS * _PRIOR_FOUND

    def found(self, choice: Choice, submit: Submit, cached_tokens: int, ttft_s: float) -> None:
        """See `Route`. Follows how often what was computed is found again."""
        super().found(choice, submit, cached_tokens, ttft_s)
        with self._lock:
            self._computed_tokens += len(submit.token_ids) - cached_tokens
            self._found_tokens += cached_tokens
            if self._computed_tokens + self._found_tokens > _MOST_TOKENS:
                self._computed_tokens /= 2
                self._found_tokens /= 2

    def _best(self, offers: Sequence[_Offer], num_tokens: int, now_s: float) -> _Offer:
        weight = self._num_coming(now_s) + min(1.0, self._found_tokens / self._computed_tokens)
        costs = [offer.estimate.cost_s(weight) for offer in offers]
        most = _AS_GOOD * min(costs)
        near = [offer for offer, cost in zip(offers, costs, strict=True) if cost <= most]
        # A conversation stays where it is unless it gains by more.
        fewest = min(offer.estimate.computed_tokens for offer in near)
        return self._less_loaded(
            [offer for offer in near if offer.estimate.computed_tokens == fewest]
        )

    def _num_coming(self, now_s: float) -> float:
        """How many that are yet to come will wait for the time that a request takes."""
        shares = [member.outlook.busy_share(now_s) for member in self._members.values()]
        busy = sum(shares) / len(shares)
        return _MOST_WEIGHT if busy >= 1.0 else min(_MOST_WEIGHT, busy / (1.0 - busy))


class PrefixRoute(KnowingRoute):
    """The replica that has most of the prompt, unless that is little or requests crowd there.

    Source of the rule and of its figures: the cache-aware policy of SGLang's router.
    """

    name = "prefix"

    def _best(self, offers: Sequence[_Offer], num_tokens: int, now_s: float) -> _Offer:
        num_open = [offer.estimate.num_open for offer in offers]
        least, most = min(num_open), max(num_open)
        if most - least > _CROWDED_BY and most > _CROWDED_TIMES * least:
            return next(offer for offer in offers if offer.estimate.num_open == least)
        longest = max(offer.estimate.found_tokens for offer in offers)
        if longest <= _LEAST_MATCH * num_tokens:
            return self._less_loaded(offers)
        return self._less_loaded([one for one in offers if one.estimate.found_tokens == longest])


class _Keys:
    """Keys of a prompt's full blocks, made once for replicas that have the same.

    Attributes:
        token_ids: of the prompt, and of the answer so far where one alone goes on.
    """

    def __init__(self, submit: Submit) -> None:
        self._salt = submit.salt
        self._is_computed_whole = submit.params.prompt_logprobs is not None
        answer = submit.resumed[0].token_ids if len(submit.resumed) == 1 else ()
        self.token_ids = [*submit.token_ids, *answer]
        self._made: dict[tuple[str, int], list[bytes]] = {}

    def of(self, outlook: Outlook) -> list[bytes]:
        """As the engine of a replica makes them; none where nothing is looked for there."""
        if not outlook.shares_prefixes or self._is_computed_whole:
            return []
        kind = (outlook.fingerprint, outlook.block_size)
        if kind not in self._made:
            self._made[kind] = self._make(*kind)
        return self._made[kind]

    def _make(self, fingerprint: str, size: int) -> list[bytes]:
        key, keys = root_hash(fingerprint, self._salt), []
        for start in range(0, len(self.token_ids) - size, size):  # one is left to compute
            key = block_hash(key, self.token_ids[start : start + size])
            keys.append(key)
        return keys


class _Peers:
    """Replicas that others may fetch from, by how much of a prompt they have in host memory."""

    def __init__(self, keys: _Keys, outlooks: Sequence[Outlook]) -> None:
        self._keys = keys
        found = [
            (one.index.prefix(keys.of(one), BITS["host"]), one) for one in outlooks if one.peer_url
        ]
        self._most_first = sorted(found, key=lambda pair: -pair[0])

    def of(self, outlook: Outlook) -> tuple[int, str | None]:
        """Leading blocks that another one has which makes the same blocks, and its URL."""
        for num_blocks, one in self._most_first:
            if num_blocks and one is not outlook and one.blocks == outlook.blocks:
                return num_blocks, one.peer_url
        return 0, None


ROUTES: dict[str, Callable[[], Route]] = {
    route.name: route for route in (CostRoute, PrefixRoute, RoundRobin, Random)
}
