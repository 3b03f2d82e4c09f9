"""The process of a rank that is not the driver's: it does what it is told until the driver ends."""

import gc
import os
import pickle
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection

import torch

from hotset.cgroups import usable_cpus
from hotset.garbage import importing
from hotset.parallel import group
from hotset.parallel.collectives import forget_symmetric_memory
from hotset.ranks.facts import machine_facts
from hotset.ranks.messages import Call, Done, Failed, RankReport, Start
from hotset.ranks.rank import Rank, Replay

_POLL_S = 5e-4  # while copies are under way


def main(fd: int) -> None:
    """Be the rank that the other end of a pipe says; never returns."""
    # A signal to the server's process group reaches the driver, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = _Worker(Connection(fd))
    try:
        worker.serve()
    except BaseException as error:
        worker.report(Failed.of(error))
    # Without what Python does at its end: others may wait inside a collective.
    os._exit(0)


class _Worker:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._receive, daemon=True).start()

    def report(self, report: RankReport) -> None:
        """Send a report; from any thread."""
        message = pickle.dumps(report, pickle.HIGHEST_PROTOCOL)
        with self._lock:
            try:
                self._connection.send_bytes(message)
            except OSError:
                os._exit(1)

    def serve(self) -> None:
        """Join the group, load a model, and replay the steps of one engine after another."""
        start: Start = pickle.loads(self._inbox.get())
        sys.path[:] = start.path
        torch.set_num_threads(max(1, usable_cpus() // start.layout.gpus))  # ranks share the cores
        store = group.find_store(start.port, start.layout.gpus, start.timeout_s)
        group.join(store, start.rank, start.layout, start.device, start.timeout_s)
        loaded = None
        while message := self._inbox.get():
            with importing():  # what loads a model; from the next call on it is left alone too
                call: Call = pickle.loads(message)
            if call.is_build:
                rank: Rank = call.function(loaded, *call.arguments)
                self.report(Done({**machine_facts(), **rank.facts}))
                self._replay(rank)
                del rank
                gc.collect()
                if start.device == "cuda":
                    torch.cuda.empty_cache()  # for the next engine
            else:
                loaded = call.function(*call.arguments)
            self.report(Done(machine_facts()))
        forget_symmetric_memory()
        group.leave()

    def _replay(self, rank: Rank) -> None:
        replay = Replay(rank, self.report)
        replay.poll()  # how many host slots are ready
        while True:
            try:
                message = self._inbox.get(timeout=_POLL_S if replay.is_copying else None)
            except queue.Empty:
                pass
            else:
                if not message:  # the driver ends without a word to its engine
                    os._exit(0)
                if not replay.run(message):
                    return
            replay.poll()

    def _receive(self) -> None:
        """Take messages in; end with the driver, whatever this rank waits for."""
        while True:
            try:
                self._inbox.put(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(1)
