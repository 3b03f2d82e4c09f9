"""Bounds on what one HTTP request may ask for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotset.errors import RequestError
from hotset.option_fields import Bounds, Group, option
from hotset.request import SamplingParams
from hotset.units import MIB

if TYPE_CHECKING:
    from hotset.server.schemas import GenerationRequest

_MORE = Bounds("more than 0", 0, is_open=True)


@dataclass(frozen=True, slots=True)
class Limits(Group):
    """How much one request, and all that wait, may be. The engine's own bounds come on top."""

    max_body_mib: float = option(4.0, "Largest JSON body, in MiB.", bounds=_MORE)
    max_file_mib: float = option(200.0, "Largest uploaded file, in MiB.", bounds=_MORE)
    max_prompt_tokens: int | None = option(
        None, "Longest prompt.", bounds=_MORE, otherwise="what the context holds"
    )
    max_tokens: int | None = option(
        None,
        "Most tokens of one output, and what a request gets that names no number.",
        bounds=_MORE,
        otherwise="what the context holds",
    )
    max_n: int = option(16, "Most outputs for one prompt.", bounds=_MORE)
    max_prompts: int = option(128, "Most prompts in one text completion.", bounds=_MORE)
    max_stop: int = option(16, "Most stop strings, and stop tokens.", bounds=_MORE)
    max_schema_kib: float = option(64.0, "Largest JSON schema, in KiB.", bounds=_MORE)
    max_prompt_logprobs: int = option(
        2**22,
        "Most log-probabilities of prompts in one answer: each output counts the prompt's tokens "
        "and the likeliest tokens at their places.",
        bounds=_MORE,
    )
    max_schema_depth: int = option(32, "Deepest JSON schema.", bounds=_MORE)
    max_stored: int = option(
        1000,
        "Most responses of /v1/responses that are kept for one key; the least recently used ones "
        "are dropped.",
        bounds=_MORE,
    )
    max_stored_mib: float = option(64.0, "Most that these may take, in MiB.", bounds=_MORE)
    max_queue: int = option(
        1024, "Requests that may wait; more are refused with 429.", bounds=_MORE
    )
    request_timeout_s: float = option(
        600.0, "Longest a request may take, in seconds, queueing included.", bounds=_MORE
    )

    @property
    def max_body_bytes(self) -> int:
        """`max_body_mib` in bytes."""
        return int(self.max_body_mib * MIB)

    @property
    def max_file_bytes(self) -> int:
        """`max_file_mib` in bytes."""
        return int(self.max_file_mib * MIB)

    def check(self, body: "GenerationRequest") -> None:
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
        count, most = body.num_prompts(), self.max_prompts
        refuse(count <= most, "the number of prompts", count, most, body.prompt_param)
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
