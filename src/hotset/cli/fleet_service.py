"""The replicas of a fleet as a service, for what answers HTTP over them."""

import os
import ssl
from pathlib import Path

from hotset.fleet.directory import Directory
from hotset.fleet.router import ROUTES
from hotset.fleet.service import FleetService
from hotset.fleet.watch import Watcher


def connect_fleet(
    folder: Path, secret: bytes, tls: ssl.SSLContext | None, route: str
) -> FleetService:
    """A service that has its first replica."""
    service = FleetService(ROUTES[route](), front_id=f"front-{os.getpid()}")
    try:
        Watcher(service, Directory(folder), secret, tls).wait()
    except BaseException:
        service.close()
        raise
    return service
