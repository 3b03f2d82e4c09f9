"""When a replica would bring the first token of a prompt, by what it last told of itself."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hotset.cost.prefix import Split, split_prefix
from hotset.cost.rates import Rates
from hotset.engine.messages import EngineInfo, Load, Queued, Submit, num_pairs, size_class
from hotset.fleet.index import BITS, ReplicaIndex
from hotset.memory.journal import TIERS

_WINDOW_S = 10.0  # for rates of what a replica did
_LEAST_WINDOW_S = 1.0
# A load that comes less than this after a request was sent may not count it yet. Where none comes,
# as the replica has nothing to tell, it refused the request.
_ON_ITS_WAY_S = 0.05
_MOST_UNHEARD_S = 5.0
_MOST_BLOCK_WAIT_S = 60.0
# Tokens of the oldest prompt for each of those that go before it; see `engine.step_shares`.
_SURE_SHARE = 1 / 3


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request would meet at a replica.

    Attributes:
        found_tokens: of its prompt, those that some tier there has, or the store.
        computed_tokens: those that are computed there.
        queued_tokens: of all prompts that are to be computed there.
        num_open: requests there.
        queued_s: until those ahead of it are computed, and blocks are free for it.
        ready_s: from then on, until its prompt is computed or fetched.
        computed_s: what computing its part of the prompt takes, by itself.
        num_behind: prompts there that wait while it is computed, as they are longer.
        step_s: of the step that brings its first token.
    """

    found_tokens: int
    computed_tokens: int
    queued_tokens: int
    num_open: int
    queued_s: float
    ready_s: float
    computed_s: float
    num_behind: int = 0
    step_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        """Seconds to its first token."""
        return self.queued_s + self.ready_s + self.step_s

    def cost_s(self, weight: float) -> float:
        """Its own wait, and what it adds to the wait of others: those behind it, and `weight`."""
        return self.ttft_s + (self.num_behind + weight) * self.computed_s


# Of a replica that has told none yet, as it has just joined.
_NO_LOAD = Load(
    queued_tokens=0,
    spare_blocks=2**31,
    usable_blocks=0,
    queued_bytes=0,
    num_open=0,
    step_s=0.0,
    prefill_tokens_per_s=0.0,
    link_bytes_per_s={},
    prefilled_tokens=0,
    prompt_step_s=0.0,
    freed_blocks=0,
)


class Speed(NamedTuple):
    """How fast a replica computes.

    Attributes:
        num_tokens: of prompts, by which it was measured.
        token_s: per token of a prompt with none before it.
        step_s: of a step without prompts.
        pair_s: per token of a prompt and token before it.
    """

    num_tokens: float
    token_s: float
    step_s: float
    pair_s: float = 0.0

    def seconds(self, num_tokens: int, pairs: int) -> float:
        """To compute tokens of prompts; see `num_pairs`."""
        return num_tokens * self.token_s + pairs * self.pair_s

    def mixed(self, other: "Speed", num_tokens: float) -> "Speed":
        """This one, and the other as if that had been measured by `num_tokens` tokens."""
        total = self.num_tokens + num_tokens
        share = num_tokens / total
        return Speed(
            total,
            *(one + share * (two - one) for one, two in zip(self[1:], other[1:], strict=True)),
        )


# A replica that has computed fewer tokens counts mostly as fast as the others: if its first steps
# were slow, it would get no requests to show more by.
_TRUSTED_TOKENS = 20_000
_UNKNOWN = Speed(0, 0.001, 0.0)


def mean_speed(speeds: Iterable[Speed]) -> Speed:
    """Of replicas, each counted by its tokens; a guess where none has been measured."""
    mean = _UNKNOWN
    for speed in speeds:
        if speed.num_tokens:
            mean = mean.mixed(speed, speed.num_tokens)
    return mean


class _Sent(NamedTuple):
    """A request that the last load may not count."""

    at_s: float
    queued: Queued
    num_blocks: int


class _Progress(NamedTuple):
    """Counters of a load."""

    at_s: float
    prompt_step_s: float
    freed_blocks: int


