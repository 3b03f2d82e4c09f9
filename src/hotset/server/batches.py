"""Batches over HTTP: files of requests, answered after requests that a client waits for."""

import asyncio
import contextlib
import functools
import logging
import threading
import time
import uuid

from hotset.errors import EngineError, HotsetError, RequestError
from hotset.server.admission import Admission
from hotset.server.batch_file import Batch, BatchSummary
from hotset.server.batch_identity import RunIdentity
from hotset.server.body import Json
from hotset.server.errors import ApiError
from hotset.server.files import FileStore
from hotset.server.keys import Tenant
from hotset.server.schemas import BatchRequest

_log = logging.getLogger(__name__)

_AT_ONCE = 2
_OPEN = ("validating", "in_progress", "finalizing", "cancelling")
_TIMES = ("in_progress_at", "completed_at", "failed_at", "cancelling_at", "cancelled_at")
_SAVE_EVERY_S = 1.0
_AGAIN_S, _AGAIN_AT_MOST_S = 1.0, 60.0  # until a batch looks again for an engine that was gone


class BatchRunner:
    """Runs batches in threads of their own, and goes on with batches that a stop interrupted.

    Used from the event loop's thread. A batch's answers are in its output file line by line, so
    a batch goes on after a crash, and no line is run twice.

    Args:
        store: has the files, and the batches' objects.
        admission: queues their requests.
    """

    def __init__(self, store: FileStore, admission: Admission) -> None:
        self._store = store
        self._admission = admission
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._stops: dict[str, threading.Event] = {}  # of the batches that are not done
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    @property
    def _is_closing(self) -> bool:
        return self._closing.is_set()

    def resume(self) -> None:
        """Go on with the batches that are not done."""
        for tenant in self._store.tenants():
            for entry in reversed(self._store.list(tenant, "batch")):
                if entry["status"] in _OPEN:
                    self._start(tenant, entry)

    def create(self, tenant: str, body: BatchRequest) -> Json:
        """Queue a batch. Raises ApiError (404): its input file is not there."""
        source = self._store.get(tenant, body.input_file_id)
        if source.get("purpose") != "batch":
            raise RequestError(
                f"{body.input_file_id} is no input of a batch", param="input_file_id"
            )
        now = int(time.time())
        entry: Json = {
            "id": f"batch-{uuid.uuid4().hex}",
            "object": "batch",
            "endpoint": body.endpoint,
            "input_file_id": body.input_file_id,
            "completion_window": body.completion_window,
            "status": "validating",
            "created_at": now,
            **dict.fromkeys(_TIMES),
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            "metadata": body.metadata,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }
        self._store.put(tenant, entry)
        self._start(tenant, entry)
        return entry

    def cancel(self, tenant: str, batch_id: str) -> Json:
        """End a batch early; the lines answered until then are kept."""
        entry = self._store.get(tenant, batch_id)
        stop = self._stops.get(batch_id)
        if stop is None:
            message = f"batch {batch_id} is {entry['status']} already"
            raise ApiError(409, message, code="batch_ended")
        entry["status"] = "cancelling"
        entry["cancelling_at"] = int(time.time())
        stop.set()
        return self._store.put(tenant, entry)

    async def close(self) -> None:
        """Stop what runs; a later start goes on with it."""
        self._closing.set()
        for stop in self._stops.values():
            stop.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, tenant: str, entry: Json) -> None:
        stop = self._stops[entry["id"]] = threading.Event()
        if entry["status"] == "cancelling":
            stop.set()
        task = asyncio.create_task(self._run(tenant, entry, stop))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, tenant: str, entry: Json, stop: threading.Event) -> None:
        try:
            async with self._places:
                await self._run_to_end(tenant, entry, stop)
        except (HotsetError, OSError) as error:
            self._fail(tenant, entry, str(error))
        except Exception:
            _log.exception("batch %s failed", entry["id"])
            self._fail(tenant, entry, "internal error")
        finally:
            self._stops.pop(entry["id"], None)

    async def _run_to_end(self, tenant: str, entry: Json, stop: threading.Event) -> None:
        """Go on where the engine, or the last replica, was gone for a while."""
        again_s = _AGAIN_S
        while not self._is_closing:
            num_done = entry["request_counts"]["completed"]
            try:
                return await asyncio.to_thread(self._run_one, tenant, entry, stop)
            except EngineError as error:
                if self._is_closing:
                    return  # it goes on with the next start
                has_moved = entry["request_counts"]["completed"] > num_done
                again_s = _AGAIN_S if has_moved else min(2 * again_s, _AGAIN_AT_MOST_S)
                _log.warning("batch %s waits %g s: %s", entry["id"], again_s, error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), again_s)

    def _run_one(self, tenant: str, entry: Json, stop: threading.Event) -> None:
        """Runs in a thread."""
        output_id = entry["id"].replace("batch-", "file-")
        target = self._store.data_path(tenant, output_id)
        batch = Batch(
            self._store.data_path(tenant, entry["input_file_id"]),
            target,
            name="the output so far",
            way_out="create the batch again",
        )
        try:
            counts = entry["request_counts"]
            counts["total"] = batch.num_lines
            failed_before = counts["failed"] if batch.num_done else 0
            entry["status"] = "in_progress"
            entry["in_progress_at"] = entry["in_progress_at"] or int(time.time())
            self._store.put(tenant, entry)
            saved_s = time.monotonic()

            def save(summary: BatchSummary) -> None:
                nonlocal saved_s
                counts["failed"] = failed_before + summary.errors
                counts["completed"] = batch.num_done + summary.lines - counts["failed"]
                if time.monotonic() - saved_s > _SAVE_EVERY_S and not stop.is_set():
                    saved_s = time.monotonic()
                    self._store.put(tenant, entry)

            service = self._admission.service
            batch.run(
                service,
                window=2 * service.options.schedule.max_num_seqs,
                identity=RunIdentity.of_model(
                    service.model,
                    service.options,
                    extra=self._admission.limits.max_tokens,  # of requests without `max_tokens`
                ),
                on_line=save,
                submit=functools.partial(
                    self._admission.submit, tenant=Tenant(tenant), is_batch=True
                ),
                is_stopped=stop.is_set,
            )
        finally:
            batch.close()
        if stop.is_set() and self._is_closing:
            self._store.put(tenant, entry)
            return
        self._store.put_file(
            tenant, output_id, filename=f"{entry['id']}_output.jsonl", purpose="batch_output"
        )
        status = "cancelled" if stop.is_set() else "completed"
        entry.update({"output_file_id": output_id, "status": status})
        entry[f"{status}_at"] = int(time.time())
        self._store.put(tenant, entry)

    def _fail(self, tenant: str, entry: Json, message: str) -> None:
        error = {"code": "batch_failed", "message": message, "line": None, "param": None}
        entry.update({"status": "failed", "failed_at": int(time.time())})
        entry["errors"] = {"object": "list", "data": [error]}
        self._store.put(tenant, entry)
