"""The OpenAI-compatible HTTP server."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from hotset.config import EngineConfig
from hotset.engine.completion import Completion
from hotset.engine.service import EngineService, OutputStream
from hotset.errors import EngineError, HotsetError, RequestError
from hotset.model.prompt import PromptEncoder
from hotset.server.schemas import (
    ChatRequest,
    GenerationRequest,
    Json,
    TextRequest,
    error_body,
    parse_body,
    response_body,
    usage_body,
)

T = TypeVar("T")


class Backend:
    """The engine behind the server: loading, ready, or failed."""

    def __init__(self) -> None:
        self.service: EngineService | None = None
        self.encoder: PromptEncoder | None = None
        self.started_s = int(time.time())

    def load(self, config: EngineConfig) -> None:
        """Load the model and start the engine; blocks until it is ready."""
        service = EngineService(config)
        try:
            self.encoder = PromptEncoder(service.model)
        except BaseException:
            service.close()
            raise
        self.service = service

    def ready(self) -> tuple[EngineService, PromptEncoder]:
        """The parts, once loaded; raises EngineError before that and after a failure."""
        if self.service is None or self.encoder is None:
            raise EngineError("the model is still being loaded; try again soon")
        self.service.raise_unless_healthy()
        return self.service, self.encoder


def create_app(
    config: EngineConfig,
    *,
    on_ready: Callable[[EngineService], None] = lambda service: None,
    on_failure: Callable[[HotsetError], None] = lambda error: None,
) -> Starlette:
    """The application. It loads the model in the background once it is started.

    Args:
        config: of the engine.
        on_ready: called in the event loop when requests are served.
        on_failure: called in the event loop when the model cannot be loaded.
    """
    backend = Backend()

    async def load() -> None:
        try:
            await asyncio.to_thread(backend.load, config)
        except HotsetError as error:
            on_failure(error)
        else:
            assert backend.service is not None
            on_ready(backend.service)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(load())
        yield
        await loading  # a thread cannot be stopped on its way
        if backend.service is not None:
            await asyncio.to_thread(backend.service.close)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _chat_completions, methods=["POST"]),
            Route("/v1/completions", _completions, methods=["POST"]),
            Route("/v1/models", _models, methods=["GET"]),
            Route("/health", _health, methods=["GET"]),
        ],
        exception_handlers={
            RequestError: _refused,
            EngineError: _unavailable,
            ClientDisconnect: _gone,
            404: _not_found,
            405: _not_found,
        },
        lifespan=lifespan,
    )
    app.state.backend = backend
    return app


async def _chat_completions(request: Request) -> Response:
    return await _generate(request, ChatRequest)


async def _completions(request: Request) -> Response:
    return await _generate(request, TextRequest)


async def _models(request: Request) -> Response:
    backend: Backend = request.app.state.backend
    service, _ = backend.ready()
    model = {
        "id": service.model.name,
        "object": "model",
        "created": backend.started_s,
        "owned_by": "hotset",
        "max_model_len": service.max_model_len,
    }
    return JSONResponse({"object": "list", "data": [model]})


async def _health(request: Request) -> Response:
    backend: Backend = request.app.state.backend
    backend.ready()  # or 503
    return JSONResponse({"status": "ok"})


async def _generate(request: Request, kind: type[GenerationRequest]) -> Response:
    backend: Backend = request.app.state.backend
    service, encoder = backend.ready()
    try:
        data = json.loads(await request.body())
    except ValueError as error:  # not UTF-8 is one too
        raise RequestError(f"the body is not JSON: {error}") from error
    body = parse_body(kind, data)
    name = service.model.name
    if body.model not in (None, name):
        message = f"model {body.model!r} is not served here; {name!r} is"
        return JSONResponse(error_body(message, code="model_not_found"), 404)
    # Encoding a long prompt or compiling a schema would hold up the other clients.
    streams = await asyncio.to_thread(submit, service, encoder, body)
    request_id = streams[0].request_id
    if body.stream:
        return _EventStream(_events(body, streams[0], name, encoder), streams)
    completions = await _unless_disconnected(request, _gather(streams, body.n), streams)
    failed = next((completion for completion in completions if completion.failed), None)
    if failed is not None:
        service.raise_unless_healthy()
        return JSONResponse(error_body(failed.error or "", "server_error"), 500)
    return JSONResponse(response_body(body, request_id, name, completions, encoder))


def submit(
    service: EngineService, encoder: PromptEncoder, body: GenerationRequest
) -> list[OutputStream]:
    """Queue each prompt of a request: all of them or, with RequestError, none."""
    params = body.params()
    prompts = body.prompts(encoder)
    if body.stream and len(prompts) > 1:
        raise RequestError("a stream has one prompt; send one request for each, or do not stream")
    streams: list[OutputStream] = []
    try:
        for token_ids in prompts:
            streams.append(service.submit(token_ids, params, salt=body.cache_salt.encode()))
    except HotsetError:
        for stream in streams:
            stream.abort()
        raise
    return streams


async def _gather(streams: list[OutputStream], n: int) -> list[Completion]:
    gathered = []
    for stream in streams:
        completions = [Completion(index=i) for i in range(n)]
        async for output in stream:
            completions[output.index].add(output)
        gathered += completions
    return gathered


async def _unless_disconnected(
    request: Request, work: Coroutine[Any, Any, T], streams: list[OutputStream]
) -> T:
    """Wait for `work`; raises ClientDisconnect, with the streams aborted, if nobody does."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(disconnect())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        for stream in streams:
            stream.abort()


async def _events(
    body: GenerationRequest, stream: OutputStream, model: str, encoder: PromptEncoder
) -> AsyncIterator[str]:
    """Server-sent events of one request."""
    completions = [Completion(index=i) for i in range(body.n)]
    head = {
        "id": f"{body.id_prefix}-{stream.request_id}",
        "object": body.chunk_name,
        "created": int(time.time()),
        "model": model,
    }
    # Where usage was asked for, the chunks before it say that they have none.
    usage = {"usage": None} if body.stream_options.include_usage else {}
    started = set()
    async for output in stream:
        if output.error is not None:
            yield _event(error_body(output.error, "server_error"))
            return
        completions[output.index].add(output)
        is_first = output.index not in started
        if output.text or output.finish_reason or is_first or output.logprobs:
            started.add(output.index)
            choice = body.chunk_choice(output, encoder, is_first=is_first)
            yield _event({**head, "choices": [choice], **usage})
    if body.stream_options.include_usage:
        yield _event({**head, "choices": [], "usage": usage_body(completions, 1)})
    yield "data: [DONE]\n\n"


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class _EventStream(StreamingResponse):
    """A response that aborts its requests however it ends, also before its first byte."""

    def __init__(self, events: AsyncIterator[str], streams: list[OutputStream]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for stream in self._streams:
                stream.abort()


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(str(error)), 400)


async def _unavailable(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(str(error), "server_error"), 503, {"Retry-After": "1"})


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _not_found(request: Request, error: Exception) -> Response:
    status: int = getattr(error, "status_code", 404)
    return JSONResponse(error_body(f"there is no {request.method} {request.url.path}"), status)
