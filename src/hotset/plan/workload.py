"""What is planned: what users do, and everything a plan is made from."""

from dataclasses import dataclass, field

from hotset.cost.calibration import Calibration
from hotset.cost.hardware import Hardware
from hotset.cost.layout import Layout
from hotset.cost.routing import Routing
from hotset.cost.shape import KV_BYTES, ModelShape
from hotset.errors import PlanError


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
            (1 <= self.users <= 10**7, "--users", self.users, "1 to 10000000"),
            (1 <= self.context <= 10**9, "--context", self.context, "1 to 1000000000 tokens"),
            (1 <= self.turns <= 10**4, "--turns", self.turns, "1 to 10000"),
            (self.reuse is None or 0 <= self.reuse <= 1, "--reuse", self.reuse, "0 to 1"),
            (self.output is None or self.output >= 1, "--output", self.output, "1 or more tokens"),
        )
        for ok, name, value, expected in checks:
            if not ok:
                raise PlanError(f"{name} is {value}; expected {expected}")
        if self.output is not None and self.output * self.turns >= self.context:
            raise PlanError(
                f"{self.turns} x --output {self.output} leaves no prompt in --context "
                f"{self.context}, which counts prompts and answers; raise --context"
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
        host_given: whether the host's memory and disk are all for this plan; else a plan of fewer
            GPUs than the host has takes their share.
        resident_experts: experts of each layer kept in HBM; None solves for it.
        hold_windows: whether the engine frees what a sliding window has left behind.
        overlap: see `CostModel`.
        routing: which experts tokens reach.
        calibration: efficiencies and overheads.
    """

    shape: ModelShape
    hardware: Hardware
    workload: Workload = field(default_factory=Workload)
    layout: Layout | None = None
    gpus: int | None = None
    kv_dtype: str = "bf16"
    host_given: bool = False
    resident_experts: int | None = None
    hold_windows: bool = True
    overlap: frozenset[str] = frozenset()
    routing: Routing = field(default_factory=Routing)
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_BYTES:
            raise PlanError(f"KV dtype {self.kv_dtype!r} is unknown; use {', '.join(KV_BYTES)}")
        if self.gpus is not None and not 1 <= self.gpus <= 100_000:
            raise PlanError(f"--gpus is {self.gpus}; expected 1 to 100000")
        if self.resident_experts is not None:
            most = self.shape.num_experts
            if not most:
                raise PlanError(
                    f"--resident-experts is given, but {self.shape.name} has no experts"
                )
            if not 0 <= self.resident_experts <= most:
                raise PlanError(
                    f"--resident-experts is {self.resident_experts}; expected 0 to {most}, "
                    f"the experts of a layer of {self.shape.name}"
                )
        if self.shape.num_experts:
            self.routing.check(self.shape.num_experts)
        self.shape.kv_bytes_per_token(self.kv_dtype)  # refuses a layout of KV that does not apply
