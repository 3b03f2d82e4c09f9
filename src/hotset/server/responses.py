"""What the OpenAI API answers: whole bodies, and the chunks of a stream; no HTTP."""

import time
from collections.abc import Sequence
from typing import Protocol

from hotset.engine.completion import Completion
from hotset.request import FinishReason, RequestOutput, TokenLogprob
from hotset.server.body import Json
from hotset.server.logprobs import chat_logprobs, prompt_logprobs
from hotset.server.schemas import ChatRequest, GenerationRequest, TextRequest
from hotset.server.text_writer import PromptPart, TextWriter
from hotset.text.call_pieces import CallPiece, Pieces, join
from hotset.text.prompt import PromptEncoder
from hotset.text.tool_calls import ToolCallParser


class Writer(Protocol):
    """Writes one entry of `choices`: in chunks, or whole. One for each output."""

    def chunk(self, output: RequestOutput) -> Json | None:
        """What a stream says of a step's output; None is nothing."""
        ...

    def whole(self, completion: Completion) -> Json:
        """The entry of a whole response."""
        ...

    def beside(self, completions: Sequence[Completion]) -> Json:
        """What the whole response has beside the entries of all `completions`."""
        ...


class ChatWriter:
    """Messages, with their tool calls.

    Args:
        request: what was asked.
        encoder: of the model.
        request_id: makes the ids of tool calls unique.
        index: of the entry.
    """

    def __init__(
        self, request: ChatRequest, encoder: PromptEncoder, request_id: str, index: int
    ) -> None:
        self._request = request
        self._encoder = encoder
        self._call_prefix = f"call_{request_id}_{index}" if index else f"call_{request_id}"
        self._index = index
        self._is_first = True
        # These add nothing to the text: the bytes of all other tokens join to the content.
        self._left_out: set[int] = set()
        if request.skip_special_tokens:
            self._left_out |= encoder.tokens.special_ids
        if not request.include_stop_str_in_output:
            self._left_out.update(request.stop_token_ids)
            self._left_out |= frozenset() if request.ignore_eos else encoder.end_ids
        self._parser = None
        if request.reads_tools or request.forces_tools:
            self._parser = ToolCallParser(
                {tool.function.name: tool.function.parameters or {} for tool in request.tools},
                # Where special tokens are in the text, these are there already.
                encoder.marker_ids if request.skip_special_tokens else {},
                encoder.decode,
                has_functions=encoder.has_functions,
                forced_name=request.forced_name,
                most_calls=None if request.parallel_tool_calls else 1,
            )

    def chunk(self, output: RequestOutput) -> Json | None:
        """A part of a message; the first one names the role."""
        pieces = self._split(output)
        reason = None if output.finish_reason is None else output.finish_reason.value
        if not (pieces.text or pieces.calls or reason or self._is_first or output.logprobs):
            return None
        delta: Json = {"role": "assistant"} if self._is_first else {}
        self._is_first = False
        if pieces.calls:
            delta["tool_calls"] = [self._call_delta(piece) for piece in pieces.calls]
        if pieces.text or not pieces.calls:
            delta["content"] = pieces.text
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": self._reason(reason),
        }

    def whole(self, completion: Completion) -> Json:
        """A message."""
        reason = FinishReason(completion.finish_reason)
        output = RequestOutput(
            "", 0, completion.text, tuple(completion.token_ids), finish_reason=reason
        )
        text, calls = join([self._split(output)])
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["tool_calls"] = [
                {
                    "id": self._call_id(i),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for i, call in enumerate(calls)
            ]
            message["content"] = text or None
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": self._reason(completion.finish_reason),
        }

    def beside(self, completions: Sequence[Completion]) -> Json:
        """The log-probabilities of the prompt, where they are asked for."""
        num_top = self._request.prompt_logprobs
        if num_top is None:
            return {}
        found = next((one.prompt_logprobs for one in completions if one.prompt_logprobs), [])
        return {"prompt_logprobs": prompt_logprobs(found, self._encoder.tokens, num_top)}

    def _split(self, output: RequestOutput) -> Pieces:
        """The text and the pieces of calls to send now."""
        if self._parser is None:
            return Pieces(output.text)
        pieces = self._parser.feed(output.text, output.token_ids)
        if output.finish_reason is None:
            return pieces
        rest = self._parser.end()
        return Pieces(pieces.text + rest.text, pieces.calls + rest.calls)

    def _reason(self, reason: str | None) -> str | None:
        # A named tool ends with `stop`, as OpenAI has it.
        has_calls = self._parser is not None and self._parser.num_calls > 0
        is_call = has_calls and self._request.forced_name is None
        return "tool_calls" if is_call and reason == FinishReason.STOP.value else reason

    def _call_delta(self, piece: CallPiece) -> Json:
        """A piece of a call; the first one has its id and name, as OpenAI has it."""
        if piece.name is None:
            return {"index": piece.index, "function": {"arguments": piece.arguments}}
        return {
            "index": piece.index,
            "id": self._call_id(piece.index),
            "type": "function",
            "function": {"name": piece.name, "arguments": piece.arguments},
        }

    def _call_id(self, index: int) -> str:
        return f"{self._call_prefix}_{index}"

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> Json | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(entries, self._encoder.tokens, self._left_out)


def make_writers(
    request: GenerationRequest,
    encoder: PromptEncoder,
    request_id: str,
    prompts: Sequence[Sequence[int]],
) -> list[Writer]:
    """The writers of all entries: `n` for each prompt, in order."""
    if isinstance(request, ChatRequest):
        return [ChatWriter(request, encoder, request_id, i) for i in range(request.n)]
    assert isinstance(request, TextRequest)
    parts = [PromptPart(request, encoder, prompt) for prompt in prompts]
    return [
        TextWriter(request, encoder, part, i * request.n + j)
        for i, part in enumerate(parts)
        for j in range(request.n)
    ]


def usage_body(completions: Sequence[Completion], n: int) -> Json:
    """Token counts over completions, `n` for each prompt, in order."""
    prompt_tokens = sum(completion.prompt_tokens for completion in completions[::n])
    completion_tokens = sum(len(completion.token_ids) for completion in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            # All outputs of a prompt count the same; an output that has not begun counts 0.
            "cached_tokens": sum(
                max(one.cached_tokens for one in completions[i : i + n])
                for i in range(0, len(completions), n)
            )
        },
    }


def response_body(
    request: GenerationRequest,
    request_id: str,
    model: str,
    completions: Sequence[Completion],
    writers: Sequence[Writer],
) -> Json:
    """The whole response; `completions` are `n` for each prompt, in order."""
    return {
        "id": f"{request.id_prefix}-{request_id}",
        "object": request.object_name,
        "created": int(time.time()),
        "model": model,
        "choices": [
            writer.whole(completion)
            for writer, completion in zip(writers, completions, strict=True)
        ],
        "usage": usage_body(completions, request.n),
        **writers[0].beside(completions),
    }
