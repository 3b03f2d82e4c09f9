"""The engine in a process of its own: HTTP and text handling never hold up a step."""

import atexit
import contextlib
import gc
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import weakref
from array import array
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

from hotset.clock import REAL_CLOCK
from hotset.engine.messages import BuildEngine, EngineInfo, Report, Submit
from hotset.errors import EngineError, HotsetError
from hotset.garbage import importing
from hotset.metrics import Metrics
from hotset.model.loaded import LoadedModel
from hotset.options import Options

if TYPE_CHECKING:
    from hotset.engine.loop import EngineLoop

_log = logging.getLogger(__name__)

_METRICS_EVERY_S = 0.25
_CLOSE_S = 30.0
_DRAINED_CLOSE_S = 90.0  # its tiers have a minute, see `EngineLoop`
# How long a process that ends by itself tries to say why.
_LAST_WORD_S = 1.0
# How often a child that starts looks whether its parent is still there.
_LOOK_EVERY_S = 0.5

# From the parent: ("submit", number, Submit), ("abort", id), ("look", id), ("drain", s),
# ("follow", whether) or ("close",).
# To the parent: ("ready", model, info) or ("refused", error) once; then lists of reports and of
# (number, None or error) for submits, with the counters where they have changed.
_Message = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Accepted:
    """The answer to a submit."""

    number: int
    error: Exception | None


