"""The other ranks' processes, as the driver has them: started, told, watched and ended.

What one of them fails at ends all: the others wait for it inside a collective, which cannot be
taken back. Which one it was, and why, is one line.
"""

import contextlib
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch

from hotset.errors import ConfigError, EngineError, HotsetError
from hotset.layout import Layout
from hotset.parallel import group
from hotset.parallel.collectives import forget_symmetric_memory
from hotset.ranks.facts import first_difference
from hotset.ranks.log import Array, Op, command
from hotset.ranks.messages import START_TIMEOUT_S, Call, Done, Failed, RankReport, Stepped
from hotset.ranks.peers import join_group, meet_peers, start_peers
from hotset.ranks.torchrun import Place, place

T = TypeVar("T")
Taker: TypeAlias = Callable[[int, RankReport], None]

_log = logging.getLogger(__name__)

# How long the driver's own error may wait for the one of another rank that caused it, and a rank's
# error for the end of another one's process.
_CAUSE_S = 1.0
_ENDED_S = 0.25
# How long a rank may take to end by itself.
_END_S = 5.0
_LOOK_EVERY_S = 0.1


def _exit(line: str) -> None:
    """End this process, in which a thread may wait for ever."""
    _log.error("%s", line)
    os._exit(1)


# What is done when a rank has failed and no thread of this process may be able to tell.
on_failure: Callable[[str], None] = _exit


