"""Entries of text completions, after their prompt where `echo` asks for it."""

import math
from collections.abc import Sequence

from hotset.engine.completion import Completion
from hotset.request import RequestOutput, TokenLogprob
from hotset.server.body import Json
from hotset.server.logprobs import echoed_logprobs, prompt_logprobs, text_logprobs
from hotset.server.schemas import TextRequest
from hotset.text.prompt import PromptEncoder


class PromptPart:
    """What all entries about one prompt show of it.

    Attributes:
        text: what goes before the text of each output.
        logprobs: of its tokens but the first; they come with the first output for it.
    """

    def __init__(
        self, request: TextRequest, encoder: PromptEncoder, token_ids: Sequence[int]
    ) -> None:
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self._request = request
        self._token_ids = token_ids
        self._tokens = encoder.tokens
        self._offsets: list[int] = []
        with_special = not request.skip_special_tokens
        if request.echo and request.logprobs is not None:
            self.text, self._offsets = encoder.decode_with_offsets(token_ids, with_special)
        elif request.echo:
            self.text = encoder.decode(token_ids, with_special)

    def echoed_logprobs(self) -> Json:
        """Those that go before the log-probabilities of an output; empty lists without `echo`."""
        request = self._request
        if not request.echo:
            return text_logprobs([], self._tokens, [])
        num_top = request.logprobs or 0
        return echoed_logprobs(self._token_ids, self.logprobs, self._tokens, self._offsets, num_top)

    def asked_logprobs(self) -> Json:
        """The entry's `prompt_logprobs`, where they are asked for."""
        num_top = self._request.prompt_logprobs
        if num_top is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(self.logprobs, self._tokens, num_top)}


class TextWriter:
    """See `Writer`."""

    def __init__(
        self, request: TextRequest, encoder: PromptEncoder, prompt: PromptPart, index: int
    ) -> None:
        self._tokens = encoder.tokens
        self._prompt = prompt
        self._index = index
        self._with_logprobs = request.logprobs is not None
        self._with_ids = request.return_token_ids
        self._is_first = True
        self._num_chars = 0

    def chunk(self, output: RequestOutput) -> Json | None:
        """A part of a text."""
        self._prompt.logprobs += output.prompt_logprobs
        starts = self._is_first and self._prompt.text
        has_ids = self._with_ids and output.token_ids
        if not (starts or output.text or output.finish_reason or output.logprobs or has_ids):
            return None
        reason = output.finish_reason
        return self._entry(
            output.text,
            output.token_ids,
            output.logprobs,
            None if reason is None else reason.value,
        )

    def whole(self, completion: Completion) -> Json:
        """A text."""
        self._prompt.logprobs = self._prompt.logprobs or completion.prompt_logprobs
        entry = self._entry(
            completion.text, completion.token_ids, completion.logprobs, completion.finish_reason
        )
        return {**entry, **self._prompt.asked_logprobs()}

    def beside(self, completions: Sequence[Completion]) -> Json:
        """Nothing: each entry has its own prompt's."""
        return {}

    def _entry(
        self,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob],
        reason: str | None,
    ) -> Json:
        starts, self._is_first = self._is_first, False
        if starts:
            text = self._prompt.text + text
        self._num_chars += len(text)
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(logprobs, reason, starts) if self._with_logprobs else None,
            "finish_reason": reason,
            **({"token_ids": list(token_ids)} if self._with_ids else {}),
        }

    def _logprobs(self, entries: Sequence[TokenLogprob], reason: str | None, starts: bool) -> Json:
        # A stop string may have cut the tokens at the end off the text.
        most = math.inf if reason is None else self._num_chars
        start = len(self._prompt.text)
        offsets = [int(min(start + one.text_offset, most)) for one in entries]
        found = text_logprobs(entries, self._tokens, offsets)
        if not starts:
            return found
        before = self._prompt.echoed_logprobs()
        return {name: before[name] + values for name, values in found.items()}
