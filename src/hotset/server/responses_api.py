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
from hotset.server.openapi import STREAMED, Endpoint
from hotset.server.reading import read_body, tenant_of
from hotset.server.response_store import KeptResponses
from hotset.server.responses_body import FIELD_NAMES, ResponsesRequest
from hotset.server.responses_form import ResponsesForm


class ResponsesApi:
    """`/v1/responses`.

    Args:
        admission: gives what takes requests; raises EngineError where nothing does.
        store: has the responses that are to be kept.
    """

    def __init__(self, admission: Callable[[], Admission], store: KeptResponses) -> None:
        self._admission = admission
        self._store = store
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
        earlier = await self._earlier(tenant.name, body.previous_response_id)
        keep = None
        if body.store:
            keep = functools.partial(self._keep, tenant.name, [*earlier, *body.items()])
        make_form = functools.partial(ResponsesForm, body, keep)
        with fields_named(FIELD_NAMES):
            return await generate(request, body.chat(earlier), admission, tenant, make_form)

    async def _keep(self, tenant: str, items: list[Json], response: Json) -> bool:
        return await self._store.put(tenant, response, [*items, *response["output"]])

    async def _earlier(self, tenant: str, response_id: str | None) -> list[Json]:
        if response_id is None:
            return []
        try:
            return (await self._store.get(tenant, response_id)).items
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
        return JSONResponse((await self._store.get(tenant, response_id)).response)

    async def _delete(self, request: Request) -> Response:
        self._admission()
        tenant, response_id = tenant_of(request).name, request.path_params["response_id"]
        await self._store.delete(tenant, response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})
