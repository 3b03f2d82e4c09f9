"""The tiers with real bytes: device pool, copy thread, host memory, disk."""

import random
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from disk_helpers import Gate
from fakes import FakeClock, FakeTier

from hotset.clock import REAL_CLOCK, Clock
from hotset.cost.cache_spec import KeysValues
from hotset.cost.rates import Rates
from hotset.memory.arena import DeviceArena, HostArena
from hotset.memory.copier import make_copier
from hotset.memory.disk.tier import DiskTier, capacity_bytes_for
from hotset.memory.measure import measure_rates
from hotset.memory.mover import Copier
from hotset.memory.tier import Answer, Tier
from hotset.memory.tiers import TierStack
from hotset.metrics import Metrics

NUM_BLOCKS = 8


class Rig:
    """A device pool with a host tier of `host_slots`, a disk tier in `folder`, and `slower`."""

    def __init__(
        self,
        host_slots: int,
        folder: Path | None = None,
        device: str = "cpu",
        *,
        disk_slots: int = 90,
        read_deadline_s: float = 5.0,
        slower: Sequence[Tier] = (),
        clock: Clock = REAL_CLOCK,
    ) -> None:
        self.device = DeviceArena(
            [KeysValues(2, 8, 8), KeysValues(1, 24, 24)],  # layers of unequal shape
            num_blocks=NUM_BLOCKS,
            block_size=4,
            dtype=torch.float32,
            device=torch.device(device),
            index_dims=[0, 6],  # so that a block is in two parts
        )
        host_arena = HostArena(num_slots=host_slots, block_bytes=self.device.block_bytes)
        self.metrics = Metrics()
        self.disk = None
        if folder is not None:
            self.disk = DiskTier(
                folder,
                payload_bytes=host_arena.slot_bytes,
                capacity_bytes=capacity_bytes_for(disk_slots, host_arena.slot_bytes),
                fingerprint={"model": "test"},
                read_deadline_s=read_deadline_s,
                write_queue_s=5.0,
            )
        self.rates = Rates(1.0, {})
        self.tiers = TierStack(
            self.device,
            host_arena,
            make_copier([self.device.memory], host_arena),
            num_slots=host_slots,
            rates=self.rates,
            metrics=self.metrics,
            slower=[tier for tier in (self.disk, *slower) if tier is not None],
            clock=clock,
        )

    def fill(self, block: int, seed: int) -> bytes:
        """Random bytes in `block`, returned."""
        content = np.random.default_rng(seed).bytes(self.device.block_bytes)
        unread = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        for part in self.parts(block):
            part.copy_(unread[: len(part)])
            unread = unread[len(part) :]
        return content

    def parts(self, block: int) -> list[torch.Tensor]:
        """Where the content of `block` is, in order."""
        memory = self.device.memory
        runs = [(start - memory.data_ptr(), size) for start, _, size in self.device.runs(block)]
        return [memory[first : first + size] for first, size in runs]

    def read(self, block: int) -> bytes:
        """The bytes of `block`."""
        return torch.cat(self.parts(block)).cpu().numpy().tobytes()

    def place(self, key: bytes) -> str | None:
        """The name of the fastest tier that has `key`."""
        [found] = self.tiers.lookup([key])
        return found.tier.name if found.tier is not None else None

    def in_use(self, key: bytes) -> bool:
        """Whether the host slot of `key` is being filled or read."""
        payload = self.tiers.host.get(key)
        return payload is not None and payload.is_in_use

    def settle(self) -> dict[int, bool]:
        """Run until nothing is under way; device block -> whether its fetch was good."""
        fetched = {}
        while self.tiers.is_busy:
            self.tiers.flush()
            self.tiers.wait(0.2)
            for ended in self.tiers.poll():
                if ended.is_fetch:
                    fetched[ended.block] = ended.ok
            self.tiers.check()
        return fetched


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_comes_back_from_host_memory_bit_for_bit(device: str) -> None:
    rig = Rig(host_slots=2, device=device)
    content = rig.fill(0, seed=1)
    assert rig.tiers.spill(b"key", 0)
    rig.settle()
    rig.fill(0, seed=2)
    rig.tiers.fetch(b"key", 5)
    assert rig.settle() == {5: True}
    assert rig.read(5) == content
    rig.tiers.close()


