"""The endpoints of files and batches."""

import asyncio
from collections.abc import Callable

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from hotset.errors import RequestError
from hotset.server.batches import BatchRunner
from hotset.server.body import Json
from hotset.server.errors import too_large
from hotset.server.files import FileStore
from hotset.server.limits import Limits
from hotset.server.openapi import BYTES, Endpoint, object_of
from hotset.server.reading import bounded, read_body, tenant_of
from hotset.server.schemas import BatchRequest
from hotset.server.validation import missing

_FORM_OVERHEAD_BYTES = 64 * 1024
_UPLOAD = object_of(
    {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
    }
)


class FilesApi:
    """`/v1/files` and `/v1/batches`, as OpenAI has them.

    Args:
        parts: gives what keeps files and runs batches; raises HotsetError where none does.
        limits: of a request.
    """

    def __init__(self, parts: Callable[[], tuple[FileStore, BatchRunner]], limits: Limits) -> None:
        self._parts = parts
        self._limits = limits
        files, batches = "/v1/files", "/v1/batches"
        file, batch = "/v1/files/{file_id}", "/v1/batches/{batch_id}"
        content, run = f"{file}/content", "Run a file of requests"
        self.endpoints = [
            Endpoint(
                "POST",
                files,
                self._add_file,
                "Upload a file",
                "files",
                body={"multipart/form-data": {"schema": _UPLOAD}},
            ),
            Endpoint("GET", files, self._list_files, "List files", "files"),
            Endpoint("GET", file, self._entry, "Describe a file", "files"),
            Endpoint("DELETE", file, self._delete_file, "Delete a file", "files"),
            Endpoint("GET", content, self._file_content, "Download a file", "files", answer=BYTES),
            Endpoint("POST", batches, self._add_batch, run, "batches", body=BatchRequest),
            Endpoint("GET", batches, self._list_batches, "List batches", "batches"),
            Endpoint("GET", batch, self._entry, "Describe a batch", "batches"),
            Endpoint("POST", f"{batch}/cancel", self._cancel_batch, "Stop a batch", "batches"),
        ]

    async def _add_file(self, request: Request) -> Response:
        store, _ = self._parts()
        most = self._limits.max_file_bytes + _FORM_OVERHEAD_BYTES
        if int(request.headers.get("content-length") or 0) > most:
            raise too_large("file", most)
        within = Request(request.scope, bounded(request.receive, most))
        try:
            async with within.form(max_files=1, max_fields=8) as form:
                upload, purpose = form.get("file"), form.get("purpose")
                if not isinstance(upload, UploadFile):
                    raise missing("file", "a file in a multipart form")
                if purpose != "batch":
                    message = f"purpose is {purpose!r}; expected 'batch'"
                    raise RequestError(message, param="purpose")
                entry = await asyncio.to_thread(
                    store.add,
                    tenant_of(request).name,
                    upload.file,
                    filename=upload.filename or "upload.jsonl",
                    purpose=purpose,
                )
        except HTTPException as error:  # no form, or a broken one
            raise RequestError(
                "the form cannot be read; expected multipart/form-data with a file and a purpose",
                code="invalid_form",
            ) from error
        return JSONResponse(entry)

    async def _list_files(self, request: Request) -> Response:
        store, _ = self._parts()
        return _page(request, store.list(tenant_of(request).name, "file"))

    async def _entry(self, request: Request) -> Response:
        """A file or a batch, by its id."""
        store, _ = self._parts()
        [entry_id] = request.path_params.values()
        return JSONResponse(store.get(tenant_of(request).name, entry_id))

    async def _delete_file(self, request: Request) -> Response:
        store, _ = self._parts()
        file_id = request.path_params["file_id"]
        store.delete(tenant_of(request).name, file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def _file_content(self, request: Request) -> Response:
        store, _ = self._parts()
        tenant, file_id = tenant_of(request).name, request.path_params["file_id"]
        store.get(tenant, file_id)  # or 404
        path = store.data_path(tenant, file_id)
        return FileResponse(path, media_type="application/octet-stream")

    async def _add_batch(self, request: Request) -> Response:
        _, batches = self._parts()
        body = await read_body(BatchRequest, request, self._limits)
        return JSONResponse(batches.create(tenant_of(request).name, body))

    async def _list_batches(self, request: Request) -> Response:
        store, _ = self._parts()
        return _page(request, store.list(tenant_of(request).name, "batch"))

    async def _cancel_batch(self, request: Request) -> Response:
        _, batches = self._parts()
        return JSONResponse(
            batches.cancel(tenant_of(request).name, request.path_params["batch_id"])
        )


def _page(request: Request, entries: list[Json]) -> Response:
    """A part of a list, as `limit` and `after` ask for."""
    limit = request.query_params.get("limit", "100")
    if not (limit.isascii() and limit.isdigit() and 1 <= len(limit) <= 5 and int(limit)):
        raise RequestError(f"limit is {limit!r}; expected a number from 1 to 99999", param="limit")
    after = request.query_params.get("after")
    ids = [entry["id"] for entry in entries]
    start = ids.index(after) + 1 if after in ids else 0
    part = entries[start : start + int(limit)]
    return JSONResponse(
        {
            "object": "list",
            "data": part,
            "first_id": part[0]["id"] if part else None,
            "last_id": part[-1]["id"] if part else None,
            "has_more": start + len(part) < len(entries),
        }
    )
