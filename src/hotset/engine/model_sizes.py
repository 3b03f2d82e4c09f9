"""A loaded model in the numbers that sizes follow from. Imports no torch."""

from dataclasses import dataclass

from hotset.cost.slot_bytes import SlotBytes
from hotset.engine.hot_sizing import SparseSizes
from hotset.engine.memory_split import Rated


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model that is loaded on its device, in numbers.

    Attributes:
        device: `cpu` or `cuda`.
        max_len: longest context the model was made for.
        kv_bytes_per_token: over all layers.
        block_size: tokens of a KV block.
        workspace_bytes: kept free on the device for steps.
        dense_bytes: of weights that are not experts'.
        expert_bytes: of experts that are weights, wherever they are; 0 of those that an engine has
            moved to host memory or disk.
        device_expert_bytes: the part of these that is on the device.
        num_experts: of a layer; 0 for a dense model.
        top_k: experts that a token is routed to.
        slots: what slots of its experts take, for the plan asked for; None where they cannot be
            hosted.
        why_not_hosted: why; empty where they can.
        rated: how fast it runs; None where no split depends on it.
        sparse: what it selects and caches; None where its requests cannot be hot.
        why_not_hot: why.
        has_index_keys: whether blocks have those of sparse attention, which lie apart.
        state_bytes: of a slot, the state of one request beside its KV; 0 for none.
    """

    device: str
    max_len: int
    kv_bytes_per_token: int
    block_size: int
    workspace_bytes: int
    dense_bytes: int
    expert_bytes: int = 0
    device_expert_bytes: int = 0
    num_experts: int = 0
    top_k: int = 1
    slots: SlotBytes | None = None
    why_not_hosted: str = "it is dense"
    rated: Rated | None = None
    has_index_keys: bool = False
    state_bytes: int = 0
    sparse: SparseSizes | None = None
    why_not_hot: str = "its layers attend to all tokens"

    @property
    def block_bytes(self) -> int:
        """Of a KV block."""
        return self.block_size * self.kv_bytes_per_token
