"""Where the experts of a layer are: all in host memory, some in slots on the device."""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from hotset.errors import ConfigError
from hotset.experts.narrow import NarrowLayout, RoundingError, quantise_into
from hotset.memory.arena import HostArena
from hotset.memory.disk.slab import slot_bytes_for

Eviction = Literal["least-stale", "lru", "lfu", "lifo"]

_NOBODY = -1
_MOST_EXPERTS_OF_KERNEL = 1024
_COMMIT_THREADS = 8
_MOVED_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """One expert as a run of bytes: its up product (gate and up), then its down product.

    Attributes:
        up: shape of the first matrix.
        down: shape of the second.
    """

    up: tuple[int, int]
    down: tuple[int, int]
    dtype: torch.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of the two matrices."""
        return (math.prod(self.up) + math.prod(self.down)) * self.dtype.itemsize

    @property
    def payload_bytes(self) -> int:
        """Bytes from one expert to the next: whole pages."""
        return slot_bytes_for(self.weight_bytes)

    def views(self, payloads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[N, payload_bytes]` uint8 as `[N, *up]` and `[N, *down]`, of the same memory."""
        values = payloads.view(self.dtype)
        split = math.prod(self.up)
        end = split + math.prod(self.down)
        return (
            values[:, :split].unflatten(1, self.up),
            values[:, split:end].unflatten(1, self.down),
        )