class Ranks:
    """The processes of ranks 1 to N - 1; this process is rank 0.

    They are started on this host, or torchrun has started them on any.

    Args:
        layout: how N ranks share a model.
        device: `cpu` or `cuda`; a GPU for each rank.
        step_timeout_s: how long a step may take on any rank.

    Attributes:
        failure: names the rank that has failed; None while none has.
        is_in_step: whether rank 0 is launching a step.

    Raises:
        ConfigError: there are fewer GPUs.
        EngineError: a rank has ended while it started.
    """

    def __init__(self, layout: Layout, device: str, *, step_timeout_s: float) -> None:
        here = place()
        _check_gpus(layout, device, here)
        self.size, self._step_timeout_s = layout.gpus, step_timeout_s
        self.failure: str | None = None
        self._takers: list[Taker] = []
        self._early: list[tuple[int, RankReport]] = []  # before there were takers; by _changed
        self._changed = threading.Condition()
        self._done: dict[int, list[dict[str, str]]] = {rank: [] for rank in range(1, layout.gpus)}
        self._num_stepped = dict.fromkeys(self._done, 0)
        self._num_steps = 0
        self._due_s: float | None = None  # of the step that the driver waits for
        self.is_in_step = False
        self._is_serving = self._is_closing = False
        self._send_lock = threading.Lock()
        if here is None:
            store, self._peers = start_peers(layout, device, START_TIMEOUT_S)
        else:
            store, self._peers = meet_peers(layout, here, device, START_TIMEOUT_S)
        self._threads = [
            threading.Thread(target=self._receive, args=(rank,), name=f"rank-{rank}", daemon=True)
            for rank in self._done
        ]
        self._threads.append(threading.Thread(target=self._watch, name="rank-watch", daemon=True))
        for thread in self._threads:
            thread.start()
        try:
            with self._naming():
                join_group(store, 0, layout, device, START_TIMEOUT_S, here)
        except BaseException:
            self.close(is_orderly=False)
            raise

    # At start

    def load(self, function: Callable[..., T], *arguments: Any) -> T:
        """Have all ranks call `function`, which loads this rank's part of a model.

        Raises:
            EngineError: another rank has failed.
        """
        return self._call(Call(function, arguments, is_build=False), lambda: function(*arguments))

    def build(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], own: Callable[[], T]
    ) -> T:
        """Have the other ranks call `function(loaded, *arguments)` while this one calls `own`.

        They replay commands from then on, see `send`.
        """
        with self._changed:
            self._takers, self._early = [], []
        built = self._call(Call(function, arguments, is_build=True), own)
        with self._changed:
            self._num_stepped = dict.fromkeys(self._done, 0)
            self._num_steps = 0
            self._is_serving = True
        return built

    def check_facts(self, facts: dict[str, str]) -> None:
        """Compare what rank 0 has with what the others said after their last call.

        Raises:
            ConfigError: something differs.
        """
        with self._changed:
            for rank, done in self._done.items():
                if line := first_difference(facts, rank, done[-1]):
                    raise ConfigError(line)

    def _call(self, call: Call, own: Callable[[], T]) -> T:
        assert not self._is_serving, "an engine runs on these ranks; close it first"
        with self._changed:
            expected = {rank: len(done) + 1 for rank, done in self._done.items()}
        self._send(pickle.dumps(call))
        with self._naming():
            result = own()
        self._wait_done(expected)
        return result

    def _wait_done(self, expected: dict[int, int]) -> None:
        def late() -> list[int]:
            return [rank for rank, count in expected.items() if len(self._done[rank]) < count]

        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or not late(), START_TIMEOUT_S)
            if self.failure is not None:
                raise EngineError(self.failure)
            if ranks := late():
                raise EngineError(f"rank {ranks[0]}: no answer for {START_TIMEOUT_S:g} seconds")

    # While it serves

    def listen(self, takers: Sequence[Taker]) -> None:
        """Have these take each report, with its rank, from threads of this; those so far too."""
        with self._changed:
            self._takers = list(takers)
            early, self._early = self._early, []
            for rank, report in early:
                for take in self._takers:
                    take(rank, report)

    def send(self, *commands: Array, ranks: Sequence[int] | None = None) -> None:
        """Have some of the other ranks, or all, run commands; any thread may call it."""
        self._send(b"".join(array.tobytes() for array in commands), ranks)

    @contextlib.contextmanager
    def step(self, commands: Sequence[Sequence[Array]]) -> Iterator[None]:
        """Send a step, one for all or one for each; within it rank 0 launches its own."""
        self._num_steps += 1
        for rank, own in enumerate(commands, start=1):
            self.send(*own, ranks=[rank] if len(commands) > 1 else None)
        self.is_in_step = True
        try:
            with self.waiting():
                yield
        finally:
            self.is_in_step = False

    @contextlib.contextmanager
    def waiting(self, most_s: float | None = None) -> Iterator[None]:
        """Within it rank 0 may wait for the others, `most_s` or as long as a step may take.

        Raises:
            EngineError: a rank has failed, this one or another.
        """
        self._due_s = time.monotonic() + (most_s or self._step_timeout_s)
        try:
            with self._naming():
                yield
        finally:
            self._due_s = None

    def end(self) -> None:
        """Have the ranks end what they built, and wait for that; idempotent."""
        if self.failure is not None or not self._is_serving:
            return
        with self._changed:
            expected = {rank: len(done) + 1 for rank, done in self._done.items()}
            self._is_serving = False
        self.send(command(Op.END))
        with self.waiting():
            self._wait_done(expected)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Within it an error of this rank names it, or the rank that caused it."""
        try:
            yield
        except HotsetError:
            raise
        except Exception as error:
            with self._changed:  # a collective fails because another rank has
                self._changed.wait_for(lambda: self.failure is not None, _CAUSE_S)
                self.failure = self.failure or f"rank 0: {Failed.of(error).line}"
            raise EngineError(self.failure) from error

    def close(self, *, is_orderly: bool = True) -> None:
        """End the other ranks and leave the group; idempotent.

        Not orderly where another rank may have ended already: leaving would wait for it.
        """
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
        forget_symmetric_memory()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.connection.send_bytes(b"")
        deadline_s = time.monotonic() + _END_S
        with contextlib.suppress(Exception):
            group.leave(is_orderly=is_orderly and self.failure is None)
        for peer in self._peers.values():
            peer.end(max(0.0, deadline_s - time.monotonic()))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        for peer in self._peers.values():
            peer.connection.close()

    def _send(self, message: bytes, ranks: Sequence[int] | None = None) -> None:
        with self._send_lock:
            for rank in self._peers if ranks is None else ranks:
                peer = self._peers[rank]
                try:
                    peer.connection.send_bytes(message)
                except OSError:
                    self.fail(rank, peer.how_it_ended())

    # In threads of their own

    def _receive(self, rank: int) -> None:
        peer = self._peers[rank]
        while True:
            try:
                report: RankReport = pickle.loads(peer.connection.recv_bytes())
            except (EOFError, OSError):
                if not self._is_closing:
                    self.fail(rank, peer.how_it_ended())
                return
            if isinstance(report, Failed):
                with self._changed:  # a collective fails because another rank has ended
                    self._changed.wait_for(lambda: self.failure is not None, _ENDED_S)
                self.fail(rank, report.line)
                return
            with self._changed:
                if isinstance(report, Done):
                    self._done[rank].append(report.facts)
                elif isinstance(report, Stepped):
                    self._num_stepped[rank] = report.num_steps
                self._changed.notify_all()
                if not self._takers:
                    self._early.append((rank, report))
                takers = list(self._takers)
            for take in takers:
                take(rank, report)

    def _watch(self) -> None:
        """Look for a step that takes too long."""
        while not self._is_closing and self.failure is None:
            time.sleep(_LOOK_EVERY_S)
            due_s = self._due_s
            if due_s is None or time.monotonic() < due_s or not self._is_serving:
                continue
            late = [rank for rank, count in self._num_stepped.items() if count < self._num_steps]
            self.fail(
                late[0] if late else 0, f"no step has ended for {self._step_timeout_s:g} seconds"
            )

    def fail(self, rank: int, line: str) -> None:
        """Take a rank for failed; while it serves, the process ends. Any thread may call it."""
        with self._changed:
            if self._is_closing or self.failure is not None:
                return
            self.failure = f"rank {rank}: {line}"
            self._changed.notify_all()
        if self._is_serving:
            self._kill()
            on_failure(self.failure)
        else:
            # The driver's thread may wait inside a collective, which ends with the processes on a
            # CPU. On a GPU nothing ends it.
            threading.Thread(target=self._end_start, args=(self.failure,), daemon=True).start()

    def _end_start(self, line: str) -> None:
        time.sleep(_CAUSE_S)
        self._kill()
        time.sleep(_END_S)
        if not self._is_closing:
            on_failure(line)

    def _kill(self) -> None:
        for peer in self._peers.values():
            peer.kill()


def _check_gpus(layout: Layout, device: str, here: Place | None) -> None:
    if device != "cuda":
        return
    count = torch.cuda.device_count()
    if here is None and count < layout.gpus:
        raise ConfigError(
            f"{layout} needs {layout.gpus} GPUs and this machine has {count}; give less, or start "
            "the others with torchrun"
        )
    if here is not None and count < here.num_local:
        raise ConfigError(
            f"torchrun started {here.num_local} processes on this host, which has {count} GPUs; "
            f"give --nproc-per-node {count} or less"
        )
