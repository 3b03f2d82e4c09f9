"""Counters of the engine: plain data, changed by the engine thread, read by any thread."""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from hotset.sequence import Request

HOT_ROWS = "host>slots"  # in `Metrics.moved_bytes`: rows of hot requests


@dataclass(slots=True)
class ExpertCounts:
    """What steps did with experts that are not all on the device, over all layers."""

    expert_hits: int = 0  # experts that a layer needed, in steps that cache, and that had a slot
    expert_misses: int = 0  # and that had none
    expert_bytes: int = 0  # of experts, from host memory to the device, in both ways
    expert_predicted: int = 0  # experts that the next layer's router chose ahead
    expert_predicted_right: int = 0  # of these, needed
    expert_copied_ahead: int = 0  # experts that were given a slot for that
    expert_cpu_computed: int = 0  # experts that were cold and computed by the CPU: neither of these
    expert_disk_reads: int = 0  # experts read from disk
    expert_disk_bytes: int = 0  # bytes of these
    expert_disk_wait_s: float = 0.0  # steps waited for them


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What a rank has of the memory.

    Attributes:
        host: the name of its machine.
        device: its name.
        used_bytes: of the device, by all processes; of a CPU, by this rank.
        total_bytes: of the device.
        host_bytes: of host memory for KV and experts; pinned where the device is a GPU.
        disk_bytes: most that it may write to disk.
        link_bytes_per_s: at which its KV comes from host memory, as measured; 0 before any did.
    """

    host: str
    device: str
    used_bytes: int
    total_bytes: int
    host_bytes: int
    disk_bytes: int
    link_bytes_per_s: float = 0.0


class HotCounts(NamedTuple):
    """What steps found of the tokens that hot requests selected, over all layers that select."""

    hits: int  # tokens that a slot held
    misses: int  # and that came from host memory
    guessed: int  # tokens that came ahead, as the next layer was guessed to select them
    guessed_right: int  # of these, that it selected: they are among the hits
    moved_bytes: int  # of the rows of misses, and of those that came ahead


@dataclass(slots=True)
class Metrics(ExpertCounts):
    """What the engine did since it started. All counts only grow; a split's bytes are of now."""

    steps: int = 0
    step_s: float = 0.0
    prompt_step_s: float = 0.0  # of these, in steps with tokens of prompts
    requests_finished: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0  # tokens that went through the model
    recomputed_tokens: int = 0  # of these, computed before for the same request
    cached_tokens: Counter[str] = field(default_factory=Counter)  # prefix hits by tier, see `found`
    forked_tokens: int = 0  # of prompts, computed by another of their `n` outputs
    resumed_tokens: Counter[str] = field(
        default_factory=Counter
    )  # by tier, after a preemption or a move
    recompute_chosen_tokens: int = 0  # found in a colder tier, cheaper to compute
    preemptions: int = 0
    rotations: int = 0  # of these, ends of a turn
    turned_hot: int = 0  # requests that gave back blocks and kept the tokens used last
    hot_hits: int = 0  # tokens that hot requests selected and had on the device, per layer
    hot_misses: int = 0  # and that came from host memory
    hot_guessed: int = 0  # tokens that came ahead, as the next layer was guessed to select them
    hot_guessed_right: int = 0  # of these, selected: they are among the hits
    freed_blocks: int = 0  # of the device, given back by requests that ended
    spilled_blocks: int = 0
    fetched_blocks: int = 0
    state_hits: Counter[str] = field(default_factory=Counter)  # by tier, states gone on from
    spilled_states: int = 0
    fetched_states: int = 0
    dropped_states: int = 0  # had no slot, or left it before their turn to be spilled came
    stateless_tokens: int = 0  # their KV was found and no state behind them: of no use
    moved_bytes: Counter[str] = field(default_factory=Counter)  # by direction, "device>host"
    tier_bytes: Counter[str] = field(default_factory=Counter)  # "remote first_read", "declined"
    expert_rounding_error: float = 0.0  # relative RMS of experts' weights; fixed at start
    split_moves: int = 0  # times that another split between experts and KV was aimed at
    split_expert_bytes: int = 0  # of experts by the split, now; 0 where it does not move
    split_kv_bytes: int = 0  # of KV
    refetched_bytes: int = 0  # to the device, again for a request that lost them to preemption
    faults: Counter[str] = field(default_factory=Counter)  # by kind

    @property
    def fetched_tokens(self) -> int:
        """Tokens that came from a tier below the device instead of being computed."""
        found = self.cached_tokens + self.resumed_tokens
        return found.total() - found["device"]

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of prompts that were computed."""
        return max(0, self.computed_tokens - self.output_tokens)

    def take_experts(self, counts: ExpertCounts) -> None:
        """These counts stand in place of the earlier ones."""
        for one in fields(counts):
            setattr(self, one.name, getattr(counts, one.name))

    def take_hot(self, counts: HotCounts) -> None:
        """These counts stand in place of the earlier ones."""
        self.hot_hits, self.hot_misses = counts.hits, counts.misses
        self.hot_guessed, self.hot_guessed_right = counts.guessed, counts.guessed_right
        self.moved_bytes[HOT_ROWS] = counts.moved_bytes

    def found(self, request: Request, start: int, num_tokens: int, tier: str) -> None:
        """Count tokens that a request need not compute, from `start` on.

        What it had before it was preempted is resumed, what another output of its prompt had is
        forked, and the rest is a prefix hit: no token of a prompt is one twice.
        """
        end = start + num_tokens
        own_end = min(end, max(start, request.kv.high_water_tokens))
        forked_end = min(end, max(own_end, request.kv.num_sibling_tokens))
        self.resumed_tokens[tier] += own_end - start
        self.forked_tokens += forked_end - own_end
        self.cached_tokens[tier] += end - forked_end
        request.kv.num_cached_tokens += end - forked_end