class Outlook:
    """What a front knows of one replica. Any thread may call it.

    Args:
        info: of the replica.

    Attributes:
        index: where its blocks are.
        blocks: what they depend on; replicas of which that is equal read each other's.
        peer_url: where other replicas may fetch from its host memory; None: nowhere.
    """

    def __init__(self, info: EngineInfo) -> None:
        memory = info.options.memory
        self.index = ReplicaIndex()
        self.fingerprint, self.block_size = info.fingerprint, info.block_size
        numerics = "" if memory.remote_share == "any" else info.numerics
        self.blocks = (info.fingerprint, numerics)
        self.shares_prefixes, self.peer_url = memory.prefix_caching, memory.peer_url
        self._bytes_per_token, self._mode = info.kv_bytes_per_token, memory.fetch_policy
        self._lock = threading.Lock()
        self._load: Load | None = None  # by _lock, as all that follows
        self._sent: dict[str, _Sent] = {}  # by the id of the request
        self._progress: deque[_Progress] = deque()

    def take(self, load: Load, now_s: float) -> None:
        """Take in a load, which counts what was sent a moment before it came."""
        with self._lock:
            self._load = load
            self._forget_sent(now_s - _ON_ITS_WAY_S)
            self._progress.append(_Progress(now_s, load.prompt_step_s, load.freed_blocks))
            self._trim(now_s)

    def send(self, submit: Submit, estimate: Estimate, now_s: float) -> None:
        """A request goes there."""
        num_tokens, left = len(submit.token_ids), estimate.computed_tokens
        queued = Queued(1, left, num_pairs(max(0, num_tokens - left), num_tokens))
        num_blocks = -(-num_tokens // self.block_size)
        with self._lock:
            self._sent[submit.request_id] = _Sent(now_s, queued, num_blocks)

    def begin(self, request_id: str) -> None:
        """The first token of a request has come: its prompt is no longer queued."""
        with self._lock:
            self._sent.pop(request_id, None)

    def _forget_sent(self, before_s: float) -> None:
        for request_id in [one for one, sent in self._sent.items() if sent.at_s < before_s]:
            del self._sent[request_id]

    def busy_share(self, now_s: float) -> float:
        """Of the last seconds, the share in which it computed prompts."""
        with self._lock:
            return self._per_s(now_s)[0]

    def speed(self) -> Speed:
        """As it was told last."""
        return _speed_of(self._load or _NO_LOAD)

    def estimate(
        self,
        keys: Sequence[bytes],
        num_tokens: int,
        now_s: float,
        *,
        in_remote: int,
        at_peer: int = 0,
        others: Speed,
    ) -> Estimate:
        """What a prompt of `num_tokens` whose full blocks have these keys would meet now.

        Args:
            keys: without that of a block with the last token, which is always computed.
            num_tokens: of the prompt.
            now_s: by the clock of `take` and `send`.
            in_remote: leading blocks that a store has which all replicas may read.
            at_peer: leading blocks that one other replica has in host memory.
            others: the mean speed of all replicas.
        """
        with self._lock:
            self._forget_sent(now_s - _MOST_UNHEARD_S)
            load, sent = self._load or _NO_LOAD, list(self._sent.values())
            freed_per_s = self._per_s(now_s)[1]
        speed = _speed_of(load).mixed(others, _TRUSTED_TOKENS)
        num_blocks = -(-num_tokens // self.block_size) + sum(one.num_blocks for one in sent)
        found_tokens, brought_tokens, split = self._bring(keys, load, speed, in_remote, at_peer)
        left = num_tokens - brought_tokens
        left_s = speed.seconds(left, num_pairs(brought_tokens, num_tokens))
        computed_tokens = left + split.computed_tokens
        queue = [
            *_classes(load),
            *((size_class(one.queued.num_tokens), one.queued) for one in sent),
        ]
        number = size_class(computed_tokens)  # of about one size, who came first goes first
        ahead = _sum(one for size, one in queue if size <= number)
        behind = _sum(one for size, one in queue if size > number)
        ahead_s = speed.seconds(ahead.num_tokens, ahead.num_pairs)
        if behind.num_tokens:
            # While these wait, the oldest of them has its part of each step.
            part = (ahead.num_tokens + computed_tokens) * _SURE_SHARE / behind.num_tokens
            ahead_s += min(1.0, part) * speed.seconds(behind.num_tokens, behind.num_pairs)
        wait_s = _block_wait_s(num_blocks - load.spare_blocks, freed_per_s)
        return Estimate(
            found_tokens=found_tokens,
            computed_tokens=computed_tokens,
            queued_tokens=sum(one.num_tokens for _, one in queue),
            num_open=load.num_open + len(sent),
            queued_s=ahead_s + wait_s,
            ready_s=split.ready_s + left_s,
            computed_s=split.computed_tokens * speed.token_s + left_s,
            num_behind=behind.num_prompts,
            step_s=speed.step_s,
        )

    def _bring(
        self, keys: Sequence[bytes], load: Load, speed: Speed, in_remote: int, at_peer: int
    ) -> tuple[int, int, Split]:
        """Tokens that are found, the same with those of a peer, and how they come to the device."""
        bits, tiers = BITS[TIERS[0]], list[str]()
        num_blocks = on_device = self.index.prefix(keys, bits)
        for name in TIERS[1:]:
            if name not in load.link_bytes_per_s:
                continue
            bits |= BITS[name]
            longer = self.index.prefix(keys, bits, first=num_blocks)
            if name == "remote":
                longer = max(longer, in_remote)
            if longer > num_blocks:
                tiers.append(name)
                num_blocks = longer
        num_found = num_blocks
        if at_peer > num_blocks and "peer" in load.link_bytes_per_s:
            tiers.append("peer")
            num_blocks = at_peer
        split = Split(0, 0.0)
        if tiers:
            first, last = on_device * self.block_size, num_blocks * self.block_size
            seconds = speed.seconds(last - first, num_pairs(first, last))
            split = split_prefix(
                Rates((last - first) / seconds, load.link_bytes_per_s),
                last - first,
                tiers,
                bytes_per_token=self._bytes_per_token,
                others_run=load.num_open > 0,
                queued_bytes=load.queued_bytes,
                mode=self._mode,
            )
        return num_found * self.block_size, num_blocks * self.block_size, split

    def _trim(self, now_s: float) -> None:
        while len(self._progress) > 1 and self._progress[1].at_s <= now_s - _WINDOW_S:
            self._progress.popleft()

    def _per_s(self, now_s: float) -> tuple[float, float]:
        """Seconds per second in which prompts were computed, and blocks given back, of late."""
        self._trim(now_s)
        if not self._progress:
            return 0.0, 0.0
        first, last = self._progress[0], self._progress[-1]
        seconds = min(max(now_s - first.at_s, _LEAST_WINDOW_S), _WINDOW_S)
        return (
            (last.prompt_step_s - first.prompt_step_s) / seconds,
            (last.freed_blocks - first.freed_blocks) / seconds,
        )


def _speed_of(load: Load) -> Speed:
    if not load.prefill_tokens_per_s:
        return Speed(0, 0.0, load.step_s)
    # One token more than were computed: the trials at its start.
    num_tokens, token_s = 1 + load.prefilled_tokens, load.token_s or 1 / load.prefill_tokens_per_s
    return Speed(num_tokens, token_s, load.step_s, load.pair_s)


def _sum(queue: Iterable[Queued]) -> Queued:
    return Queued(*map(sum, zip(Queued(0, 0, 0), *queue, strict=True)))


def _classes(load: Load) -> Iterator[tuple[int, Queued]]:
    """What is queued, by its class; what a load does not tell of counts as small."""
    yield from enumerate(load.queue)
    rest = load.queued_tokens - sum(one.num_tokens for one in load.queue)
    yield 0, Queued(0, max(0, rest), 0)


def _block_wait_s(num_short: int, freed_per_s: float) -> float:
    if num_short <= 0:
        return 0.0
    return min(_MOST_BLOCK_WAIT_S, num_short / max(freed_per_s, 1e-9))
