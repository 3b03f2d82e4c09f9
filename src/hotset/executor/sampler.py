"""Choose the next token of each request from its logits."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from hotset.attention.inputs import HostCopy
from hotset.errors import RequestError
from hotset.executor.logit_changes import LogitChanges
from hotset.executor.logprobs import PendingLogprobs
from hotset.executor.step_input import SampleInput
from hotset.grammar.grammar import Grammars, OutputMatcher
from hotset.grammar.json_bounds import JsonBounds
from hotset.request import SamplingParams, TokenLogprob
from hotset.sequence import Sampling

Array = npt.NDArray[Any]

# Below this, dividing by the temperature would only turn differences into infinities.
MIN_TEMPERATURE = 1e-5
# How many of the likeliest tokens are ranked first to find a nucleus; all are if it is larger.
_NUCLEUS_WIDTH = 1024
# Rows are worked on in groups of at most this many logits, which bounds the memory taken.
_GROUP_LOGITS = 2**25
# A token is found among pieces of the vocabulary of this size, then within one. Most vocabularies
# are whole multiples of it.
_PIECE_LOGITS = 128
_TOKEN_BYTES = 8  # of a token id on the device


@dataclass(slots=True)
class Sampled:
    """The next token of each row.

    Attributes:
        logprobs: None for requests that ask for none.
        errors: sequence id -> one line, for requests whose grammar failed (it grew too complex).
            Their tokens mean nothing.
        not_finite: ids of the sequences whose logits have no largest number. Their tokens mean
            nothing, too.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    errors: dict[int, str] = field(default_factory=dict)
    not_finite: set[int] = field(default_factory=set)


class PendingTokens:
    """Tokens being chosen on the device; what `Sampler.submit` returns.

    Attributes:
        token_ids: `[R]` int64 on the device, for the next step to read without the host. Each is
            in the vocabulary, whatever the logits.
    """

    def __init__(
        self,
        chosen: "_Chosen",
        endings: list[Callable[[Sampled], None]],
        sequences: Sequence[Sampling],
    ) -> None:
        self.token_ids = chosen.token_ids
        self._endings, self._sequences = endings, sequences
        self._dtype = chosen.tops.dtype
        self._on_host = HostCopy(chosen.memory)

    def wait(self) -> Sampled:
        """Block until the tokens are there; what only the host can do with them is done then."""
        token_ids, tops = _split(self._on_host.wait(), len(self._sequences), self._dtype)
        sampled = Sampled(token_ids.tolist(), [None] * len(self._sequences))
        if not math.isfinite(float(tops.sum())):  # as with any NaN or infinity among them
            rows = tops.isfinite().logical_not().nonzero().flatten().tolist()
            sampled.not_finite = {self._sequences[row].sequence_id for row in rows}
        for end in self._endings:
            end(sampled)
        return sampled


class _Chosen:
    """What is chosen for R rows, in one piece of memory, so that it is copied at once.

    Attributes:
        memory: uint8.
        token_ids: `[R]` int64.
        tops: `[R]`, the largest logit of each; NaN where one is.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        num_rows = len(logits)
        size = num_rows * (_TOKEN_BYTES + logits.itemsize)
        self.memory = torch.empty(size, dtype=torch.uint8, device=logits.device)
        self.token_ids, self.tops = _split(self.memory, num_rows, logits.dtype)


def _split(
    memory: torch.Tensor, num_rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and largest logits in the memory of `_Chosen`."""
    end = num_rows * _TOKEN_BYTES
    return memory[:end].view(torch.int64), memory[end:].view(dtype)


