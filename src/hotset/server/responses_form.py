"""A response of the OpenAI Responses API: its items, whole or as they grow."""

import itertools
import time
from collections.abc import Awaitable, Callable, Sequence

from hotset.engine.completion import Completion
from hotset.request import FinishReason, RequestOutput
from hotset.server.admission import Admitted
from hotset.server.body import Json
from hotset.server.errors import ApiError
from hotset.server.forms import encode
from hotset.server.responses import usage_body
from hotset.server.responses_body import FunctionTool, ResponsesRequest


class ResponsesForm:
    """Messages and calls as items: see `Form`.

    A whole answer is made of the same steps as a stream, whose events are then left out.

    Args:
        body: what was asked.
        keep: stores the finished response; returns whether it did. None: it is not asked for.
        admitted: the chat.
        model: its name.
    """

    keep_alive = ": waiting\n\n"

    def __init__(
        self,
        body: ResponsesRequest,
        keep: Callable[[Json], Awaitable[bool]] | None,
        admitted: Admitted,
        model: str,
    ) -> None:
        self._body = body
        self._keep = keep
        self._admitted = admitted
        self._model = model
        self._created_s = int(time.time())
        self._numbers = itertools.count()
        self._output: list[Json] = []  # items that have ended
        self._item: Json | None = None  # the one that grows
        self._call_index: int | None = None  # of the call that it is
        self._logprobs: list[Json] = []  # of tokens whose text is still to come
        self._finished: Json = {}  # once it is settled
        self._last_events = ""

    async def settle(self, completions: Sequence[Completion]) -> None:
        """See `Form`: end the response, and store it where that is asked for."""
        if not self._body.stream:
            entry = self._admitted.writers[0].whole(completions[0])
            message = entry["message"]
            calls = [{"index": i, **one} for i, one in enumerate(message.get("tool_calls", ()))]
            self._take({**entry, "delta": {"content": message["content"], "tool_calls": calls}})
        self._last_events, self._finished = self._finish(completions)
        if self._keep is not None:
            self._finished["store"] = True
            self._finished["store"] = await self._keep(self._finished)

    def whole(self, completions: Sequence[Completion]) -> Json:
        """See `Form`."""
        return self._finished

    def begin(self) -> str:
        """See `Form`."""
        response = self._response("in_progress")
        events = (self._event(kind, response=response) for kind in ("created", "in_progress"))
        return "".join(events)

    def step(self, index: int, output: RequestOutput) -> str:
        """See `Form`."""
        choice = self._admitted.writers[0].chunk(output)
        return "" if choice is None else self._take(choice)

    def end(self, completions: Sequence[Completion]) -> str:
        """See `Form`."""
        response = self._finished
        return self._last_events + self._event(response["status"], response=response)

    def failure(self, error: ApiError) -> str:
        """See `Form`."""
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": str(error)}
        return self._event("failed", response=response)

    def _finish(self, completions: Sequence[Completion]) -> tuple[str, Json]:
        """End the item that is open; returns its events, and the response."""
        is_cut = completions[0].finish_reason == FinishReason.LENGTH.value
        status = "incomplete" if is_cut else "completed"
        events = self._close(status)
        response = self._response(status)
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        usage = usage_body(completions, 1)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        return events, response

    def _take(self, choice: Json) -> str:
        """Add a part of the message; returns the events."""
        delta = choice["delta"]
        text, calls = delta.get("content"), delta.get("tool_calls", ())
        self._logprobs += (choice.get("logprobs") or {}).get("content") or []
        # What goes on with an open call is before the text, new calls are behind it.
        goes_on = [call for call in calls if call["index"] == self._call_index]
        new = [call for call in calls if call["index"] != self._call_index]
        events = self._add_calls(goes_on)
        if text:
            events += self._add_text(text)
        return events + self._add_calls(new)

    def _add_text(self, text: str) -> str:
        events = ""
        if self._item is None or self._item["type"] != "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events = self._open({"type": "message", "role": "assistant", "content": []}, "msg")
            events += self._part_event("content_part.added", part=part)
            assert self._item is not None
            self._item["content"] = [part]
        [part] = self._item["content"]
        logprobs, self._logprobs = self._logprobs, []
        part["text"] += text
        part["logprobs"] += logprobs
        return events + self._part_event("output_text.delta", delta=text, logprobs=logprobs)

    def _add_calls(self, calls: Sequence[Json]) -> str:
        events = ""
        for call in calls:
            function = call["function"]
            if self._item is None or self._call_index != call["index"]:
                item = {"type": "function_call", "call_id": call["id"], "name": function["name"]}
                events += self._open({**item, "arguments": ""}, "fc")
                self._call_index = call["index"]
            if arguments := function.get("arguments"):
                assert self._item is not None
                self._item["arguments"] += arguments
                kind = "function_call_arguments.delta"
                events += self._item_event(kind, delta=arguments)
        return events

    def _open(self, item: Json, prefix: str) -> str:
        """Begin an item behind those there are."""
        events = self._close("completed")
        item_id = f"{prefix}_{self._admitted.request_id}_{len(self._output)}"
        self._item = {"id": item_id, "status": "in_progress", **item}
        return events + self._output_event("output_item.added")

    def _close(self, status: str) -> str:
        """End the open item, if there is one."""
        item = self._item
        if item is None:
            return ""
        item["status"] = status
        if item["type"] == "message":
            [part] = item["content"]
            part["logprobs"] += self._logprobs  # of tokens without a text, as the last one
            said = {"text": part["text"], "logprobs": part["logprobs"]}
            events = self._part_event("output_text.done", **said)
            events += self._part_event("content_part.done", part=part)
        else:
            said = {"name": item["name"], "arguments": item["arguments"]}
            events = self._item_event("function_call_arguments.done", **said)
        events += self._output_event("output_item.done")
        self._logprobs = []
        self._output.append(item)
        self._item = self._call_index = None
        return events

    def _output_event(self, kind: str) -> str:
        return self._event(kind, output_index=len(self._output), item=self._item)

    def _item_event(self, kind: str, **fields: object) -> str:
        assert self._item is not None
        where = {"item_id": self._item["id"], "output_index": len(self._output)}
        return self._event(kind, **where, **fields)

    def _part_event(self, kind: str, **fields: object) -> str:
        return self._item_event(kind, content_index=0, **fields)

    def _event(self, kind: str, **fields: object) -> str:
        kind = f"response.{kind}"
        data = {"type": kind, "sequence_number": next(self._numbers), **fields}
        return f"event: {kind}\ndata: {encode(data)}\n\n"

    def _response(self, status: str) -> Json:
        body = self._body
        choice = body.tool_choice
        tools = [one for one in body.tools if isinstance(one, FunctionTool)]
        return {
            "id": f"resp_{self._admitted.request_id}",
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions or None,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": self._model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": body.text.format.model_dump(by_alias=True, exclude_defaults=True)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in tools],
            "top_logprobs": body.top_logprobs,
            "top_p": body.top_p,
            "truncation": body.truncation,
            "usage": None,
            "user": body.user,
        }
