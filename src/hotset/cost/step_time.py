"""The cost model: seconds from bytes, operations and rates. Pure arithmetic, no torch.

The planner, the bench and the engine's split of memory use it.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from hotset.cost.attention import Kind, causal_pairs
from hotset.cost.calibration import Calibration
from hotset.cost.experts import bring_experts
from hotset.cost.hardware import Hardware
from hotset.cost.layout import shard_model
from hotset.cost.routing import Routing
from hotset.cost.shape import ModelShape
from hotset.cost.wire import Wire
from hotset.layout import Layout

PREFILL_CHUNK = 8192  # tokens that go through the chip at once

CAUSES = {
    "dense_weights": "reading dense weights",
    "experts": "reading experts",
    "attention": "attention over KV",
    "index": "scoring index keys",
    "all_reduce": "all-reduce",
    "all_to_all": "tokens to experts and back",
    "launch": "kernel launches",
    "per_user": "sampling and scheduling",
    "host_experts": "experts over the host link",
    "host_kv": "KV over the host link",
    "swap": "swapping parked users",
    "prefill": "prefill of new turns",
}


@dataclass(frozen=True)
class Step:
    """One step of the whole layout.

    Attributes:
        parts: seconds that each cause of `CAUSES` adds; what is hidden behind another is not here.
        bounds: for parts that move bytes and compute, which of the two takes the time.
        ceiling_s: no engine can be faster: nominal rates, everything overlapped, no launches.
    """

    parts: dict[str, float]
    ceiling_s: float
    bounds: dict[str, str] = field(default_factory=dict)

    @property
    def expected_s(self) -> float:
        """Sum of the parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Tiering:
    """What a decode step finds where.

    Attributes:
        resident_experts: share of the expert slots that lie in HBM.
        host_experts: share of the others that lie in host memory; the rest is on disk.
        host_kv: share of the running users' KV that is read over the link each step.
    """

    resident_experts: float = 1.0
    host_experts: float = 1.0
    host_kv: float = 0.0


class _Work(NamedTuple):
    """What one part of a step moves and computes on a rank."""

    moved_bytes: float
    flops: float
    dtype: str
    efficiency: float
    is_dense: bool = False


