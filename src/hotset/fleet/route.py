"""How a front chooses the replica of a request: the hook, and two ways that know nothing."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hotset.engine.messages import EngineHost, Report, Submit
from hotset.fleet.status import Why


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes.

    Attributes:
        expected_tokens: of the prompt, those that are expected to be computed there; None: it was
            not asked.
        expected_ttft_s: when its first token is expected.
        peer: see `Submit`.
    """

    replica_id: str
    why: Why
    expected_tokens: int | None = None
    expected_ttft_s: float = 0.0
    peer: str | None = None


class Route(Protocol):
    """Chooses among replicas. Called from any thread, also at once.

    Attributes:
        name: as `--route` has it.
        num_snapshots: snapshots of a replica's blocks that were asked for since the start.
    """

    name: str
    num_snapshots: int

    def join(self, replica_id: str, host: EngineHost) -> None:
        """A replica serves from now on. Must not call `host.submit`."""
        ...

    def leave(self, replica_id: str) -> None:
        """A replica is lost."""
        ...

    def take(self, replica_id: str, report: Report) -> None:
        """Take in a report's journal and load. Must not block: the thread that reports is here."""
        ...

    def choose(self, submit: Submit, replica_ids: Sequence[str]) -> Choice:
        """Choose one of at least one replica. The request is sent there next."""
        ...

    def found(self, choice: Choice, submit: Submit, cached_tokens: int, ttft_s: float) -> None:
        """What became of a choice: tokens of the prompt that were found, time to the first token.

        Not called for requests that go on from the middle of their answer.
        """
        ...


class BlindRoute:
    """The hooks of a route that looks at nothing."""

    num_snapshots = 0

    def join(self, replica_id: str, host: EngineHost) -> None:
        """See `Route`."""

    def leave(self, replica_id: str) -> None:
        """See `Route`."""

    def take(self, replica_id: str, report: Report) -> None:
        """See `Route`."""

    def found(self, choice: Choice, submit: Submit, cached_tokens: int, ttft_s: float) -> None:
        """See `Route`."""


class RoundRobin(BlindRoute):
    """Each replica in its turn."""

    name = "round-robin"

    def __init__(self) -> None:
        self._turns = itertools.count()

    def choose(self, submit: Submit, replica_ids: Sequence[str]) -> Choice:
        """See `Route`."""
        return Choice(replica_ids[next(self._turns) % len(replica_ids)], Why.TURN)


class Random(BlindRoute):
    """Any replica, all with the same probability."""

    name = "random"

    def choose(self, submit: Submit, replica_ids: Sequence[str]) -> Choice:
        """See `Route`."""
        return Choice(random.choice(replica_ids), Why.RANDOM)
