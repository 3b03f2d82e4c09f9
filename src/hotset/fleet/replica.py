"""A replica as a front has it."""

from dataclasses import dataclass, field

from hotset.engine.looks import Looks
from hotset.engine.messages import EngineHost, Load
from hotset.engine.status import EngineStatus
from hotset.fleet.flight import Flight, Kind
from hotset.fleet.status import ReplicaState, ReplicaStatus


@dataclass(eq=False, slots=True)
class Replica:
    """One host, from its connection to its loss; a replica that comes back is another one.

    Attributes:
        flights: the requests that it has, by the id of their attempt.
        state: with the moment since which it is in it, and one line on how it came to it.
        engine, load: as it last told.
    """

    replica_id: str
    address: str
    host: EngineHost = field(init=False)
    flights: dict[str, Flight] = field(default_factory=dict)
    looks: Looks = field(default_factory=Looks)
    state: ReplicaState = ReplicaState.CONNECTING
    since_s: float = 0.0
    why: str = ""
    engine: EngineStatus | None = None
    load: Load | None = None

    @property
    def kind(self) -> Kind:
        """What its answers depend on; an answer that has begun goes on with the same only."""
        info = self.host.info
        return Kind(info.fingerprint, info.numerics)

    def turn(self, state: ReplicaState, now_s: float, why: str = "") -> None:
        """Change the state."""
        self.state, self.since_s, self.why = state, now_s, why

    def status(self, now_s: float) -> ReplicaStatus:
        """What the status page shows."""
        return ReplicaStatus(
            replica_id=self.replica_id,
            address=self.address,
            state=self.state,
            since_s=now_s - self.since_s,
            why=self.why,
            fingerprint=self.kind.fingerprint,
            num_open=len(self.flights),
            queued_tokens=0 if self.load is None else self.load.queued_tokens,
            metrics=self.host.metrics,
            engine=self.engine,
        )
