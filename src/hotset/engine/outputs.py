"""What steps put out of all running requests, and the end of each. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from hotset.engine.output_text import OutputText
from hotset.errors import ModelError, RequestError
from hotset.request import FinishReason, RequestOutput, Resumed, SamplingParams, TokenLogprob
from hotset.sequence import Request


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

    def resume(
        self, prompt_ids: Sequence[int], params: SamplingParams, resumed: Sequence[Resumed]
    ) -> dict[int, OutputText]:
        """The texts of outputs that go on from their tokens. May be called from any thread.

        Returns:
            By the outputs' indices, for `add`; a text gives out what follows these tokens.

        Raises:
            RequestError: one is over with them.
        """
        texts = {}
        for one in resumed:
            text = texts[one.index] = self._begin(prompt_ids, params)
            for number, token_id in enumerate(one.token_ids, 1):
                text.append(token_id)
                if text.is_over:
                    raise RequestError(
                        f"output {one.index} cannot go on from its {len(one.token_ids)} tokens: it "
                        f"ends with token {number} of them",
                        param="resumed",
                    )
            text.take()
        return texts

    def add(self, request: Request, text: OutputText | None = None) -> None:
        """Start an output; one that goes on has its `text`, see `resume`."""
        if text is None:
            text = self._begin(request.token_ids, request.params)
        self._sequences[request.sequence_id] = _Sequence(request, text)

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
        if request.params.max_tokens == 0:  # the prompt was all that was wanted
            self.finish(request, FinishReason.LENGTH)
            return sequence.finish_reason
        sequence.token_ids.append(token_id)
        offset = sequence.text.append(token_id)
        if logprob is not None:
            sequence.logprobs.append(logprob._replace(text_offset=offset))
        self._changed[request.sequence_id] = sequence
        if sequence.text.is_over:
            self.finish(request, FinishReason.STOP)
        elif request.num_tokens >= request.max_total_tokens:
            self.finish(request, FinishReason.LENGTH)
        return sequence.finish_reason

    def finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End an output and release the text held back. Ended and unknown ones are left alone."""
        sequence = self._sequences.pop(request.sequence_id, None)
        if sequence is None:
            return
        if reason is not FinishReason.MOVED:
            sequence.text.flush()
        # The last bytes of a text may complete a stop string.
        ended = FinishReason.STOP if sequence.text.is_stopped else reason
        sequence.finish_reason = reason if reason is FinishReason.ERROR else ended
        sequence.error = error
        self._changed[request.sequence_id] = sequence

    def take(self) -> list[RequestOutput]:
        """What is new since the last call: one output for each sequence that changed."""
        outputs = [sequence.take() for sequence in self._changed.values()]
        self._changed.clear()
        return outputs

    def _begin(self, prompt_ids: Sequence[int], params: SamplingParams) -> OutputText:
        return OutputText(self._tokenizer, prompt_ids, params, self._eos_token_ids)


@dataclass(eq=False, slots=True)
class _Sequence:
    """One output as it grows; its tokens and log-probabilities are what was not taken yet."""

    request: Request
    text: OutputText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None

    def take(self) -> RequestOutput:
        output = RequestOutput(
            request_id=self.request.request_id,
            index=self.request.index,
            text=self.text.take(),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            error=self.error,
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            prompt_tokens=self.request.prompt_len,
            cached_tokens=self.request.kv.num_cached_tokens,
        )
        self.token_ids.clear()
        self.logprobs.clear()
        self.prompt_logprobs.clear()
        return output
