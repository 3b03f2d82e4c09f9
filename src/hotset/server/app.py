"""The OpenAI-compatible HTTP server."""

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from hotset import __version__
from hotset.engine.stream_service import StreamService
from hotset.errors import EngineError, HotsetError
from hotset.server import metrics, openapi
from hotset.server.admission import Admission
from hotset.server.batches import BatchRunner
from hotset.server.body import Json
from hotset.server.desk import Desk
from hotset.server.errors import not_found
from hotset.server.files import FileStore
from hotset.server.files_api import FilesApi
from hotset.server.gate import Gate
from hotset.server.generate import WARNING_HEADER, generate
from hotset.server.keys import Keys
from hotset.server.limits import Limits
from hotset.server.messages_api import MessagesApi
from hotset.server.openapi import PLAIN_TEXT, STREAMED, Endpoint
from hotset.server.reading import read_body, tenant_of
from hotset.server.response_store import ResponseStore
from hotset.server.responses_api import ResponsesApi
from hotset.server.schemas import (
    ChatRequest,
    DetokenizeRequest,
    GenerationRequest,
    TextRequest,
    TokenizeRequest,
)
from hotset.server.status import StatusBoard
from hotset.server.tracing import Tracer
from hotset.text.prompt import PromptEncoder

_SHUTTING_DOWN = "the server is shutting down"
_EXPOSED_HEADERS = ["x-request-id", "retry-after", WARNING_HEADER]
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'",
}


@dataclass(slots=True)
class ServerConfig:
    """How requests are taken.

    Attributes:
        keys: who may ask; without keys every client may.
        host_names: by which the server may be called; None is any.
        limits: of a request.
        files_path: folder for uploaded files and batches; None offers neither.
        files_gib: most that one tenant's files may take.
        tracer: gets a span of each request; None is no traces.
        cors_origins: of pages that browsers may let use the server; `*` is any page.
        fronts_path: folder in which fronts that share a port tell each other what they did.
        desk: has files, batches, stored responses and limits of keys in place of this server.
    """

    keys: Keys = field(default_factory=Keys)
    host_names: Collection[str] | None = None
    limits: Limits = field(default_factory=Limits)
    files_path: Path | None = None
    files_gib: float = 4.0
    tracer: Tracer | None = None
    cors_origins: Collection[str] = ()
    fronts_path: Path | None = None
    desk: Desk | None = None


@dataclass(frozen=True, slots=True)
class _Parts:
    """What answers requests once the model is loaded."""

    service: StreamService
    admission: Admission
    board: StatusBoard
    store: FileStore | None
    batches: BatchRunner | None


