"""The engine in a thread of its own, for any number of threads and event loops."""

import asyncio
import atexit
import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from hotset.config import EngineConfig
from hotset.engine.engine import Engine
from hotset.errors import EngineError, RequestError
from hotset.metrics import Metrics
from hotset.model.loader import LoadedModel, load_model
from hotset.request import FinishReason, RequestOutput, SamplingParams

_log = logging.getLogger(__name__)

# With no request left, how often the engine takes note of copies that still run between tiers.
_TRANSFER_CHECK_S = 0.05


def build_engine(config: EngineConfig) -> tuple[Engine, LoadedModel]:
    """Load the model and set up the engine. Raises what either raises."""
    loaded = load_model(config.model, device=config.device, dtype=config.dtype)
    return Engine(config, loaded), loaded


class EngineService:
    """Runs an engine in one background thread; every method may be called from any thread.

    The engine is built, used and closed in that thread alone. The constructor returns when it
    is ready.

    Args:
        config: what to load and how.
        build: makes the engine; raises a HotsetError where it cannot.

    Raises:
        HotsetError: the engine cannot be built; no thread is left.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        build: Callable[[EngineConfig], tuple[Engine, LoadedModel]] = build_engine,
    ) -> None:
        self._wake = threading.Condition()
        self._inbox: deque[_Submit | _Abort] = deque()  # guarded by _wake
        self._is_closing = False  # guarded by _wake
        self._failure: str | None = None  # guarded by _wake; says why no more is served
        self._streams: dict[str, OutputStream] = {}  # used by the engine thread alone
        self._ids = itertools.count()
        ready: Future[tuple[Engine, LoadedModel]] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(config, build, ready), name="hotset-engine", daemon=True
        )
        self._thread.start()
        try:
            self._engine, self.model = ready.result()
        except BaseException:  # Ctrl-C included: the thread ends once the engine is built
            self._request_close()
            raise
        # A daemon thread in the middle of a step would be cut off while Python shuts down.
        atexit.register(self.close)

    @property
    def healthy(self) -> bool:
        """Whether requests are served."""
        return self._failure is None and not self._is_closing

    @property
    def report(self) -> str:
        """What went where in memory."""
        return self._engine.report

    @property
    def metrics(self) -> Metrics:
        """The engine's counters; they change while one reads."""
        return self._engine.metrics

    @property
    def max_model_len(self) -> int:
        """The longest context in tokens."""
        return self._engine.max_model_len

    @property
    def config(self) -> EngineConfig:
        """What the engine was built with."""
        return self._engine.config

    def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        salt: bytes = b"",
        priority: int = 0,
        request_id: str | None = None,
    ) -> "OutputStream":
        """Queue a prompt and return the stream of its outputs. Does not wait for the engine.

        Raises:
            RequestError: the request can never be served; nothing was queued.
            EngineError: the engine has failed or was closed.
        """
        self._engine.validate(token_ids, params)
        if request_id is None:
            request_id = f"hotset-{next(self._ids)}"
        elif "#" in request_id:
            raise RequestError(f"request id {request_id!r} has a '#' in it")
        stream = OutputStream(self, request_id, params.n)
        submit = _Submit(stream, list(token_ids), params, salt, priority)
        with self._wake:
            self.raise_unless_healthy()
            self._inbox.append(submit)
            self._wake.notify()
        return stream

    def raise_unless_healthy(self) -> None:
        """Raise EngineError, with the reason, where no requests are served any more."""
        if self._failure is not None:
            raise EngineError(self._failure)
        if self._is_closing:
            raise EngineError("the engine was closed")

    def close(self) -> None:
        """End open requests as aborted, close the engine and wait for its thread. Idempotent."""
        self._request_close()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def _request_close(self) -> None:
        with self._wake:
            self._is_closing = True
            self._wake.notify()

    def _abort(self, stream: "OutputStream") -> None:
        with self._wake:
            self._inbox.append(_Abort(stream))
            self._wake.notify()

    # What follows runs in the engine thread.

    def _run(
        self,
        config: EngineConfig,
        build: Callable[[EngineConfig], tuple[Engine, LoadedModel]],
        ready: "Future[tuple[Engine, LoadedModel]]",
    ) -> None:
        try:
            engine, model = build(config)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result((engine, model))
        try:
            self._serve(engine)
        except Exception as error:
            _log.exception("the engine has failed")
            self._fail(f"the engine has failed: {type(error).__name__}: {error}")
        finally:
            self._end_streams(FinishReason.ABORT, None)
            with contextlib.suppress(Exception):
                engine.close()

    def _serve(self, engine: Engine) -> None:
        while True:
            with self._wake:
                if not self._inbox and not self._is_closing and not engine.has_work:
                    self._wake.wait(_TRANSFER_CHECK_S if engine.has_transfers else None)
                if self._is_closing:
                    return
                messages = list(self._inbox)
                self._inbox.clear()
            for message in messages:
                if isinstance(message, _Submit):
                    self._add(engine, message)
                else:
                    self._drop(engine, message.stream)
            if engine.has_work or engine.has_transfers:
                for output in engine.step():
                    self._deliver(output)

    def _add(self, engine: Engine, submit: "_Submit") -> None:
        stream = submit.stream
        if stream.is_abandoned:
            stream.end(FinishReason.ABORT, None)
            return
        try:
            engine.add_request(
                submit.token_ids,
                submit.params,
                salt=submit.salt,
                priority=submit.priority,
                request_id=stream.request_id,
            )
        except RequestError as error:
            stream.end(FinishReason.ERROR, str(error))
        else:
            self._streams[stream.request_id] = stream

    def _drop(self, engine: Engine, stream: "OutputStream") -> None:
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            engine.abort(stream.request_id)
        stream.end(FinishReason.ABORT, None)

    def _deliver(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is not None and stream.put(output):
            del self._streams[output.request_id]

    def _fail(self, failure: str) -> None:
        with self._wake:
            self._failure = " ".join(failure.split())
        self._end_streams(FinishReason.ERROR, self._failure)

    def _end_streams(self, reason: FinishReason, error: str | None) -> None:
        with self._wake:
            messages = list(self._inbox)
            self._inbox.clear()
        queued = [message.stream for message in messages]
        for stream in [*self._streams.values(), *queued]:
            stream.end(reason, error)
        self._streams.clear()


class OutputStream:
    """The outputs of one request, in order, for one reader: a thread or a task.

    Iterate it, with `for` or `async for`; the last output of each of the `n` indices has a
    finish reason. Leaving the iteration early (break, an exception, a cancelled task) aborts the
    request. Outputs wait here for a slow reader, the engine never does.
    """

    def __init__(self, service: EngineService, request_id: str, n: int) -> None:
        self.request_id = request_id
        self.is_abandoned = False
        self._service = service
        self._condition = threading.Condition()
        self._outputs: deque[RequestOutput] = deque()
        self._unfinished = set(range(n))
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def abort(self) -> None:
        """Stop the request; the iteration ends soon after. Ended ones are left alone."""
        with self._condition:
            if self.is_abandoned or not self._unfinished:
                return
            self.is_abandoned = True
        self._service._abort(self)

    def __iter__(self) -> Generator[RequestOutput, None, None]:
        try:
            while True:
                with self._condition:
                    while not self._outputs and self._unfinished:
                        self._condition.wait()
                    if not self._outputs:
                        return
                    output = self._outputs.popleft()
                yield output
        finally:
            self.abort()

    async def __aiter__(self) -> AsyncGenerator[RequestOutput, None]:
        event = asyncio.Event()
        with self._condition:
            self._reader = (asyncio.get_running_loop(), event)
        try:
            while True:
                with self._condition:
                    event.clear()
                    outputs = list(self._outputs)
                    self._outputs.clear()
                    is_over = not self._unfinished
                for output in outputs:
                    yield output
                if is_over:
                    return
                if not outputs:
                    await event.wait()
        finally:
            self.abort()

    # What follows is called from the engine thread.

    def put(self, output: RequestOutput) -> bool:
        """Hand over an output; returns whether it was the request's last one."""
        with self._condition:
            self._outputs.append(output)
            if output.finish_reason is not None:
                self._unfinished.discard(output.index)
            self._condition.notify()
            if self._reader is not None:
                loop, event = self._reader
                with contextlib.suppress(RuntimeError):  # the reader's loop is closed
                    loop.call_soon_threadsafe(event.set)
            return not self._unfinished

    def end(self, reason: FinishReason, error: str | None) -> None:
        """End every index that has not ended."""
        for index in sorted(self._unfinished):
            self.put(RequestOutput(self.request_id, index, "", (), reason, error))


@dataclass(frozen=True, slots=True)
class _Submit:
    stream: OutputStream
    token_ids: list[int]
    params: SamplingParams
    salt: bytes
    priority: int


@dataclass(frozen=True, slots=True)
class _Abort:
    stream: OutputStream
