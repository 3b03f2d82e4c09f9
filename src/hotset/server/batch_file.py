"""Run an OpenAI batch file: requests in, responses out, line by line, in the same order."""

import fcntl
import functools
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotset.engine.completion import gather
from hotset.engine.stream_service import StreamService
from hotset.errors import ConfigError, EngineError, HotsetError, RequestError
from hotset.foreign_text import ForeignTextError, parse_json
from hotset.request import FinishReason
from hotset.server.admission import Admission, Admitted
from hotset.server.batch_identity import RunIdentity, line_identity, read_record_id
from hotset.server.body import Json, parse_body
from hotset.server.errors import ApiError, as_api_error, ended_early
from hotset.server.keys import Tenant
from hotset.server.limits import UNLIMITED
from hotset.server.responses import response_body
from hotset.server.schemas import ChatRequest, GenerationRequest, TextRequest
from hotset.text.prompt import PromptEncoder

_log = logging.getLogger(__name__)

_KINDS: dict[str, type[GenerationRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": TextRequest,
}


@dataclass(slots=True)
class BatchSummary:
    """What one run did."""

    lines: int = 0  # written by this run
    skipped: int = 0  # there from an earlier run
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class _Pending:
    """A line in flight: its request in the engine, or the record that is known already."""

    custom_id: str | None
    record: Json | None = None
    record_id: str = ""
    request: GenerationRequest | None = None
    admitted: Admitted | None = None


class Batch:
    """One input file and the output file it becomes.

    Every line of the input that is not blank becomes one line of the output, at the same place.
    So an output file that exists holds the answers to the first lines: they are kept, and the run
    goes on behind them. The ids of its records tell whether they answer these lines, and by what
    model and options (`batch_identity`). A torn last line, left by a crash, is cut.

    Args:
        source: the input.
        target: the output.
        name: of the output in messages; None is its path.
        way_out: what to do about an output of something else, in messages.

    Attributes:
        num_lines: of the input.
        num_done: lines that are answered already.

    Raises:
        ConfigError: a file cannot be read or written, is in use by another run, or the output
            is not the beginning of this input's. The output is unchanged.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        *,
        name: str | None = None,
        way_out: str = "delete it or choose another output",
    ) -> None:
        self._source = source
        self._name = name or str(target)
        self._way_out = way_out
        self._written_by: RunIdentity | None = None
        try:
            for path in (source, target):  # a device or pipe may have no end
                if path.exists() and not path.is_file():
                    raise ConfigError(f"{path} is not a plain file; expected one")
            # Read to the end first: an unreadable line should not cost a loaded model.
            self.num_lines = sum(1 for _ in _lines(source))
            if target.exists() and target.samefile(source):
                raise ConfigError(f"{target} is both input and output; choose another output")
            self._target = open(target, "a+b")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from error
        try:
            self.num_done = self._check_target()
        except BaseException:
            self._target.close()
            raise

    def close(self) -> None:
        """Close the output; another run may go on with it."""
        self._target.close()

    def check_run(self, identity: RunIdentity) -> None:
        """Raise ConfigError unless the output's answers are of this model and these options."""
        written_by = self._written_by
        if written_by is None:
            return
        if written_by.model != identity.model:
            raise ConfigError(
                f"{self._name} holds answers of another model; give that one, or {self._way_out}"
            )
        if written_by.options != identity.options:
            raise ConfigError(
                f"{self._name} holds answers under other values of options that change answers "
                f"(dtype, KV dtype, seed, longest context, bounds of JSON); give those, or "
                f"{self._way_out}"
            )
        if identity.texts not in (None, written_by.texts):
            raise ConfigError(
                f"{self._name} holds answers under another chat template or tokenizer; undo its "
                f"change, or {self._way_out}"
            )

    def run(
        self,
        service: StreamService,
        *,
        window: int,
        identity: RunIdentity | None = None,
        on_line: Callable[[BatchSummary], None] = lambda summary: None,
        submit: Callable[[GenerationRequest], Admitted] | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> BatchSummary:
        """Answer the lines that are left, with at most `window` of them in flight.

        An early end leaves whole lines, and a later run goes on from them.

        Args:
            service: the engine.
            window: many more than the engine runs at once keep it busy beside a slow first one.
            identity: of the answers; None takes the identity of the service.
            on_line: called after each line written.
            submit: queues a line's request; None does so without any limit.
            is_stopped: asked after each line whether to end early.

        Raises:
            EngineError: the engine has failed.
            ConfigError: the output cannot be written, as when the disk is full; or its answers are
                of another model or other options.
        """
        identity = identity or RunIdentity.of_model(service.model, service.options)
        self.check_run(identity)
        if submit is None:
            encoder = PromptEncoder(service.model, finds_repeats=service.keeps_states)
            admission = Admission(service, encoder, UNLIMITED)
            submit = functools.partial(admission.submit, tenant=Tenant(), is_batch=True)
        summary = BatchSummary(skipped=self.num_done)
        seen: set[str] = set()
        in_flight: deque[_Pending] = deque()
        try:
            for position, line in enumerate(_lines(self._source)):
                pending = _parse(line, seen)
                if position < self.num_done:
                    continue
                pending.record_id = identity.record_id(position, line)
                if is_stopped():
                    break
                if pending.request is not None:
                    _submit(pending, submit)
                in_flight.append(pending)
                if len(in_flight) >= window:
                    self._finish(in_flight.popleft(), service, summary)
                    on_line(summary)
            while in_flight and not is_stopped():
                self._finish(in_flight.popleft(), service, summary)
                on_line(summary)
            os.fsync(self._target.fileno())
        finally:
            for pending in in_flight:
                if pending.admitted is not None:
                    pending.admitted.abort()
        return summary

    def _finish(self, pending: _Pending, service: StreamService, summary: BatchSummary) -> None:
        """Wait for a line's answer and write it."""
        record = pending.record
        if record is None:
            record = _answer(pending, service)
            usage = record["response"]["body"].get("usage", {})
            summary.prompt_tokens += usage.get("prompt_tokens", 0)
            summary.completion_tokens += usage.get("completion_tokens", 0)
        record = {"id": pending.record_id, **record}
        try:
            text = json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a character, which JSON can name and UTF-8 cannot
            text = json.dumps(record).encode()
        try:
            self._target.write(text + b"\n")
            self._target.flush()
        except OSError as error:
            raise ConfigError(f"the output cannot be written: {error.strerror}") from error
        summary.lines += 1
        summary.errors += record["error"] is not None

    def _check_target(self) -> int:
        """Lock the output, check it against the input, cut a torn line; returns its lines."""
        try:
            fcntl.flock(self._target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{self._name} is being written by another run") from error
        self._target.seek(0)
        source, seen = _lines(self._source), set[str]()
        num_lines = whole_bytes = 0
        for line in self._target:
            try:
                if not line.endswith(b"\n"):
                    raise ForeignTextError("is torn")
                record = _load(line)
            except ForeignTextError as error:
                if not _is_torn(line, num_lines):
                    raise ConfigError(
                        f"{self._name} line {num_lines + 1} is not a batch record; {self._way_out}"
                    ) from error
                break  # torn by a crash: cut off below
            self._check_record(record, num_lines, next(source, None), seen)
            num_lines += 1
            whole_bytes += len(line)
        self._target.truncate(whole_bytes)
        return num_lines

    def _check_record(
        self, record: Json, position: int, line: bytes | None, seen: set[str]
    ) -> None:
        """Raise ConfigError unless a record of the output answers `line` of the input."""
        where = f"{self._name} line {position + 1}"
        custom_id = None if line is None else _parse(line, seen).custom_id
        if line is None or record.get("custom_id") != custom_id:
            raise ConfigError(
                f"{where} has custom_id {record.get('custom_id')!r} where the input has "
                f"{custom_id!r}; it is of another input: {self._way_out}"
            )
        known = read_record_id(record.get("id"))
        if known is None or known[0] != position:
            raise ConfigError(
                f"{where} has the id {record.get('id')!r}, which does not tell what it answers; "
                f"{self._way_out}"
            )
        _, identity, run = known
        if identity != line_identity(line):
            raise ConfigError(
                f"{where} answers another request than the input has for custom_id {custom_id!r} "
                f"now: the input was edited; undo that, or {self._way_out}"
            )
        if run != (self._written_by or run):
            raise ConfigError(
                f"{where} has the answer of another run than the lines before; {self._way_out}"
            )
        self._written_by = run


def _is_torn(line: bytes, position: int) -> bool:
    """Whether `line` is the beginning of a record that was being written, and not another text."""
    head = f'{{"id": "batch_req_{position}_'.encode()
    return not line.endswith(b"\n") and line[: len(head)] == head[: len(line)]


def _lines(source: Path) -> Iterator[bytes]:
    """The lines that are not blank."""
    with source.open("rb") as handle:
        yield from (line for line in handle if line.strip())


def _load(line: bytes) -> dict[str, Any]:
    """A line's object. Raises ForeignTextError, which says what is wrong with the line."""
    data = parse_json(line)
    if not isinstance(data, dict):
        raise ForeignTextError("is no JSON object")
    return data


def _parse(line: bytes, seen: set[str]) -> _Pending:
    """A line's request, or the error record it becomes; `seen` takes in its custom_id."""
    try:
        data = _load(line)
    except ForeignTextError as error:
        return _Pending(None, _line_error(None, "invalid_json", f"the line {error}"))
    custom_id = data.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        message = "custom_id is missing; expected a string"
        return _Pending(None, _line_error(None, "missing_custom_id", message))
    if custom_id in seen:
        message = f"custom_id {custom_id!r} is that of an earlier line"
        return _Pending(custom_id, _line_error(custom_id, "duplicate_custom_id", message))
    seen.add(custom_id)
    url = data.get("url")
    if data.get("method", "POST") != "POST":
        message = f"method is {data['method']!r}; expected 'POST'"
        return _Pending(custom_id, _line_error(custom_id, "invalid_method", message))
    kind = _KINDS.get(url) if isinstance(url, str) else None
    if kind is None:
        message = f"url is {url!r}; expected {' or '.join(_KINDS)}"
        return _Pending(custom_id, _line_error(custom_id, "invalid_url", message))
    try:
        request = parse_body(kind, data.get("body"))
        if request.stream:
            raise RequestError("stream is true; a batch does not stream", param="stream")
    except RequestError as error:
        return _Pending(custom_id, _request_error(custom_id, error))
    return _Pending(custom_id, request=request)


def _submit(pending: _Pending, submit: Callable[[GenerationRequest], Admitted]) -> None:
    """Queue a line's prompts; where they are refused, the line has its record."""
    assert pending.request is not None
    try:
        pending.admitted = submit(pending.request)
    except (RequestError, ApiError) as error:
        pending.record = _request_error(pending.custom_id, error)
    except HotsetError:
        raise
    except Exception:  # a bug that one line shows must not cost the others their answers
        _log.exception("line %s of a batch failed", pending.custom_id)
        pending.record = _request_error(pending.custom_id, ApiError(500, "internal error"))


def _answer(pending: _Pending, service: StreamService) -> Json:
    """Wait for a line's outputs; returns its record."""
    admitted = pending.admitted
    assert admitted is not None
    n = admitted.body.n
    completions = [one for stream in admitted.streams for one in gather(stream, n)]
    for one in completions:
        reason = FinishReason(one.finish_reason)
        if reason is FinishReason.ABORT and one.error is None:
            raise EngineError("the engine was closed")
        error = ended_early(reason, one.error, one.code)
        if error is not None:
            service.raise_unless_healthy()  # then it is no fault of the line's
            return _request_error(pending.custom_id, error)
    body = response_body(
        admitted.body, admitted.request_id, service.model.name, completions, admitted.writers
    )
    return {
        "custom_id": pending.custom_id,
        "response": {"status_code": 200, "request_id": admitted.request_id, "body": body},
        "error": None,
    }


def _line_error(custom_id: str | None, code: str, message: str) -> Json:
    return {
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }


def _request_error(custom_id: str | None, error: HotsetError) -> Json:
    refused = as_api_error(error)
    return {
        "custom_id": custom_id,
        "response": {
            "status_code": refused.status,
            "request_id": None,
            "body": refused.body(),
        },
        "error": {"code": refused.kind, "message": str(refused)},
    }
