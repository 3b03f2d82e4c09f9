"""States in the tiers: pieces of one block's size, whose bytes come back as they left."""

import numpy as np
import pytest
import torch

from hotset.cost.cache_spec import KeysValues, State
from hotset.cost.rates import Rates
from hotset.memory.arena import DeviceArena, HostArena
from hotset.memory.copier import make_copier
from hotset.memory.device_payloads import DevicePayloads
from hotset.memory.state_arena import StateArena
from hotset.memory.state_pieces import StatePieces
from hotset.memory.tiers import TierStack
from hotset.metrics import Metrics

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_the_pieces_of_all_slots_are_their_memory_one_after_another() -> None:
    pieces = StatePieces(first=7, slot_bytes=50, block_bytes=16)
    assert pieces.per_state == 4
    numbers = [number for slot in range(3) for number in pieces.of_slot(slot)]
    assert numbers == list(range(7, 19))
    end = 0
    for number in numbers:
        start, num_bytes = pieces.span(number)
        assert start == end and 0 < num_bytes <= 16
        end += num_bytes
    assert end == 3 * 50


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_and_a_block_come_back_as_they_left(device: str) -> None:
    place = torch.device(device)
    arena = DeviceArena(
        [KeysValues(2, 8, 8)], num_blocks=4, block_size=4, dtype=torch.float32, device=place
    )
    specs = {0: State((2, 9, 7), (5, 3), conv_itemsize=4), 1: State((), (40, 3), conv_itemsize=4)}
    states = StateArena(specs, num_slots=5, dtype=torch.float32, device=place)
    payloads = DevicePayloads(arena, states)
    assert payloads.pieces is not None and payloads.pieces.per_state == 3
    assert payloads.pieces.slot_bytes % arena.block_bytes  # the last piece is shorter
    host = HostArena(num_slots=8, block_bytes=arena.block_bytes)
    tiers = TierStack(
        payloads,
        host,
        make_copier(payloads.memories, host),
        num_slots=8,
        rates=Rates(1.0, {}),
        metrics=Metrics(),
    )
    rng = np.random.default_rng(0)
    state, block = (
        torch.from_numpy(rng.integers(1, 256, count, np.uint8)).to(place)
        for count in (states.slot_bytes, arena.block_bytes)
    )
    states.memory[3] = state
    memory = arena.memory.view(4, -1)
    memory[2] = block

    def settle() -> None:
        tiers.flush()
        while tiers.is_busy:
            tiers.wait(1.0)
            assert all(ended.ok for ended in tiers.poll())

    for number in (2, *payloads.pieces.of_slot(3)):
        assert tiers.spill(number.to_bytes(16, "big"), number)
    settle()
    states.memory[3] = 0
    targets = (1, *payloads.pieces.of_slot(4))
    for source, target in zip((2, *payloads.pieces.of_slot(3)), targets, strict=True):
        tiers.fetch(source.to_bytes(16, "big"), target)
    settle()
    assert torch.equal(states.memory[4], state) and not states.memory[:4].any()
    assert torch.equal(memory[1], block) and not memory[[0, 3]].any()
    tiers.close()
