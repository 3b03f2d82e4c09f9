"""One sequence being generated, as scheduler, KV cache and executor note it. Imports no torch."""

import itertools
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum, IntEnum
from typing import NamedTuple

from hotset.request import FinishReason, SamplingParams

# Stands last in `Request.token_ids` for the token that the device is still choosing.
UNKNOWN_TOKEN = -1
# Slots for state that no sequence gets: one of zeros, which a sequence without a token reads and
# none writes, and one that rows of padding write.
ZEROS_SLOT, PADDING_SLOT = 0, 1
# In place of a slot that a row of a step writes: the row is one of several of a sequence, whose
# state is written chunk by chunk, or the row is of no sequence.
IN_CHUNKS, NO_SEQUENCE = -1, -2

_ids = itertools.count()


class RequestStatus(Enum):
    """Where a request is in its life. FINISHED is the only state without a way out."""

    WAITING = "waiting"  # queued; holds no block
    RUNNING = "running"  # holds blocks; some of them may still be on their way up
    FINISHED = "finished"


class Kind(IntEnum):
    """What the tokens of one item of a step are; a step has its items in this order."""

    DECODE = 0  # one token
    PROMPT = 1  # several tokens of a text that is known
    VERIFY = 2  # several tokens that a draft proposes; the logits of each are wanted


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of a sequence are chosen, all its life; the executor's state goes by its id.

    Attributes:
        sequence_id: no other sequence of this process has it.
        index: which of the `n` outputs of its request it is.
        uses_logits_alone: whether nothing but `min_tokens` changes the logits, and only the
            token is asked for.
        counts_tokens: whether penalties count its tokens.
        resumed: tokens that were chosen of it before, by another engine.
    """

    sequence_id: int
    index: int
    params: SamplingParams
    resumed: Sequence[int] = ()
    uses_logits_alone: bool = field(init=False)
    counts_tokens: bool = field(init=False)

    def __post_init__(self) -> None:
        params = self.params
        is_more = params.logprobs is not None or params.has_form or params.has_penalties
        object.__setattr__(self, "uses_logits_alone", not (is_more or params.logit_bias))
        object.__setattr__(self, "counts_tokens", params.has_penalties)


@dataclass(frozen=True, slots=True)
class Tail:
    """The last, partial block of a request: its key, table index and tokens."""

    key: bytes
    index: int
    num_tokens: int

    def end(self, block_size: int) -> int:
        """Tokens up to its end."""
        return self.index * block_size + self.num_tokens


class StateCut(NamedTuple):
    """A state that a step keeps: after how many tokens, in which slot, under which key."""

    position: int
    slot: int
    key: bytes | None


class KeptState(NamedTuple):
    """A state that a request has left or come from: after how many tokens, under which key.

    Attributes:
        slowest: the number of the slowest tier that it is to be in; -1 for none.
    """

    num_tokens: int
    key: bytes
    slowest: int


class ParkedState(NamedTuple):
    """A state that a preempted request has left for itself alone."""

    num_tokens: int
    key: bytes


@dataclass(slots=True)
class AwaitedState:
    """The state that a request was let in to go on from, while it or KV before it is on its way.

    Attributes:
        num_tokens: after which it is.
        tier: that had it.
        is_arriving: whether it is still on its way.
        is_own: whether the request had parked it.
        has_failed: whether it did not come.
    """

    num_tokens: int
    tier: str
    is_arriving: bool
    is_own: bool
    has_failed: bool = False


class Followed(NamedTuple):
    """The request that computes what another begins with, and after how many tokens its state."""

    leader: "Request"
    position: int


@dataclass(frozen=True, slots=True)
class ArrivedBlock:
    """Content that a block of a request has without being computed: from where, how much."""

    tier: str
    num_tokens: int


@dataclass(eq=False, slots=True)
class SequenceBlocks:
    """What `KVCache` notes of one sequence, and nothing else changes.

    Attributes:
        num_computed_tokens: how many leading tokens have their KV in `block_table`.
        block_table: device block ids in token order; where a hot request has left a block to host
            memory, an index block, which has nothing but its index keys: see `kv.table`.
        slot_blocks: device blocks that are a hot request's slots, beside `block_table`.
        seat: of a hot request, its row in the device's tables; see `kv.seats`.
        num_index_blocks: how many of `block_table` are index blocks.
        block_hashes: chained hashes of the leading full blocks, as far as computed.
        arriving: index into `block_table` -> key of the content that is on its way up.
        arrived: index into `block_table` -> the content it has, at or beyond
            `num_computed_tokens`.
        num_shared_blocks: of `block_table`, those that others had too when it was let in.
        resume: where the last partial block was spilled at preemption.
        was_hot: whether it was hot when it was preempted.
        kept: keys of payloads that stay in host memory until the preempted request is back.
        fetched: indices into `block_table` of full blocks that were fetched for it before.
        was_staged: whether what the disk has of it was asked for ahead of its turn.
        was_fetched: whether all that was found of it is, or comes, to the device ahead of its turn.
        num_cached_tokens: of the prompt, tokens that others had computed; one of `n` outputs has
            those of the output that computed the prompt for it.
        high_water_tokens: the most tokens that were ever computed; more compute is recompute.
        num_sibling_tokens: leading tokens of the prompt that another of its `n` outputs has
            computed or found.
        state_read: slot that has its state after `num_computed_tokens`; see `kv.state_slots`.
        state_write: slot that its next step writes to.
        snapshots: positions after which its state is to be kept.
        cuts: those within its next step.
        num_planned: tokens of a step that was planned and is not committed, of such a model.
        fork_slot: what is kept for those that fork.
        has_forks: whether others are to fork where its prompt ends.
        kept_states: those that others find too, which it has left or come from.
        parked: its own, as long as it was preempted.
        awaited: what it is to go on from, before its first step.
        most_found: no state from there on is looked for, as one did not come; None is no bound.
        followed: whose state it waits for, or did, before it was let in; see `kv.leaders`.
    """

    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    slot_blocks: list[int] = field(default_factory=list)
    seat: int | None = None
    num_index_blocks: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    arriving: dict[int, bytes] = field(default_factory=dict)
    arrived: dict[int, ArrivedBlock] = field(default_factory=dict)
    num_shared_blocks: int = 0
    resume: Tail | None = None
    was_hot: bool = False
    kept: list[bytes] = field(default_factory=list)
    fetched: set[int] = field(default_factory=set)
    was_staged: bool = False
    was_fetched: bool = False
    num_cached_tokens: int = 0
    high_water_tokens: int = 0
    num_sibling_tokens: int = 0
    state_read: int = ZEROS_SLOT
    state_write: int = PADDING_SLOT
    snapshots: list[int] = field(default_factory=list)
    cuts: list[StateCut] = field(default_factory=list)
    num_planned: int = 0
    fork_slot: int | None = None
    has_forks: bool = False
    kept_states: list[KeptState] = field(default_factory=list)
    parked: ParkedState | None = None
    awaited: AwaitedState | None = None
    most_found: int | None = None
    followed: Followed | None = None

    @property
    def num_blocks(self) -> int:
        """Device blocks that it holds, without index blocks."""
        return len(self.block_table) - self.num_index_blocks + len(self.slot_blocks)


@dataclass(eq=False, slots=True)
class QueueState:
    """What `Scheduler` notes of one sequence, and nothing else changes.

    Attributes:
        since_s: when it last came to the end of the queue: its arrival, or a quantum's end.
        served_tokens: tokens of prompts that its tenant was served before it came.
        quantum_start_s: when it was last let in; it then had `quantum_start_tokens`.
        num_preemptions: how often it had to give way.
    """

    since_s: float = 0.0
    served_tokens: int = 0
    quantum_start_s: float = 0.0
    quantum_start_tokens: int = 0
    num_preemptions: int = 0


@dataclass(eq=False, slots=True)
class Request:
    """One sequence being generated: one of the `n` outputs of what a user asked for.

    The engine writes its tokens, `KVCache` its `kv` and `Scheduler` its `queue` and its end.

    Attributes:
        request_id: as the user knows it.
        token_ids: prompt and output so far.
        index: which of the `n` outputs this is.
        priority: lower runs first; equal ones first come, first served.
        tenant: whose it is; the prompts of one share what one gets.
        lane: number of the engine's lane that has it.
        arrival_s: when it came, by the engine's clock.
        sampling: what the executor knows of it, and knows it by.
        pending_row: while the device is still choosing the last token, its row among the tokens
            of the step that chooses it; `token_ids` then ends with `UNKNOWN_TOKEN`.
        snapshot_at: how many of its first tokens other prompts are likely to repeat: a state is to
            be kept there.
        num_scored_tokens: leading tokens whose logits were taken for the log-probabilities of the
            prompt; None where this request has not to bring any.
    """

    request_id: str
    prompt_len: int
    token_ids: list[int]
    params: SamplingParams
    max_total_tokens: int
    index: int = 0
    salt: bytes = b""
    priority: int = 0
    tenant: str = ""
    arrival_s: InitVar[float] = 0.0
    snapshot_at: Sequence[int] = ()
    lane: int = 0
    sampling: Sampling = field(init=False)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    error: str | None = None
    pending_row: int | None = None
    num_scored_tokens: int | None = None
    kv: SequenceBlocks = field(default_factory=SequenceBlocks)
    queue: QueueState = field(default_factory=QueueState)

    def __post_init__(self, arrival_s: float) -> None:
        self.queue.since_s = arrival_s
        self.sampling = Sampling(next(_ids), self.index, self.params, self.output_ids)

    @property
    def sequence_id(self) -> int:
        """No other sequence of this process has it."""
        return self.sampling.sequence_id

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the output so far."""
        return len(self.token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Tokens that the host knows: all but the one that the device is still choosing."""
        return len(self.token_ids) - (self.pending_row is not None)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose KV is yet to be computed or found."""
        return len(self.token_ids) - self.kv.num_computed_tokens

    @property
    def kind(self) -> Kind:
        """What is left to compute of it: a prompt, or the one token that comes next."""
        num_tokens = len(self.token_ids) - self.kv.num_computed_tokens
        return Kind.PROMPT if num_tokens > 1 else Kind.DECODE

    @property
    def is_complete(self) -> bool:
        """Whether no token may follow the last one."""
        return len(self.token_ids) >= self.max_total_tokens

    @property
    def is_scored(self) -> bool:
        """Whether all log-probabilities of the prompt that it has to bring were taken."""
        return self.num_scored_tokens is None or self.num_scored_tokens >= self.prompt_len - 1

    @property
    def num_findable_tokens(self) -> int:
        """How many leading tokens may be found instead of computed: one at least is left over."""
        if self.num_scored_tokens is None or self.is_scored:
            return len(self.token_ids) - 1
        return self.num_scored_tokens

    @property
    def order(self) -> tuple[int, float]:
        """Sort key: who runs first. The greatest is preempted first."""
        return (self.priority, self.queue.since_s)

    @property
    def output_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.prompt_len :]

    @property
    def num_output_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.token_ids) - self.prompt_len

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended, for whatever reason."""
        return self.status is RequestStatus.FINISHED