def test_a_fetch_asked_for_while_the_spill_runs_waits_for_it() -> None:
    rig = Rig(host_slots=2)
    content = rig.fill(0, seed=1)
    rig.tiers.spill(b"key", 0)
    rig.tiers.fetch(b"key", 3)
    assert rig.settle() == {3: True}
    assert rig.read(3) == content
    rig.tiers.close()


@pytest.mark.parametrize("has_disk", [False, True])
def test_what_went_up_leaves_host_memory_first_if_it_is_below(
    has_disk: bool, tmp_path: Path
) -> None:
    rig = Rig(host_slots=3, folder=tmp_path if has_disk else None)
    for number, key in enumerate((b"a", b"b", b"c")):
        rig.fill(number, number)
        rig.tiers.spill(key, number)
        rig.settle()
    rig.tiers.fetch(b"b", 5)
    rig.settle()
    rig.tiers.touch([b"b"])
    rig.tiers.spill(b"d", 4)
    rig.settle()
    gone = b"b" if has_disk else b"a"
    assert {key for key in (b"a", b"b", b"c", b"d") if not rig.tiers.host.is_ready(key)} == {gone}
    rig.tiers.close()


class OrderingCopier:
    """A copier that compute can wait for on the device; its copies end when they are told to."""

    def __init__(self, copier: Copier) -> None:
        self._copier, self._ended = copier, list[tuple[int, float]]()
        self.num_ready_slots = copier.num_ready_slots
        self.ordered: list[int] = []
        self.is_open = True

    def __getattr__(self, name: str) -> object:
        return getattr(self._copier, name)

    def order(self, copy_id: int) -> bool:
        self.ordered.append(copy_id)
        return True

    def poll(self) -> list[tuple[int, float]]:
        self._ended += self._copier.poll()
        ended = self._ended if self.is_open else []
        self._ended = [] if self.is_open else self._ended
        return ended


def test_a_fetch_bounded_by_time_has_arrived_once_compute_waits_for_it() -> None:
    rig = Rig(host_slots=2)
    content = rig.fill(0, seed=1)
    rig.tiers.spill(b"key", 0, slowest=0)
    rig.settle()
    rig.rates.link_bytes_per_s["host"] = 1e9
    copier = OrderingCopier(rig.tiers.mover.copier)
    rig.tiers.mover.copier = copier
    copier.is_open = False
    rig.tiers.fetch(b"key", 5)
    assert rig.tiers.poll() == []
    rig.tiers.flush(most_s=1.0)
    assert [(ended.key, ended.ok) for ended in rig.tiers.poll()] == [(b"key", True)]
    assert len(copier.ordered) == 1
    rig.tiers.discard([b"key"])
    # The copy still reads its host slot, and is not told of twice.
    assert rig.in_use(b"key") and rig.tiers.poll() == []
    assert rig.metrics.moved_bytes["host>device"] == 0
    copier.is_open = True
    assert rig.settle() == {}
    assert not rig.tiers.host.is_ready(b"key")
    assert rig.metrics.moved_bytes["host>device"] == rig.device.block_bytes
    assert rig.read(5) == content
    # Without a bound it may take longer than a step, which would wait for it.
    rig.tiers.spill(b"other", 5)
    rig.settle()
    copier.is_open, copier.ordered = False, []
    rig.tiers.fetch(b"other", 6)
    rig.tiers.flush()
    assert rig.tiers.poll() == [] and copier.ordered == []
    copier.is_open = True
    assert rig.settle() == {6: True}
    rig.tiers.close()


def test_fetches_beyond_the_time_given_go_with_later_calls() -> None:
    rig = Rig(host_slots=4)
    for seed in range(4):
        rig.fill(seed, seed)
        rig.tiers.spill(bytes([seed]), seed)
    rig.settle()
    rig.rates.link_bytes_per_s["host"] = rig.device.block_bytes / 1e-3
    contents = [rig.read(block) for block in range(4)]
    for block in range(4):
        rig.tiers.fetch(bytes([block]), block + 4)
    moved = rig.metrics.moved_bytes
    for num_blocks in (2, 4):  # one, and another for the time given
        rig.tiers.flush(most_s=1.5e-3)
        while moved["host>device"] < num_blocks * rig.device.block_bytes:
            rig.tiers.wait(0.2)
            rig.tiers.poll()
        rig.tiers.check()
        assert moved["host>device"] == num_blocks * rig.device.block_bytes
    assert not rig.tiers.is_busy
    assert [rig.read(block) for block in range(4, 8)] == contents
    rig.tiers.close()


