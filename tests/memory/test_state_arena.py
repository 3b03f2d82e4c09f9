"""Slots for state: one run of bytes each, over all layers."""

import torch

from hotset.cost.cache_spec import State, state_slot_bytes
from hotset.memory.state_arena import StateArena

SPECS = {
    0: State((2, 3, 5), (7, 3)),
    2: State((), (4, 2)),
    3: State((2, 3, 5), (7, 3)),
}


def test_a_slot_is_one_run_and_layers_share_none_of_it() -> None:
    arena = StateArena(SPECS, num_slots=4, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert arena.slot_bytes == state_slot_bytes(SPECS.values()) == 352  # of 340, in whole words
    assert list(arena.recurrent) == [0, 3] and list(arena.columns) == [0, 2, 3]
    views = [*arena.recurrent.values(), *arena.columns.values()]
    assert all(view.dtype == torch.float32 for view in arena.recurrent.values())
    for view in views:
        assert len(view) == 4 and not view.any()
        assert view.stride(0) * view.itemsize == arena.slot_bytes
    for number, view in enumerate(views, 1):
        view[2] = number
    for number, view in enumerate(views, 1):
        assert (view[2] == number).all()
        assert not view[[0, 1, 3]].any()
