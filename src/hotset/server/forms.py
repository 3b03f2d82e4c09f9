"""How an API writes an answer: whole, or as server-sent events."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from hotset.engine.completion import Completion
from hotset.request import RequestOutput
from hotset.server.admission import Admitted
from hotset.server.body import Json
from hotset.server.errors import ApiError
from hotset.server.responses import response_body, usage_body

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
encode = _JSON.encode


def encode_in_parts(value: object, levels: int) -> str:
    """`encode`, with a call for each part that is `levels` down: no call holds up other threads."""
    if levels and isinstance(value, list):
        return f"[{','.join([encode_in_parts(one, levels - 1) for one in value])}]"
    if levels and isinstance(value, dict):
        parts = [f"{encode(key)}:{encode_in_parts(one, levels - 1)}" for key, one in value.items()]
        return f"{{{','.join(parts)}}}"
    return encode(value)


class Form(Protocol):
    """Writes one answer as its API has it. A stream is `begin`, one `step` per output, and one end.

    Attributes:
        keep_alive: what a stream sends while there is no output.
    """

    keep_alive: str

    async def settle(self, completions: Sequence[Completion]) -> None:
        """Do what `whole` or `end`, which comes next, tells of. Raises nothing."""
        ...

    def whole(self, completions: Sequence[Completion]) -> Json:
        """The body of a whole answer; `completions` are `n` for each prompt, in order."""
        ...

    def begin(self) -> str:
        """The events before the first output."""
        ...

    def step(self, index: int, output: RequestOutput) -> str:
        """The events of one output of the completion at `index`; may be none."""
        ...

    def end(self, completions: Sequence[Completion]) -> str:
        """The last events of an answer that came to its end."""
        ...

    def failure(self, error: ApiError) -> str:
        """The last events of one that did not."""
        ...


MakeForm = Callable[[Admitted, str], Form]  # the model's name is the second


class CompletionForm:
    """Chat and text completions of the OpenAI API."""

    keep_alive = ": waiting\n\n"

    def __init__(self, admitted: Admitted, model: str) -> None:
        self._admitted = admitted
        self._body = admitted.body
        self._model = model
        self._head = {
            "id": f"{self._body.id_prefix}-{admitted.request_id}",
            "object": self._body.chunk_name,
            "created": int(time.time()),
            "model": model,
        }
        # The choice is all that changes from one chunk to the next.
        self._start = f'data: {encode(self._head)[:-1]},"choices":['
        # Where usage was asked for, the chunks before it say that they have none.
        has_usage = self._body.stream_options.include_usage
        self._end = '],"usage":null}\n\n' if has_usage else "]}\n\n"
        self._num_tokens: Counter[int] = Counter()  # by index

    async def settle(self, completions: Sequence[Completion]) -> None:
        """See `Form`."""

    def whole(self, completions: Sequence[Completion]) -> Json:
        """See `Form`."""
        admitted = self._admitted
        return response_body(
            self._body, admitted.request_id, self._model, completions, admitted.writers
        )

    def begin(self) -> str:
        """See `Form`."""
        return ""

    def step(self, index: int, output: RequestOutput) -> str:
        """See `Form`."""
        choice = self._admitted.writers[index].chunk(output)
        end = self._end
        if self._body.stream_options.continuous_usage_stats:
            self._num_tokens[index] += len(output.token_ids)
            end = f'],"usage":{encode(self._usage_so_far(index, output.prompt_tokens))}}}\n\n'
        return "" if choice is None else f"{self._start}{encode(choice)}{end}"

    def end(self, completions: Sequence[Completion]) -> str:
        """See `Form`."""
        usage = ""
        if self._body.stream_options.include_usage:
            counts = usage_body(completions, self._body.n)
            usage = f"data: {encode({**self._head, 'choices': [], 'usage': counts})}\n\n"
        return f"{usage}data: [DONE]\n\n"

    def _usage_so_far(self, index: int, prompt_tokens: int) -> Json:
        """Of one entry, as vLLM has it."""
        num_tokens = self._num_tokens[index]
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": prompt_tokens + num_tokens,
        }

    def failure(self, error: ApiError) -> str:
        """See `Form`."""
        return f"data: {encode(error.body())}\n\n"
