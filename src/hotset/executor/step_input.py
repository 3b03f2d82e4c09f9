"""A step as a message to what runs it, and what comes back. Imports numpy, no torch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from hotset.attention.batch import Batch
from hotset.kv.seats import SeatUpdates
from hotset.request import TokenLogprob
from hotset.sequence import Kind, Sampling


@dataclass(frozen=True, slots=True)
class SeenTokens:
    """All tokens of a sequence whose penalties count them; those of the prompt come first."""

    prompt_len: int
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class SampleInput:
    """The rows of a step that choose a token, R of them.

    Attributes:
        sequences: how each chooses.
        num_outputs: how many tokens each has generated so far.
        seen: by sequence id, the tokens of those with penalties.
    """

    sequences: Sequence[Sampling] = ()
    num_outputs: Sequence[int] = ()
    seen: dict[int, SeenTokens] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Tokens of one prompt whose log-probabilities are wanted, each by the row before it.

    Attributes:
        num_top: how many of the likeliest tokens are wanted beside each.
    """

    sequence_id: int
    token_ids: list[int]
    num_top: int


@dataclass(frozen=True, slots=True)
class Together:
    """What the steps of all lanes that run at the same time have in common.

    Attributes:
        num_rows: of logits that each lane brings, some of them padding.
        num_chosen: tokens that all of them choose.
        is_decode: whether they run as steps of decodes.
        is_launched: whether they are launched, although such steps are recorded.
    """

    num_rows: int
    num_chosen: int
    is_decode: bool
    is_launched: bool


@dataclass(frozen=True, slots=True)
class StepInput:
    """All that a model step needs, as plain data: it can be sent to another process.

    Attributes:
        kinds: one for each of `batch.sequences`; decodes first, then prompts, then drafts.
        batch: token ids, positions, places of KV and block tables.
        sample: for each of `batch.sampled_rows`, how its next token is chosen.
        scored: for each of `batch.scored_rows` in turn, the prompt token that its logits tell of.
        copies: (from, to), blocks of the device that are copied before anything is computed.
        seats: what the device's tables of hot requests lack before that; None for nothing.
        together: with the steps of other lanes; None where there is one lane.
    """

    kinds: Sequence[Kind]
    batch: Batch
    sample: SampleInput
    scored: Sequence[ScoredTokens] = ()
    copies: Sequence[tuple[int, int]] = ()
    seats: SeatUpdates | None = None
    together: Together | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.batch.num_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Of these, those that are not of decodes."""
        return self.batch.num_tokens - self.batch.num_decodes

    @property
    def mean_context(self) -> float:
        """Tokens before a token of these, on average; there is one at least."""
        prompts = self.batch.sequences[self.batch.num_decodes :]
        pairs = sum(one.num_tokens * (one.context_len - one.num_tokens / 2) for one in prompts)
        return pairs / self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought.

    Attributes:
        token_ids: the next token for each of `StepInput.sample`.
        logprobs: None for those that ask for none.
        errors: sequence id -> one line, where a grammar failed (it grew too complex). The tokens
            of those mean nothing.
        prompt_logprobs: for each of `StepInput.scored`, in the order of its tokens.
        seconds: how long the device took.
        not_finite: ids of the sequences whose logits are NaN or infinite. Their tokens mean
            nothing, and neither may what was stored of them.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob | None]
    errors: dict[int, str]
    prompt_logprobs: Sequence[list[TokenLogprob]]
    seconds: float
    not_finite: Collection[int] = ()