class CostModel:
    """Times of one model on one layout of one kind of GPU.

    All GPUs work alike, so a step is that of one rank with the most users.

    Args:
        shape: the model.
        hardware: the GPU, its links and host.
        layout: how the model is spread.
        kv_dtype: key of `KV_BYTES`.
        calibration: efficiencies and overheads.
        routing: which experts tokens reach.
        overlap: `comm` hides collectives behind compute (two-batch overlap), `stream` hides what
            comes over the host link. Experts that are streamed whole are always prefetched one
            layer ahead, so they need no switch.
    """

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        layout: Layout,
        kv_dtype: str,
        calibration: Calibration,
        routing: Routing,
        overlap: frozenset[str] = frozenset(),
    ) -> None:
        self.shape = shape
        self.hardware = hardware
        self.layout = layout
        self.kv_dtype = kv_dtype
        self.calibration = calibration
        self.routing = routing
        self.overlap = overlap
        self.wire = Wire(hardware, calibration)
        self.shard = shard_model(shape, layout, has_whole_embedding=calibration.has_whole_embedding)

    # -- rates --------------------------------------------------------------------------------

    @property
    def memory_bytes_per_s(self) -> float:
        """HBM rate that decode kernels reach."""
        return self.calibration.memory_bytes_per_s(self.hardware)

    def _flops(self, dtype: str, efficiency: float) -> float:
        reached, c = efficiency, self.calibration
        if self.hardware.measured:
            reached = c.probe_compute * min(1.0, efficiency / c.compute_efficiency)
        return self.hardware.flops_for(dtype)[1] * reached

    @property
    def kernel_s(self) -> float:
        """Cost of one kernel beside its bytes."""
        own = self.hardware.kernel_s
        return self.calibration.kernel_s if own is None else own

    @property
    def gpus_on_host(self) -> int:
        """GPUs of this layout that share one host."""
        return min(self.layout.gpus, self.hardware.gpus_per_host)

    def link_bytes_per_s(self, *, nominal: bool = False) -> float:
        """One-way rate from host memory to one GPU while all GPUs of the host use theirs."""
        calibration, hardware = self.calibration, self.hardware
        if nominal:
            calibration = replace(calibration, link_efficiency=1.0)
            hardware = replace(hardware, together={})
        return calibration.link_bytes_per_s(hardware, num_gpus=self.gpus_on_host)

    def expert_bytes_per_s(self) -> float:
        """The same where kernels of the GPU copy experts."""
        return self.link_bytes_per_s() * self.calibration.gather_efficiency

    def disk_bytes_per_s(self) -> float:
        """Read rate from disk to one GPU while all GPUs of the host read."""
        return min(self.link_bytes_per_s(), self.hardware.disk_bytes_per_s / self.gpus_on_host)

    # -- collectives --------------------------------------------------------------------------

    def all_reduce_s(self, tokens: float) -> float:
        """Two all-reduces a layer over the tensor-parallel ranks.

        One where tokens of several groups meet in the experts.
        """
        tp, shape = self.layout.tp, self.shape
        count = 2 * len(shape.layers)
        if self.layout.groups_per_expert_set > 1:
            count -= len(shape.moe_layers)
        return count * self.wire.all_reduce_s(tp, tokens * shape.hidden_size * 2)

    def logits_s(self, users: float) -> float:
        """To put together the logits, of which each tensor-parallel rank has some columns."""
        tp = self.layout.tp
        return self.wire.all_gather_s(tp, users * self.shape.vocab_size / tp * 2)

    def all_to_all_s(self, tokens: float, *, per_node: bool) -> float:
        """To bring `tokens` tokens of each rank to the experts of each MoE layer and back.

        Where groups share slices of experts, and inside a domain of up to top-k ranks, all tokens
        are gathered and the sums are scattered; else each travels to its own experts.
        """
        layout, shape, hw = self.layout, self.shape, self.hardware
        ranks = layout.expert_gpus
        if layout.groups_per_expert_set == 1:
            return 0.0
        if layout.es > 1 or ranks <= min(shape.top_k_experts, hw.peer_gpus):
            rank_bytes = tokens * shape.hidden_size * 2
            each_s = self.wire.all_gather_s(ranks, rank_bytes)
            each_s += self.wire.reduce_scatter_s(ranks, rank_bytes)
        else:
            imbalance = self.routing.imbalance(shape.num_experts, layout.ep)
            each_s = self.wire.all_to_all_s(shape, layout.ep, tokens * imbalance, per_node=per_node)
        return len(shape.moe_layers) * each_s

    # -- experts ------------------------------------------------------------------------------

    def expert_slots_read(self, tokens: float) -> float:
        """Expert slots of a layer that one rank reads when each group has `tokens` tokens."""
        shape, layout = self.shape, self.layout
        if not shape.moe_layers:
            return 0.0
        routed = tokens * layout.groups_per_expert_set
        return self.routing.distinct_on_rank(
            shape.num_experts, shape.top_k_experts, routed, layout.ep
        )

    def expert_flops(self, tokens: float) -> float:
        """Operations of routed experts on the busiest rank for `tokens` tokens a group."""
        per_token = 2 * (self.shape.active_params - self.shape.dense_params)
        imbalance = self.routing.imbalance(self.shape.num_experts, self.layout.ep)
        return per_token * tokens / self.layout.tp * imbalance

    def _streamed_experts_s(self, slots_read: float, hidden_behind_s: float, t: Tiering) -> float:
        """Exposed time of experts that are not resident, beside `hidden_behind_s` of compute."""
        missing = 1 - t.resident_experts
        if missing <= 0 or not self.shard.experts_bytes:
            return 0.0
        num_layers = len(self.shape.moe_layers)
        host_s = 1 / self.expert_bytes_per_s()
        disk_s = max(host_s, 1 / self.disk_bytes_per_s())
        byte_s = t.host_experts * host_s + (1 - t.host_experts) * disk_s
        copy_s = self.shard.slot_bytes / num_layers * byte_s
        return bring_experts(
            missed=slots_read * missing,
            absent=self.shard.expert_slots * missing,
            gather_s=copy_s,
            stream_s=copy_s,
            hidden_s=hidden_behind_s / num_layers,
            num_layers=num_layers,
        ).seconds

    # -- steps --------------------------------------------------------------------------------

    def decode(
        self,
        users: float,
        context: float,
        tiering: Tiering | None = None,
        *,
        mean_users: float | None = None,
    ) -> Step:
        """One decode step with `users` users, of `context` tokens each, in the fullest group.

        A group is `layout.tp` GPUs; there are `layout.dp` of them, with `mean_users` users on
        average (all as full as the fullest, if None), whose tokens meet in the experts.
        """
        tiering = tiering or Tiering()
        routed = users if mean_users is None else mean_users
        work = self._decode_work(users, routed, context)
        parts = dict.fromkeys(CAUSES, 0.0)
        bounds: dict[str, str] = {}
        for name, part in work.items():
            parts[name], bounds[name] = self._seconds(part)
        parts["launch"] = self._launch_s
        c = self.calibration
        device_s = sum(parts.values()) if c.host_is_hidden else 0.0
        parts["per_user"] = max(0.0, users * c.user_s - device_s)
        chip_s = sum(parts.values())
        slots = self.expert_slots_read(routed)
        parts["host_experts"] = self._streamed_experts_s(slots, chip_s, tiering)
        # A rank that holds some KV on the host reads that part over the link every step.
        host_kv_bytes = work["attention"].moved_bytes * tiering.host_kv
        parts["host_kv"] = host_kv_bytes / self.link_bytes_per_s()
        if "stream" in self.overlap:
            parts["host_kv"] = max(0.0, parts["host_kv"] - chip_s)
        parts["all_reduce"] = self.all_reduce_s(users) + self.logits_s(users)
        parts["all_to_all"] = self.all_to_all_s(users / self.layout.tp, per_node=False)
        if "comm" in self.overlap:
            for name in ("all_reduce", "all_to_all"):
                parts[name] = max(0.0, parts[name] - chip_s)
        missed = slots * (1 - tiering.resident_experts) * self.shard.slot_bytes
        link_floor_s = (host_kv_bytes + missed) / self.link_bytes_per_s(nominal=True)
        ceiling_s = sum(
            max(
                part.moved_bytes / self.hardware.hbm_bytes_per_s,
                part.flops / self.hardware.flops_for(part.dtype)[1],
            )
            for part in work.values()
        )
        return Step(parts, max(ceiling_s, link_floor_s), bounds)

    def _decode_work(self, users: float, routed: float, context: float) -> dict[str, _Work]:
        """What a decode step moves and computes on a rank, by cause."""
        shape, tp, c = self.shape, self.layout.tp, self.calibration
        work = self._weights_work(users, routed, shape.matmul_params)
        kv_bytes = shape.kv_read_bytes(context, self.kv_dtype, tp=tp) * users
        flops = shape.attention_flops_per_token(context, tp=tp) * users
        work["attention"] = _Work(kv_bytes, flops, "bf16", c.attention_efficiency)
        if shape.index_bytes_per_token:  # every rank has all index keys and scores them
            keys = context * users
            work["index"] = _Work(
                keys * shape.index_bytes_per_token,
                keys * shape.index_pair_flops,
                "bf16",
                c.index_efficiency,
            )
        return work

    def _weights_work(self, tokens: float, routed: float, matmul_params: int) -> dict[str, _Work]:
        """Of dense weights with `tokens` tokens, and of experts with `routed` tokens a group."""
        shape, efficiency = self.shape, self.calibration.compute_efficiency
        dense = matmul_params - (shape.active_params - shape.dense_params)
        slots = self.expert_slots_read(routed)
        return {
            "dense_weights": _Work(
                self.shard.dense_read_bytes,
                2 * dense * tokens / self.layout.tp,
                shape.quantised.get("mlp", shape.plain_dtype),
                efficiency,
                is_dense=True,
            ),
            "experts": _Work(
                slots * self.shard.slot_bytes,
                self.expert_flops(routed),
                shape.expert_dtype,
                efficiency,
            ),
        }

    def _seconds(self, work: _Work) -> tuple[float, str]:
        """Time that one part of a step takes, and what bounds it."""
        memory_s = work.moved_bytes / self.memory_bytes_per_s
        compute_s = work.flops / self._flops(work.dtype, work.efficiency)
        bound = "HBM bandwidth" if memory_s >= compute_s else "compute"
        if work.is_dense and not self.calibration.reading_is_hidden:
            return math.hypot(memory_s, compute_s), bound
        return max(memory_s, compute_s), bound

    @property
    def _launch_s(self) -> float:
        layers = self.shape.layers
        kernels = sum(layer.num_kernels for layer in layers)
        over_latents = sum(layer.attention.kind is Kind.MLA for layer in layers)
        kernels += self.calibration.latent_kernels * over_latents
        return (kernels + 4) * self.kernel_s  # embed, norm, head, sample

    def prefill_s(
        self,
        new_tokens: float,
        past_tokens: float = 0.0,
        tiering: Tiering | None = None,
        *,
        sequences: int = 1,
        chunk: int = PREFILL_CHUNK,
    ) -> float:
        """Time to compute `new_tokens` tokens of each of `sequences` after `past_tokens` of it.

        They go through the chip in chunks of at most `chunk` tokens, every group alike. Each chunk
        reads the weights once, or is bound by their products; attention, collectives and launches
        are added.
        """
        if new_tokens <= 0:
            return 0.0
        chunks = math.ceil(sequences * new_tokens / chunk)
        tokens = sequences * new_tokens / chunks
        attention_s = sequences * self.prefill_attention_s(new_tokens, past_tokens, chunk=chunk)
        return chunks * self.chunk_s(tokens, tiering) + attention_s

    def prefill_attention_s(
        self, new_tokens: float, past_tokens: float = 0.0, *, chunk: float = PREFILL_CHUNK
    ) -> float:
        """Time that causal attention takes for `new_tokens` of one sequence after `past_tokens`.

        They are computed at most `chunk` at once.
        """
        c, tp = self.calibration, self.layout.tp
        flops = self.shape.prefill_attention_flops(new_tokens, past_tokens, chunk=chunk, tp=tp)
        pairs = causal_pairs(new_tokens, past_tokens)
        scoring_s = pairs * self.shape.index_pair_flops / self._flops("bf16", c.index_efficiency)
        return flops / self._flops("bf16", c.attention_efficiency) + scoring_s

    def chunk_s(self, tokens: float, tiering: Tiering | None = None) -> float:
        """Time of one step of `tokens` tokens of prompts in every group, without attention."""
        shape = self.shape
        head = shape.head if shape.head.count else shape.embedding
        work = self._weights_work(tokens, tokens, shape.matmul_params - head.count)
        # For the last token alone, so that no products hide the reading of its weights.
        head_bytes = shape.part_bytes("plain", head) / self.layout.tp
        layers = work["dense_weights"]
        work["dense_weights"] = layers._replace(moved_bytes=layers.moved_bytes - head_bytes)
        chip_s = self._launch_s + head_bytes / self.memory_bytes_per_s
        chip_s += sum(self._seconds(part)[0] for part in work.values())
        comm_s = self.all_reduce_s(tokens) + self.all_to_all_s(
            tokens / self.layout.tp, per_node=True
        )
        if "comm" in self.overlap:
            comm_s = max(0.0, comm_s - chip_s)
        slots = self.expert_slots_read(tokens)
        return chip_s + comm_s + self._streamed_experts_s(slots, chip_s, tiering or Tiering())