def test_blocks_pushed_out_of_host_memory_come_back_from_disk(tmp_path: Path) -> None:
    rig = Rig(host_slots=2, folder=tmp_path)
    contents = {}
    for seed in range(6):
        key = bytes([seed]) * 16
        contents[key] = rig.fill(seed % NUM_BLOCKS, seed)
        rig.tiers.spill(key, seed % NUM_BLOCKS)
        rig.settle()
    first = bytes([0]) * 16
    assert rig.place(first) == "disk"
    rig.tiers.fetch(first, 7)
    assert rig.settle() == {7: True}
    assert rig.read(7) == contents[first]
    rig.tiers.close()

    again = Rig(host_slots=2, folder=tmp_path)  # a restart finds them all
    for key, content in contents.items():
        assert again.place(key) == "disk"
        again.tiers.fetch(key, 1)
        assert again.settle() == {1: True}
        assert again.read(1) == content
    again.tiers.close()


def test_a_private_payload_never_reaches_the_disk_and_is_forgotten_when_dropped(
    tmp_path: Path,
) -> None:
    rig = Rig(host_slots=4, folder=tmp_path)
    rig.fill(0, seed=1)
    rig.tiers.spill(b"p" * 16, 0, slowest=0)
    rig.tiers.discard([b"p" * 16])  # while the copy is still to be made
    rig.settle()
    assert rig.place(b"p" * 16) is None
    assert rig.tiers.host.num_used == 0
    rig.tiers.close()


@pytest.mark.parametrize("is_on_its_way", [False, True])
def test_what_is_discarded_is_found_in_no_tier_even_if_it_was_on_its_way_down(
    is_on_its_way: bool, tmp_path: Path
) -> None:
    rig = Rig(host_slots=2, folder=tmp_path)
    rig.fill(0, seed=1)
    assert rig.tiers.spill(b"key", 0)
    if not is_on_its_way:
        rig.settle()
        assert rig.place(b"key") == "host"
    rig.tiers.discard([b"key", b"unknown"])
    assert rig.place(b"key") is None
    assert not is_on_its_way or not rig.tiers.spill(b"key", 0)  # its slot is still being filled
    rig.settle()
    assert rig.place(b"key") is None and rig.tiers.host.num_free == 2
    rig.fill(0, seed=2)
    assert rig.tiers.spill(b"key", 0)  # what is sound is stored
    rig.settle()
    assert rig.place(b"key") == "host"
    rig.tiers.close()


def test_what_is_kept_is_not_evicted_until_nobody_keeps_it() -> None:
    rig = Rig(host_slots=3)
    content = rig.fill(0, seed=1)
    rig.tiers.spill(b"kept", 0)
    assert rig.tiers.keep(b"kept")  # on its way
    rig.settle()
    assert rig.tiers.keep(b"kept")  # there
    assert not rig.tiers.keep(b"elsewhere")
    for seed in range(6):
        rig.tiers.spill(bytes([seed]), 1)
        rig.settle()
        rig.tiers.fetch(b"kept", 5)
        assert rig.settle() == {5: True}
        assert rig.read(5) == content
        if seed == 3:
            rig.tiers.unkeep(b"kept")
    rig.tiers.unkeep(b"kept")
    for seed in range(3):
        rig.tiers.spill(bytes([100 + seed]), 1)
        rig.settle()
    assert rig.place(b"kept") is None
    rig.tiers.close()


def test_what_is_kept_leaves_room_for_what_comes_from_disk(tmp_path: Path) -> None:
    rig = Rig(host_slots=3, folder=tmp_path)
    contents = [rig.fill(block, seed=block) for block in range(4)]
    for block in range(4):
        rig.tiers.spill(bytes([block]) * 16, block)
        rig.settle()
    kept = [block for block in range(4) if rig.tiers.keep(bytes([block]) * 16)]
    assert kept == [1, 2]
    rig.tiers.fetch(bytes(16), 5)  # evicted to disk before
    assert rig.settle() == {5: True}
    assert rig.read(5) == contents[0]
    rig.tiers.close()


