"""The Anthropic Messages API: a chat in another form."""

import asyncio
import json
from collections.abc import Callable, Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from hotset.engine.completion import Completion
from hotset.foreign_text import ForeignTextError, parse_json
from hotset.request import FinishReason, RequestOutput
from hotset.server.admission import Admission, Admitted
from hotset.server.body import Json
from hotset.server.errors import ApiError, fields_named
from hotset.server.forms import encode
from hotset.server.generate import generate
from hotset.server.messages_body import FIELD_NAMES, CountTokensRequest, MessagesRequest
from hotset.server.messages_error import messages_error
from hotset.server.openapi import STREAMED, Endpoint
from hotset.server.reading import read_body, tenant_of
from hotset.server.responses import usage_body
from hotset.text.prompt import PromptEncoder


class MessagesApi:
    """`/v1/messages` and `/v1/messages/count_tokens`.

    Args:
        admission: gives what takes requests; raises EngineError where nothing does.
    """

    def __init__(self, admission: Callable[[], Admission]) -> None:
        self._admission = admission
        path, create, count = "/v1/messages", self._create, self._count_tokens
        counting = f"{path}/count_tokens"
        self.endpoints = [
            Endpoint(
                "POST", path, create, "Answer a message", body=MessagesRequest, answer=STREAMED
            ),
            Endpoint("POST", counting, count, "Count a prompt's tokens", body=CountTokensRequest),
        ]

    async def _create(self, request: Request) -> ASGIApp:
        admission = self._admission()
        body = await read_body(MessagesRequest, request, admission.limits)
        make_form = partial(MessagesForm, body.stop_sequences, admission.encoder)
        with fields_named(FIELD_NAMES):
            return await generate(request, body.chat(), admission, tenant_of(request), make_form)

    async def _count_tokens(self, request: Request) -> Response:
        admission = self._admission()
        body = await read_body(CountTokensRequest, request, admission.limits)
        admission.check_model(body.model)
        with fields_named(FIELD_NAMES):
            [prompt] = await asyncio.to_thread(body.chat().prompts, admission.encoder)
        return JSONResponse({"input_tokens": len(prompt)})