class StoredExperts:
    """Experts as rows of bytes, as they are computed with or in fewer bits.

    Attributes:
        layout: as they are computed with.
        narrow: None where they are stored like that.
        payloads: `[E, payload_bytes]` uint8, on any device.
    """

    def __init__(
        self, layout: ExpertLayout, narrow: NarrowLayout | None, payloads: torch.Tensor
    ) -> None:
        self.layout, self.narrow, self.payloads = layout, narrow, payloads

    @property
    def payload_bytes(self) -> int:
        """Bytes from one expert to the next."""
        return self.payloads.shape[1]

    def matrices(self, experts: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """`[N, *layout.up]` and `[N, *layout.down]`: views, or copies of what is narrow."""
        payloads = self.payloads[experts]
        if self.narrow is None:
            return self.layout.views(payloads)
        up, down = self.narrow.dequantise(payloads, self.layout.dtype)
        return up, down


class HostExperts(StoredExperts):
    """The only copy in host memory of the experts of one layer.

    Args:
        pinned: whether to pin the memory at once, which makes filling it from a GPU faster.

    Attributes:
        rounding: what it lost, where it is narrow.

    Raises:
        ConfigError: it cannot be pinned.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        num_experts: int,
        narrow: NarrowLayout | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        num_bytes = layout.weight_bytes if narrow is None else narrow.payload_bytes
        self._arena = HostArena(num_slots=num_experts, block_bytes=num_bytes)
        self._arena.use_huge_pages()
        super().__init__(layout, narrow, torch.from_numpy(self._arena.slots))
        self.rounding = RoundingError()
        self._unpin: Callable[[], object] | None = None
        if pinned:
            self._arena.commit(0, num_experts, num_threads=_COMMIT_THREADS)
            self.pin()

    def store(self, up: torch.Tensor, down: torch.Tensor, device: torch.device) -> None:
        """Fill it with `[E, *layout.up]` and `[E, *layout.down]`, rounded on `device` if at all."""
        if self.narrow is not None:
            self.rounding = quantise_into(self.narrow, self.payloads, up, down, device)
            return
        # Off a GPU as whole payloads, which is one copy each time: a view of their parts is not.
        num_experts = len(up) if up.device.type == "cpu" else _MOVED_TOGETHER
        for start in range(0, len(up), num_experts):
            part = slice(start, start + num_experts)
            target = self.payloads[part]
            payloads = (
                target if up.device.type == "cpu" else torch.zeros_like(target, device=up.device)
            )
            for view, weight in zip(self.layout.views(payloads), (up, down), strict=True):
                view.copy_(weight[part])
            if payloads is not target:
                target.copy_(payloads)

    def pin(self) -> None:
        """Pin the memory, so that the device can read it.

        Raises:
            ConfigError: it cannot be pinned; it stays as it is.
        """
        if self._unpin is None:
            self._unpin = pin_memory(self.payloads, self)

    @property
    def host_bytes(self) -> int:
        """Of all payloads."""
        return int(self.payloads.nbytes)

    def unpin(self) -> None:
        """Unpin the memory. Nothing may read it from the device any more."""
        if self._unpin is not None:
            self._unpin()
            self._unpin = None


def pin_memory(payloads: torch.Tensor, owner: object) -> Callable[[], object]:
    """Pin host memory of experts where it is.

    Returns:
        what unpins it; that happens at the end of `owner` at the latest, as the driver takes memory
        for pinned that has been given back and is something else's now.

    Raises:
        ConfigError: it cannot be pinned; it stays as it is.
    """
    code = torch.cuda.cudart().cudaHostRegister(payloads.data_ptr(), payloads.nbytes, 0)
    if int(code) != 0:
        raise ConfigError(
            f"{payloads.nbytes / 2**30:.2f} GiB of host memory for experts cannot be pinned (CUDA "
            f"error {int(code)}); raise the limit on locked memory, or keep more experts on "
            "the device"
        )
    unpin = weakref.finalize(owner, _unregister, payloads.data_ptr())
    unpin.atexit = False
    return unpin


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


class SlotTable:
    """Which expert of a layer is in which slot, and which one goes when another must come.

    All state is in tensors on the device and every operation has a fixed shape and asks nothing of
    the host, so that a CUDA graph can record it; on the CPU the same operations run.

    At first the slots hold the experts of the same number, and they are never empty: exactly E - S
    experts have none at any time. With `fewest` only the first slots are in use, whose number a
    tensor holds, so that `shrink` and `grow` between two steps change what a recorded one does.
    The others are nobody's.

    A step that needs more experts than fit takes several passes: `begin` gives each needed expert
    its pass, those that are here in the first; `load` makes room for the experts of a pass. An
    expert that the pass needs is never evicted in it. `plan` does all of that at once.

    `prefetch` does that before the step, for experts that it is likely to need.

    Policies choose among the others, and slots tie by their number:
      least-stale -- not used in the current step before used in it, then the first that came.
        Source: "SpecMD" (its least-stale eviction). Slots belong to one layer here, so all of a
        layer's experts are equally far ahead in the scan over layers, and the step decides alone.
      lru -- the longest not used. lfu -- the least often used so far. lifo -- the last that came.

    Args:
        num_experts: E, of the layer.
        num_slots: S, on the device; at most E.
        eviction: the policy.
        fewest: slots that stay in use; None where all S do.
        num_active: slots in use at first; None is all.
        counts: `[5]` int64 on the device, to be added to: experts that were needed and here,
            needed and not; that `prefetch` was asked for, of these those that were needed, and
            those that it gave a slot.
    """

    def __init__(
        self,
        num_experts: int,
        num_slots: int,
        *,
        eviction: Eviction,
        counts: torch.Tensor,
        fewest: int | None = None,
        num_active: int | None = None,
    ) -> None:
        assert 0 <= num_slots <= num_experts
        self.num_experts, self.num_slots = num_experts, num_slots
        self.num_active = num_slots if num_active is None else num_active
        self._is_fixed = fewest is None
        self._fewest = num_slots if fewest is None else fewest
        self._eviction = eviction
        self._counts = counts
        device = counts.device

        # One entry more than there are experts or slots: writes that mean nobody go there. All in
        # one tensor, in the order that `kernels.plan_passes` knows.
        sizes = [num_experts + 1] * 5 + [num_slots + 1] * 2 + [1, 1, 1]
        self.state = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        views: tuple[torch.Tensor, ...] = self.state.split(sizes)
        self._slot_of, self._last_use, self._num_uses, self._predicted, self._pass_of = views[:5]
        self._expert_in, self._arrival, self._time, self._num_arrivals, self._active = views[5:]
        self._places = torch.arange(num_slots, device=device)
        self.reset()
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._nobody = -self._one

    def reset(self) -> None:
        """Each slot in use has the expert of its number, and nothing was used."""
        self.state.zero_()
        self._slot_of.fill_(_NOBODY)
        active = self._places[: self.num_active]
        self._slot_of[: self.num_active] = self._expert_in[: self.num_active] = active
        self._expert_in[self.num_active :] = self.num_experts
        self._arrival[:-1] = self._places + 1
        self._num_arrivals.fill_(self.num_slots)
        self._active.fill_(self.num_active)

    @property
    def most_absent(self) -> int:
        """The most experts that can be without a slot."""
        return self.num_experts - self._fewest

    @property
    def num_absent(self) -> int | torch.Tensor:
        """The experts that have none; `[1]` on the device where their number changes."""
        return self.most_absent if self._is_fixed else self.num_experts - self._active

    def shrink(self, num_slots: int) -> None:
        """Leave so many slots in use, fewer than now. The experts of the others have none then."""
        assert self._fewest <= num_slots < self.num_active
        given_up = self._expert_in[num_slots : self.num_active]
        self._slot_of.scatter_(0, given_up, _NOBODY)
        given_up.fill_(self.num_experts)
        self._active.fill_(num_slots)
        self.num_active = num_slots

    def grow(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one more slot in use, for the expert without one that was used last.

        Returns:
            the expert, `[1]` int64, to be copied now; and its slot.
        """
        assert self.num_active < self.num_slots
        slot = self._places[self.num_active : self.num_active + 1]
        last_use = self._last_use[:-1].masked_fill(self.slots() >= 0, -1)
        expert = last_use.argmax(0, keepdim=True)
        self._slot_of.scatter_(0, expert, slot)
        self._expert_in.scatter_(0, slot, expert)
        self._num_arrivals += 1
        self._arrival.scatter_(0, slot, self._num_arrivals)
        self._active += 1
        self.num_active += 1
        return expert, slot

    def num_passes(self, num_ids: int) -> int:
        """The most passes that a step of so many expert ids can take."""
        return max(1, -(-min(self.num_experts, num_ids) // max(1, self._fewest)))

    def plan(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`begin` and `load` of all passes of a step that needs `ids`, `[N]` int64.

        P = `num_passes(N)`.

        Returns:
            `[E + 1]` int64, of an expert its pass times S plus its slot, P * S for those that are
            not needed; `[P, S]` int64 experts to be copied in each pass, -1 for none; and their
            slots.
        """
        num_passes, num_slots = self.num_passes(len(ids)), self.num_slots
        if ids.device.type == "cuda" and self.num_experts <= _MOST_EXPERTS_OF_KERNEL:
            from hotset.kernels.plan_passes import plan_passes

            return plan_passes(
                self.state,
                self._counts,
                ids,
                num_experts=self.num_experts,
                num_slots=num_slots,
                num_passes=num_passes,
                policy=self._eviction,
            )
        which = self.begin(ids)
        keys = torch.full((self.num_experts + 1,), num_passes * num_slots, device=ids.device)
        copies = []
        for number in range(num_passes):
            wanted = which == number
            copies.append(torch.stack(self.load(wanted)))
            keys[:-1] = torch.where(wanted, self.slots() + number * num_slots, keys[:-1])
        experts, slots = torch.stack(copies, 1)
        return keys, experts, slots

    def begin(self, ids: torch.Tensor) -> torch.Tensor:
        """Start a step that needs `ids`, `[N]` int64; those of E and more are nobody's.

        Returns:
            `[E]` int64, the pass of each expert; `num_passes(N)` for those that are not needed.
        """
        needed = self._num_rows(ids) > 0
        here = self._slot_of[:-1] >= 0
        hit, miss = needed & here, needed & ~here
        self._counts[:2] += torch.stack([hit.sum(), miss.sum()])
        predicted = self._predicted[:-1] > 0
        right = predicted & needed
        self._counts[2:4] += torch.stack([predicted.sum(), right.sum()])
        self._predicted.zero_()
        self._time += 1
        self._last_use[:-1] = torch.where(needed, self._time, self._last_use[:-1])
        self._num_uses[:-1] += needed
        # Hits come first.
        hit_rank, miss_rank = hit.cumsum(0) - 1, miss.cumsum(0) - 1
        rank = torch.where(hit, hit_rank, hit.sum() + miss_rank)
        per_pass = max(1, self.num_slots) if self._is_fixed else self._active
        which = rank.div(per_pass, rounding_mode="floor")
        which = which.masked_fill(~needed, self.num_passes(len(ids)))
        self._pass_of[:-1] = which
        return which

    def load(self, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give a slot to each of the `wanted` experts, `[E]` bool, that has none.

        Returns:
            experts, `[S]` int64, to be copied now, -1 for none; and their slots.
        """
        missing = wanted & (self._slot_of[:-1] < 0)
        victims = self._order(wanted)
        arriving = torch.argsort((~missing).to(torch.uint8), stable=True)[: self.num_slots]
        return self._assign(arriving, victims, missing.sum())

    def prefetch(self, ids: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Give slots to experts of `ids`, `[N]` as for `begin`, that have none, before the step.

        Those that are named most often come first; experts of `ids` that are here stay.

        Args:
            ids: what the next step is likely to need.
            most: experts to give a slot, at most S, or `fewest`.

        Returns:
            experts, `[most]` int64, to be copied now, -1 for none; and their slots.
        """
        assert 0 < most <= self.num_slots
        num_rows = self._num_rows(ids)
        wanted = num_rows > 0
        self._predicted[:-1] = wanted
        missing = wanted & (self._slot_of[:-1] < 0)
        num_free = (~self._stays(wanted)).sum()
        num = torch.minimum(missing.sum(), num_free).clamp(max=most)
        arriving = torch.argsort(num_rows * missing, descending=True, stable=True)[:most]
        self._counts[4] += num
        return self._assign(arriving, self._order(wanted)[:most], num)

    def slots(self) -> torch.Tensor:
        """`[E]` int64, the slot of each expert, -1 for none; a view."""
        return self._slot_of[:-1]

    def absent(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts that have no slot, which stay without one.

        Returns:
            `[A]` int64 experts, A being `most_absent`, with -1 after the last one; and `[E + 1]`
            int64 places: of an expert its slot, or S plus where it is in the first list, and S + A
            for those that are nobody's.
        """
        is_absent = self._slot_of[:-1] < 0
        experts = torch.argsort((~is_absent).to(torch.uint8), stable=True)[: self.most_absent]
        if not self._is_fixed:
            experts = torch.where(is_absent[experts], experts, _NOBODY)
        rank = self.num_slots - 1 + is_absent.cumsum(0)
        places = torch.where(is_absent, rank, self._slot_of[:-1])
        nobody = self.num_slots + self.most_absent
        return experts, torch.cat([places, places.new_full((1,), nobody)])

    def check(self) -> None:
        """Assert that both directions of the table agree."""
        slot_of, expert_in = self._slot_of.tolist(), self._expert_in.tolist()
        assert slot_of[-1] == _NOBODY and expert_in[-1] == self.num_experts
        for slot, expert in enumerate(expert_in[:-1]):
            is_active = slot < self.num_active
            assert slot_of[expert] == slot if is_active else expert == self.num_experts
        assert self._active.tolist() == [self.num_active]
        for expert, slot in enumerate(slot_of[:-1]):
            assert slot == _NOBODY or expert_in[slot] == expert

    def _num_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """`[E]` int64, how often each expert is in `ids`."""
        padded = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=ids.device)
        padded.scatter_add_(0, ids.clamp(max=self.num_experts), self._one.expand(len(ids)))
        return padded[:-1]

    def _assign(
        self, arriving: torch.Tensor, victims: torch.Tensor, num: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the first `num` of the experts `arriving`, `[N]`, slots of `victims`, `[N]`.

        Returns:
            the experts, -1 for the others; and the slots.
        """
        is_real = self._places[: len(victims)] < num
        gone = torch.where(is_real, self._expert_in[victims], self.num_experts)
        self._slot_of.scatter_(0, gone, self._nobody.expand(len(victims)))
        come = torch.where(is_real, arriving, self.num_experts)
        self._slot_of.scatter_(0, come, torch.where(is_real, victims, _NOBODY))
        slots = torch.where(is_real, victims, self.num_slots)
        self._expert_in.scatter_(0, slots, come)
        arrival = self._num_arrivals + self._places[: len(victims)] + 1
        self._arrival.scatter_(0, slots, arrival)
        self._num_arrivals += num
        return torch.where(is_real, arriving, _NOBODY), victims

    def _order(self, wanted: torch.Tensor) -> torch.Tensor:
        """`[S]` slots, those that go first in front, those of `wanted`, `[E]` bool, last."""
        experts, arrival = self._expert_in[:-1], self._arrival[:-1]
        last = 2**62
        if self._eviction == "lru":
            rank = self._last_use[experts]
        elif self._eviction == "lfu":
            rank = self._num_uses[experts]
        elif self._eviction == "lifo":
            rank = self._num_arrivals - arrival
        else:
            is_current = self._last_use[experts] == self._time
            rank = arrival + is_current * 2**61
        return torch.argsort(rank.masked_fill(self._stays(wanted), last), stable=True)

    def _stays(self, wanted: torch.Tensor) -> torch.Tensor:
        """`[S]` bool, slots that no other expert can have: of `wanted`, `[E]`, or not in use."""
        experts = self._expert_in[:-1]
        if self._is_fixed:
            return wanted[experts]
        is_unused = experts == self.num_experts
        return is_unused | wanted[experts.clamp(max=self.num_experts - 1)]


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
        """Bytes of so many slots a layer, with the staging buffers.

        Two of these, filled in turn; what the copy engine brings in fewer bits passes from two
        narrow ones through a wide one.
        """
        staged = 2 * self.payload_bytes
        if self.plan == "stream" and self.narrow_bytes is not None:
            staged = 2 * self.narrow_bytes + self.payload_bytes
        slots = self.num_layers * num_slots * self.payload_bytes
        return slots + self.staged(num_slots) * staged
