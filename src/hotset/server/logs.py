"""Logs with the id of the request they are about; prompts, answers and keys are never in them."""

import json
import logging
import os
import time
from contextvars import ContextVar
from typing import Any, Literal

request_id: ContextVar[str] = ContextVar("request_id", default="")

LogFormat = Literal["text", "json"]


class _Formatter(logging.Formatter):
    """One line per record, exceptions included; its `fields` become fields of the line."""

    def __init__(self, form: LogFormat) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds = time.gmtime(record.created)
        entry: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', seconds)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            entry["request_id"] = current
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if self._form == "json":
            return json.dumps(entry, ensure_ascii=False, default=str)
        head = [entry.pop(key) for key in ("time", "level", "message")]
        exception = entry.pop("exception", None)
        del entry["logger"]
        line = " ".join([*head, *(f"{key}={_quoted(value)}" for key, value in entry.items())])
        return line if exception is None else f"{line}\n{exception}"


def _quoted(value: object) -> str:
    """A value that cannot pass for another field or another line."""
    text = str(value)
    is_plain = text.isprintable() and not set(text) & set(' "=')
    return text if is_plain else json.dumps(text)


def set_up(form: LogFormat, level: str) -> None:
    """Send all logs to stderr, in the form asked for."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(form))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("uvicorn.error", "urllib3", "asyncio", "httpx", "python_multipart.multipart"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # FlashInfer's has a handler and a form of its own, and from 0.7 on tells of each build.
    os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "warning")
