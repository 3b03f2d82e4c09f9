"""What is planned: what users do, and everything a plan is made from."""

from dataclasses import dataclass, field

from hotset.cost.attention import KV_BYTES
from hotset.cost.calibration import Calibration
from hotset.cost.hardware import Hardware
from hotset.cost.hot_set import Misses, SparseCache
from hotset.cost.routing import Routing
from hotset.cost.selection import GUESSED, DrawnSelections, check_share
from hotset.cost.shape import ModelShape
from hotset.errors import PlanError
from hotset.layout import Layout


@dataclass(frozen=True)
class Workload:
    """What users do.

    Attributes:
        users: who want tokens at the same time.
        context: tokens a user has at the end: prompts and answers of all turns.
        output: answer tokens of a turn. None plans decode alone at full context, as in
            disaggregated serving; a number adds the prefill of the turns that follow one another.
        reuse: share of what could be found in a tier that is found: of the prompt with one turn
            (default 0), of the earlier turns with several (default 1).
        turns: of a conversation, equally long.
    """

    users: int = 256
    context: int = 4096
    output: int | None = None
    reuse: float | None = None
    turns: int = 1

    def __post_init__(self) -> None:
        checks = (
            (1 <= self.users <= 10**7, "users", "1 to 10000000"),
            (1 <= self.context <= 10**9, "context", "1 to 1000000000 tokens"),
            (1 <= self.turns <= 10**4, "turns", "1 to 10000"),
            (self.reuse is None or 0 <= self.reuse <= 1, "reuse", "0 to 1"),
            (self.output is None or self.output >= 1, "output", "1 or more tokens"),
        )
        for ok, name, expected in checks:
            if not ok:
                raise PlanError(f"{name} is {getattr(self, name)}; expected {expected}")
        if self.output is not None and self.output * self.turns >= self.context:
            raise PlanError(
                f"output is {self.output}, which in {self.turns} turns leaves no prompt in a "
                f"context of {self.context} tokens; plan a longer context, which counts prompts "
                "and answers"
            )

    @property
    def past_tokens(self) -> float:
        """Tokens of earlier turns before the mean turn."""
        return self.context * (self.turns - 1) / (2 * self.turns)

    @property
    def prompt_tokens(self) -> float:
        """All tokens before the answer of the mean turn."""
        return self.past_tokens + self.context / self.turns - (self.output or 0)

    @property
    def decode_context(self) -> float:
        """Mean tokens that a decode step attends to."""
        if self.output is None:
            return self.context
        return self.prompt_tokens + self.output / 2

    @property
    def wanted_tokens(self) -> float:
        """Tokens of the prompt that are looked for in a tier and found, if it holds them."""
        if self.turns == 1:
            return self.prompt_tokens * (self.reuse or 0.0)
        return self.past_tokens * (1.0 if self.reuse is None else self.reuse)


@dataclass(frozen=True)
class Request:
    """Everything a plan is made from.

    Attributes:
        shape: the model, weights in the dtype wanted.
        hardware: of each GPU.
        workload: what users do.
        layout: None picks one, see `make_plan`.
        gpus: None takes those of the layout, or the fewest that hold the model.
        kv_dtype: key of `KV_BYTES`.
        host_given: whether the host's memory is all for this plan; else a plan of fewer GPUs than
            the host has takes their share. A disk is for this plan alone.
        total_bytes: HBM of each GPU that weights, experts, KV and workspace may take; None is the
            share that a server claims.
        hot_bytes: HBM of each GPU for KV and experts together, or for KV alone beside
            `expert_slots`; None is what weights and workspace leave.
        expert_slots: experts of each layer kept in HBM; None solves for it.
        free_windows: whether the engine frees what a sliding window has left behind. Hotset's
            keeps each token in each layer.
        stream_kv: whether a step may read KV from host memory over the link. Hotset's reads it
            on the device only.
        overlap: see `CostModel`.
        routing: which experts tokens reach.
        calibration: efficiencies and overheads.
        selections: of a sparse model: how many rows of a hot request are missed.
        tpot_s: longest step with hot requests; None is any.
        row_prefetch: which missed rows come early, see `HotSetCost`.
        selection_guessed: share of a selection that a guess of it has.
    """

    shape: ModelShape
    hardware: Hardware
    workload: Workload = field(default_factory=Workload)
    layout: Layout | None = None
    gpus: int | None = None
    kv_dtype: str = "bf16"
    host_given: bool = False
    total_bytes: float | None = None
    hot_bytes: float | None = None
    expert_slots: int | None = None
    free_windows: bool = False
    stream_kv: bool = False
    overlap: frozenset[str] = frozenset()
    routing: Routing = field(default_factory=Routing)
    calibration: Calibration = field(default_factory=Calibration)
    selections: Misses = field(default_factory=DrawnSelections)
    tpot_s: float | None = None
    row_prefetch: int = 0
    selection_guessed: float = GUESSED

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_BYTES:
            raise PlanError(f"KV dtype {self.kv_dtype!r} is unknown; use {', '.join(KV_BYTES)}")
        if self.gpus is not None and not 1 <= self.gpus <= 100_000:
            raise PlanError(f"gpus is {self.gpus}; expected 1 to 100000")
        self._check_memory()
        if self.expert_slots is not None:
            most = self.shape.num_experts
            if not most:
                raise PlanError(
                    f"expert_slots is {self.expert_slots}, but {self.shape.name} has no experts"
                )
            if not 0 <= self.expert_slots <= most:
                raise PlanError(
                    f"expert_slots is {self.expert_slots}; expected 0 to {most}, the experts of "
                    f"a layer of {self.shape.name}"
                )
        self._check_hot_set()
        if self.shape.num_experts:
            self.routing.check(self.shape.num_experts)
        self.shape.kv_bytes_per_token(self.kv_dtype)  # refuses a layout of KV that does not apply

    def _check_hot_set(self) -> None:
        if self.tpot_s is not None and not self.tpot_s > 0:
            raise PlanError(f"tpot_ms is {self.tpot_s * 1e3:g}; expected above 0")
        if not 0 <= self.row_prefetch <= 2:
            raise PlanError(f"row_prefetch is {self.row_prefetch}; expected 0, 1 or 2")
        check_share(self.selection_guessed, "selection_guessed")
        cache = SparseCache.of(self.shape, self.kv_dtype)
        if cache is not None:
            context = self.workload.decode_context
            self.selections.misses(context, cache.top_k, cache.top_k)  # refuses what cannot be

    def _check_memory(self) -> None:
        if self.total_bytes is not None and self.hot_bytes is not None:
            raise PlanError("total_gib is given beside hot_gib; give one of them")
        for field_name, size in (("total_gib", self.total_bytes), ("hot_gib", self.hot_bytes)):
            if size is not None and not 0 < size <= self.hardware.hbm_bytes:
                raise PlanError(
                    f"{field_name} is {size / 2**30:g}; expected above 0 and at most the "
                    f"{self.hardware.hbm_bytes / 2**30:.4g} GiB of {self.hardware.name}"
                )
