"""Load on a server from processes of their own, so that the client holds up no stream.

Each process has a share of the sessions and plays it in one event loop; all start at the same
moment of the clock that they share (`time.perf_counter`).
"""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from hotset.bench.load_player import SAY_EVERY_S, Asking, Done, Job, serve
from hotset.bench.play import Play
from hotset.bench.workload import Work
from hotset.cgroups import usable_cpus
from hotset.errors import EngineError

_MOST_PROCESSES = 8
_START_IN_S = 0.2


def num_processes(num_sessions: int) -> int:
    """One for two cores, as the server may be on the same machine."""
    return max(1, min(_MOST_PROCESSES, usable_cpus() // 2, num_sessions))


@dataclass(slots=True)
class Played:
    """A run as its client saw it.

    Attributes:
        is_complete: whether all was sent and ended.
        busiest: the largest share of a core that one of the client's processes took.
        cpu_s: what all of them took together.
    """

    play: Play
    wall_s: float
    is_complete: bool
    num_processes: int
    busiest: float
    cpu_s: float


class LoadProcesses:
    """Processes that send work; close them."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share locks and sockets
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), name="hotset-load", daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            pipe.close()
            process.kill()
            process.join()

    def play(
        self,
        asking: Asking,
        work: Work,
        *,
        max_s: float | None = None,
        progress: Callable[[Play, float], None] = lambda play, now_s: None,
    ) -> Played:
        """Send the work and wait for its end.

        Where the server gives no token ids, later turns send random stand-ins in place of the
        answers' tokens. A request that fails ends its session; it is told in its record.

        Raises:
            EngineError: one of the processes has ended.
        """
        pipes = self._pipes[: len(work.sessions)]
        for i, pipe in enumerate(pipes):
            mine = list(range(i, len(work.sessions), len(pipes)))
            share = replace(work, sessions=tuple(work.sessions[s] for s in mine), prefixes=())
            self._send(pipe, Job(asking, share, mine, max_s))
        for pipe in pipes:
            self._receive(pipe)  # it has its first requests ready
        start_s = time.perf_counter() + _START_IN_S
        for pipe in pipes:
            self._send(pipe, start_s)
        play, ended = Play(work), dict.fromkeys(range(len(pipes)), 0)
        done: dict[int, Done] = {}
        while len(done) < len(pipes):
            left = {pipe: i for i, pipe in enumerate(pipes) if i not in done}
            for ready in wait(list(left), timeout=SAY_EVERY_S):
                i = left[cast(Connection, ready)]
                said = self._receive(pipes[i])
                if isinstance(said, Done):
                    done[i] = said
                else:
                    ended[i] = said
            play.num_ended = sum(ended.values())
            progress(play, max(0.0, time.perf_counter() - start_s))
        return _merged(play, [done[i] for i in range(len(pipes))])

    def _send(self, pipe: Connection, message: object) -> None:
        try:
            pipe.send(message)
        except OSError as error:
            raise EngineError("a process of the client has ended") from error

    def _receive(self, pipe: Connection) -> Any:
        try:
            said = pipe.recv()
        except (EOFError, OSError) as error:
            raise EngineError("a process of the client has ended") from error
        if isinstance(said, Exception):
            raise said
        return said


def _merged(play: Play, parts: list[Done]) -> Played:
    for part in parts:
        play.records += part.records
        play.gaps_s.extend(part.gaps_s)
    play.records.sort(key=lambda record: (record.sent_s, record.session))
    ended = [record for record in play.records if record.end_s is not None]
    good = [record for record in ended if record.error is None]
    play.num_ended, play.num_failed = len(ended), len(ended) - len(good)
    play.prompt_tokens = sum(record.prompt_tokens for record in good)
    play.output_tokens = sum(record.num_tokens for record in good)
    return Played(
        play,
        max(part.wall_s for part in parts),
        all(part.is_complete for part in parts),
        len(parts),
        max(part.cpu_s / max(1e-9, part.wall_s) for part in parts),
        sum(part.cpu_s for part in parts),
    )
