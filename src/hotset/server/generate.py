"""The answer to a request for text: whole, or as server-sent events."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hotset.engine.completion import Completion
from hotset.request import FinishReason, RequestOutput
from hotset.server.admission import Admission, Admitted
from hotset.server.errors import ended_early
from hotset.server.forms import CompletionForm, Form, MakeForm, encode_in_parts
from hotset.server.keys import Tenant
from hotset.server.responses import usage_body
from hotset.server.schemas import GenerationRequest

T = TypeVar("T")

Facts = dict[str, Any]  # of a request, for the access log and the trace

# Proxies give up on a stream that says nothing for a minute or so.
KEEP_ALIVE_S = 10.0
WARNING_HEADER = "x-hotset-warning"  # names the parts of a request that were left out
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy in between should not wait for more
]


async def generate(
    request: Request,
    body: GenerationRequest,
    admission: Admission,
    tenant: Tenant,
    make_form: MakeForm = CompletionForm,
) -> ASGIApp:
    """Answer a request by its form. Raises what `Tenant.request` and `Admission.submit` do."""
    facts: Facts = request.scope["facts"]
    facts["model"] = admission.service.model.name
    admission.check_model(body.model)
    await tenant.ready()
    with contextlib.ExitStack() as stack:
        stack.enter_context(tenant.request())
        # Encoding a long prompt or compiling a schema would hold up the other clients.
        admitted = await asyncio.to_thread(admission.submit, body, tenant)
        stack.callback(admitted.abort)
        facts["engine_id"] = admitted.request_id
        warning = body.warning()
        headers = {} if warning is None else {WARNING_HEADER: warning}
        if warning is not None:
            facts["warning"] = warning
        tally = _Tally(admitted, tenant, facts)
        stack.callback(tally.close)
        form = make_form(admitted, admission.service.model.name)
        if body.stream:
            # From here on the response holds the tenant's place and ends the request.
            return _EventStream(tally, form, admitted, stack.pop_all(), headers)
        await _unless_disconnected(request, tally.read_all())
        _raise_failure(tally.completions, admission)
        await form.settle(tally.completions)
        if body.num_prompt_logprobs() is None:
            return JSONResponse(form.whole(tally.completions), headers=headers)
        # These can take seconds to write, in which other clients' streams go on.
        content = await asyncio.to_thread(_long_content, form, tally.completions)
        return Response(content, headers=headers, media_type="application/json")


def _long_content(form: Form, completions: list[Completion]) -> bytes:
    return encode_in_parts(form.whole(completions), 4).encode()


class _Tally:
    """Reads the outputs of a request and keeps count of them."""

    def __init__(self, admitted: Admitted, tenant: Tenant, facts: Facts) -> None:
        self._admitted = admitted
        self._tenant = tenant
        self._facts = facts
        self._start_s = time.monotonic()
        n = admitted.body.n
        self.completions = [Completion(index=i) for i in range(n * len(admitted.streams))]

    async def read_all(self) -> None:
        """Read to the end."""
        async for _ in self.read():
            pass

    async def read(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Each output with the index of its entry in `choices`."""
        n = self._admitted.body.n
        async for position, output in _merge(self._admitted):
            if "ttft_ms" not in self._facts and output.token_ids:
                self._facts["ttft_ms"] = round(1e3 * (time.monotonic() - self._start_s), 1)
            index = position * n + output.index
            self.completions[index].add(output)
            yield index, output

    def close(self) -> None:
        """Note for the log and the trace what the request came to."""
        usage = usage_body(self.completions, self._admitted.body.n)
        self._tenant.charge(usage["total_tokens"])
        self._facts["prompt_tokens"] = usage["prompt_tokens"]
        self._facts["output_tokens"] = usage["completion_tokens"]
        self._facts["cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]
        self._facts["finish"] = ",".join(
            dict.fromkeys(one.finish_reason or "none" for one in self.completions)
        )


async def _merge(admitted: Admitted) -> AsyncIterator[tuple[int, RequestOutput]]:
    """The outputs of all prompts as they come, each with its prompt's position."""
    if len(admitted.streams) == 1:
        async for output in admitted.streams[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | None]] = asyncio.Queue()

    async def read(position: int) -> None:
        async for output in admitted.streams[position]:
            queue.put_nowait((position, output))
        queue.put_nowait((position, None))

    tasks = [asyncio.create_task(read(i)) for i in range(len(admitted.streams))]
    try:
        num_open = len(tasks)
        while num_open:
            position, one = await queue.get()
            if one is None:
                num_open -= 1
            else:
                yield position, one
    finally:
        for task in tasks:
            task.cancel()


def _raise_failure(completions: list[Completion], admission: Admission) -> None:
    for one in completions:
        error = ended_early(FinishReason(one.finish_reason), one.error, one.code)
        if error is not None:
            if one.code is None:
                admission.service.raise_unless_healthy()
            raise error


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for `work`; cancels it and raises ClientDisconnect where the client goes away first."""
    tasks = asyncio.create_task(work), asyncio.create_task(_disconnect(request.receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _events(tally: _Tally, form: Form) -> AsyncIterator[str]:
    """Server-sent events of one request."""
    yield form.begin()
    async for index, output in tally.read():
        if output.finish_reason is not None:
            error = ended_early(output.finish_reason, output.error, output.code)
            if error is not None:
                if output.token_ids:  # outputs of a slow reader are joined
                    yield form.step(index, output._replace(finish_reason=None))
                yield form.failure(error)
                return
        yield form.step(index, output)
    await form.settle(tally.completions)
    yield form.end(tally.completions)


class _EventStream:
    """A response that ends its request however it ends itself, also before its first byte."""

    def __init__(
        self,
        tally: _Tally,
        form: Form,
        admitted: Admitted,
        stack: contextlib.ExitStack,
        headers: dict[str, str],
    ) -> None:
        more = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        self._headers = [*_SSE_HEADERS, *more]
        self._events = _events(tally, form)
        self._keep_alive = form.keep_alive.encode()
        self._admitted = admitted
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; a client that goes away ends the request at once."""
        num_sent = 0

        async def watch() -> None:
            num_seen = -1
            while True:
                try:
                    await asyncio.wait_for(_disconnect(receive), KEEP_ALIVE_S)
                except TimeoutError:
                    if num_seen == num_sent:  # still in the queue, or a long prompt
                        await send(_body(self._keep_alive))
                    num_seen = num_sent
                else:
                    self._admitted.abort()  # ends `_events`
                    return

        with self._stack:
            watcher = asyncio.create_task(watch())
            try:
                start = {"type": "http.response.start", "status": 200, "headers": self._headers}
                await send(start)
                async for events in self._events:
                    if events:
                        await send(_body(events.encode()))
                        num_sent += 1
                await send({"type": "http.response.body", "body": b""})
            finally:
                watcher.cancel()


def _body(content: bytes) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": True}
