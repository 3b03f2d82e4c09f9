"""A whole answer, gathered from the outputs of its steps. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from hotset.request import FinishReason, RequestOutput, TokenLogprob


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one prompt and one of its outputs."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found instead of computed; less than `prompt_tokens`


@dataclass(slots=True)
class Completion:
    """One output for one prompt.

    Attributes:
        index: which of the `n` outputs for the prompt this is.
        finish_reason: `stop`, `length`, `abort` or `error`; None while it is incomplete.
        error: one line, where the finish reason is `error`; `code` as of its last output.
        logprobs: one entry per token where they were asked for, otherwise empty.
        prompt_logprobs: one entry per token of the prompt but the first, where asked for.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    code: str | None = None

    def add(self, output: RequestOutput) -> None:
        """Take in what one step added."""
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.prompt_tokens = max(self.prompt_tokens, output.prompt_tokens)
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason.value
            self.error, self.code = output.error, output.code

    @property
    def failed(self) -> bool:
        """Whether the output ended with an error."""
        return self.finish_reason == FinishReason.ERROR.value

    @property
    def usage(self) -> Usage:
        """Token counts."""
        return Usage(self.prompt_tokens, len(self.token_ids), self.cached_tokens)


def gather(outputs: Iterable[RequestOutput], n: int) -> list[Completion]:
    """Read a request's outputs to the end; returns its `n` completions in order."""
    completions = [Completion(index=i) for i in range(n)]
    for output in outputs:
        completions[output.index].add(output)
    found = next((one.prompt_logprobs for one in completions if one.prompt_logprobs), [])
    for completion in completions:  # one brings them for all
        completion.prompt_logprobs = found
    return completions