class MessagesForm:
    """A message with blocks of text and of calls: see `Form`.

    Args:
        stop_sequences: of the request.
        encoder: of the model.
        admitted: the chat.
        model: its name.
    """

    keep_alive = 'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(
        self,
        stop_sequences: Sequence[str],
        encoder: PromptEncoder,
        admitted: Admitted,
        model: str,
    ) -> None:
        self._stop_sequences = stop_sequences
        self._encoder = encoder
        self._admitted = admitted
        self._model = model
        self._num_blocks = 0
        self._open: str | None = None  # the block that is being sent: "text", or a call's index
        self._has_calls = False

    async def settle(self, completions: Sequence[Completion]) -> None:
        """See `Form`."""

    def whole(self, completions: Sequence[Completion]) -> Json:
        """See `Form`."""
        [completion] = completions
        message = self._admitted.writers[0].whole(completion)["message"]
        content: list[Json] = []
        if message["content"]:
            content.append({"type": "text", "text": message["content"]})
        content += [self._whole_call(call) for call in message.get("tool_calls", ())]
        self._has_calls = any(block["type"] == "tool_use" for block in content)
        usage = _usage(usage_body(completions, 1))
        return {**self._message(content, usage), **self._stop(completion)}

    def begin(self) -> str:
        """See `Form`."""
        prompt_tokens = self._admitted.num_prompt_tokens
        message = self._message([], _usage_of(prompt_tokens, 0, 0))
        return _event("message_start", {"message": message}) + self.keep_alive

    def step(self, index: int, output: RequestOutput) -> str:
        """See `Form`."""
        choice = self._admitted.writers[0].chunk(output)
        if choice is None:
            return ""
        delta = choice["delta"]
        text, calls = delta.get("content"), delta.get("tool_calls", ())
        # What goes on with an open call is before the text, new calls are behind it.
        goes_on = [call for call in calls if str(call["index"]) == self._open]
        new = [call for call in calls if str(call["index"]) != self._open]
        return self._calls(goes_on) + (self._text(text) if text else "") + self._calls(new)

    def _text(self, text: str) -> str:
        events = ""
        if self._open != "text":
            events = self._start("text", {"type": "text", "text": ""})
        return events + self._delta({"type": "text_delta", "text": text})

    def _calls(self, calls: Sequence[Json]) -> str:
        events = ""
        for call in calls:
            function = call["function"]
            if self._open != str(call["index"]):
                self._has_calls = True
                block = {"type": "tool_use", "id": _tool_id(call), "name": function["name"]}
                events += self._start(str(call["index"]), {**block, "input": {}})
            if arguments := function.get("arguments"):
                events += self._delta({"type": "input_json_delta", "partial_json": arguments})
        return events

    def end(self, completions: Sequence[Completion]) -> str:
        """See `Form`."""
        usage = _usage(usage_body(completions, 1))
        stop = _event("message_delta", {"delta": self._stop(completions[0]), "usage": usage})
        return self._close() + stop + _event("message_stop", {})

    def failure(self, error: ApiError) -> str:
        """See `Form`."""
        _, body = messages_error(error)
        return _event("error", {"error": body["error"]})

    def _message(self, content: list[Json], usage: Json) -> Json:
        return {
            "id": f"msg_{self._admitted.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _whole_call(self, call: Json) -> Json:
        """A call; one that was cut has no input, and is the text that it is."""
        function = call["function"]
        try:
            arguments = parse_json(function["arguments"] or "{}", check_unicode=True)
        except ForeignTextError:
            arguments = None
        if not isinstance(arguments, dict):
            name = json.dumps(function["name"], ensure_ascii=False)
            text = f'{{"name": {name}, "arguments": {function["arguments"]}'
            return {"type": "text", "text": text}
        return {
            "type": "tool_use",
            "id": _tool_id(call),
            "name": function["name"],
            "input": arguments,
        }

    def _stop(self, completion: Completion) -> Json:
        sequence = None
        if completion.finish_reason == FinishReason.LENGTH.value:
            reason = "max_tokens"
        elif self._has_calls:
            reason = "tool_use"
        else:
            sequence = self._stop_sequence(completion)
            reason = "end_turn" if sequence is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _stop_sequence(self, completion: Completion) -> str | None:
        """The sequence that ended the text: it is in the tokens, and not in the text."""
        if not self._stop_sequences:
            return None
        text = self._encoder.decode(completion.token_ids)
        found = [(text.find(one), one) for one in self._stop_sequences if one in text]
        return min(found)[1] if found else None

    def _start(self, name: str, block: Json) -> str:
        events = self._close()
        self._open = name
        fields = {"index": self._num_blocks, "content_block": block}
        self._num_blocks += 1
        return events + _event("content_block_start", fields)

    def _delta(self, delta: Json) -> str:
        return _event("content_block_delta", {"index": self._num_blocks - 1, "delta": delta})

    def _close(self) -> str:
        if self._open is None:
            return ""
        self._open = None
        return _event("content_block_stop", {"index": self._num_blocks - 1})


def _tool_id(call: Json) -> str:
    return "toolu_" + str(call["id"]).removeprefix("call_")


def _usage(usage: Json) -> Json:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return _usage_of(usage["prompt_tokens"], cached, usage["completion_tokens"])


def _usage_of(prompt_tokens: int, cached_tokens: int, output_tokens: int) -> Json:
    """Token counts; Anthropic's input tokens are those that were not found in the cache."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }


def _event(kind: str, fields: Json) -> str:
    return f"event: {kind}\ndata: {encode({'type': kind, **fields})}\n\n"