def test_a_full_host_tier_refuses_the_spill_and_counts_it() -> None:
    rig = Rig(host_slots=1)
    assert rig.tiers.spill(b"a", 0)
    assert not rig.tiers.spill(b"b", 1)  # the only slot is being filled
    assert rig.metrics.faults["host_full"] == 1
    rig.settle()
    rig.tiers.close()


def test_a_corrupt_disk_block_is_a_failed_fetch_and_never_bytes(tmp_path: Path) -> None:
    rig = Rig(host_slots=1, folder=tmp_path)
    for seed, key in enumerate((b"a" * 16, b"b" * 16)):
        rig.fill(seed, seed)
        rig.tiers.spill(key, seed)
        rig.settle()
    slab = tmp_path / "blocks.slab"
    raw = bytearray(slab.read_bytes())
    for i in range(0, len(raw), 512):
        raw[i] ^= 0xFF
    slab.write_bytes(raw)
    before = rig.read(5)
    rig.tiers.fetch(b"a" * 16, 5)
    assert rig.settle() == {5: False}
    assert rig.read(5) == before
    assert rig.metrics.faults["disk_corrupt"] == 1
    assert rig.place(b"a" * 16) is None
    rig.tiers.close()


def test_rates_are_measured_at_start_and_leave_the_device_blocks_alone(tmp_path: Path) -> None:
    rig = Rig(host_slots=4, folder=tmp_path)
    content = rig.fill(0, seed=9)
    measure_rates(rig.tiers, num_blocks=4)
    assert rig.read(0) == content
    assert set(rig.rates.link_bytes_per_s) == {"host", "disk"}
    assert all(rate > 0 for rate in rig.rates.link_bytes_per_s.values())
    assert rig.metrics.moved_bytes.total() == 0
    rig.tiers.check()
    rig.tiers.close()
    again = Rig(host_slots=4, folder=tmp_path)
    assert again.disk is not None
    assert again.disk.usage().used_payloads == 0  # nothing was left there
    again.tiers.close()


@pytest.mark.parametrize("num_stored", [1, 3])
def test_measuring_the_rate_of_a_disk_keeps_all_it_holds(num_stored: int, tmp_path: Path) -> None:
    rig = Rig(host_slots=4, folder=tmp_path, disk_slots=3)
    keys = [bytes([seed]) * 16 for seed in range(num_stored)]
    for seed, key in enumerate(keys):
        rig.fill(seed, seed)
        rig.tiers.spill(key, seed)
    rig.settle()
    rig.tiers.close()
    again = Rig(host_slots=4, folder=tmp_path, disk_slots=3)
    measure_rates(again.tiers, num_blocks=4)
    assert again.disk is not None
    assert sorted(again.disk.newest_keys(9)) == keys
    assert again.rates.link_bytes_per_s["disk"] > 0
    assert again.tiers.host.num_used == 0
    again.disk.check()
    again.tiers.close()


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_disk_that_hangs_while_it_is_measured_does_not_stop_the_start(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotset.memory.measure._PROBE_S", 0.3)
    rig = Rig(host_slots=4, folder=tmp_path, read_deadline_s=0.1)
    gate = Gate(monkeypatch, call)
    measure_rates(rig.tiers, num_blocks=3)
    assert rig.rates.link_bytes_per_s["disk"] > 0
    rig.tiers.check()
    # Its buffers stay its own until it is done with them; a block goes round beside them.
    content = rig.fill(0, seed=1)
    rig.tiers.spill(b"k" * 16, 0)
    rig.tiers.flush()
    gate.open.set()
    rig.settle()
    rig.tiers.fetch(b"k" * 16, 5)
    assert rig.settle() == {5: True}
    assert rig.read(5) == content
    assert rig.disk is not None
    assert rig.disk.newest_keys(9) == [b"k" * 16]
    rig.tiers.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(4))
