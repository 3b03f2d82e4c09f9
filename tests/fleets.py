"""A front over replicas in threads of this process, which die and drain when a test says so."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from servers import build

from hotset.engine.loop import EngineLoop
from hotset.engine.messages import BuildEngine, Report, Submit
from hotset.fleet.address import Address
from hotset.fleet.directory import Entry, Registration
from hotset.fleet.listener import Listener
from hotset.fleet.route import RoundRobin, Route
from hotset.fleet.service import FleetService
from hotset.fleet.wire import VERSIONS
from hotset.metrics import Metrics
from hotset.options import Options
from hotset.request import FinishReason, RequestOutput
from hotset.secret import own_secret

OnReport = Callable[[Report], None]


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(4000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen")


class Mortal:
    """An engine in a thread, and the link to it, which can be cut.

    Attributes:
        loop: goes on behind a cut link, as a replica does until it notices.
        late: what it reported since.
        edit: what becomes of its reports before they arrive.
    """

    def __init__(
        self, on_report: OnReport, options: Options | None = None, build: BuildEngine = build
    ) -> None:
        self._on_report, self._lock = on_report, threading.Lock()
        self._is_cut = False
        self.late: list[Report] = []
        self.edit: Callable[[Report], Report] = lambda report: report
        self.loop = EngineLoop(options or Options.of(hot_gib=0.01), build, self._take)
        self.model, self.info = self.loop.model, self.loop.info
        self.follow, self.drain = self.loop.follow, self.loop.drain
        self.submit: Callable[[Submit], None] = self.loop.submit
        self.abort, self.look = self.loop.abort, self.loop.look

    def _take(self, report: Report) -> None:
        with self._lock:
            if self._is_cut:
                self.late.append(report)
            else:
                self._on_report(self.edit(report))

    @property
    def is_alive(self) -> bool:
        return not self._is_cut and self.loop.is_alive

    @property
    def metrics(self) -> Metrics:
        return self.loop.metrics

    def cut(self, *, aborts: bool = False, is_silent: bool = False) -> None:
        """The front hears no more of it; with `aborts` it ends its requests, as links do."""
        with self._lock:
            if self._is_cut:
                return
            self._is_cut = True
        self._on_report(Report(0.0, failure="the link was cut", is_silent=is_silent))
        for request_id in list(self.loop._entries) if aborts else ():
            self.loop.abort(request_id)

    def hold(self) -> None:
        """It accepts requests from now on, and does nothing with them."""
        self.submit = lambda submit: None

    def replay(self) -> None:
        """What the replica said behind the cut arrives after all."""
        for report in self.late:
            self._on_report(replace(report, failure=None))

    def close(self) -> None:
        """A front closes its link; the engine ends with the test."""


class Fleet:
    """A front with replicas of one tiny model, their ids `r0`, `r1` and so on."""

    def __init__(self, route: Route | None = None, *, wait_s: float = 20.0, **options: Any) -> None:
        self.service = FleetService(route or RoundRobin(), wait_s=wait_s)
        self.options = Options.of(**{"hot_gib": 0.01, **options})
        self.hosts: list[Mortal] = []

    def add(self, build: BuildEngine = build) -> Mortal:
        """One more replica."""

        def connect(on_report: OnReport) -> Mortal:
            self.hosts.append(Mortal(on_report, self.options, build))
            return self.hosts[-1]

        self.service.add(f"r{len(self.hosts)}", connect)
        return self.hosts[-1]

    def close(self) -> None:
        self.service.close()
        for host in self.hosts:
            host.loop.close()

    def check(self) -> None:
        """Nothing is open, and no replica holds a block, whatever it died of."""
        dispatcher = self.service._dispatcher
        assert not self.service._streams and not dispatcher._flights and not dispatcher._waiting
        assert not any(
            replica.flights for replica in [*dispatcher.roster.connected, *dispatcher.roster.lost]
        )
        for host in self.hosts:
            pool = host.loop._engine.kv.pool
            assert pool.num_held == 0
            host.loop._engine.kv.check()


@contextlib.contextmanager
def fleet(num: int, route: Route | None = None, **options: Any) -> Iterator[Fleet]:
    """A front with `num` replicas."""
    with contextlib.closing(Fleet(route, **options)) as made:
        for _ in range(num):
            made.add()
        yield made


class LinkedReplica:
    """A replica with an entry and a listener, over an engine in a thread."""

    def __init__(self, folder: Path, replica_id: str, options: Options | None = None) -> None:
        self.secret = own_secret(folder)
        address = Address(path=str(folder / f"{replica_id}.sock"))
        self.listener = Listener(address, self.secret, replica_id=replica_id)
        options = options or Options.of(hot_gib=0.01)
        self.host = EngineLoop(options, build, self.listener.take_report)
        self.listener.serve(self.host)
        at = str(self.listener.address)
        info, model = self.host.info, self.host.model
        entry = Entry(
            replica_id, at, os.getpid(), model.name, model.fingerprint, info.fingerprint, VERSIONS
        )
        self.registration = Registration(folder, entry)

    def close(self) -> None:
        self.registration.close()
        self.listener.close()
        self.host.close()


class Moving:
    """Has a replica give up each request after its `every` tokens, as one that drains does."""

    def __init__(self, host: Mortal, every: int) -> None:
        self._host, self._every = host, every
        self._left: dict[str, int] = {}
        self._open: dict[str, set[int]] = {}
        submit = host.submit

        def note(one: Submit) -> None:
            if one.request_id not in self._left:
                indices = {resumed.index for resumed in one.resumed} or set(range(one.params.n))
                self._left[one.request_id] = every * len(indices)
                self._open[one.request_id] = indices
            submit(one)

        host.submit, host.edit = note, self._edit

    def _edit(self, report: Report) -> Report:
        outputs: list[RequestOutput] = []
        for output in report.outputs:
            left = self._open.get(output.request_id)
            if left is None:  # it was given up
                continue
            outputs.append(output)
            if output.finish_reason is not None:
                left.discard(output.index)
            self._left[output.request_id] -= len(output.token_ids)
        for request_id in {output.request_id for output in outputs}:
            if self._left[request_id] <= 0:
                for index in self._open.pop(request_id):
                    outputs.append(RequestOutput(request_id, index, "", (), FinishReason.MOVED))
                self._host.loop.abort(request_id)
        return replace(report, outputs=outputs)
