"""A front's requests and the replicas they are on: none is lost with a replica, none is twice."""

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from hotset.clock import Clock
from hotset.engine.messages import EngineHost, Report, Submit
from hotset.errors import DrainingError, EngineError, HotsetError, OverloadedError, RequestError
from hotset.fleet.flight import Flight, with_seed
from hotset.fleet.replica import Replica
from hotset.fleet.roster import Roster
from hotset.fleet.route import Choice, Route
from hotset.fleet.status import FleetCounts, GivenUp, Moved, ReplicaState, Why
from hotset.fleet.sums import sum_metrics
from hotset.metrics import Metrics
from hotset.request import NOT_AVAILABLE, POISONED, FinishReason, RequestOutput

_log = logging.getLogger(__name__)

_MOVERS = 8  # threads that submit again
NO_REPLICA = "no replica is there that takes requests; try again soon"

Connect = Callable[[Callable[[Report], None]], EngineHost]


Deliver = Callable[[Iterable[RequestOutput], float], None]
NoteStarted = Callable[[Iterable[str], float], None]


class Dispatcher:
    """Sends requests to replicas, and to others where a replica is lost or drains.

    Args:
        route: chooses among the replicas that may take a request.
        deliver: takes outputs of requests; called with a lock, one call at a time.
        note_started: takes ids of requests that are part of a step for the first time; likewise.
        wait_s: how long a request that has left a replica waits for one that may take it. An answer
            that has begun does not wait where all that serve have another model.
        clock: what times are told by.

    Attributes:
        counts: live ones: they change while one reads.
        roster: the replicas.
    """

    def __init__(
        self,
        route: Route,
        deliver: Deliver,
        note_started: NoteStarted,
        *,
        wait_s: float,
        clock: Clock,
    ) -> None:
        self.counts = FleetCounts()
        self.roster = Roster()
        self._route, self._wait_s, self._clock = route, wait_s, clock
        self._deliver, self._note_started = deliver, note_started
        # Guards all that follows, flights, and changes of the roster. No host is called with it, as
        # that may wait for a report, but for `metrics`.
        self._lock = threading.Lock()
        self._flights: dict[str, Flight] = {}
        self._waiting: set[Flight] = set()  # for a replica
        self._is_closing = False
        self._movers = ThreadPoolExecutor(_MOVERS, "hotset-mover")

    @property
    def metrics(self) -> Metrics:
        """Of all replicas, those that were lost included."""
        with self._lock:
            found = self.roster.counted
        return sum_metrics(found)

    def add(self, replica_id: str, connect: Connect, *, address: str = "") -> None:
        """Connect to a replica and send it requests from now on.

        Args:
            replica_id: other than the ids of those that are there.
            connect: returns its host; gets what takes the host's reports.
            address: to show.

        Raises:
            EngineError: there is one of this id, it ended at once, or `connect` raised it.
        """
        replica = Replica(replica_id, address)
        host = replica.host = connect(partial(self._take_report, replica))
        with self._lock:
            why = replica.why
            if replica_id in self.roster.ids:
                why = f"there is a replica {replica_id!r} already"
            elif self._is_closing:
                why = "the engine was closed"
            if not why:
                self.roster.join(replica, self._clock.now())
                waiting, self._waiting = self._waiting, set()
        if why:
            host.close()
            raise EngineError(why)
        self._route.join(replica_id, host)
        for flight in waiting:
            self._movers.submit(self._place_again, flight)

    def submit(self, submit: Submit) -> None:
        """Send a request to a replica. Raises as `EngineHost.submit`: it is on none then."""
        now_s = self._clock.now()
        deadline_s = None if submit.timeout_s is None else now_s + submit.timeout_s
        flight = Flight(with_seed(submit), deadline_s)
        with self._lock:
            self._flights[submit.request_id] = flight
        try:
            self._place(flight)
        except BaseException:
            with self._lock:
                if flight.was_accepted:  # and lost since
                    self._wait(flight)
                    return
                self._flights.pop(submit.request_id, None)
            raise

    def abort(self, request_id: str) -> None:
        """See `StreamService`. Its stream ends at once, whatever its replica does."""
        with self._lock:
            flight = self._flights.get(request_id)
            if flight is None:
                return
            replica = flight.replica
            self._end(flight, FinishReason.ABORT, None)
        if replica is not None:
            replica.host.abort(flight.sent.request_id)

    def tend(self) -> None:
        """Look after replicas that ended without a word, and requests that wait for one."""
        for replica in self.roster.serving:
            if not replica.host.is_alive:
                self._lose(replica, "it has ended without a word")
        if not self._waiting:
            return
        now_s = self._clock.now()
        with self._lock:
            for flight in list(self._waiting):
                if flight.wait_until_s <= now_s:
                    self._give_up(flight, self._why_none(flight), now_s)
                elif self._candidates(flight, set()):
                    self._waiting.discard(flight)
                    self._movers.submit(self._place_again, flight)

    def close(self) -> None:
        """End open requests as aborted, at once, then close all hosts and wait for that."""
        with self._lock:
            self._is_closing = True
            replicas = self.roster.connected
            for flight in list(self._flights.values()):
                self._end(flight, FinishReason.ABORT, None)
        with ThreadPoolExecutor(max(1, len(replicas)), "hotset-close") as closers:
            list(closers.map(lambda replica: replica.host.close(), replicas))
        self._movers.shutdown(cancel_futures=True)
        for replica in replicas:
            replica.looks.fail("the engine was closed")

    # Finding a replica.

    def _place_again(self, flight: Flight) -> None:
        """Place a request that has left a replica. In a thread of its own."""
        try:
            self._place(flight)
        except (EngineError, OverloadedError):
            with self._lock:
                self._wait(flight)
        except Exception as error:
            if not isinstance(error, RequestError):
                _log.exception("request %s cannot go on elsewhere", flight.asked.request_id)
            with self._lock:
                self._end(flight, FinishReason.ERROR, f"it cannot go on elsewhere: {error}")

    def _place(self, flight: Flight) -> None:
        """Submit to one replica after the other, until one takes it or it is over.

        Raises:
            RequestError: the request can never be served. OverloadedError, EngineError: not now.
        """
        refusal: HotsetError = EngineError(NO_REPLICA)
        tried: set[Replica] = set()
        while (replica := self._depart(flight, tried)) is not None:
            try:
                replica.host.submit(flight.sent)
            except (EngineError, OverloadedError) as error:
                if not isinstance(refusal, OverloadedError):  # which says when to try again
                    refusal = error
                tried.add(replica)
                with self._lock:
                    self._leave(flight)
                if isinstance(error, DrainingError):
                    self._drain(replica)
            except BaseException:
                with self._lock:
                    self._leave(flight)
                raise
            else:
                if self._arrive(flight):
                    break
        if flight.is_over:  # it was aborted, or has ended meanwhile
            if replica is not None:
                replica.host.abort(flight.sent.request_id)
        elif replica is None:
            raise refusal

    def _candidates(self, flight: Flight, tried: set[Replica]) -> list[Replica]:
        """Replicas that may take a request, best those that have not been lost with it."""
        found = [
            replica
            for replica in self.roster.serving
            if replica not in tried and flight.kind in (None, replica.kind)
        ]
        return [one for one in found if one.replica_id not in flight.lost_on] or found

    def _depart(self, flight: Flight, tried: set[Replica]) -> Replica | None:
        """Choose a replica and note that the request goes there; None: there is none."""
        while True:
            now_s = self._clock.now()
            with self._lock:
                if flight.is_over or self._is_closing:
                    return None
                if flight.deadline_s is not None and flight.deadline_s <= now_s:
                    self._give_up(flight, GivenUp.TIMEOUT, now_s)
                    return None
                candidates = self._candidates(flight, tried)
                if not candidates:
                    return None
                submit = flight.depart(now_s)
            choice = self._route.choose(submit, [one.replica_id for one in candidates])
            with self._lock:
                replica = next(one for one in candidates if one.replica_id == choice.replica_id)
                if flight.is_over or replica not in self.roster.serving:
                    continue
                flight.choice = choice
                flight.sent = replace(
                    submit, expected_tokens=choice.expected_tokens, peer=choice.peer
                )
                replica.flights[submit.request_id] = flight
                flight.replica = replica
                self.counts.routed[replica.replica_id, _why(flight, choice, candidates)] += 1
                return replica

    def _arrive(self, flight: Flight) -> bool:
        """A replica has taken the request; False: and has lost it since."""
        with self._lock:
            if flight.must_move and not flight.is_over:
                flight.was_accepted = True
                return False
            flight.was_accepted, flight.is_placing = True, False
            flight.wait_until_s = math.inf
            return True

    # What follows is called with the lock.

    def _leave(self, flight: Flight) -> None:
        """Its replica no longer has the request."""
        replica, flight.replica = flight.replica, None
        if replica is not None:
            replica.flights.pop(flight.sent.request_id, None)

    def _move(self, flight: Flight, why: Moved) -> None:
        """Have a request that has left its replica go on at another."""
        if flight.has_begun:
            self.counts.resumed[why] += 1
            flight.is_paused = True
        else:
            self.counts.retried[why] += 1
        if flight.is_placing:
            flight.must_move = True
        elif not self._is_closing:
            flight.is_placing = True
            self._movers.submit(self._place_again, flight)

    def _wait(self, flight: Flight) -> None:
        if flight.is_over or self._is_closing:
            return
        now_s = self._clock.now()
        has_just_left, why = flight.wait_until_s == math.inf, self._why_none(flight)
        if has_just_left and why is not GivenUp.NO_REPLICA:
            self._give_up(flight, why, now_s)
            return
        flight.wait_until_s = min(flight.wait_until_s, now_s + self._wait_s)
        if flight.deadline_s is not None:
            flight.wait_until_s = min(flight.wait_until_s, flight.deadline_s)
        self._waiting.add(flight)

    def _why_none(self, flight: Flight) -> GivenUp:
        """Why no replica takes a request that has left another."""
        serving = self.roster.serving
        if flight.kind is None or not serving or self._candidates(flight, set()):
            return GivenUp.NO_REPLICA
        if any(one.kind.fingerprint == flight.kind.fingerprint for one in serving):
            return GivenUp.NUMERICS
        return GivenUp.FINGERPRINT

    def _give_up(self, flight: Flight, why: GivenUp, now_s: float) -> None:
        """End a request that has left a replica and cannot go on."""
        if flight.deadline_s is not None and flight.deadline_s <= now_s:
            why = GivenUp.TIMEOUT
        self.counts.given_up[why] += 1
        if why is GivenUp.TIMEOUT:
            self._end(flight, FinishReason.ABORT, flight.too_late)
        elif why is GivenUp.POISONED:
            error = "two replicas ended while this request ran on them; it is not tried on others"
            self._end(flight, FinishReason.ERROR, error, POISONED)
        else:
            self._end(flight, FinishReason.ERROR, _WHY_LOST[why], NOT_AVAILABLE)

    def _end(
        self, flight: Flight, reason: FinishReason, error: str | None, code: str | None = None
    ) -> None:
        self._deliver(flight.end(reason, error, code), self._clock.now())
        self._forget(flight)

    def _forget(self, flight: Flight) -> None:
        self._flights.pop(flight.asked.request_id, None)
        self._waiting.discard(flight)
        self._leave(flight)

    # What follows is called from one thread for each replica, by its host.

    def _take_report(self, replica: Replica, report: Report) -> None:
        now_s = self._clock.now()  # that of the report may be of another machine
        if report.load is not None:
            replica.load = report.load
        if report.journal is not None or report.load is not None:
            self._route.take(replica.replica_id, report)
        found: list[tuple[Choice, Submit, int, float]] = []
        with self._lock:
            for attempt_id in report.taken:
                if (flight := replica.flights.get(attempt_id)) is not None:
                    flight.run()
            flights = [replica.flights[one] for one in report.started if one in replica.flights]
            self._note_started((flight.asked.request_id for flight in flights), now_s)
            accepted = [self._accept(replica, one, now_s, found) for one in report.outputs]
            self._deliver((one for one in accepted if one is not None), now_s)
        for choice in found:
            self._route.found(*choice)
        replica.looks.answer(report.looks)
        for note in report.notes:
            _log.info("replica %s: %s", replica.replica_id, note)
        if report.is_draining:
            self._drain(replica)
        if report.failure is not None:
            self._lose(replica, report.failure, Moved.SILENT if report.is_silent else Moved.LOST)

    def _accept(
        self,
        replica: Replica,
        output: RequestOutput,
        now_s: float,
        found: list[tuple[Choice, Submit, int, float]],
    ) -> RequestOutput | None:
        """What to deliver of an output; notes what became of the choice of its replica."""
        flight = replica.flights.get(output.request_id)
        if flight is None:
            self.counts.late_outputs += 1
            return None
        if output.token_ids and flight.is_paused:
            self.counts.pause.observe(now_s - flight.last_s)
        if not flight.has_begun and output.token_ids and flight.choice is not None:
            waited_s = now_s - flight.sent_s
            found.append((flight.choice, flight.sent, output.cached_tokens, waited_s))
            self._count(*found[-1])
        delivered = flight.accept(output, replica.kind, now_s)
        if flight.is_over:
            self._forget(flight)
        elif flight.has_left:
            self._leave(flight)
            self._move(flight, Moved.DRAINED)
        return delivered

    def _count(self, choice: Choice, submit: Submit, cached_tokens: int, ttft_s: float) -> None:
        if choice.expected_tokens is None:
            return
        self.counts.num_predicted += 1
        self.counts.predicted_tokens += len(submit.token_ids) - choice.expected_tokens
        self.counts.found_tokens += cached_tokens
        self.counts.predicted_ttft_s += choice.expected_ttft_s
        self.counts.real_ttft_s += ttft_s

    def _drain(self, replica: Replica) -> None:
        """A replica takes no more requests, and is about to give up those that it has."""
        with self._lock:
            self.counts.drains += self.roster.drain(replica, self._clock.now())

    def _lose(self, replica: Replica, why: str, moved: Moved = Moved.LOST) -> None:
        """A replica has died: what it had goes on elsewhere."""
        now_s = self._clock.now()
        with self._lock:
            if replica.state is ReplicaState.LOST:
                return
            is_end = replica.state is ReplicaState.DRAINING and not replica.flights
            if not self.roster.lose(replica, why, now_s):
                return
            self.counts.lost += not is_end
            self.counts.silent += moved is Moved.SILENT and not is_end
            flights, replica.flights = list(replica.flights.values()), {}
            for flight in flights:
                flight.replica = None
                verdict = flight.lose(replica.replica_id, has_died=moved is Moved.LOST)
                if verdict is None:
                    self._move(flight, moved)
                else:
                    self._give_up(flight, verdict, now_s)
        level = logging.INFO if is_end else logging.WARNING
        _log.log(level, "replica %s is gone: %s", replica.replica_id, why)
        self._route.leave(replica.replica_id)
        replica.looks.fail(why)
        with contextlib.suppress(RuntimeError):  # all is closed
            self._movers.submit(replica.host.close)


_WHY_LOST = {
    GivenUp.RETRIES: "the replicas that had this request ended one after the other",
    GivenUp.NO_REPLICA: "the replica that had this request has ended, and no other has come",
    GivenUp.FINGERPRINT: "the replica that had this request has ended, and no other has its model",
    GivenUp.NUMERICS: "the replica that had this request has ended, and the others with its model "
    "round numbers in another way: their device or kernels are not the same",
}


def _why(flight: Flight, choice: Choice, candidates: list[Replica]) -> Why:
    if flight.has_begun:
        return Why.RESUME
    if flight.lost_on or flight.attempt > 1:
        return Why.RETRY
    return Why.ONLY if len(candidates) == 1 else choice.why
