"""Threads that run a tier's blocking transfers, with a bound on how long one may queue."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hotset.clock import REAL_CLOCK, Clock
from hotset.memory.mailbox import Mailbox


@dataclass(eq=False, slots=True)
class Job:
    """One transfer. A worker fills in the last three before it hands the job back."""

    transfer_id: int
    key: bytes
    slot: int
    buffer: memoryview
    submitted_s: float
    checksum: int = 0  # expected (read) or computed (write)
    ok: bool = False
    service_s: float = 0.0
    faults: list[str] = field(default_factory=list)


class IoQueue:
    """First in, first out, over a few threads; every job put in ends in the mailbox.

    A job that no thread took up within `limit_s` ends there as not ok, with the fault
    `expired_fault`. The threads are daemons: one stuck in a dead disk does not keep the process.

    Args:
        name: of the threads.
        run: does the transfer in a worker, adds to `job.faults`, returns whether it succeeded.
            What it raises ends the job as not ok.
        idle: called from a worker when there was nothing to do for a while.
        clock: of waits and of `Job.service_s`.
    """

    _IDLE_S = 0.2

    def __init__(
        self,
        name: str,
        *,
        num_threads: int,
        limit_s: float,
        expired_fault: str,
        run: Callable[[Job], bool],
        mailbox: Mailbox[Job],
        idle: Callable[[], None] | None = None,
        clock: Clock = REAL_CLOCK,
    ) -> None:
        self.num_threads = num_threads
        self._limit_s = limit_s
        self._expired_fault = expired_fault
        self._run = run
        self._mailbox = mailbox
        self._idle = idle
        self._clock = clock
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        """Jobs no thread has taken up yet."""
        return len(self._jobs)

    def queued_slots(self, limit: int) -> list[int]:
        """The slots of the first jobs waiting."""
        with self._changed:
            return [self._jobs[index].slot for index in range(min(limit, len(self._jobs)))]

    def submit(self, job: Job) -> None:
        """Put a job in."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def expire(self) -> None:
        """End the jobs that have waited too long."""
        with self._changed:
            self._expire()

    def drop_all(self) -> None:
        """End every job not taken up, as if it had waited too long."""
        with self._changed:
            while self._jobs:
                self._drop_first()

    def next_expiry_s(self) -> float | None:
        """When the first job waiting will have waited too long."""
        with self._changed:
            return self._jobs[0].submitted_s + self._limit_s if self._jobs else None

    def close(self, timeout_s: float) -> bool:
        """Drop what waits and stop the threads; whether they all stopped in time."""
        self.drop_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline_s = REAL_CLOCK.now() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - REAL_CLOCK.now()))
        return not any(thread.is_alive() for thread in self._threads)

    def _drop_first(self) -> None:
        job = self._jobs.popleft()
        job.faults.append(self._expired_fault)
        self._mailbox.put(job)

    def _expire(self) -> None:
        expired_s = self._clock.now() - self._limit_s
        while self._jobs and self._jobs[0].submitted_s < expired_s:
            self._drop_first()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs and not self._closed:
                    self._changed.wait(self._IDLE_S if self._idle else None)
                self._expire()
                job = self._jobs.popleft() if self._jobs else None
                if job is None and self._closed:
                    return
            if job is not None:
                self._finish(job)
                job = None  # while waiting, it would keep the caller's buffer alive
            elif self._idle is not None:
                self._idle()

    def _finish(self, job: Job) -> None:
        started_s = self._clock.now()
        try:
            job.ok = self._run(job)
        except Exception as error:  # a thread that died would leave its callers waiting for ever
            job.faults.append(f"disk_{type(error).__name__}")
        job.service_s = self._clock.now() - started_s
        self._mailbox.put(job)
