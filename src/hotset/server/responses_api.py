"""The OpenAI Responses API: a chat in another form, stored where that is asked for."""

import functools
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from hotset.errors import RequestError
from hotset.server.admission import Admission
from hotset.server.body import Json
from hotset.server.errors import ApiError, fields_named
from hotset.server.generate import generate
from hotset.server.limits import Limits
from hotset.server.openapi import STREAMED, Endpoint
from hotset.server.reading import read_body, tenant_of
from hotset.server.response_store import ResponseStore
from hotset.server.responses_body import FIELD_NAMES, ResponsesRequest
from hotset.server.responses_form import ResponsesForm


class ResponsesApi:
    """`/v1/responses`.

    Args:
        admission: gives what takes requests; raises EngineError where nothing does.
        limits: of a request, and of what is stored.
    """

    def __init__(self, admission: Callable[[], Admission], limits: Limits) -> None:
        self._admission = admission
        self._store = ResponseStore(
            max_count=limits.max_stored, max_bytes=int(limits.max_stored_mib * 2**20)
        )
        path, create = "/v1/responses", self._create
        one = f"{path}/{{response_id}}"
        self.endpoints = [
            Endpoint(
                "POST", path, create, "Make a response", body=ResponsesRequest, answer=STREAMED
            ),
            Endpoint("GET", one, self._get, "A response that was stored"),
            Endpoint("DELETE", one, self._delete, "Forget a response"),
        ]

    async def _create(self, request: Request) -> ASGIApp:
        admission, tenant = self._admission(), tenant_of(request)
        body = await read_body(ResponsesRequest, request, admission.limits)
        earlier = self._earlier(tenant.name, body.previous_response_id)
        on_end = None
        if body.store:
            on_end = functools.partial(self._keep, tenant.name, [*earlier, *body.items()])
        make_form = functools.partial(ResponsesForm, body, on_end)
        with fields_named(FIELD_NAMES):
            return await generate(request, body.chat(earlier), admission, tenant, make_form)

    def _keep(self, tenant: str, items: list[Json], response: Json) -> bool:
        return self._store.put(tenant, response, [*items, *response["output"]])

    def _earlier(self, tenant: str, response_id: str | None) -> list[Json]:
        if response_id is None:
            return []
        try:
            return self._store.get(tenant, response_id).items
        except ApiError as error:
            raise RequestError(
                f"previous_response_id: {error}",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from error

    async def _get(self, request: Request) -> Response:
        self._admission()
        if request.query_params.get("stream", "false").lower() != "false":
            message = "stream is set; expected none: a stored response is given whole"
            raise RequestError(message, param="stream", code="unsupported_parameter")
        tenant, response_id = tenant_of(request).name, request.path_params["response_id"]
        return JSONResponse(self._store.get(tenant, response_id).response)

    async def _delete(self, request: Request) -> Response:
        self._admission()
        tenant, response_id = tenant_of(request).name, request.path_params["response_id"]
        self._store.delete(tenant, response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})
