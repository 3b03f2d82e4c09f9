"""A replica in this process, and fronts with real links to it."""

import queue
import ssl

from tiny_engine import build

from hotset.engine.loop import EngineLoop
from hotset.engine.messages import Report
from hotset.fleet.address import Address
from hotset.fleet.link_host import LinkHost
from hotset.fleet.listener import Listener
from hotset.options import Options
from hotset.request import RequestOutput

SECRET = b"0123456789abcdef"


class Replica:
    """A listener over an engine of its own."""

    def __init__(self, address: Address, tls: ssl.SSLContext | None = None) -> None:
        self.listener = Listener(address, SECRET, replica_id="r1", tls=tls)
        self.address = str(self.listener.address)
        self.host = EngineLoop(Options.of(hot_gib=0.01), build, self.listener.take_report)
        self.listener.serve(self.host)

    def close(self) -> None:
        self.listener.close()
        self.host.close()


class Front:
    """A link, and what it reports."""

    def __init__(
        self, address: str, secret: bytes = SECRET, tls: ssl.SSLContext | None = None
    ) -> None:
        self.reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.host = LinkHost(address, secret, self.reports.put, tls=tls)

    def outputs(self, *request_ids: str) -> list[RequestOutput]:
        """All until the last of each request."""
        found: list[RequestOutput] = []
        left = set(request_ids)
        while left:
            report = self.reports.get(timeout=30)
            assert report.failure is None
            found += report.outputs
            left -= {one.request_id for one in report.outputs if one.finish_reason is not None}
        return found
