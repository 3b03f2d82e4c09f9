"""Keeps a front connected to the replicas that a directory lists."""

import logging
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hotset.clock import REAL_CLOCK
from hotset.errors import HotsetError
from hotset.fleet.directory import Directory, Entry
from hotset.fleet.link_host import LinkHost
from hotset.fleet.service import FleetService

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
# Between tries to connect to a replica that does not answer: doubled each time.
_FIRST_DELAY_S, _MOST_DELAY_S = 0.5, 8.0
_CONNECTORS = 8  # threads; a replica that hangs takes one for some seconds


@dataclass(slots=True)
class _Try:
    """Tries to connect to a replica."""

    pid: int
    due_s: float = 0.0
    delay_s: float = _FIRST_DELAY_S
    is_running: bool = False


class Watcher:
    """Connects to each replica of a directory that a service has no link to.

    It ends when the service is closed. A link that breaks is for the service to notice; here the
    replica is connected to again while the directory lists it.

    Args:
        service: gets the replicas.
        directory: lists them; while it is out of reach, its last list stands.
        secret: of the fleet.
        tls: how to check the certificates of replicas; None is no TLS.
    """

    def __init__(
        self,
        service: FleetService,
        directory: Directory,
        secret: bytes,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._service, self._directory = service, directory
        self._secret, self._tls = secret, tls
        self._tries: dict[str, _Try] = {}  # by replica id; of this thread, but for `_Try`'s fields
        self._has_replica = threading.Event()
        threading.Thread(target=self._run, name="hotset-watch", daemon=True).start()

    def wait(self) -> None:
        """Wait until the first replica serves. Raises EngineError where the service is closed."""
        while not self._has_replica.wait(_LOOK_EVERY_S):
            self._service.raise_if_closed()

    def _run(self) -> None:
        with ThreadPoolExecutor(_CONNECTORS, "hotset-connect") as pool:
            while not self._service.wait_closed(_LOOK_EVERY_S):
                entries = {entry.replica_id: entry for entry in self._directory.entries()}
                self._tries = {i: one for i, one in self._tries.items() if i in entries}
                for entry in entries.values():
                    if not entry.is_draining and self._is_due(entry):
                        self._tries[entry.replica_id].is_running = True
                        pool.submit(self._connect, entry, self._tries[entry.replica_id])

    def _is_due(self, entry: Entry) -> bool:
        if entry.replica_id in self._service.replica_ids:
            return False
        one = self._tries.get(entry.replica_id)
        if one is None or one.pid != entry.pid:  # another process, which may answer
            one = self._tries[entry.replica_id] = _Try(entry.pid)
        return not one.is_running and one.due_s <= REAL_CLOCK.now()

    def _connect(self, entry: Entry, one: _Try) -> None:
        """In a thread of its own."""
        try:
            self._service.add(
                entry.replica_id,
                lambda on_report: LinkHost(entry.address, self._secret, on_report, tls=self._tls),
                address=entry.address,
            )
        except HotsetError as error:
            level = logging.WARNING if one.delay_s == _FIRST_DELAY_S else logging.DEBUG
            one.due_s = REAL_CLOCK.now() + one.delay_s
            one.delay_s = min(_MOST_DELAY_S, 2 * one.delay_s)
            _log.log(level, "replica %s is not connected: %s", entry.replica_id, error)
        else:
            _log.info("replica %s is connected, at %s", entry.replica_id, entry.address)
            one.due_s, one.delay_s = 0.0, _FIRST_DELAY_S
            self._has_replica.set()
        finally:
            one.is_running = False
