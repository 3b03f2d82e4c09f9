"""The process of a rank that is not the driver's: it does what it is told until the driver ends."""

import gc
import os
import pickle
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import NoReturn

import torch

from hotset.garbage import importing
from hotset.parallel import group
from hotset.parallel.collectives import forget_symmetric_memory
from hotset.ranks.facts import machine_facts
from hotset.ranks.messages import START_TIMEOUT_S, Call, Done, Failed, Held, RankReport, Start
from hotset.ranks.peers import join_group
from hotset.ranks.rank import Rank, Replay
from hotset.ranks.torchrun import Place, find_driver, place

_POLL_S = 5e-4  # while copies are under way


def main(fd: int) -> NoReturn:
    """Be the rank that the other end of a pipe says; never returns."""
    _serve(Connection(fd), None)


def serve_driver() -> NoReturn:
    """Be the rank that torchrun's environment says; never returns."""
    here = place()
    assert here is not None
    store = group.torchrun_store(START_TIMEOUT_S)
    _serve(find_driver(store, here, START_TIMEOUT_S), here)


def _serve(connection: Connection, here: Place | None) -> NoReturn:
    # A signal to the server's process group, or of torchrun to all ranks, reaches the driver, which
    # ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker, status = _Worker(connection, here), 0
    try:
        worker.serve()
    except BaseException as error:
        worker.report(Failed.of(error))
        status = 1
    # Without what Python does at its end: others may wait inside a collective.
    os._exit(status)


class _Worker:
    def __init__(self, connection: Connection, here: Place | None) -> None:
        self._connection, self._here = connection, here
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
        if start.attempt:
            store = group.torchrun_store(start.timeout_s, start.attempt)
        else:
            sys.path[:] = start.path
            store = group.find_store(start.port, start.layout.gpus, start.timeout_s)
        join_group(store, start.rank, start.layout, start.device, start.timeout_s, self._here)
        loaded = None
        while message := self._inbox.get():
            with importing():  # what loads a model; from the next call on it is left alone too
                call: Call = pickle.loads(message)
            if call.is_build:
                rank: Rank = call.function(loaded, *call.arguments)
                self.report(Held(rank.meter.read()))
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