class EngineProcess:
    """An `EngineLoop` in a child process; see `EngineHost`.

    The child ends when this process does, however that is. If the child ends by itself, the last
    report says so.

    Args:
        options: what to load and how.
        build: makes the engine; a function that can be imported by name. None is `load_engine`,
            which is imported in the child alone, as it brings torch.
        on_report: called from one thread of this process.

    Raises:
        HotsetError: the engine cannot be built, or its process ended; nothing is left running.
    """

    def __init__(
        self, options: Options, build: BuildEngine | None, on_report: Callable[[Report], None]
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share locks and CUDA
        self._on_report = on_report
        self._name = "the engine's process"
        if options.layout.num_gpus > 1:
            self._name = "rank 0: its process"
        self._connection, theirs = context.Pipe()
        self._send_lock = threading.Lock()
        self._lock = threading.Lock()
        self._pending: dict[int, Future[None]] = {}  # submits without an answer; by _lock
        self._number = 0  # of the last submit; by _lock
        self._is_closed = False  # by _lock
        self._was_drained = False
        self._has_ended = False  # by _lock
        self._metrics = Metrics()
        self._process = context.Process(
            target=_child, args=(theirs, options, build), name="hotset-engine", daemon=True
        )
        self._process.start()
        theirs.close()
        # What the tokenizer needs, while the child loads the model.
        threading.Thread(target=_import_tokenizers, daemon=True).start()
        try:
            kind, *answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise EngineError(f"{self._name} has {self._how_it_ended()}") from None
        except BaseException:  # Ctrl-C
            self._process.kill()  # it ignores SIGTERM, and this process would wait for its end
            raise
        if kind == "refused":
            self._process.join()
            raise answer[0]
        self.model: LoadedModel = answer[0]
        self.info: EngineInfo = answer[1]
        self._thread = threading.Thread(target=self._receive, name="hotset-reports", daemon=True)
        self._thread.start()
        _running.add(self)

    @property
    def is_alive(self) -> bool:
        """See `EngineHost`."""
        return self._thread.is_alive()

    @property
    def metrics(self) -> Metrics:
        """The engine's counters as of a moment ago."""
        return self._metrics

    def submit(self, submit: Submit) -> None:
        """See `EngineHost`; waits for the child's answer, not for a step."""
        answer: Future[None] = Future()
        with self._lock:
            if self._has_ended:
                raise EngineError("the engine was closed")
            self._number += 1
            number = self._number
            self._pending[number] = answer
        try:
            token_ids = array("q", submit.token_ids)  # packs well
        except OverflowError:
            token_ids = array("q", [-1])  # no token either: refused there
        self._send(("submit", number, replace(submit, token_ids=token_ids)))
        answer.result()

    def abort(self, request_id: str) -> None:
        """See `EngineHost`."""
        self._send(("abort", request_id))

    def look(self, look_id: int) -> None:
        """See `EngineHost`."""
        self._send(("look", look_id))

    def drain(self, drain_s: float) -> None:
        """See `EngineHost`."""
        self._was_drained = True
        self._send(("drain", drain_s))

    def follow(self, is_on: bool) -> None:
        """See `EngineHost`."""
        self._send(("follow", is_on))

    def close(self) -> None:
        """See `EngineHost`."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            self._send(("close",))
        if threading.current_thread() is self._thread:
            return
        self._process.join(_DRAINED_CLOSE_S if self._was_drained else _CLOSE_S)
        if self._process.is_alive():  # stuck in a driver or on a disk
            self._process.kill()
            self._process.join()
        self._thread.join()

    def _send(self, message: _Message) -> None:
        with self._send_lock, contextlib.suppress(OSError):  # `_receive` sees the end too
            self._connection.send(message)

    def _receive(self) -> None:
        fault: str | None = None
        try:
            self._take_reports()
        except (EOFError, OSError):
            pass
        except Exception as error:
            _log.exception("a report of the engine cannot be taken")
            fault = f"the engine's reports cannot be read: {type(error).__name__}: {error}"
            self._process.kill()
        self._process.join()
        with self._lock:
            self._has_ended = True
            pending, self._pending = list(self._pending.values()), {}
            is_failure = not self._is_closed
        failure = fault or f"{self._name} has {self._how_it_ended()}"
        for answer in pending:
            answer.set_exception(EngineError(failure if is_failure else "the engine was closed"))
        if is_failure:
            self._on_report(Report(0.0, failure=failure))
        self._connection.close()

    def _take_reports(self) -> None:
        """Until the child closes its end, with EOFError or OSError."""
        while True:
            items, metrics = pickle.loads(self._connection.recv_bytes())
            if metrics is not None:
                self._metrics = metrics
            for item in items:
                if isinstance(item, _Accepted):
                    with self._lock:
                        answer = self._pending.pop(item.number)
                    if item.error is None:
                        answer.set_result(None)
                    else:
                        answer.set_exception(item.error)
                else:
                    self._on_report(item)

    def _how_it_ended(self) -> str:
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"been ended by signal {-code} ({signal.strsignal(-code)})"
        return f"ended with status {code}"


_running: weakref.WeakSet[EngineProcess] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a fork: let go of the pipes, whose end tells an engine that its process is gone."""
    for host in _running:
        host._connection.close()


os.register_at_fork(after_in_child=_leave_to_parent)


def _import_tokenizers() -> None:
    import transformers.tokenization_utils_base  # noqa: F401


def _child(connection: Connection, options: Options, build: BuildEngine | None) -> None:
    """The child's main function."""
    # A signal to the server's process group reaches the parent, which stops this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with importing():
        from hotset.engine.load import load_engine
        from hotset.engine.loop import EngineLoop
        from hotset.ranks import driver

    has_started, is_ready = threading.Event(), threading.Event()
    threading.Thread(target=_end_with_parent, args=(connection, has_started), daemon=True).start()
    outgoing: queue.SimpleQueue[Report | _Accepted | None] = queue.SimpleQueue()

    def end(line: str) -> None:
        """Report that another rank has failed; threads here may wait for it for ever."""
        if is_ready.is_set():
            outgoing.put(Report(REAL_CLOCK.now(), failure=line))
            outgoing.put(None)
            sender.join(_LAST_WORD_S)
        else:
            with contextlib.suppress(OSError):
                connection.send(("refused", EngineError(line)))
        os._exit(1)

    driver.on_failure = end
    try:
        loop = EngineLoop(options, build or load_engine, outgoing.put)
    except HotsetError as error:
        connection.send(("refused", error))
        _leave()
    # Collections that go through all of the model's objects held steps up for 0.3 s.
    gc.collect()
    gc.freeze()
    has_started.set()
    # The parent needs the tokenizer and the names; the weights stay here.
    connection.send(("ready", replace(loop.model, model=None, ranks=None), loop.info))
    sender = threading.Thread(target=_send_all, args=(connection, outgoing, loop), daemon=True)
    sender.start()
    is_ready.set()
    _take_messages(connection, loop, outgoing)
    loop.close()
    outgoing.put(None)
    sender.join(_CLOSE_S)
    _leave()


def _leave() -> NoReturn:
    """End this process; Triton's library would list what it leaks as the interpreter shuts down."""
    atexit._run_exitfuncs()
    os._exit(0)


def _take_messages(
    connection: Connection,
    loop: "EngineLoop",
    outgoing: "queue.SimpleQueue[Report | _Accepted | None]",
) -> None:
    """Do what the parent asks for, until it closes the engine."""

    def submit(number: int, submit: Submit) -> None:
        error: Exception | None = None
        try:
            loop.submit(submit)
        except HotsetError as refused:
            error = refused
        except Exception as bug:
            error = EngineError(f"the request could not be queued: {bug}")
        outgoing.put(_Accepted(number, error))

    # Compiling a JSON schema may take long, and an abort should not wait for it.
    with ThreadPoolExecutor(4, "hotset-submit") as pool:
        while True:
            try:
                kind, *rest = connection.recv()
            except (EOFError, OSError):
                # The parent is gone, and a new one may want the GPU and the disk tier's folder,
                # which is as good as after any crash.
                os._exit(1)
            if kind == "close":
                break
            if kind == "submit":
                pool.submit(submit, *rest)
            elif kind == "abort":
                loop.abort(*rest)
            elif kind == "drain":
                loop.drain(*rest)
            elif kind == "follow":
                loop.follow(*rest)
            else:
                loop.look(*rest)


def _end_with_parent(connection: Connection, has_started: threading.Event) -> None:
    """In a thread of a child that starts, which takes minutes: end it if the parent is gone.

    Nothing comes from the parent before the child has started, but the end of the pipe.
    """
    while not has_started.is_set():
        if connection.poll(_LOOK_EVERY_S) and not has_started.is_set():
            os._exit(1)


def _send_all(
    connection: Connection,
    outgoing: "queue.SimpleQueue[Report | _Accepted | None]",
    loop: "EngineLoop",
) -> None:
    """Send what is there, all at once; what comes while the pipe is full waits for the next."""
    sent_s, is_stale = 0.0, False  # when the parent got the counters; whether they changed
    while True:
        items: list[Report | _Accepted | None] = []
        try:
            items.append(outgoing.get(timeout=_METRICS_EVERY_S if is_stale else None))
            while True:
                items.append(outgoing.get_nowait())
        except queue.Empty:
            pass
        is_last = None in items
        is_due = REAL_CLOCK.now() - sent_s >= _METRICS_EVERY_S
        metrics = loop.metrics if is_due or is_last else None
        is_stale = metrics is None
        if metrics is not None:
            sent_s = REAL_CLOCK.now()
        reports = [item for item in items if item is not None]
        with contextlib.suppress(OSError):  # the parent is gone; the main thread sees that
            connection.send_bytes(pickle.dumps((reports, metrics), pickle.HIGHEST_PROTOCOL))
        if is_last:
            return
