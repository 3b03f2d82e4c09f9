"""Times of collectives between GPUs: as measured where the profile has them, else by a ring.

Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hotset.cost.calibration import Calibration
from hotset.cost.hardware import Hardware
from hotset.cost.points import Point, seconds_at
from hotset.cost.shape import ModelShape

MOST_WITHOUT_NVLINK = 64e9  # bytes/s, of PCIe 5 x16


@dataclass(frozen=True, slots=True)
class Wire:
    """What lies between the GPUs of a layout.

    Attributes:
        hardware: with the rates of NVLink and network, and with what was measured.
        calibration: latencies, and shares of the rates that are reached.
    """

    hardware: Hardware
    calibration: Calibration

    def all_reduce_s(self, ranks: int, message: float) -> float:
        """To sum `message` bytes over `ranks` ranks.

        A ring over d ranks moves 2 (d - 1) / d of the message over each link. Beyond an NVLink
        domain it is done inside each first, then between them by all GPUs at once, each with its
        own port and its share of the message.
        """
        hw, c = self.hardware, self.calibration
        if ranks == 1:
            return 0.0
        if points := self._measured("all_reduce", ranks):
            return seconds_at(points, message)
        inside = min(ranks, hw.peer_gpus)
        domains = ranks / inside
        wire_s = 2 * (inside - 1) / inside * message / hw.peer_bytes_per_s
        latency_s = c.all_reduce_s
        if domains > 1:
            share = message / inside
            wire_s += 2 * (domains - 1) / domains * share / hw.network_bytes_per_s
            latency_s += c.hop_s
        return wire_s / c.wire_efficiency + latency_s

    def all_gather_s(self, ranks: int, rank_bytes: float) -> float:
        """To bring to each rank the `rank_bytes` bytes that each other one has."""
        return self._gather_s("all_gather", ranks, rank_bytes)

    def reduce_scatter_s(self, ranks: int, rank_bytes: float) -> float:
        """To sum over `ranks` ranks what each has for each of them, `rank_bytes` bytes."""
        return self._gather_s("reduce_scatter", ranks, rank_bytes)

    def _gather_s(self, name: str, ranks: int, rank_bytes: float) -> float:
        """Both move the same bytes; one stands for the other where that was not measured."""
        hw, c = self.hardware, self.calibration
        if ranks == 1:
            return 0.0
        if points := self._measured(name, ranks) or self._measured("all_gather", ranks):
            return seconds_at(points, rank_bytes)
        rate, latency_s = hw.peer_bytes_per_s, c.all_reduce_s
        if ranks > hw.peer_gpus:
            rate, latency_s = hw.network_bytes_per_s, latency_s + c.hop_s
        return (ranks - 1) * rank_bytes / (rate * c.wire_efficiency) + latency_s

    def all_to_all_s(
        self, shape: ModelShape, ranks: int, tokens: float, *, per_node: bool
    ) -> float:
        """Dispatch and combine of one MoE layer for `tokens` tokens of each rank.

        A token travels to each of its top-k experts on another rank: out at 8 bits where experts
        are 8-bit or less, back at 16. `per_node` sends it once to each remote host and spreads it
        there, as prefill kernels do; the low-latency kernels of decode do not.
        """
        hw, c = self.hardware, self.calibration
        narrow = shape.expert_dtype not in ("bf16", "fp16", "fp32")
        token_bytes = shape.hidden_size * (1 if narrow else 2) + shape.hidden_size * 2
        domain = min(ranks, hw.peer_gpus)
        copies = float(shape.top_k_experts)
        near = copies * (domain - 1) / ranks
        far = copies * (ranks - domain) / ranks
        if per_node and far:
            nodes = ranks / domain
            if shape.expert_groups:
                nodes = min(nodes, float(shape.expert_groups[1]))
            reached = nodes * (1 - (1 - 1 / nodes) ** copies)
            far = reached * (1 - domain / ranks)
        wire_s = max(
            near * token_bytes / (hw.peer_bytes_per_s * c.wire_efficiency),
            far * token_bytes / (hw.network_bytes_per_s * c.wire_efficiency),
        )
        return tokens * wire_s + 2 * (c.all_to_all_s + (c.hop_s if far else 0.0))

    def slow_note(self, ranks: int, rows: int, shape: tuple[int, int], *, has_peers: bool) -> str:
        """What sums of a step take where GPUs have no NVLink between them; empty where they have.

        Args:
            ranks: that share each layer.
            rows: of the step.
            shape: of the model: its layers, and its hidden size.
            has_peers: whether each GPU reaches the memory of the others.
        """
        hw = self.hardware
        if has_peers and hw.peer_bytes_per_s > MOST_WITHOUT_NVLINK:
            return ""
        rate = min(hw.peer_bytes_per_s, MOST_WITHOUT_NVLINK)
        wire = replace(self, hardware=replace(hw, peer_bytes_per_s=rate, together={}))
        num_layers, hidden = shape
        step_s = 2 * num_layers * wire.all_reduce_s(ranks, rows * hidden * 2)
        why = "have no NVLink" if has_peers else "do not reach each other's memory"
        return (
            f"warning: GPUs of {hw.name} {why}: sums over {ranks} ranks go through NCCL over PCIe "
            f"and take about {step_s * 1e3:.1f} ms of a step of {rows} requests"
        )

    def _measured(self, name: str, ranks: int) -> Sequence[Point]:
        together = self.hardware.together.get(ranks)
        points: Sequence[Point] = getattr(together, name, ())
        return points
