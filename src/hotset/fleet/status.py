"""What a front knows of its replicas and has done with requests: plain data."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

from hotset.engine.latency import Histogram
from hotset.engine.status import EngineStatus
from hotset.metrics import Metrics

# In seconds; a link that ends is noticed at once, a silent one after 5 s.
_PAUSE_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)


class ReplicaState(StrEnum):
    """What a front makes of a replica. Only a serving one is sent requests."""

    CONNECTING = "connecting"  # in the directory; its link is not up yet
    SERVING = "serving"
    DRAINING = "draining"  # ends what it has, and takes nothing new
    LOST = "lost"  # its link has ended, or was silent for 5 s


class Why(StrEnum):
    """Why a request went to the replica that it went to."""

    ONLY = "only"  # there was no other
    PREFIX = "prefix"  # it has more of the prompt than the others
    LOAD = "load"  # less waits there than where more of the prompt is
    TURN = "turn"  # it was next
    RANDOM = "random"
    RETRY = "retry"  # another one failed before the first token
    RESUME = "resume"  # another one failed or drained in the middle of the answer


class Moved(StrEnum):
    """Why a request left a replica before its end."""

    LOST = "lost"  # the replica has ended, or its link
    SILENT = "silent"  # nothing was heard of the replica for 5 s
    DRAINED = "drained"  # it gave the request up


class GivenUp(StrEnum):
    """Why a request that left a replica ended with an error."""

    POISONED = "poisoned"  # it was running on two replicas that died
    RETRIES = "retries"  # submitted again as often as is allowed
    NO_REPLICA = "no_replica"  # none is left that may take it
    FINGERPRINT = "fingerprint"  # none is left with the model that began the answer
    NUMERICS = "numerics"  # those with that model round numbers in another way
    TIMEOUT = "timeout"


@dataclass(slots=True)
class FleetCounts:
    """What a front did since it started. All counts only grow.

    Attributes:
        routed: submits by replica id and reason, those of moved requests included.
        retried: requests that were submitted again before their first token.
        resumed: outputs that go on at another replica, from the token after their last one.
        given_up: requests that ended with an error after they had left a replica.
        lost: replicas that were lost.
        silent: of these, those of which nothing was heard for 5 s.
        drains: replicas that began to drain.
        late_outputs: outputs that were dropped: of a replica that the request had left.
        predicted_tokens: tokens of prompts that the router expected to be found.
        found_tokens: tokens of the same prompts that were found.
        num_predicted: requests in these two and in the times below.
        predicted_ttft_s: sum of the times to the first token that the router expected.
        real_ttft_s: sum of those of the same requests.
        snapshots: snapshots of a replica's blocks that were asked for, as the journal had a gap.
        pause: seconds between the last token before a move and the first after it.
    """

    routed: Counter[tuple[str, Why]] = field(default_factory=Counter)
    retried: Counter[Moved] = field(default_factory=Counter)
    resumed: Counter[Moved] = field(default_factory=Counter)
    given_up: Counter[GivenUp] = field(default_factory=Counter)
    lost: int = 0
    silent: int = 0
    drains: int = 0
    late_outputs: int = 0
    predicted_tokens: int = 0
    found_tokens: int = 0
    num_predicted: int = 0
    predicted_ttft_s: float = 0.0
    real_ttft_s: float = 0.0
    snapshots: int = 0
    pause: Histogram = field(default_factory=lambda: Histogram(_PAUSE_S))


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica, as a front sees it.

    Attributes:
        address: of its link.
        since_s: seconds for which it has been in this state.
        why: one line on how it came to it; empty where all is well.
        fingerprint: what its blocks and its answers depend on; equal ones share both.
        num_open: requests of this front that it has.
        queued_tokens: tokens of prompts ahead of a new request, as the router counts them.
        metrics: its counters, as of its last message.
        engine: its last snapshot; None where there was none yet.
    """

    replica_id: str
    address: str
    state: ReplicaState
    since_s: float
    why: str
    fingerprint: str
    num_open: int
    queued_tokens: int
    metrics: Metrics
    engine: EngineStatus | None


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """All of a front's replicas at one moment.

    Attributes:
        route: how it chooses among replicas (`--route`).
        replicas: those it has, then those that were lost in the last minutes, if none has their id.
        counts: live ones: they change while one reads.
    """

    front_id: str
    route: str
    replicas: tuple[ReplicaStatus, ...]
    counts: FleetCounts


@runtime_checkable
class HasFleet(Protocol):
    """What serves requests by several replicas."""

    def fleet(self) -> FleetStatus:
        """What is known of them now; at once, and from any thread."""
        ...
