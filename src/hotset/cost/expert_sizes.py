"""How many experts of a layer are where, by what was asked and what they take."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hotset.cost.slot_bytes import SlotBytes, count_slots
from hotset.errors import ConfigError
from hotset.expert_options import ExpertBudget, ExpertSlots, HostedExperts, SplitMemory
from hotset.options import OPTIONS, own_options
from hotset.units import GIB, round_up_gib

# In host memory, where others are on disk: one is read into while the other is used.
FEWEST_HOST_SLOTS = 2


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """What experts get of the memory.

    Attributes:
        slots: what slots take, and how experts come to them.
        num_slots: of each layer, on the device.
        host_slots: experts of all layers that host memory has room for, beside a disk with all of
            them; None where host memory has them all.
    """

    slots: SlotBytes
    num_slots: int
    host_slots: int | None = None

    @property
    def are_resident(self) -> bool:
        """Whether all experts are on the device."""
        return self.num_slots == self.slots.num_experts

    @property
    def device_bytes(self) -> int:
        """Of slots and staging buffers; of the weights where all are resident."""
        if self.are_resident:
            return self.slots.num_layers * self.num_slots * self.slots.payload_bytes
        return self.slots(self.num_slots)

    @property
    def host_bytes(self) -> int:
        """Of experts in host memory."""
        if self.are_resident:
            return 0
        in_all = self.slots.num_layers * self.slots.num_experts
        return self.slots.cold_bytes * (in_all if self.host_slots is None else self.host_slots)


def size_experts(
    asked: HostedExperts, slots: SlotBytes | None, why_not: str, *, device: str
) -> ExpertSizes | None:
    """Refuse options of experts that a model cannot follow; needs none of its weights.

    Args:
        asked: by the user.
        slots: of the model's experts; None where they cannot be hosted.
        why_not: why.
        device: `cpu` or `cuda`.

    Returns:
        What experts get, where the user gave them a size of their own.

    Raises:
        ConfigError: there are no such experts, or others than asked for.
    """
    if isinstance(asked, ExpertSlots | ExpertBudget):
        if slots is None:
            asked_for = "expert_slots" if isinstance(asked, ExpertSlots) else "expert_gib"
            raise ConfigError(
                f"{asked_for} is {getattr(asked, asked_for)}, but {why_not}; leave {asked_for} out"
            )
        return asked_sizes(asked, slots, device=device)
    if slots is None:
        for one in (*own_options(SplitMemory), *own_options(HostedExperts)):
            if (value := getattr(asked, one.name)) != one.default:
                raise ConfigError(f"{one.name} is {value!r}, but {why_not}; leave {one.name} out")
    return None


def asked_sizes(asked: ExpertSlots | ExpertBudget, slots: SlotBytes, *, device: str) -> ExpertSizes:
    """The sizes where the user gave that of the experts.

    Args:
        asked: by the user.
        slots: of the model's experts, for the plan asked for.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: what is asked for cannot work with these experts.
    """
    slots, host_slots = with_disk(asked, slots)
    if isinstance(asked, ExpertSlots):
        num_slots = asked.expert_slots
        if num_slots > slots.num_experts:
            raise ConfigError(
                f"expert_slots is {num_slots}, but a layer has {slots.num_experts} experts; give "
                f"{slots.num_experts} or fewer"
            )
    else:
        found = count_slots(int(asked.expert_gib * GIB), slots.num_experts, slots)
        if found is None:
            raise ConfigError(
                f"expert_gib {asked.expert_gib} holds too little: the plan {slots.plan} needs "
                f"{round_up_gib(slots(slots.fewest))} or more for the experts of this model"
            )
        num_slots = found
    return checked_sizes(asked, ExpertSizes(slots, num_slots, host_slots), device=device)


def with_disk(asked: HostedExperts, slots: SlotBytes) -> tuple[SlotBytes, int | None]:
    """Slots as they are with `expert_host_gib`, and the experts that it has room for.

    Returns:
        The slots, and None, where that is no bound or all experts are within it.

    Raises:
        ConfigError: the others would be on disk, which cannot work as asked.
    """
    if asked.expert_host_gib is None:
        return slots, None
    num_experts = slots.num_layers * slots.num_experts
    host_slots = int(asked.expert_host_gib * GIB) // slots.cold_bytes
    if host_slots >= num_experts:
        return slots, None
    given = f"expert_host_gib is {asked.expert_host_gib}"
    all_gib = num_experts * slots.cold_bytes / GIB
    if asked.expert_cold_dtype != "auto":
        raise ConfigError(
            f"{given} and expert_cold_dtype is {asked.expert_cold_dtype}, in which the experts "
            f"take {all_gib:.3f} GiB; what is on disk is not rounded: leave expert_cold_dtype out, "
            "or give more memory"
        )
    if host_slots < FEWEST_HOST_SLOTS:
        least = round_up_gib(FEWEST_HOST_SLOTS * slots.payload_bytes)
        raise ConfigError(
            f"{given}, which holds {host_slots} experts of this model; at least "
            f"{FEWEST_HOST_SLOTS} are needed to read others from disk: give {least} or more"
        )
    if asked.expert_plan == "stream":
        raise ConfigError(
            f"expert_plan is 'stream', which copies whole layers from host memory, but {given} and "
            f"the experts take {all_gib:.3f} GiB; leave expert_plan out, or give more memory"
        )
    return replace(slots, plan="cache"), host_slots


def checked_sizes(asked: HostedExperts, sizes: ExpertSizes, *, device: str) -> ExpertSizes:
    """The sizes, where all that was asked for has an effect with them.

    Raises:
        ConfigError: it has not.
    """
    for problem in _without_effect(asked, sizes, device):
        raise ConfigError(problem)
    return sizes


def _without_effect(asked: HostedExperts, sizes: ExpertSizes, device: str) -> Iterator[str]:
    """What options of experts do not go together with a model's experts: the one list of it."""
    names = ("expert_cold_dtype", "expert_prefetch", "expert_host_gib", "expert_cpu")
    given = {
        name: value for name in names if (value := getattr(asked, name)) != OPTIONS[name].default
    }
    if asked.expert_cpu == "on" and device == "cpu":
        yield (
            "expert_cpu is 'on', but the device is the CPU, which computes all experts anyway; "
            "leave it out"
        )
    if sizes.are_resident:
        for name, value in given.items():
            yield (
                f"{name} is {value}, which does nothing while all experts are on the device, as "
                "they are here; leave it out, or give them less memory"
            )
        if isinstance(asked, SplitMemory) and asked.move_split:
            yield (
                "move_split does nothing while all experts are on the device, as they are here; "
                "leave it out, or give less memory"
            )
    if asked.expert_prefetch > sizes.num_slots:
        yield (
            f"expert_prefetch is {asked.expert_prefetch}, but a layer keeps {sizes.num_slots} "
            f"experts on the device; give {sizes.num_slots} or fewer"
        )
    if sizes.host_slots is None:
        return
    said = [f"{n} is {given[n]!r}" for n in ("expert_cpu", "expert_prefetch") if n in given]
    if isinstance(asked, SplitMemory) and asked.move_split:
        said.append("move_split is given")
    for one in said:
        yield (
            f"{one}, but expert_host_gib {asked.expert_host_gib} leaves experts on disk, with "
            "which it does not work; leave one of them out"
        )
