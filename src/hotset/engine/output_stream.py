"""The outputs of one request, from the engine's threads to one reader. Imports no torch."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Generator
from typing import Protocol

from hotset.engine.latency import RequestClock
from hotset.request import FinishReason, RequestOutput

# How often a reader that waits looks whether there still is an engine to wait for.
_LOOK_EVERY_S = 2.0


class StreamSource(Protocol):
    """What a stream asks of the service that it is from; see `EngineService`."""

    @property
    def is_forked(self) -> bool:
        """Whether this process has no engine, as a fork of the one that has."""
        ...

    def raise_unless_healthy(self) -> None:
        """Raise EngineError where nothing can run."""
        ...

    def look_for_engine(self) -> None:
        """End all streams where the engine has gone."""
        ...

    def abort(self, request_id: str) -> None:
        """Stop a request."""
        ...


class OutputStream:
    """The outputs of one request, in order, for one reader: a thread or a task.

    Iterate it, with `for` or `async for`; the last output of each of the `n` indices has a
    finish reason. Leaving the iteration early (break, an exception, a cancelled task) aborts the
    request. Outputs wait here for a slow reader, joined to one for each index; the engine never
    waits.
    """

    def __init__(self, service: StreamSource, request_id: str, n: int, clock: RequestClock) -> None:
        self.request_id = request_id
        self.clock = clock
        self._service = service
        self._condition = threading.Condition()
        self._is_aborted = False
        self._outputs: dict[int, RequestOutput] = {}  # by index; not read yet
        self._unfinished = set(range(n))
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def is_aborted(self) -> bool:
        """Whether its reader stopped it. Any other end as aborted is the engine's doing."""
        return self._is_aborted

    @property
    def is_over(self) -> bool:
        """Whether every index has its last output, be it read or not."""
        return not self._unfinished

    def abort(self) -> None:
        """Stop the request; the iteration ends soon after. Ended ones are left alone."""
        if self._service.is_forked:
            return
        with self._condition:
            if self._is_aborted or not self._unfinished:
                return
            self._is_aborted = True
        self._service.abort(self.request_id)

    def __iter__(self) -> Generator[RequestOutput, None, None]:
        try:
            while True:
                outputs = self._wait()
                if not outputs:
                    return
                yield from outputs
        finally:
            self.abort()

    def _wait(self) -> list[RequestOutput]:
        """The unread outputs, once there are some; empty at the end."""
        while True:
            if self._service.is_forked:
                self._service.raise_unless_healthy()
            with self._condition:
                if not self._outputs and self._unfinished:
                    self._condition.wait(_LOOK_EVERY_S)
                if self._outputs or not self._unfinished:
                    outputs, self._outputs = self._outputs, {}
                    return list(outputs.values())
            self._service.look_for_engine()

    async def __aiter__(self) -> AsyncGenerator[RequestOutput, None]:
        if self._service.is_forked:
            self._service.raise_unless_healthy()
        event = asyncio.Event()
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def wake() -> None:
            nonlocal timer
            event.set()
            timer = loop.call_later(_LOOK_EVERY_S, wake)

        timer = loop.call_later(_LOOK_EVERY_S, wake)
        with self._condition:
            self._reader = (loop, event)
        try:
            while True:
                with self._condition:
                    event.clear()
                    outputs, self._outputs = self._outputs, {}
                    is_over = not self._unfinished
                for output in outputs.values():
                    yield output
                if is_over:
                    return
                if not outputs:
                    self._service.look_for_engine()
                    await event.wait()
        finally:
            timer.cancel()
            self.abort()

    # What follows is called by the service.

    def put(
        self, output: RequestOutput
    ) -> "tuple[asyncio.AbstractEventLoop, asyncio.Event] | None":
        """Hand over an output; returns the reading task's loop and what to set in it."""
        with self._condition:
            unread = self._outputs.get(output.index)
            self._outputs[output.index] = output if unread is None else _join(unread, output)
            if output.finish_reason is not None:
                self._unfinished.discard(output.index)
            self._condition.notify()
            return self._reader

    def end(self, reason: FinishReason, error: str | None) -> None:
        """End every index that has not ended."""
        for index in sorted(self._unfinished):
            reader = self.put(RequestOutput(self.request_id, index, "", (), reason, error))
            if reader is not None:
                with contextlib.suppress(RuntimeError):  # the reader's loop is closed
                    reader[0].call_soon_threadsafe(reader[1].set)


def _join(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Two outputs of one index, one after the other, as one."""
    return second._replace(
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        prompt_tokens=max(first.prompt_tokens, second.prompt_tokens),
        cached_tokens=max(first.cached_tokens, second.cached_tokens),
    )
