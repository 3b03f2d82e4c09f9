"""One process of the load: it plays its share of the sessions in one event loop."""

import asyncio
import gc
import json
import random
import re
import signal
import ssl
import sys
import time
from array import array
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from hotset.bench.events import ids_of, read_answer
from hotset.bench.http_stream import BrokenStreamError, Client, Endpoint, RawAnswer
from hotset.bench.play import Due, Play, Record
from hotset.bench.workload import Work
from hotset.errors import EngineError

SAY_EVERY_S = 0.5
_MOST_KEPT_BYTES = 256 * 2**20  # of raw answers; what comes then is read at once
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True, slots=True)
class Asking:
    """How a server is asked.

    Attributes:
        model: its name there.
        gives_ids: whether it is asked for the ids of its answers' tokens.
        token_range: of the random tokens that stand in for an answer without ids.
    """

    endpoint: Endpoint
    model: str
    gives_ids: bool
    token_range: tuple[int, int]

    def body(self, prompt: list[int], max_tokens: int, temperature: float = 0.0) -> dict[str, Any]:
        """A request that is answered in exactly `max_tokens` tokens."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,  # no seed: some servers are slower with one
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.gives_ids:
            body["return_token_ids"] = True
        return body


@dataclass(frozen=True, slots=True)
class Job:
    """One process's share of a run; `sessions` are the numbers of its sessions in the whole."""

    asking: Asking
    work: Work
    sessions: list[int]
    max_s: float | None


@dataclass(slots=True)
class Done:
    """What a process has seen; the records' sessions are those of the whole work."""

    records: list[Record]
    gaps_s: "array[float]"
    wall_s: float
    is_complete: bool
    cpu_s: float


def serve(pipe: Connection) -> None:
    """A process's main function: jobs, until the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    run = asyncio.run
    if sys.platform != "win32":
        import uvloop

        run = uvloop.run
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send(run(_Player(job, pipe).play()))
        except (EOFError, OSError):
            return
        except Exception as error:
            pipe.send(EngineError(f"the client has failed: {type(error).__name__}: {error}"))


class _Player:
    """Plays one share of a run."""

    def __init__(self, job: Job, pipe: Connection) -> None:
        self._job = job
        self._pipe = pipe
        self._play = Play(job.work)
        self._client = Client(job.asking.endpoint, make_tls=ssl.create_default_context)
        self._changed = asyncio.Event()
        self._answers: list[tuple[Due, RawAnswer]] = []  # not read yet
        self._kept_bytes = 0
        self._start_s = 0.0

    async def play(self) -> Done:
        """Send the share, from the moment that the parent names; returns what was seen."""
        play, max_s = self._play, self._job.max_s
        first = []
        while (due := play.take_due(0.0)) is not None:
            first.append((due, self._request(due)))
        self._pipe.send(None)
        self._start_s = self._pipe.recv()
        await asyncio.sleep(max(0.0, self._start_s - time.perf_counter()))
        gc.collect()
        gc.freeze()
        gc.disable()
        cpu_s = time.process_time()
        tasks = {asyncio.create_task(self._send(due, request)) for due, request in first}
        said_s, is_complete = 0.0, True
        while not play.is_over:
            elapsed_s = time.perf_counter() - self._start_s
            if max_s is not None and elapsed_s > max_s:
                is_complete = False
                break
            while (due := play.take_due(elapsed_s)) is not None:
                tasks.add(asyncio.create_task(self._send(due, self._request(due))))
            if elapsed_s - said_s > SAY_EVERY_S:
                said_s = elapsed_s
                self._pipe.send(play.num_ended)
                tasks = {task for task in tasks if not task.done()}
            await self._wait(play.next_arrival_s(), elapsed_s)
        wall_s = time.perf_counter() - self._start_s
        cpu_s = time.process_time() - cpu_s
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._client.close()
        gc.enable()
        self._read_answers()
        for record in play.records:
            record.session = self._job.sessions[record.session]
        return Done(play.records, play.gaps_s, wall_s, is_complete, cpu_s)

    async def _wait(self, arrival_s: float | None, elapsed_s: float) -> None:
        """Until a request has ended, or the next session arrives, or a while."""
        wait_s = SAY_EVERY_S
        if arrival_s is not None:
            wait_s = min(wait_s, max(0.0, arrival_s - elapsed_s))
        self._changed.clear()
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def _request(self, due: Due) -> bytes:
        body = self._job.asking.body(due.prompt, due.output_tokens, self._play.work.temperature)
        return json.dumps(body).encode()

    async def _send(self, due: Due, request: bytes) -> None:
        record = due.record
        error: str | None = "broken off"
        end_s: float | None = None
        try:
            answer = await self._client.post(request)
            end_s = answer.end_s
            error = self._take(due, answer)
        except BrokenStreamError as problem:
            error = str(problem)
        except Exception as bug:  # an event that is like none known, say
            error = f"{type(bug).__name__}: {bug}"
        finally:
            self._play.on_end(record, (end_s or time.perf_counter()) - self._start_s, error)
            self._changed.set()

    def _take(self, due: Due, answer: RawAnswer) -> str | None:
        """Keep an answer to be read later; returns what went wrong, as far as its bytes show."""
        body = answer.body
        looks_wrong = answer.status != 200 or b'"error":' in body or b"[DONE]" not in body[-64:]
        if looks_wrong and (reading := read_answer(answer)).error is not None:
            return reading.error
        record = due.record
        if self._is_continued(record):
            record.token_ids = self._ids_of(due, body)
        self._answers.append((due, answer))
        self._kept_bytes += len(body)
        if self._kept_bytes > _MOST_KEPT_BYTES:
            self._read_answers()
        return None

    def _is_continued(self, record: Record) -> bool:
        session = self._play.work.sessions[record.session]
        number = record.turn - session.first_turn + 1
        return number < len(session.turns) and session.turns[number].extends

    def _ids_of(self, due: Due, body: bytes) -> "array[int]":
        """The tokens that the next turn sends back: the answer's, or as many random ones."""
        told = _USAGE.findall(body[-2048:])
        count = int(told[-1]) if told else due.output_tokens
        ids = ids_of(body) if self._job.asking.gives_ids else []
        return array("i", ids) if len(ids) == count else self._stand_ins(due.record, count)

    def _stand_ins(self, record: Record, count: int) -> "array[int]":
        rng = random.Random(f"{self._job.sessions[record.session]}/{record.turn}")
        return array("i", rng.choices(range(*self._job.asking.token_range), k=count))

    def _read_answers(self) -> None:
        """Fill in the records of the answers that are kept."""
        for due, answer in self._answers:
            record = due.record
            record.token_ids = array("i")  # those that the next turn sent are found again
            reading = read_answer(answer)
            if reading.error is not None:
                record.error = reading.error
                continue
            for time_s, ids in reading.outputs or [(answer.end_s, ())]:
                self._play.on_tokens(record, ids, time_s - self._start_s)
            told = reading.num_tokens
            record.num_tokens = due.output_tokens if told is None else told
            if len(record.token_ids) != record.num_tokens:
                record.token_ids = self._stand_ins(record, record.num_tokens)
        self._answers.clear()
        self._kept_bytes = 0