class Sampler:
    """Turns logits into tokens, as each request's `SamplingParams` say.

    In this order: bias, penalties (repetition, then presence and frequency), no end before
    `min_tokens`, grammar mask, then the argmax, or temperature, top-k, top-p, min-p and one draw.
    That is the order of transformers (`GenerationMixin._get_logits_processor`); tokens as likely
    as the last kept one are kept too.
    A token is drawn by inverting the cumulative distribution at one uniform number from the
    request's own generator, so that a seeded request gets the same tokens in any batch.
    Log-probabilities are of the model's own distribution, before all of these, as in the
    OpenAI API and vLLM.

    Args:
        vocab_size: V, the width of the logits.
        device: where the logits are.
        seed: of the requests that bring none.
        tokenizer: for structured output; None refuses it.
        eos_token_ids: for structured output and `min_tokens`.
        bounds: of what a JSON schema lets repeat.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        seed: int = 0,
        *,
        tokenizer: Any = None,
        eos_token_ids: Sequence[int] = (),
        bounds: JsonBounds = JsonBounds(),  # noqa: B008  # immutable
    ) -> None:
        self.vocab_size = vocab_size
        self._device = torch.device(device)
        self._has_kernel = self._device.type == "cuda"
        self._seed = seed
        self._tokenizer = tokenizer
        self._grammars = Grammars(tokenizer, vocab_size, eos_token_ids, bounds)
        self._num_unseeded = 0
        # What a running request needs beside its parameters, by sequence id.
        self._generators: dict[int, random.Random] = {}
        self._changes = LogitChanges(vocab_size, self._device, eos_token_ids)
        self._matchers: dict[int, OutputMatcher] = {}

    def validate(self, params: SamplingParams, answers: Sequence[Sequence[int]] = ()) -> None:
        """Check what needs the model to be checked. May be called from any thread.

        Args:
            params: of a request.
            answers: tokens that outputs of it are to go on from.

        Raises:
            RequestError: such a request can never be served.
        """
        if params.stop and self._tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer; use stop_token_ids with this model", param="stop"
            )
        self._changes.validate(params)
        if params.has_form:
            self._grammars.check(params, answers)

    def load_kernels(self, dtype: torch.dtype) -> None:
        """Compile what draws from logits of `dtype` on a GPU, so that no request waits for it."""
        if self._has_kernel:
            logits = torch.zeros(1, self.vocab_size, dtype=dtype, device=self._device)
            chosen, one = _Chosen(logits), np.ones(1, np.float32)
            torch.amax(logits, -1, out=chosen.tops)
            self._run_kernel(logits, np.zeros(1, np.int64), one, np.zeros(1), chosen)

    def submit(self, logits: torch.Tensor, sample: SampleInput) -> PendingTokens:
        """Start choosing one token for each row; the host does not wait for the device.

        R = rows, V = vocabulary. Requests with penalties or a grammar need their tokens on
        the host: wait for one step's before the next is submitted.

        Args:
            logits: `[R, V]`, any float dtype. Not changed.
            sample: how each row chooses.
        """
        endings: list[Callable[[Sampled], None]] = []
        sequences = sample.sequences
        # By row, whether the model's own logits decide: their largest, or a draw from all.
        is_plain = [
            sequence.uses_logits_alone and num_outputs >= sequence.params.min_tokens
            for sequence, num_outputs in zip(sequences, sample.num_outputs, strict=True)
        ]
        rows = [
            row
            for row, sequence in enumerate(sequences)
            if not is_plain[row] or sequence.params.temperature >= MIN_TEMPERATURE
        ]
        chosen = _Chosen(logits)
        if len(rows) < len(sequences):
            torch.max(logits, -1, out=(chosen.tops, chosen.token_ids))
        else:
            torch.amax(logits, -1, out=chosen.tops)
        if self._has_kernel:
            drawn = [row for row in rows if is_plain[row] and _takes_all(sequences[row].params)]
            self._draw_from_all(logits, sequences, drawn, chosen)
            rows = sorted(set(rows) - set(drawn))
        group = max(1, _GROUP_LOGITS // logits.shape[1])
        for start in range(0, len(rows), group):
            some = rows[start : start + group]
            endings.append(self._submit_rows(logits, sample, some, chosen.token_ids))
        return PendingTokens(chosen, endings, sequences)

    def release(self, sequence_id: int) -> None:
        """Forget a sequence that has ended. Unknown ids are fine."""
        self._generators.pop(sequence_id, None)
        self._changes.release(sequence_id)
        self._matchers.pop(sequence_id, None)

    def _draw_from_all(
        self,
        logits: torch.Tensor,
        sequences: Sequence[Sampling],
        rows: list[int],
        chosen: _Chosen,
    ) -> None:
        """Draw the tokens of `rows` as `_draw` does, by kernels of their own."""
        if not rows:
            return
        drawing = [sequences[row] for row in rows]
        temperatures = np.array([one.params.temperature for one in drawing], np.float32)
        shares = np.array([self._generator(one).random() for one in drawing])
        self._run_kernel(logits, np.array(rows), temperatures, shares, chosen)

    def _run_kernel(
        self,
        logits: torch.Tensor,
        rows: Array,
        temperatures: Array,
        shares: Array,
        chosen: _Chosen,
    ) -> None:
        from hotset.kernels.draw_tokens import draw_tokens

        on_device = [self._tensor(values) for values in (rows, temperatures, shares)]
        draw_tokens(logits, chosen.tops, on_device[0], on_device[1], on_device[2], chosen.token_ids)

    def _submit_rows(
        self,
        all_logits: torch.Tensor,
        sample: SampleInput,
        rows: list[int],
        token_ids: torch.Tensor,
    ) -> Callable[[Sampled], None]:
        """Choose the tokens of `rows`, write them into `token_ids`, and say what is left to do."""
        index = self._tensor(np.array(rows))
        logits = all_logits[index].float()  # [N, V], a copy
        sequences = [sample.sequences[row] for row in rows]
        with_logprobs = [i for i, one in enumerate(sequences) if one.params.logprobs is not None]
        asking = self._tensor(np.array(with_logprobs)) if with_logprobs else None
        as_of_model = None if asking is None else logits[asking]  # [L, V], a copy
        num_outputs = [sample.num_outputs[row] for row in rows]
        self._changes.apply(logits, SampleInput(sequences, num_outputs, sample.seen))
        matchers = {i: self._matcher(one) for i, one in enumerate(sequences) if one.params.has_form}
        if matchers:
            self._grammars.mask(logits, matchers)
        drawn = [i for i, s in enumerate(sequences) if s.params.temperature >= MIN_TEMPERATURE]
        if len(drawn) == len(sequences):
            chosen = self._draw(logits, sequences)
        else:
            chosen = logits.argmax(-1)  # [N]
            if drawn:
                some = self._tensor(np.array(drawn))
                chosen[some] = self._draw(logits[some], [sequences[i] for i in drawn])
        token_ids[index] = chosen
        scored = None
        if asking is not None and as_of_model is not None:
            num_top = [sequences[i].params.logprobs or 0 for i in with_logprobs]
            scored = PendingLogprobs(as_of_model, chosen[asking], num_top, has_ranks=False)

        def end(sampled: Sampled) -> None:
            for i, matcher in matchers.items():
                if sequences[i].sequence_id in sampled.not_finite:
                    continue  # its token is none that the grammar allows
                matcher.consume_token(sampled.token_ids[rows[i]])
                if matcher.error is not None:
                    sampled.errors[sequences[i].sequence_id] = matcher.error
            if scored is not None:
                places = [rows[i] for i in with_logprobs]
                entries = scored.wait([sampled.token_ids[row] for row in places])
                for row, entry in zip(places, entries, strict=True):
                    sampled.logprobs[row] = entry

        return end

    def _draw(self, logits: torch.Tensor, sequences: Sequence[Sampling]) -> torch.Tensor:
        """Draw a token for each row of `logits`, `[N, V]`; returns `[N]`. Mutates `logits`."""
        params = [one.params for one in sequences]
        temperature = self._tensor(np.array([[p.temperature] for p in params], np.float32))
        # Relative to the largest, so that no temperature makes an infinity.
        logits -= logits.amax(-1, keepdim=True)
        logits /= temperature
        limit = least_logit(
            logits,
            top_k=np.array([[p.top_k] for p in params]),
            top_p=np.array([[p.top_p] for p in params], np.float32),
            min_p=np.array([[p.min_p] for p in params], np.float32),
        )
        if limit is not None:
            logits.masked_fill_(logits < limit, -torch.inf)
        uniform = self._tensor(np.array([[self._generator(one).random()] for one in sequences]))
        return _invert(logits.exp_(), uniform)

    def _generator(self, sequence: Sampling) -> random.Random:
        generator = self._generators.get(sequence.sequence_id)
        if generator is None:
            if sequence.params.seed is None:
                self._num_unseeded += 1
                name = f"unseeded {self._seed} {self._num_unseeded}"
            else:
                name = f"seeded {sequence.params.seed} {sequence.index}"
            generator = self._generators[sequence.sequence_id] = random.Random(name)
            for _ in sequence.resumed:
                generator.random()  # that chose it
        return generator

    def _matcher(self, sequence: Sampling) -> OutputMatcher:
        matcher = self._matchers.get(sequence.sequence_id)
        if matcher is None:
            matcher = self._grammars.matcher(sequence.params, sequence.resumed)
            self._matchers[sequence.sequence_id] = matcher
        return matcher

    def _tensor(self, values: Array) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def _takes_all(params: SamplingParams) -> bool:
    """Whether no token is left out of a draw."""
    return params.top_k == 0 and params.top_p >= 1 and params.min_p == 0


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token of each row up to which the weights add up to more than a share of all.

    Args:
        weights: `[N, V]` float32, not negative.
        uniform: `[N, 1]` float64, the shares, below 1.

    Returns:
        `[N]` int64: a token of weight above 0, and any token where weights are NaN. Found in two
        steps: a row is read once, and of its running sum just one piece is made.
    """
    num_rows, vocab_size = weights.shape
    num_pieces = -(-vocab_size // _PIECE_LOGITS)
    if padding := num_pieces * _PIECE_LOGITS - vocab_size:
        weights = functional.pad(weights, (0, padding))
    pieces = weights.view(num_rows, num_pieces, _PIECE_LOGITS)
    ends = pieces.sum(-1, dtype=torch.float64).cumsum(-1)  # [N, P]
    # A share of 1 - 2^-53 may be rounded up to all; no token is beyond that.
    aim = torch.minimum(uniform * ends[:, -1:], ends[:, -1:].nextafter(ends.new_zeros(())))
    piece = torch.searchsorted(ends, aim, right=True).clamp_(max=num_pieces - 1)  # [N, 1]
    before = torch.where(piece > 0, ends.gather(1, (piece - 1).clamp(min=0)), 0.0)
    within = pieces.gather(1, piece.unsqueeze(-1).expand(-1, -1, _PIECE_LOGITS)).squeeze(1)
    sums = within.cumsum(-1, dtype=torch.float64)  # [N, 128]
    # The piece's sum was made in another order: the aim may be a rounding error beyond it.
    aim = torch.minimum(aim - before, sums[:, -1:].nextafter(sums.new_zeros(())))
    place = torch.searchsorted(sums, aim, right=True)
    # NaN weights find no token at all; an id outside of the vocabulary would end the process.
    return (piece * _PIECE_LOGITS + place).squeeze(1).clamp_(max=vocab_size - 1)


def least_logit(
    logits: torch.Tensor,
    *,
    top_k: Array,
    top_p: Array,
    min_p: Array,
) -> torch.Tensor | None:
    """The least logit of each row that top-k, top-p and min-p, in this order, keep.

    A limit by value, and not by rank, does not depend on how a sort orders equal logits, and
    so not on the other rows of the batch.

    Args:
        logits: `[N, V]` float32, after the temperature, -inf where a token cannot be chosen.
        top_k: `[N, 1]`; 0 is off.
        top_p: `[N, 1]`, above 0; 1 is off.
        min_p: `[N, 1]`; 0 is off.

    Returns:
        `[N, 1]`, or None where everything is off for all rows.
    """
    vocab_size = logits.shape[1]
    device = logits.device
    top_k = np.where(top_k > 0, top_k, vocab_size).clip(max=vocab_size)
    limit = None
    if (bounded := top_k < vocab_size).any():
        width = int(top_k[bounded].max())
        ranked = logits.topk(width).values  # [N, width]
        last = torch.from_numpy(np.minimum(top_k, width) - 1).to(device, non_blocking=True)
        on = torch.from_numpy(bounded).to(device, non_blocking=True)
        limit = torch.where(on, ranked.gather(1, last), -torch.inf)
        logits = logits.masked_fill(logits < limit, -torch.inf)
    if (top_p < 1).any():
        nucleus = _nucleus_limit(logits, torch.from_numpy(top_p).to(device, non_blocking=True))
        limit = nucleus if limit is None else limit.maximum(nucleus)
    if (min_p > 0).any():
        least = torch.from_numpy(min_p).to(device, non_blocking=True).log()
        floor = logits.amax(-1, keepdim=True) + least
        limit = floor if limit is None else limit.maximum(floor)
    return limit


def _nucleus_limit(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The least logit of the smallest set with a probability of `top_p`; `[N, V]` to `[N, 1]`.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration, section 3.1.
    """
    off = top_p >= 1
    log_total = logits.logsumexp(-1, keepdim=True)
    # A nucleus is small as a rule: rank all tokens only where it is not.
    ranked = logits.topk(min(_NUCLEUS_WIDTH, logits.shape[1])).values
    mass = (ranked - log_total).exp().cumsum(-1)
    if ranked.shape[1] < logits.shape[1] and not bool(((mass[:, -1:] >= top_p) | off).all()):
        ranked = logits.sort(descending=True).values
        mass = (ranked - log_total).exp().cumsum(-1)
    last = (mass < top_p).sum(-1, keepdim=True).clamp_(max=ranked.shape[1] - 1)
    return torch.where(off, -torch.inf, ranked.gather(1, last))
