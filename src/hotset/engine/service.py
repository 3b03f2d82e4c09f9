"""The engine for any number of threads and event loops: each request gets a stream of outputs.

Imports no torch.
"""

import logging
import threading
from concurrent.futures import Future
from functools import partial

from hotset.engine.looks import Looks
from hotset.engine.messages import BuildEngine, EngineHost, Report, Submit
from hotset.engine.process import EngineProcess
from hotset.engine.restarts import Restarts
from hotset.engine.status import EngineStatus
from hotset.engine.stream_service import StreamService
from hotset.errors import HotsetError
from hotset.metrics import Metrics
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.ranks.torchrun import place
from hotset.request import FinishReason

_log = logging.getLogger(__name__)


class EngineService(StreamService):
    """Runs an engine beside its callers; see `StreamService`.

    Args:
        options: what to load and how.
        build: makes the engine; raises a HotsetError where it cannot. None is `load_engine`.
        own_process: run it in a process of its own, so that nothing that Python does here can
            delay a step; otherwise in a thread. `build` must then be importable by name. An engine
            of several ranks has a process in any case, and starts again when a rank has failed.

    Raises:
        HotsetError: the engine cannot be built; nothing is left running.
    """

    def __init__(
        self,
        options: Options,
        *,
        build: BuildEngine | None = None,
        own_process: bool = False,
    ) -> None:
        super().__init__()
        self._looks = Looks()
        self._host: EngineHost
        has_ranks = options.layout.num_gpus > 1
        # Ranks that torchrun has started are torchrun's to start again.
        self._restarts = Restarts() if has_ranks and place() is None else None
        self._is_restarting = False  # guarded by _lock
        self._close_event = threading.Event()
        # Nothing here imports torch then, so that the child starts at once.
        if own_process or has_ranks:
            self._start = partial(EngineProcess, options, build, self._take_report)
            self._host = self._start()
        else:
            from hotset.engine.load import load_engine
            from hotset.engine.loop import EngineLoop

            self._host = EngineLoop(options, build or load_engine, self._take_report)
        self._model = self._host.model
        self._close_at_exit()

    @property
    def model(self) -> LoadedModel:
        """See `StreamService`."""
        return self._model

    @property
    def report(self) -> str:
        """See `StreamService`."""
        return self._host.info.report

    @property
    def metrics(self) -> Metrics:
        """See `StreamService`."""
        return self._host.metrics

    @property
    def max_model_len(self) -> int:
        """See `StreamService`."""
        return self._host.info.max_model_len

    @property
    def keeps_states(self) -> bool:
        """See `StreamService`."""
        return self._host.info.keeps_states

    @property
    def options(self) -> Options:
        """See `StreamService`."""
        return self._host.info.options

    def status(self) -> "Future[EngineStatus]":
        """See `StreamService`."""
        self.raise_unless_healthy()
        look = self._looks.ask(self._host)
        if not self.healthy:  # it ended meanwhile, before it knew of this look or after
            self._looks.fail(self._failure or "the engine was closed")
        return look

    def abort(self, request_id: str) -> None:
        """See `StreamService`."""
        self._host.abort(request_id)

    def look_for_engine(self) -> None:
        """See `StreamService`."""
        if self.is_forked:
            self.raise_unless_healthy()
        if self._host.is_alive:
            return
        with self._lock:
            if not self._is_closing and self._failure is None:
                self._failure = "the engine has ended without a word"
            failure = self._failure
        self._end_all(FinishReason.ABORT if failure is None else FinishReason.ERROR, failure)

    def _send(self, submit: Submit) -> None:
        self._host.submit(submit)

    def _stop(self) -> None:
        self._close_event.set()
        self._host.close()

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        super()._end_all(reason, error)
        self._looks.fail(error or "the engine was closed")

    # What follows is called from one thread, by the engine's host.

    def _take_report(self, report: Report) -> None:
        self._note_started(report.started, report.time_s)
        self._deliver(report.outputs, report.time_s)
        self._looks.answer(report.looks)
        for note in report.notes:
            _log.info("%s", note)
        if report.failure is not None:
            with self._lock:
                self._failure = self._failure or report.failure  # the first says why
                starts = self._restarts is not None and not self._is_restarting
                self._is_restarting = self._is_restarting or starts
            self._end_all(FinishReason.ERROR, self._failure)
            if starts:
                threading.Thread(target=self._restart, name="hotset-restart", daemon=True).start()

    def _restart(self) -> None:
        """Start the engine again, in a thread of its own, until it serves or has failed often."""
        assert self._restarts is not None
        self._host.close()
        while (delay_s := self._restarts.next_delay_s()) is not None:
            _log.error("%s; starting again in %g s", self._failure, delay_s)
            if self._close_event.wait(delay_s):
                return
            try:
                host = self._start()
            except HotsetError as error:
                self._failure = str(error)
                continue
            with self._lock:
                self._host, self._is_restarting, self._failure = host, False, None
                is_closing = self._is_closing
            if is_closing:
                host.close()
            return
        _log.error("%s; it has failed too often to be started again", self._failure)
