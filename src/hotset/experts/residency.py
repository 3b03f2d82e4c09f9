"""Which expert of a layer is in which slot on the device, and which one goes for another."""

import torch

from hotset.eviction import By, policy_named

_NONE = -1
_MOST_EXPERTS_OF_KERNEL = 1024


class SlotTable:
    """Which expert of a layer is in which slot, and which one goes when another must come.

    All state is in tensors on the device and every operation has a fixed shape and asks nothing of
    the host, so that a CUDA graph can record it; on the CPU the same operations run.

    At first the slots hold the experts of the same number, and they are never empty: exactly E - S
    experts have none at any time. With `fewest` only the first slots are in use, whose number a
    tensor holds, so that `shrink` and `grow` between two steps change what a recorded one does.
    The other slots hold no expert.

    A step that needs more experts than fit takes several passes: `begin` gives each needed expert
    its pass, those that are here in the first; `load` makes room for the experts of a pass. An
    expert that the pass needs is never evicted in it. `arrange` does all of that at once.

    `prefetch` does that before the step, for experts that it is likely to need.

    The policy chooses among the others, and slots tie by their number.

    Args:
        num_experts: E, of the layer.
        num_slots: S, on the device; at most E.
        eviction: the name of a policy in `eviction`.
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
        eviction: str,
        counts: torch.Tensor,
        fewest: int | None = None,
        num_active: int | None = None,
    ) -> None:
        assert 0 <= num_slots <= num_experts
        self.num_experts, self.num_slots = num_experts, num_slots
        self.num_active = num_slots if num_active is None else num_active
        self._is_fixed = fewest is None
        self._fewest = num_slots if fewest is None else fewest
        self._policy = policy_named(eviction)
        self._counts = counts
        device = counts.device

        # One entry more than there are experts or slots, for writes that mean none of them. All in
        # one tensor, in the order that `kernels.plan_passes` knows.
        sizes = [num_experts + 1] * 5 + [num_slots + 1] * 2 + [1, 1, 1]
        self.state = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        views: tuple[torch.Tensor, ...] = self.state.split(sizes)
        self._slot_of, self._last_use, self._num_uses, self._predicted, self._pass_of = views[:5]
        self._expert_in, self._arrival, self._time, self._num_arrivals, self._active = views[5:]
        self._places = torch.arange(num_slots, device=device)
        self.reset()
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._none = -self._one

    def reset(self) -> None:
        """Each slot in use has the expert of its number, and nothing was used."""
        self.state.zero_()
        self._slot_of.fill_(_NONE)
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
        """Leave `num_slots` slots in use, fewer than now. Experts of the others have none then."""
        assert self._fewest <= num_slots < self.num_active
        given_up = self._expert_in[num_slots : self.num_active]
        self._slot_of.scatter_(0, given_up, _NONE)
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
        """The most passes that a step of `num_ids` expert ids can take."""
        return max(1, -(-min(self.num_experts, num_ids) // max(1, self._fewest)))

    def arrange(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
                policy=self._policy,
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
        """Start a step that needs `ids`, `[N]` int64; ids of E and more belong to no expert here.

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
            for ids that belong to no expert here.
        """
        is_absent = self._slot_of[:-1] < 0
        experts = torch.argsort((~is_absent).to(torch.uint8), stable=True)[: self.most_absent]
        if not self._is_fixed:
            experts = torch.where(is_absent[experts], experts, _NONE)
        rank = self.num_slots - 1 + is_absent.cumsum(0)
        places = torch.where(is_absent, rank, self._slot_of[:-1])
        none = self.num_slots + self.most_absent
        return experts, torch.cat([places, places.new_full((1,), none)])

    def check(self) -> None:
        """Assert that both directions of the table agree."""
        slot_of, expert_in = self._slot_of.tolist(), self._expert_in.tolist()
        assert slot_of[-1] == _NONE and expert_in[-1] == self.num_experts
        for slot, expert in enumerate(expert_in[:-1]):
            is_active = slot < self.num_active
            assert slot_of[expert] == slot if is_active else expert == self.num_experts
        assert self._active.tolist() == [self.num_active]
        for expert, slot in enumerate(slot_of[:-1]):
            assert slot == _NONE or expert_in[slot] == expert

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
        self._slot_of.scatter_(0, gone, self._none.expand(len(victims)))
        come = torch.where(is_real, arriving, self.num_experts)
        self._slot_of.scatter_(0, come, torch.where(is_real, victims, _NONE))
        slots = torch.where(is_real, victims, self.num_slots)
        self._expert_in.scatter_(0, slots, come)
        arrival = self._num_arrivals + self._places[: len(victims)] + 1
        self._arrival.scatter_(0, slots, arrival)
        self._num_arrivals += num
        return torch.where(is_real, arriving, _NONE), victims

    def _order(self, wanted: torch.Tensor) -> torch.Tensor:
        """`[S]` slots, those that go first in front, those of `wanted`, `[E]` bool, last."""
        experts, policy = self._expert_in[:-1], self._policy
        if policy.by is By.ARRIVAL:
            rank = self._arrival[:-1]
        else:
            rank = (self._last_use if policy.by is By.LAST_USE else self._num_uses)[experts]
        if policy.largest_first:
            rank = -rank
        if policy.spares_current:
            rank = rank + (self._last_use[experts] == self._time) * 2**61
        last = 2**62
        return torch.argsort(rank.masked_fill(self._stays(wanted), last), stable=True)

    def _stays(self, wanted: torch.Tensor) -> torch.Tensor:
        """`[S]` bool, slots that no other expert can have: of `wanted`, `[E]`, or not in use."""
        experts = self._expert_in[:-1]
        if self._is_fixed:
            return wanted[experts]
        is_unused = experts == self.num_experts
        return is_unused | wanted[experts.clamp(max=self.num_experts - 1)]
