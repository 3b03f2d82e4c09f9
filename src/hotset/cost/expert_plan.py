"""Which plan brings the experts of a step sooner: slots as a cache, or all others streamed."""

from dataclasses import dataclass

from hotset.cost.expert_steps import GATHER_GB_PER_S
from hotset.cost.routing import Routing

# Of the same H200. The choice depends on the ratio of the two rates alone, so other machines with a
# link far slower than their memory choose alike.
HBM_GB_PER_S = 4200.0


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """One layer, as the choice sees it.

    Attributes:
        num_experts: E.
        num_slots: S, of experts that are on the device.
        wide_bytes: of an expert in its slot.
        cold_bytes: of an expert in host memory.
    """

    num_experts: int
    num_slots: int
    wide_bytes: int
    cold_bytes: int


def streaming_is_faster(sizes: ExpertSizes, num_tokens: int, top_k: int) -> bool:
    """Whether a step of so many tokens is sooner done if it streams all experts without a slot.

    Tokens are expected to choose among the E experts alike, so that a step needs
    D = E * (1 - (1 - top_k / E) ** num_tokens). The cache copies D * (1 - S / E) of them, and
    then reads D; streaming copies E - S while the layer before is computed.
    """
    num_experts, num_absent = sizes.num_experts, sizes.num_experts - sizes.num_slots
    needed = Routing().distinct(num_experts, top_k, num_tokens)
    copy_s = sizes.cold_bytes / (GATHER_GB_PER_S * 1e9)
    compute_s = needed * sizes.wide_bytes / (HBM_GB_PER_S * 1e9)
    cached_s = needed * num_absent / num_experts * copy_s + compute_s
    streamed_s = max(num_absent * copy_s, compute_s)
    return streamed_s <= cached_s
