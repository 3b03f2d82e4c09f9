"""Messages between an engine, in this process or another, and its users. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from hotset.engine.status import EngineStatus
from hotset.memory.journal import JournalPart
from hotset.metrics import Metrics
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import RequestOutput, Resumed, SamplingParams

if TYPE_CHECKING:
    from hotset.engine.engine import Engine

BuildEngine = Callable[[Options], tuple["Engine", LoadedModel]]


@dataclass(frozen=True, slots=True)
class Submit:
    """A request for the loop; see `EngineService.submit`.

    Attributes:
        resumed: outputs that go on from what was delivered of them; there are no others of this
            request then. Empty for a new request.
        expected_tokens: of the prompt, those that its router expects to be computed; None is all.
        peer: the `peer_url` of a replica that is said to have what the prompt begins with.
    """

    request_id: str
    token_ids: Sequence[int]
    params: SamplingParams
    salt: bytes = b""
    priority: int = 0
    tenant: str = ""
    timeout_s: float | None = None
    queue_limit: int | None = None
    snapshot_at: Sequence[int] = ()
    resumed: Sequence[Resumed] = ()
    expected_tokens: int | None = None
    peer: str | None = None


class Queued(NamedTuple):
    """Prompts of about one size that are yet to be computed, or what is left of them.

    Attributes:
        num_prompts: of these.
        num_tokens: that are left.
        num_pairs: of a token that is left and one before it.
    """

    num_prompts: int
    num_tokens: int
    num_pairs: int


def size_class(num_tokens: int) -> int:
    """The exponent of the least power of two that is not below the tokens left of a prompt."""
    return max(0, num_tokens - 1).bit_length()


def num_pairs(first: int, last: int) -> int:
    """Pairs of a token from `first` on, `last` being the next behind, and one before it."""
    return (last * last - first * first) // 2


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is, between two steps.

    What it did not tell before has a default, for one that does not.

    Attributes:
        queued_tokens: of prompts, yet to be computed; of those that wait, as many as was expected.
        spare_blocks: blocks of the device that can be had, less those that the requests here are
            sure to need. Below 0 where requests wait for blocks.
        usable_blocks: blocks of the device in all.
        queued_bytes: on their way to the device from slower tiers.
        num_open: requests that have not ended.
        step_s: mean of the last steps; 0 before the first.
        prefill_tokens_per_s, link_bytes_per_s: as in `Rates`.
        prefilled_tokens: of prompts, computed since the start.
        prompt_step_s: of steps with tokens of prompts, since the start.
        freed_blocks: that requests have given back at their ends since the start.
        queue: the prompts of `queued_tokens` by `size_class`, from class 0 on.
        token_s: seconds per token of a prompt where none is before it; 0 before the first.
        pair_s: seconds on top for each token before it.
    """

    queued_tokens: int
    spare_blocks: int
    usable_blocks: int
    queued_bytes: int
    num_open: int
    step_s: float
    prefill_tokens_per_s: float
    link_bytes_per_s: dict[str, float]
    prefilled_tokens: int
    prompt_step_s: float
    freed_blocks: int
    queue: Sequence[Queued] = ()
    token_s: float = 0.0
    pair_s: float = 0.0


@dataclass(slots=True)
class Report:
    """What one round of the loop reports.

    Attributes:
        time_s: of `time.monotonic`, which all processes of a machine share.
        outputs: of the requests; each of a request's outputs has a last one, whatever happens.
        started: ids of the requests that were part of a step for the first time.
        taken: ids of the requests that the next steps may have; reported before such a step.
        looks: snapshots by the id they were asked for with; or why there is none.
        notes: lines for the log.
        failure: one line; the engine serves no more, and this is the last report.
        is_silent: the failure is that nothing has been heard of the engine for a while.
        journal, load: while a front follows the engine; see `EngineHost.follow`.
        is_draining: the engine takes no more requests; told once.
    """

    time_s: float
    outputs: Sequence[RequestOutput] = ()
    started: Sequence[str] = ()
    taken: Sequence[str] = ()
    looks: Sequence[tuple[int, EngineStatus | str]] = ()
    notes: Sequence[str] = ()
    failure: str | None = None
    journal: JournalPart | None = None
    load: Load | None = None
    is_draining: bool = False
    is_silent: bool = False


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What does not change while an engine runs.

    Attributes:
        keeps_states: whether prefixes are found up to states that were kept.
        fingerprint: of all that blocks depend on beside tokens; keys of blocks start with it.
        block_size: tokens of a block.
        kv_bytes_per_token: over all layers.
        numerics: what the last bits of what it computes depend on, beside the fingerprint: device,
            kernels and their versions.
    """

    options: Options
    max_model_len: int
    report: str
    keeps_states: bool
    fingerprint: str
    block_size: int
    kv_bytes_per_token: int
    numerics: str = ""


class EngineHost(Protocol):
    """Where an engine runs: `EngineLoop` in this process, or `EngineProcess` in one of its own.

    Any thread may call it. Reports go to a function given at the start, from one thread.

    Attributes:
        model: loaded; its `model` is None where the weights are in another process.
    """

    model: LoadedModel
    info: EngineInfo

    @property
    def is_alive(self) -> bool:
        """Whether reports may still come. False only after the last one."""
        ...

    @property
    def metrics(self) -> Metrics:
        """The engine's counters: live ones, or as of a moment ago."""
        ...

    def submit(self, submit: Submit) -> None:
        """Queue a request.

        Raises:
            RequestError, OverloadedError, DrainingError: nothing was queued.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request soon; a report has its last outputs. Ended ones are left alone."""
        ...

    def look(self, look_id: int) -> None:
        """Have a coming report bring a snapshot."""
        ...

    def drain(self, drain_s: float) -> None:
        """Take no more requests, and end those that are open in `drain_s` seconds as moved.

        Each of their outputs that has not ended by then gets a last one, with
        `FinishReason.MOVED`; what it had before is all there is of it. The engine itself goes on,
        so that what its tiers write can end. The earliest of several calls counts.
        """
        ...

    def follow(self, is_on: bool) -> None:
        """Have reports bring the load, and the journal from a new snapshot on; or no more of it."""
        ...

    def close(self) -> None:
        """End the engine and wait for that. Idempotent. Open requests get no more outputs."""
        ...
