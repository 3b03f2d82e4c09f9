"""The other ranks' processes as the driver has them: on this host started by it, or by torchrun."""

import contextlib
import os
import pickle
import secrets
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Protocol

import torch
from torch._C._distributed_c10d import Store

from hotset.cgroups import usable_cpus
from hotset.layout import Layout
from hotset.parallel import group
from hotset.ranks.messages import Start
from hotset.ranks.torchrun import Meeting, Place, cut

_CAUSE_S = 1.0
_WORKER = """
from hotset.garbage import importing
with importing():
    from hotset.ranks.worker import main
main({})
"""


class Peer(Protocol):
    """One other rank.

    Attributes:
        connection: to it; ends with its process.
    """

    connection: Connection

    def kill(self) -> None:
        """End it, whatever it waits for."""

    def end(self, timeout_s: float) -> None:
        """Wait for its end, and kill it after this time."""

    def how_it_ended(self) -> str:
        """What to say of it when the connection has ended."""
        ...


class Spawned:
    """See `Peer`. A process that this one has started.

    Args:
        start: what it is told first.
    """

    def __init__(self, start: Start) -> None:
        self.connection, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, start.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER.format(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        self.connection.send_bytes(pickle.dumps(start))

    def kill(self) -> None:
        """See `Peer`."""
        self._process.kill()

    def end(self, timeout_s: float) -> None:
        """See `Peer`."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def how_it_ended(self) -> str:
        """See `Peer`."""
        try:
            code = self._process.wait(_CAUSE_S)
        except subprocess.TimeoutExpired:
            return "its process has closed its connection"
        if code < 0:
            return f"its process has been ended by signal {-code} ({signal.strsignal(-code)})"
        return f"its process has ended with status {code}"


class Connected:
    """See `Peer`. A process that torchrun has started, which ends with the connection.

    Args:
        connection: to it.
        host: its name.
    """

    def __init__(self, connection: Connection, host: str) -> None:
        self.connection, self._host = connection, host

    def kill(self) -> None:
        """See `Peer`."""
        with contextlib.suppress(OSError):
            cut(self.connection)

    def end(self, timeout_s: float) -> None:
        """See `Peer`. The driver's thread that receives sees the end of the connection."""
        timer = threading.Timer(timeout_s, self.kill)
        timer.daemon = True
        timer.start()

    def how_it_ended(self) -> str:
        """See `Peer`."""
        return f"its process on {self._host} has ended, or that host cannot be reached"


def join_group(
    store: Store, rank: int, layout: Layout, device: str, timeout_s: float, here: Place | None
) -> None:
    """Become one of the ranks; returns when all have. `here` is where torchrun has put this one."""
    num_local = layout.gpus if here is None else here.num_local
    torch.set_num_threads(max(1, usable_cpus() // num_local))  # ranks of a host share the cores
    if here is None:
        group.join(store, rank, layout, device, timeout_s)
        return
    group.join(
        store,
        rank,
        layout,
        device,
        timeout_s,
        local_rank=here.local_rank,
        num_hosts=here.num_hosts,
        is_on_loopback=here.is_on_loopback,
    )


def start_peers(layout: Layout, device: str, timeout_s: float) -> tuple[Store, dict[int, Peer]]:
    """Start the ranks 1 to N - 1 on this host; the store is where all find each other."""
    store = group.serve_store(layout.gpus, timeout_s)
    peers: dict[int, Peer] = {
        rank: Spawned(Start(tuple(sys.path), rank, layout, device, store.port, "", timeout_s))
        for rank in range(1, layout.gpus)
    }
    return store, peers


def meet_peers(
    layout: Layout, here: Place, device: str, timeout_s: float
) -> tuple[Store, dict[int, Peer]]:
    """Wait for the ranks that torchrun has started.

    Raises:
        EngineError: some have not come.
    """
    meeting = Meeting(group.torchrun_store(timeout_s), here)
    found, attempt = meeting.wait(timeout_s), secrets.token_hex(8)
    for rank, (connection, _) in found.items():
        start = Start((), rank, layout, device, 0, attempt, timeout_s)
        connection.send_bytes(pickle.dumps(start))
    peers: dict[int, Peer] = {rank: Connected(*each) for rank, each in found.items()}
    return group.torchrun_store(timeout_s, attempt), peers
