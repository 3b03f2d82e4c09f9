"""Bounds on what one HTTP request may ask for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from hotset.errors import ConfigError, RequestError
from hotset.request import SamplingParams
from hotset.server.schemas import GenerationRequest, TextRequest

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request, and all that wait, may be. The engine's own bounds come on top.

    Attributes:
        max_body_mib: of a JSON body.
        max_file_mib: of an uploaded file.
        max_prompt_tokens: of one prompt; None is what the context holds.
        max_tokens: to generate for one output; a request without `max_tokens` gets this many at
            most. None is what the context holds.
        max_n: outputs for one prompt.
        max_prompts: in one text completion.
        max_stop: stop strings, and as many stop tokens.
        max_schema_kib, max_schema_depth: of a JSON schema.
        max_prompt_logprobs: log-probabilities of prompts in one answer: each entry of `choices`
            counts the prompt's tokens and the likeliest tokens at their places.
        max_stored, max_stored_mib: responses of `/v1/responses` that are kept for one key, and
            their size; the least recently used ones are dropped.
        max_queue: requests that wait for the engine; more are refused with 429.
        request_timeout_s: the longest a request may take, queueing included.
    """

    max_body_mib: float = 4.0
    max_file_mib: float = 200.0
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_n: int = 16
    max_prompts: int = 128
    max_stop: int = 16
    max_schema_kib: float = 64.0
    max_schema_depth: int = 32
    max_stored: int = 1000
    max_stored_mib: float = 64.0
    max_prompt_logprobs: int = 2**22
    max_queue: int = 1024
    request_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and not value > 0:
                raise ConfigError(f"{one.name} is {value}; expected more than 0")

    @property
    def max_body_bytes(self) -> int:
        """`max_body_mib` in bytes."""
        return int(self.max_body_mib * MIB)

    @property
    def max_file_bytes(self) -> int:
        """`max_file_mib` in bytes."""
        return int(self.max_file_mib * MIB)

    def check(self, body: GenerationRequest) -> None:
        """Raise RequestError where a request asks for more; sets a bound where it has none."""

        def refuse(ok: bool, what: str, value: object, most: object, param: str) -> None:
            if not ok:
                raise RequestError(
                    f"{what} is {value}; this server allows {most} at most", param=param
                )

        refuse(body.n <= self.max_n, "n", body.n, self.max_n, "n")
        if self.max_tokens is not None:
            if body.max_tokens is None:
                body.max_tokens = self.max_tokens
            most = self.max_tokens
            refuse(body.max_tokens <= most, "max_tokens", body.max_tokens, most, "max_tokens")
        for name in ("stop", "stop_token_ids"):
            stop = getattr(body, name)
            if isinstance(stop, list):
                count, most = len(stop), self.max_stop
                refuse(count <= most, "the number of stops", count, most, name)
        if isinstance(body, TextRequest):
            count, most = body.num_prompts(), self.max_prompts
            refuse(count <= most, "the number of prompts", count, most, "prompt")
        for schema in body.schemas():
            size, depth = measure(schema, most_depth=self.max_schema_depth)
            deepest, most_kib, param = self.max_schema_depth, self.max_schema_kib, body.schema_param
            refuse(depth <= deepest, "a schema's depth", f"over {deepest}", deepest, param)
            ok, over = size <= 1024 * most_kib, f"over {most_kib} KiB"
            refuse(ok, "a schema's size", over, f"{most_kib} KiB", param)

    def check_prompt(self, num_tokens: int) -> None:
        """Raise RequestError where a prompt is too long."""
        if self.max_prompt_tokens is not None and num_tokens > self.max_prompt_tokens:
            raise RequestError(
                f"the prompt has {num_tokens} tokens; "
                f"this server allows {self.max_prompt_tokens} at most",
                param="prompt",
                code="context_length_exceeded",
            )

    def check_prompt_logprobs(
        self, params: SamplingParams, prompts: Sequence[Sequence[int]]
    ) -> None:
        """Raise RequestError where the answer would have too many of them."""
        if params.prompt_logprobs is None:
            return
        count = params.n * sum(map(len, prompts)) * (1 + params.prompt_logprobs)
        if count > self.max_prompt_logprobs:
            raise RequestError(
                f"the answer would have {count} log-probabilities of prompts; "
                f"this server allows {self.max_prompt_logprobs} at most",
                param="n" if params.n > 1 else "prompt_logprobs",
            )


UNLIMITED = Limits(
    max_body_mib=math.inf,
    max_file_mib=math.inf,
    max_n=2**31,
    max_prompts=2**31,
    max_stop=2**31,
    max_schema_kib=math.inf,
    max_schema_depth=64,
    max_prompt_logprobs=2**63,
    max_queue=2**31,
    request_timeout_s=math.inf,
)


def measure(schema: object, *, most_depth: int) -> tuple[int, int]:
    """About how many bytes of JSON a schema is, and how deep; looks no deeper than needed."""
    size, depth = 0, 0
    level: list[object] = [schema]
    while level and depth <= most_depth:
        depth += 1
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                size += 2 + sum(len(key) + 4 for key in value)
                below += value.values()
            elif isinstance(value, list):
                size += 2 + len(value)
                below += value
            else:
                size += len(value) + 2 if isinstance(value, str) else 5
        level = below
    return size, depth