class Api:
    """The server's endpoints, an ASGI application. Loads the model once it is started.

    Attributes:
        is_loaded: whether requests are, or were, taken.

    Args:
        start: returns what serves requests, once it does; called in a thread. Raises HotsetError.
        config: of the server.
        on_ready: called in the event loop when requests are served.
        on_failure: called in the event loop when `start` has raised.
    """

    def __init__(
        self,
        start: Callable[[], StreamService],
        config: ServerConfig,
        *,
        on_ready: Callable[[StreamService], None] = lambda service: None,
        on_failure: Callable[[HotsetError], None] = lambda error: None,
    ) -> None:
        self._start = start
        self._config = config
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._parts: _Parts | None = None
        self.is_loaded = False
        self._started_s = int(time.time())
        self._is_draining = False
        self._store = None
        if config.files_path is not None:
            self._store = FileStore(
                config.files_path, max_tenant_bytes=int(config.files_gib * 2**30)
            )
        files = FilesApi(self._files, config.limits)
        messages = MessagesApi(lambda: self._ready().admission)
        kept = config.desk or ResponseStore.of(config.limits)
        responses = ResponsesApi(lambda: self._ready().admission, kept)
        self._endpoints = [
            *self._of_models(),
            *responses.endpoints,
            *messages.endpoints,
            *(files.endpoints if config.desk is None else self._passed_on(files.endpoints)),
            *self._of_server(),
        ]
        self._router = Router(
            [one.route for one in self._endpoints],
            redirect_slashes=False,
            default=self._no_route,
            lifespan=self._lifespan,
        )
        self.gate = Gate(
            self._route, keys=config.keys, host_names=config.host_names, tracer=config.tracer
        )
        self._entry: ASGIApp = self.gate
        if config.cors_origins:
            # Outside of the gate: a browser asks for leave without a key.
            self._entry = CORSMiddleware(
                self.gate,
                allow_origins=list(config.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=_EXPOSED_HEADERS,
            )

    def _of_models(self) -> Iterator[Endpoint]:
        for path, kind, summary in (
            ("/v1/chat/completions", ChatRequest, "Answer a chat"),
            ("/v1/completions", TextRequest, "Continue a text"),
        ):
            handler = functools.partial(self._generate, kind=kind)
            yield Endpoint("POST", path, handler, summary, body=kind, answer=STREAMED)
        yield Endpoint("GET", "/v1/models", self._models, "List the model", "models")
        path = "/v1/models/{model:path}"
        yield Endpoint("GET", path, self._model, "Describe the model", "models")

    def _passed_on(self, endpoints: Sequence[Endpoint]) -> Iterator[Endpoint]:
        """Endpoints that the desk answers, whether or not there is a replica."""
        desk = self._config.desk
        assert desk is not None

        async def pass_on(request: Request) -> Response:
            if self._is_draining:
                raise EngineError(_SHUTTING_DOWN)
            return await desk.pass_on(request)

        for one in endpoints:
            yield dataclasses.replace(one, handler=pass_on)

    def _of_server(self) -> Iterator[Endpoint]:
        for path, handler, summary, body in (
            ("/tokenize", self._tokenize, "Token ids of a text or a chat", TokenizeRequest),
            ("/detokenize", self._detokenize, "The text of token ids", DetokenizeRequest),
        ):
            yield Endpoint("POST", path, handler, summary, body=body)
        get = functools.partial(Endpoint, "GET", tag="server")
        yield get("/health", self._health, "200 once requests are served, else 503")
        yield get("/version", self._version, "The version of hotset")
        yield get("/metrics", self._metrics, "Metrics for Prometheus", answer=PLAIN_TEXT)
        yield get("/status.json", self._status, "What the status page shows")
        yield get("/openapi.json", self._openapi)
        yield get("/docs", functools.partial(_page, "docs.html"))
        yield get("/", functools.partial(_page, "status.html"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await self._entry(scope, receive, send)

    def drain(self) -> None:
        """Take no more requests; those that run go on. May be called from a signal handler."""
        self._is_draining = True

    async def end_requests(self) -> None:
        """End what runs: each client gets an error that says so. What comes is refused."""
        if self._parts is not None:
            await asyncio.to_thread(self._parts.service.close)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # lets the router raise what `Gate` answers, as 405
        await self._router(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: object) -> AsyncIterator[None]:
        loading = asyncio.create_task(self._load())
        desk = self._config.desk
        async with desk.running(self._config.keys.tenants) if desk else contextlib.nullcontext():
            yield
        await loading  # a thread cannot be stopped on its way
        parts, self._parts = self._parts, None
        if parts is not None:
            self._sampling.cancel()
            if parts.batches is not None:
                closing = asyncio.create_task(parts.batches.close())
                await asyncio.sleep(0)  # the threads are told to stop before the engine is gone
            await asyncio.to_thread(parts.service.close)
            if parts.batches is not None:
                await closing
        if self._config.tracer is not None:
            await asyncio.to_thread(self._config.tracer.close)

    async def _load(self) -> None:
        def build() -> tuple[StreamService, PromptEncoder]:
            service = self._start()
            try:
                return service, PromptEncoder(service.model, finds_repeats=service.keeps_states)
            except BaseException:
                service.close()
                raise

        try:
            service, encoder = await asyncio.to_thread(build)
        except HotsetError as error:
            self._on_failure(error)
            return
        admission = Admission(service, encoder, self._config.limits)
        batches = None
        if self._store is not None:
            batches = BatchRunner(self._store, admission)
            batches.resume()
        board = StatusBoard(service, self.gate.counts, self._config.fronts_path)
        self._sampling = asyncio.create_task(board.run())
        self._parts = _Parts(service, admission, board, self._store, batches)
        self.is_loaded = True
        self._on_ready(service)

    def _loaded(self) -> _Parts:
        """The parts, once there is something to look at; raises EngineError before that."""
        if self._is_draining:
            raise EngineError(_SHUTTING_DOWN)
        if self._parts is None:
            raise EngineError("the model is still being loaded; try again soon")
        return self._parts

    def _ready(self) -> _Parts:
        """The parts, once loaded; raises EngineError before that and after a failure."""
        parts = self._loaded()
        parts.service.raise_unless_healthy()
        return parts

    # Generation.

    async def _generate(self, request: Request, kind: type[GenerationRequest]) -> ASGIApp:
        parts = self._ready()
        body = await read_body(kind, request, self._config.limits)
        return await generate(request, body, parts.admission, tenant_of(request))

    async def _tokenize(self, request: Request) -> Response:
        parts = self._ready()
        body = await read_body(TokenizeRequest, request, self._config.limits)
        parts.admission.check_model(body.model)
        ids = await asyncio.to_thread(body.token_ids, parts.admission.encoder)
        return JSONResponse(
            {"count": len(ids), "max_model_len": parts.service.max_model_len, "tokens": ids}
        )

    async def _detokenize(self, request: Request) -> Response:
        parts = self._ready()
        body = await read_body(DetokenizeRequest, request, self._config.limits)
        parts.admission.check_model(body.model)
        return JSONResponse({"prompt": parts.admission.encoder.decode(body.tokens, True)})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_body()]})

    async def _model(self, request: Request) -> Response:
        self._ready().admission.check_model(request.path_params["model"])
        return JSONResponse(self._model_body())

    def _model_body(self) -> Json:
        service = self._ready().service
        return {
            "id": service.model.name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "hotset",
            "max_model_len": service.max_model_len,
        }

    def _files(self) -> tuple[FileStore, BatchRunner]:
        parts = self._ready()
        if parts.store is None or parts.batches is None:
            raise not_found("files and batches are switched off on this server")
        return parts.store, parts.batches

    # For those who run the server.

    async def _health(self, request: Request) -> Response:
        self._ready()  # or 503
        return JSONResponse({"status": "ok"})

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def _metrics(self, request: Request) -> Response:
        parts = self._loaded()
        board, accept = parts.board, request.headers.get("accept", "")
        content, kind = metrics.exposition(await board.engines(), board.own_metrics(), accept)
        return Response(content, headers={"Content-Type": kind})

    async def _status(self, request: Request) -> Response:
        parts = self._loaded()  # a fleet shows what became of its replicas when none is left
        return JSONResponse(await parts.board.body())

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    @functools.cached_property
    def _document(self) -> Json:
        return openapi.document(self._endpoints)

    async def _no_route(self, scope: Scope, receive: Receive, send: Send) -> None:
        paths = dict.fromkeys(one.path for one in self._endpoints)
        raise not_found(f"there is no {scope['path'][:200]}; there are {', '.join(paths)}")


async def _page(name: str, request: Request) -> Response:
    text = package_files("hotset.server").joinpath("static", name).read_text()
    return Response(text, media_type="text/html", headers=_PAGE_HEADERS)
