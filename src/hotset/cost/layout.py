"""How a model is spread over GPUs: tensor, data and expert parallelism."""

import re
from dataclasses import dataclass

from hotset.cost.shape import ModelShape
from hotset.errors import PlanError


@dataclass(frozen=True, slots=True)
class Layout:
    """`tp` x `dp` GPUs.

    Attributes:
        tp: GPUs that share each attention head set and dense matrix.
        dp: groups of `tp` GPUs, each with its own users and its own copy of the dense weights.
        ep: GPUs over which the routed experts are spread whole; 1 splits each expert over the
            `tp` GPUs of a group instead.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tp * self.dp

    @property
    def groups_per_expert_set(self) -> int:
        """Data-parallel groups whose tokens meet in one set of experts."""
        return max(1, self.ep // self.tp)

    def __str__(self) -> str:
        parts = [f"tp={self.tp}"] if self.tp > 1 or (self.dp == 1 and self.ep == 1) else []
        parts += [f"dp={self.dp}"] if self.dp > 1 else []
        parts += [f"ep={self.ep}"] if self.ep > 1 else []
        return ",".join(parts)


def parse_layout(text: str) -> Layout:
    """Read `tp=8`, `dp=8,ep=8`, `tp=2,dp=4,ep=8` or `ep=72` (which is `dp=72,ep=72`).

    Raises:
        PlanError: it says something else.
    """
    sizes: dict[str, int] = {}
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"([a-zA-Z]+)=(\d{1,6})", part)
        if not match:
            raise PlanError(f"layout {text!r} has {part!r}; expected for example tp=2,dp=4,ep=8")
        key, size = match[1].lower(), int(match[2])
        if key not in ("tp", "dp", "ep"):
            raise PlanError(
                f"layout {text!r} asks for {key}, which is not planned; use tp, dp and ep"
            )
        if key in sizes:
            raise PlanError(f"layout {text!r} gives {key} twice")
        if not 1 <= size <= 100_000:
            raise PlanError(f"layout {text!r}: {key} is {size}; expected 1 or more")
        sizes[key] = size
    tp, ep = sizes.get("tp", 1), sizes.get("ep", 1)
    dp = sizes.get("dp", max(1, ep // tp))
    return Layout(tp, dp, ep)


def check_layout(layout: Layout, shape: ModelShape, gpus: int | None) -> None:
    """Raise PlanError where the layout cannot hold this model, or asks for more than `gpus`."""
    if gpus is not None and layout.gpus > gpus:
        raise PlanError(
            f"layout {layout} needs {layout.gpus} GPUs and {gpus} are given; "
            f"raise --gpus or shrink the layout"
        )
    for heads in shape.num_heads:
        if heads % layout.tp:
            fitting = [t for t in range(1, heads + 1) if all(h % t == 0 for h in shape.num_heads)]
            raise PlanError(
                f"tp={layout.tp} does not divide the {heads} attention heads of {shape.name}; "
                f"possible: {', '.join(map(str, fitting))}"
            )
    kv_heads = shape.min_kv_heads
    if not shape.is_mla and kv_heads % layout.tp and layout.tp % kv_heads:
        raise PlanError(
            f"tp={layout.tp} neither divides the {kv_heads} KV heads of {shape.name} nor is a "
            f"multiple of them"
        )
    if layout.ep == 1:
        return
    if not shape.moe_layers:
        raise PlanError(f"ep={layout.ep} spreads experts, and {shape.name} has none; use tp and dp")
    if layout.ep % layout.tp or layout.gpus % layout.ep:
        raise PlanError(
            f"ep={layout.ep} must be a multiple of tp={layout.tp} and divide the "
            f"{layout.gpus} GPUs of {layout}"
        )
    if layout.ep > 8 * shape.num_experts:
        raise PlanError(
            f"ep={layout.ep} is over eight GPUs for each of the {shape.num_experts} experts of "
            f"{shape.name}; use fewer"
        )


def candidate_layouts(shape: ModelShape, gpus: int) -> list[Layout]:
    """Every layout of exactly `gpus` GPUs that can hold this model, simple ones first."""
    result = []
    for tp in (t for t in range(1, gpus + 1) if gpus % t == 0):
        dp = gpus // tp
        sizes = {1, gpus, *((8,) if gpus % 8 == 0 else ())} if shape.moe_layers else {1}
        for ep in sorted(sizes):
            layout = Layout(tp, dp, ep)
            try:
                check_layout(layout, shape, gpus)
            except PlanError:
                continue
            if layout not in result:
                result.append(layout)
    return result


@dataclass(frozen=True, slots=True)
class Shard:
    """What one GPU of a layout holds of a model, all experts resident.

    Attributes:
        dense_bytes: weights other than routed experts.
        dense_read_bytes: of those, what each decode step reads (no input embeddings).
        expert_slots: experts a layer keeps here (whole ones with ep, slices of all with tp).
        slot_bytes: bytes of one slot, over all MoE layers.
        experts_bytes: all slots.
    """

    dense_bytes: float
    dense_read_bytes: float
    expert_slots: int
    slot_bytes: float
    experts_bytes: float


def shard_model(shape: ModelShape, layout: Layout) -> Shard:
    """Cut a model for a layout."""
    tp, ep = layout.tp, layout.ep
    replicated = shape.replicated_bytes
    dense = (shape.dense_bytes - replicated) / tp + replicated
    embedding = shape.embedding_bytes if shape.head.count else 0
    per_expert_bytes = sum(shape.layer_expert_bytes(layer) for layer in shape.moe_layers)
    if ep > 1:
        slots, slot_bytes = -(-shape.num_experts // ep), float(per_expert_bytes)
    else:
        slots, slot_bytes = shape.num_experts, per_expert_bytes / tp
    return Shard(
        dense_bytes=dense,
        dense_read_bytes=dense - embedding / tp,
        expert_slots=slots,
        slot_bytes=slot_bytes,
        experts_bytes=slots * slot_bytes,
    )
