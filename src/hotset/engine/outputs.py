"""From tokens to text: incremental decoding, stop strings, and the end of a request."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from hotset.errors import ModelError
from hotset.request import FinishReason, RequestOutput, TokenLogprob
from hotset.sequence import Request
from hotset.text.token_text import TokenDecoder

# The last tokens of the prompt let the decoder see that the output does not start a sentence:
# some tokenizers would drop its first space.
_CONTEXT_TOKENS = 8


class OutputProcessor:
    """Text and ends of all running requests. Called from the engine thread.

    Args:
        tokenizer: a fast transformers tokenizer; None leaves all texts empty.
        eos_token_ids: ids that end an output, beside the requests' own.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: tuple[int, ...] | list[int]) -> None:
        self._tokenizer: Tokenizer | None = None
        if tokenizer is not None:
            self._tokenizer = getattr(tokenizer, "backend_tokenizer", None)
            if not isinstance(self._tokenizer, Tokenizer):
                raise ModelError(
                    f"the tokenizer is a {type(tokenizer).__name__}, which cannot decode "
                    "incrementally; expected a fast one (with a tokenizer.json)"
                )
        self._eos_token_ids = frozenset(eos_token_ids)
        self._sequences: dict[int, _Sequence] = {}
        self._changed: dict[int, _Sequence] = {}  # since the last take

    @property
    def has_outputs(self) -> bool:
        """Whether `take` has anything to return."""
        return bool(self._changed)

    def add(self, request: Request) -> None:
        """Start an output."""
        decoder = None
        if self._tokenizer is not None:
            context = request.token_ids[: request.prompt_len][-_CONTEXT_TOKENS:]
            decoder = TokenDecoder(
                self._tokenizer, context, skip_special=request.params.skip_special_tokens
            )
        self._sequences[request.sequence_id] = _Sequence(request, decoder)

    def score(self, sequence_id: int, logprobs: list[TokenLogprob]) -> None:
        """Take in log-probabilities of the next tokens of the prompt. Ended ones are left alone."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            sequence.prompt_logprobs += logprobs

    def append(
        self, request: Request, token_id: int, logprob: TokenLogprob | None
    ) -> FinishReason | None:
        """Take in the token just appended to `request.token_ids`.

        Returns:
            Why the request has ended with it; None while it goes on.
        """
        sequence = self._sequences[request.sequence_id]
        params = request.params
        if params.max_tokens == 0:  # the prompt was all that was wanted
            self.finish(request, FinishReason.LENGTH)
            return sequence.finish_reason
        is_stop_token = token_id in params.stop_token_ids or (
            token_id in self._eos_token_ids and not params.ignore_eos
        )
        sequence.token_ids.append(token_id)
        if is_stop_token and not params.include_stop_str_in_output:
            offset = sequence.end
        else:
            offset = sequence.feed(token_id)
        if logprob is not None:
            sequence.logprobs.append(logprob._replace(text_offset=offset))
        self._changed[request.sequence_id] = sequence
        if is_stop_token or sequence.is_stopped:
            self.finish(request, FinishReason.STOP)
        elif request.num_tokens >= request.max_total_tokens:
            self.finish(request, FinishReason.LENGTH)
        return sequence.finish_reason

    def finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End an output and release the text held back. Ended and unknown ones are left alone."""
        sequence = self._sequences.pop(request.sequence_id, None)
        if sequence is None:
            return
        sequence.flush()
        # The last bytes of a text may complete a stop string.
        ended = FinishReason.STOP if sequence.is_stopped else reason
        sequence.finish_reason = reason if reason is FinishReason.ERROR else ended
        sequence.error = error
        self._changed[request.sequence_id] = sequence

    def take(self) -> list[RequestOutput]:
        """What is new since the last call: one output for each sequence that changed."""
        outputs = [sequence.take() for sequence in self._changed.values()]
        self._changed.clear()
        return outputs


@dataclass(eq=False, slots=True)
class _Sequence:
    """One output as it grows: `text`, `token_ids` and `logprobs` are what was not taken yet."""

    request: Request
    decoder: TokenDecoder | None
    text: str = ""
    held: str = ""  # may be the start of a stop string
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    is_stopped: bool = False  # by a stop string
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def end(self) -> int:
        """The length of the text so far, with what is held back."""
        return 0 if self.decoder is None else self.decoder.end

    def feed(self, token_id: int) -> int:
        """Take in a token; returns where in the text it begins."""
        if self.decoder is None:
            return 0
        if self.request.params.logprobs is None:
            self._extend(self.decoder.feed(token_id))
            return 0
        text, offset = self.decoder.feed_at(token_id)
        self._extend(text)
        return offset

    def flush(self) -> None:
        if self.decoder is not None and not self.is_stopped:
            self._extend(self.decoder.flush())
        self.text += self.held
        self.held = ""

    def take(self) -> RequestOutput:
        output = RequestOutput(
            request_id=self.request.request_id,
            index=self.request.index,
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            error=self.error,
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            prompt_tokens=self.request.prompt_len,
            cached_tokens=self.request.kv.num_cached_tokens,
        )
        self.text = ""
        self.token_ids.clear()
        self.logprobs.clear()
        self.prompt_logprobs.clear()
        return output

    def _extend(self, new: str) -> None:
        """Add text up to the first stop string; hold back what may become one."""
        params = self.request.params
        stop = params.stop
        if not stop or self.request.num_output_tokens <= params.min_tokens:
            self.text += new
            return
        held = self.held + new
        found = [(at, len(s)) for s in stop if (at := held.find(s)) >= 0]
        if found:
            self.is_stopped = True
            at, length = min(found)
            self.text += held[: at + length if params.include_stop_str_in_output else at]
            self.held = ""
            return
        keep = len(held) - _possible_start(held, stop)
        self.text += held[:keep]
        self.held = held[keep:]


def _possible_start(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string could go on from."""
    for length in range(min(len(text), max(map(len, stop)) - 1), 0, -1):
        end = text[-length:]
        if any(s.startswith(end) for s in stop):
            return length
    return 0
