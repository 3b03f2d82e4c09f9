"""The replicas of a front: those that it is connected to, and those that it has lost."""

from hotset.engine.messages import EngineHost
from hotset.fleet.replica import Replica
from hotset.fleet.status import ReplicaState
from hotset.fleet.sums import sum_metrics
from hotset.metrics import Metrics

_MOST_LOST = 64  # replicas that are remembered


class Roster:
    """Who is there. Its user sees to it that one thread at a time changes it.

    Attributes:
        connected: replaced, never changed, so that any thread may read it; likewise the next two.
        serving: of these, those that take requests.
        lost: the last one first.
        first: the host of the first replica that ever was here.
        lost_metrics: counters of all that were lost, together.
    """

    def __init__(self) -> None:
        self.connected: tuple[Replica, ...] = ()
        self.serving: tuple[Replica, ...] = ()
        self.lost: tuple[Replica, ...] = ()
        self.first: EngineHost | None = None
        self.lost_metrics = Metrics()

    @property
    def ids(self) -> frozenset[str]:
        """Of those that are connected."""
        return frozenset(one.replica_id for one in self.connected)

    @property
    def counted(self) -> list[Metrics]:
        """Counters whose sum never falls; not while another thread changes the roster."""
        return [self.lost_metrics, *(one.host.metrics for one in self.connected)]

    def join(self, replica: Replica, now_s: float) -> None:
        """A replica is connected; it serves unless it has said that it drains."""
        if replica.state is ReplicaState.CONNECTING:
            replica.turn(ReplicaState.SERVING, now_s)
        self.first = self.first or replica.host
        self._connect((*self.connected, replica))

    def drain(self, replica: Replica, now_s: float) -> bool:
        """A replica takes no more requests; returns whether that is new."""
        if replica.state not in (ReplicaState.CONNECTING, ReplicaState.SERVING):
            return False
        replica.turn(ReplicaState.DRAINING, now_s)
        self._connect(self.connected)
        return True

    def lose(self, replica: Replica, why: str, now_s: float) -> bool:
        """A replica has died; returns whether it was connected."""
        replica.turn(ReplicaState.LOST, now_s, why)
        if replica not in self.connected:
            return False
        self._connect(tuple(one for one in self.connected if one is not replica))
        self.lost = (replica, *self.lost)[:_MOST_LOST]
        self.lost_metrics = sum_metrics([self.lost_metrics, replica.host.metrics])
        return True

    def _connect(self, replicas: tuple[Replica, ...]) -> None:
        self.connected = replicas
        self.serving = tuple(one for one in replicas if one.state is ReplicaState.SERVING)
