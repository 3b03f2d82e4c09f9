"""The text of one output as it grows, and where it ends. Imports no torch."""

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

from hotset.request import SamplingParams
from hotset.text.token_text import TokenDecoder

# The last tokens of the prompt let the decoder see that the output does not start a sentence:
# some tokenizers would drop its first space.
_CONTEXT_TOKENS = 8


class OutputText:
    """Decodes one output token by token, up to a token or a string that ends it.

    What it gives out is a function of the tokens alone: an output that goes on elsewhere has the
    text that would have followed here.

    Args:
        tokenizer: None leaves the text empty.
        prompt_ids: the prompt, or its last tokens.
        params: of the request.
        eos_token_ids: ids that end an output, beside the request's own.

    Attributes:
        new: what was not taken yet.
        is_stopped: by a stop string.
        is_over: by a token or by a string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        eos_token_ids: Collection[int],
    ) -> None:
        self.new = ""
        self.is_stopped = self.is_over = False
        self._params = params
        self._eos_token_ids = () if params.ignore_eos else eos_token_ids
        self._held = ""  # may be the start of a stop string
        self._num_tokens = 0
        self._decoder: TokenDecoder | None = None
        if tokenizer is not None:
            context = list(prompt_ids[-_CONTEXT_TOKENS:])
            skip_special = params.skip_special_tokens
            self._decoder = TokenDecoder(tokenizer, context, skip_special=skip_special)

    def append(self, token_id: int) -> int:
        """Take in the next token; returns where in the text it begins, for its log-probability."""
        self._num_tokens += 1
        self.is_over = token_id in self._params.stop_token_ids or token_id in self._eos_token_ids
        if self.is_over and not self._params.include_stop_str_in_output:
            return 0 if self._decoder is None else self._decoder.end
        offset = self._feed(token_id)
        self.is_over = self.is_over or self.is_stopped
        return offset

    def flush(self) -> None:
        """Give out what was held back; its last bytes may complete a stop string."""
        if self._decoder is not None and not self.is_stopped:
            self._extend(self._decoder.flush())
        self.new += self._held
        self._held = ""

    def take(self) -> str:
        """What is new since the last call."""
        new, self.new = self.new, ""
        return new

    def _feed(self, token_id: int) -> int:
        if self._decoder is None:
            return 0
        if self._params.logprobs is None:
            self._extend(self._decoder.feed(token_id))
            return 0
        text, offset = self._decoder.feed_at(token_id)
        self._extend(text)
        return offset

    def _extend(self, new: str) -> None:
        """Add text up to the first stop string; hold back what may become one."""
        stop = self._params.stop
        if not stop or self._num_tokens <= self._params.min_tokens:
            self.new += new
            return
        held = self._held + new
        found = [(at, len(s)) for s in stop if (at := held.find(s)) >= 0]
        if found:
            self.is_stopped = True
            at, length = min(found)
            self.new += held[: at + length if self._params.include_stop_str_in_output else at]
            self._held = ""
            return
        keep = len(held) - _possible_start(held, stop)
        self.new += held[:keep]
        self._held = held[keep:]


def _possible_start(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string could go on from."""
    for length in range(min(len(text), max(map(len, stop)) - 1), 0, -1):
        end = text[-length:]
        if any(s.startswith(end) for s in stop):
            return length
    return 0