def test_under_random_traffic_every_fetch_that_ends_well_brings_the_right_bytes(
    seed: int, device: str, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    rig = Rig(host_slots=3, folder=tmp_path, device=device)
    contents: dict[bytes, bytes] = {}
    busy: dict[int, bytes] = {}  # block -> key being fetched into it, or b"" for a spill
    kept: list[bytes] = []
    good = 0
    rig.rates.observe_link("host", 10**9, 1.0)
    for i in range(400):
        free = [block for block in range(NUM_BLOCKS) if block not in busy]
        if free and rng.random() < 0.5:
            block, key = rng.choice(free), i.to_bytes(16, "big")
            contents[key] = rig.fill(block, i)
            if rig.tiers.spill(key, block):
                busy[block] = b""
        elif free and contents and rng.random() < 0.7:
            block, key = rng.choice(free), rng.choice(list(contents))
            if rig.place(key) is not None:
                rig.tiers.fetch(key, block)
                busy[block] = key
        elif kept and rng.random() < 0.6:
            rig.tiers.unkeep(kept.pop(rng.randrange(len(kept))))
        elif contents and rig.tiers.keep(key := rng.choice(list(contents))):
            kept.append(key)
        rig.tiers.flush(most_s=rng.choice([None, 0.0]))
        if rng.random() < 0.5:
            rig.tiers.wait(0.002)
        for ended in rig.tiers.poll():
            del busy[ended.block]
            if ended.is_fetch and ended.ok:
                assert rig.read(ended.block) == contents[ended.key]
                good += 1
        rig.tiers.check()
    rig.settle()
    for key in kept:
        rig.tiers.unkeep(key)
    assert rig.tiers.host.num_evictable == 3
    assert good > 20
    rig.tiers.close()


def with_fakes(
    clock: FakeClock, *, folder: Path | None = None
) -> tuple[Rig, tuple[FakeTier, FakeTier]]:
    """Two host slots over two tiers that hold payloads in dictionaries."""
    near, far = FakeTier("near", 4096), FakeTier("far", 4096)
    return Rig(host_slots=2, folder=folder, slower=[near, far], clock=clock), (near, far)


def test_a_spill_goes_from_tier_to_tier_and_a_fetch_takes_the_fastest() -> None:
    rig, (near, far) = with_fakes(FakeClock())
    contents = [rig.fill(block, seed=block) for block in range(4)]
    keys = [bytes([block]) * 16 for block in range(4)]
    for block, key in enumerate(keys):
        near.is_full = block == 1  # refuses it: the next tier gets it all the same
        rig.tiers.spill(key, block)
        rig.settle()
    assert set(near.stored) == {keys[0], keys[2], keys[3]} and set(far.stored) == set(keys)
    assert [rig.place(key) for key in keys] == ["near", "far", "host", "host"]
    near.discard([keys[0]])
    assert rig.place(keys[0]) == "far"
    for block in range(2):
        rig.tiers.fetch(keys[block], 5)
        assert rig.settle() == {5: True}
        assert rig.read(5) == contents[block]
    moved, size = rig.metrics.moved_bytes, rig.device.block_bytes
    assert (moved["host>near"], moved["host>far"], moved["far>host"]) == (
        3 * size,
        4 * size,
        2 * size,
    )
    rig.tiers.touch([keys[2]])
    assert near.touched == far.touched == [keys[2]]
    rig.tiers.close()


def test_tiers_describe_themselves_and_each_has_a_measured_rate(tmp_path: Path) -> None:
    rig, (near, far) = with_fakes(FakeClock(), folder=tmp_path)
    assert [info.name for info in rig.tiers.infos] == ["host", "disk", "near", "far"]
    assert [info.feeds_device for info in rig.tiers.infos] == [True, False, False, False]
    assert [info.capacity_payloads for info in rig.tiers.infos] == [2, 90, 100, 100]
    measure_rates(rig.tiers, num_blocks=2)
    assert set(rig.rates.link_bytes_per_s) == {"host", "disk", "near", "far"}
    assert not near.stored and not far.stored and rig.metrics.moved_bytes.total() == 0
    assert [usage.used_payloads for usage in rig.tiers.usage()] == [0, 0, 0, 0]
    rig.tiers.check()
    rig.tiers.close()


def test_a_key_is_pending_for_a_bounded_time_and_then_missing() -> None:
    clock = FakeClock()
    rig, (near, far) = with_fakes(clock)
    near.stored[b"a"] = far.stored[b"b"] = bytes(4096)
    far.is_asking = True
    answers = [found.answer for found in rig.tiers.lookup([b"a", b"b"])]
    assert answers == [Answer.HIT, Answer.PENDING]  # a faster tier need not wait for it
    assert rig.tiers.is_busy  # so that the engine comes back
    clock.now_s += 0.2
    assert [found.answer for found in rig.tiers.lookup([b"b"])] == [Answer.PENDING]
    clock.now_s += 0.1
    assert not rig.tiers.is_busy
    assert [found.answer for found in rig.tiers.lookup([b"b"])] == [Answer.MISS]
    far.is_asking = False  # the answer comes too late, and is used from then on
    assert rig.place(b"b") == "far" and not rig.tiers.is_busy
    rig.tiers.close()


def test_a_tier_may_think_for_its_part_of_what_its_payloads_save() -> None:
    clock = FakeClock()
    rig, (near, far) = with_fakes(clock)
    assert rig.tiers.may_think
    rig.tiers.infos[1:] = [replace(near.info, patience=None), replace(far.info, patience=0.125)]
    far.is_asking = True

    def answer(saved_s: float) -> Answer:
        return rig.tiers.lookup([b"a"], saved_s=saved_s)[0].answer

    assert answer(0.0) is Answer.MISS  # it would be computed in any case
    assert answer(1.0) is Answer.PENDING
    clock.now_s += 0.125
    assert answer(1.0) is Answer.MISS
    assert answer(1.5) is Answer.PENDING  # another request gains more by it
    clock.now_s += 0.125
    assert answer(inf) is Answer.MISS
    rig.tiers.close()


def test_answers_are_awaited_until_all_is_said_or_the_time_is_over() -> None:
    rig, (_, far) = with_fakes(FakeClock())
    far.stored[b"a"] = bytes(4096)
    far.is_asking = True
    looks: list[Answer] = []

    def is_open() -> bool:
        looks.append(rig.tiers.lookup([b"a"])[0].answer)
        far.is_asking = len(looks) < 3
        return looks[-1] is Answer.PENDING

    rig.tiers.await_answers(is_open, 60.0)
    assert looks == [Answer.PENDING] * 3 + [Answer.HIT]
    far.is_asking = True
    rig.tiers.await_answers(lambda: True, 0.001)  # it says nothing
    rig.tiers.await_answers(is_open, 0.0)
    assert looks[4:] == [Answer.PENDING]
    rig.tiers.close()


def test_what_a_tier_declined_is_written_to_it_once_it_was_used() -> None:
    picky = FakeTier("picky", 8192)
    picky.declines = True
    rig = Rig(host_slots=8, slower=[picky])
    keys = [bytes([number]) * 16 for number in range(3)]
    contents = [rig.fill(block, seed=block) for block in range(3)]
    for block, key in enumerate(keys):
        assert rig.tiers.spill(key, block)
    rig.settle()
    assert not picky.stored
    last = b"last" * 4
    assert rig.tiers.spill(last, 3)
    rig.tiers.touch([last, *keys[1::-1]], came_back=True)  # one is still on its way down
    rig.settle()
    assert set(picky.stored) == {*keys[:2], last}
    assert [picky.stored[key][: len(contents[0])] for key in keys[:2]] == contents[:2]
    rig.tiers.close()


def test_what_is_owed_waits_for_a_moment_without_requests_but_not_for_long() -> None:
    picky, clock = FakeTier("picky", 8192), FakeClock()
    picky.declines = True
    rig = Rig(host_slots=16, slower=[picky], clock=clock)
    first, second, third = (bytes([number]) * 16 for number in range(3))
    for block, key in enumerate((first, second, third)):
        rig.fill(block, seed=block)
        assert rig.tiers.spill(key, block)
    rig.settle()
    rig.tiers.is_idle = False

    def written() -> list[bytes]:
        rig.tiers.poll()
        rig.tiers.poll()
        return list(picky.stored)

    rig.tiers.touch([first], came_back=True)
    assert written() == []
    rig.tiers.is_idle = True
    assert written() == [first]
    rig.tiers.is_idle = False
    rig.tiers.touch([second], came_back=True)
    clock.now_s += 9.0
    rig.tiers.touch([second], came_back=True)  # which does not begin anew
    assert written() == [first]
    clock.now_s += 1.0
    assert written() == [first, second]
    rig.tiers.touch([third], came_back=True)
    rig.tiers.begin_drain()  # as the process ends, whoever waits
    assert written() == [first, second, third]
    rig.settle()
    rig.tiers.close()


def test_a_drain_writes_all_but_what_is_of_use_here_alone() -> None:
    picky = FakeTier("picky", 8192)
    picky.declines = True
    rig = Rig(host_slots=8, slower=[picky])
    keys = [bytes([number]) * 16 for number in range(4)]
    for block, key in enumerate(keys):
        rig.fill(block, seed=block)
        rig.tiers.spill(key, block, slowest=0 if key == keys[3] else None)
    rig.settle()
    rig.tiers.begin_drain(keys[:1])
    rig.tiers.begin_drain(keys[1:2])  # which go first now
    assert rig.tiers.num_to_drain == 3
    rig.settle()
    assert rig.tiers.num_to_drain == 0
    assert list(picky.stored) == [keys[1], keys[2], keys[0]]  # then what was used last
    rig.tiers.close()


def test_a_drain_ends_when_the_tier_takes_nothing() -> None:
    full = FakeTier("full", 8192)
    full.is_full = True
    rig = Rig(host_slots=8, slower=[full])
    for block in range(4):
        rig.tiers.spill(bytes([block]) * 16, block)
    rig.settle()
    rig.tiers.begin_drain()
    rig.settle()
    assert rig.tiers.num_to_drain == 0 and not full.stored
    rig.tiers.close()


def test_a_tier_is_asked_elsewhere_for_what_requests_need_alone() -> None:
    far = FakeTier("far", 8192)
    far.is_asking = True
    rig = Rig(host_slots=2, slower=[far])
    assert [one.answer for one in rig.tiers.lookup([bytes(16)], may_ask=False)] == [Answer.MISS]
    assert not rig.tiers.is_busy
    assert [one.answer for one in rig.tiers.lookup([bytes(16)])] == [Answer.PENDING]
    rig.tiers.close()


def test_host_memory_keeps_what_is_used_where_a_slower_tier_lacks_it() -> None:
    picky = FakeTier("picky", 8192)
    picky.declines = True
    rig = Rig(host_slots=2, slower=[picky])
    for block in range(2):
        rig.tiers.spill(bytes([block]) * 16, block)
        rig.settle()
    picky.is_full = True
    rig.tiers.touch([bytes(16)])
    rig.settle()
    rig.tiers.spill(bytes([2]) * 16, 2)
    rig.settle()
    assert rig.place(bytes(16)) == "host" and rig.place(bytes([1]) * 16) is None
    rig.tiers.close()


def test_a_payload_is_copied_out_whole_or_not_at_all() -> None:
    rig = Rig(host_slots=1)
    content = rig.fill(0, seed=1)
    key, other = b"k" * 16, b"o" * 16
    rig.tiers.spill(key, 0)
    rig.settle()
    into = bytearray(rig.tiers.infos[0].payload_bytes)
    assert rig.tiers.copy_out(key, memoryview(into)) and into.startswith(content)
    assert not rig.tiers.copy_out(other, memoryview(into))

    def view(slot: int) -> memoryview:
        """In the middle of the copy the slot is given to another payload."""
        rig.fill(1, seed=2)
        rig.tiers.spill(other, 1)
        rig.settle()
        return memory_view(slot)

    memory_view = rig.tiers._memory.view
    rig.tiers._memory.view = view  # type: ignore[method-assign]
    assert not rig.tiers.copy_out(key, memoryview(into))
    rig.tiers._memory.view = memory_view  # type: ignore[method-assign]
    assert rig.tiers.copy_out(other, memoryview(into)) and not into.startswith(content)
    rig.tiers.close()


def test_a_rate_that_a_tier_measures_itself_is_followed() -> None:
    far = FakeTier("far", 8192)
    far.info = replace(far.info, measured_bytes_per_s=5e6)
    rig = Rig(host_slots=2, slower=[far])
    measure_rates(rig.tiers, num_blocks=1)
    assert rig.rates.link_bytes_per_s["far"] == 5e6 and not far.stored
    rig.rates.link_bytes_per_s["far"] = 1.0  # as it was slow once
    rig.tiers.poll()
    assert rig.rates.link_bytes_per_s["far"] == 1.0
    usage = replace(far.usage(), measured_bytes_per_s=7e6)
    far.usage = lambda: usage  # type: ignore[method-assign]
    rig.tiers.poll()
    assert rig.rates.link_bytes_per_s["far"] == 7e6
    rig.tiers.close()
