"""Serves requests by replicas that come and go, as `EngineService` does by one engine."""

import threading
from concurrent.futures import Future
from functools import partial

from hotset.clock import REAL_CLOCK, Clock
from hotset.engine.messages import EngineHost, Submit
from hotset.engine.status import EngineStatus
from hotset.engine.stream_service import StreamService
from hotset.errors import EngineError
from hotset.fleet.dispatch import NO_REPLICA, Connect, Dispatcher
from hotset.fleet.route import Route
from hotset.fleet.status import FleetStatus, ReplicaState
from hotset.fleet.sums import merge_engines
from hotset.metrics import Metrics
from hotset.model.loaded import LoadedModel
from hotset.options import Options

# How long a request that has left a replica waits for one that may take it.
_WAIT_S = 60.0
_SHOW_LOST_S = 300.0


class FleetService(StreamService):
    """Serves requests by replicas; see `StreamService`.

    A request that loses its replica, or that a draining one gives up, goes on at another, from the
    token after the last one that was delivered. See `Dispatcher`.

    Args:
        route: chooses among the replicas that may take a request.
        front_id: of this front, for its status.
        wait_s: how long a request that has left a replica waits for one that may take it.
        clock: what times are told by.
    """

    def __init__(
        self,
        route: Route,
        *,
        front_id: str = "front",
        wait_s: float = _WAIT_S,
        clock: Clock = REAL_CLOCK,
    ) -> None:
        super().__init__()
        self._route, self._front_id, self._clock = route, front_id, clock
        self._dispatcher = Dispatcher(
            route, self._deliver, self._note_started, wait_s=wait_s, clock=clock
        )
        self._closed = threading.Event()
        self._close_at_exit()

    def add(self, replica_id: str, connect: Connect, *, address: str = "") -> None:
        """See `Dispatcher.add`."""
        self.raise_if_closed()
        self._dispatcher.add(replica_id, connect, address=address)

    def wait_closed(self, timeout_s: float) -> bool:
        """Wait for `close` to be called; returns whether it was."""
        return self._closed.wait(timeout_s)

    @property
    def replica_ids(self) -> frozenset[str]:
        """Of the replicas that are connected."""
        return self._dispatcher.roster.ids

    @property
    def model(self) -> LoadedModel:
        """See `StreamService`. Raises EngineError before the first replica is there."""
        return self._any_host().model

    @property
    def options(self) -> Options:
        """See `StreamService`: those of the first replica."""
        return self._any_host().info.options

    @property
    def keeps_states(self) -> bool:
        """See `StreamService`."""
        return self._any_host().info.keeps_states

    @property
    def max_model_len(self) -> int:
        """See `StreamService`: what all replicas take."""
        hosts = [replica.host for replica in self._dispatcher.roster.serving] or [self._any_host()]
        return min(host.info.max_model_len for host in hosts)

    @property
    def report(self) -> str:
        """See `StreamService`: of each replica."""
        return "\n".join(
            f"replica {replica.replica_id}:\n{replica.host.info.report}"
            for replica in self._dispatcher.roster.serving
        )

    @property
    def metrics(self) -> Metrics:
        """See `StreamService`: of all replicas, those that were lost included."""
        return self._dispatcher.metrics

    def fleet(self) -> FleetStatus:
        """What is known of all replicas, at once."""
        now_s = self._clock.now()
        roster = self._dispatcher.roster
        shown = {one.replica_id: one for one in roster.connected}
        for one in roster.lost:
            if one.since_s > now_s - _SHOW_LOST_S:
                shown.setdefault(one.replica_id, one)
        statuses = tuple(one.status(now_s) for one in shown.values())
        counts = self._dispatcher.counts
        counts.snapshots = self._route.num_snapshots
        return FleetStatus(self._front_id, self._route.name, statuses, counts)

    def status(self) -> "Future[EngineStatus]":
        """See `StreamService`: of all replicas that answer, as one."""
        self.raise_unless_healthy()
        replicas = self._dispatcher.roster.connected
        looks = [replica.looks.ask(replica.host) for replica in replicas]
        merged: Future[EngineStatus] = Future()
        if not looks:
            merged.set_exception(EngineError(NO_REPLICA))
        lock, left = threading.Lock(), set(range(len(looks)))

        def note(i: int, look: "Future[EngineStatus]") -> None:
            if look.exception() is None:
                replicas[i].engine = look.result()
            with lock:
                left.discard(i)
                is_last = not left
            if is_last and merged.set_running_or_notify_cancel():
                seen = [one.result() for one in looks if one.exception() is None]
                if seen:
                    merged.set_result(merge_engines(seen))
                else:
                    merged.set_exception(EngineError("no replica answers"))

        for i, (replica, look) in enumerate(zip(replicas, looks, strict=True)):
            look.add_done_callback(partial(note, i))
            if replica.state is ReplicaState.LOST:  # meanwhile, before it knew of this look
                replica.looks.fail(replica.why)
        return merged

    def raise_unless_healthy(self) -> None:
        """See `StreamService`."""
        self.raise_if_closed()
        if not self._dispatcher.roster.serving:
            raise EngineError(NO_REPLICA)

    def raise_if_closed(self) -> None:
        """Raise EngineError where no replica may come any more."""
        super().raise_unless_healthy()

    def abort(self, request_id: str) -> None:
        """See `StreamService`. The stream ends at once, whatever its replica does."""
        self._dispatcher.abort(request_id)

    def look_for_engine(self) -> None:
        """See `StreamService`. Requests that wait for a replica are looked after."""
        if self.is_forked:
            self.raise_unless_healthy()
        self._dispatcher.tend()

    def _any_host(self) -> EngineHost:
        first = self._dispatcher.roster.first
        if first is None:
            raise EngineError(NO_REPLICA)
        return first

    def _send(self, submit: Submit) -> None:
        self._dispatcher.submit(submit)

    def _stop(self) -> None:
        self._closed.set()
        self._dispatcher.close()
