"""What slots of experts take on the device, and how many fit."""

from dataclasses import dataclass


def count_slots(budget_bytes: int, num_experts: int, bytes_of: "SlotBytes") -> int | None:
    """The most slots a layer can have within the budget; None where not even the fewest fit."""
    for num_slots in range(num_experts, bytes_of.fewest - 1, -1):
        if bytes_of(num_slots) <= budget_bytes:
            return num_slots
    return None


@dataclass(frozen=True, slots=True)
class SlotBytes:
    """What slots take on the device over all layers.

    Attributes:
        plan: `cache`, `stream`, or `auto` for both.
        payload_bytes: of an expert on the device.
        narrow_bytes: of one in host memory, where it has fewer bits there; else None.
        fewest_ever: slots that a split which moves may leave, for which staging buffers have room;
            None where their number stays.
    """

    plan: str
    num_layers: int
    num_experts: int
    payload_bytes: int
    narrow_bytes: int | None = None
    fewest_ever: int | None = None

    @property
    def fewest(self) -> int:
        """The fewest slots of a layer that can work."""
        return 0 if self.plan == "stream" else 1

    @property
    def cold_bytes(self) -> int:
        """Of an expert in host memory."""
        return self.payload_bytes if self.narrow_bytes is None else self.narrow_bytes

    def staged(self, num_slots: int) -> int:
        """Experts of a layer that pass through staging buffers."""
        fewest = num_slots if self.fewest_ever is None else self.fewest_ever
        return 0 if self.plan == "cache" else self.num_experts - fewest

    def __call__(self, num_slots: int) -> int:
        """Bytes of `num_slots` slots per layer, with the staging buffers.

        Two of these, filled in turn; what the copy engine brings in fewer bits passes from two
        narrow ones through a wide one.
        """
        staged = 2 * self.payload_bytes
        if self.plan == "stream" and self.narrow_bytes is not None:
            staged = 2 * self.narrow_bytes + self.payload_bytes
        slots = self.num_layers * num_slots * self.payload_bytes
        return slots + self.staged(num_slots) * staged
