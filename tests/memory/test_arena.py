"""Where the parts of a block with index keys lie."""

import torch

from hotset.cost.cache_spec import KEYS_ALONE, KeysValues, Latent
from hotset.kv.index_blocks import IndexBlocks
from hotset.kv.pool import BlockPool
from hotset.memory.arena import DeviceArena, row_steps

LATENT = Latent(8, 4, KeysValues(2, 12, 8))


def make_arena(num_blocks: int) -> DeviceArena:
    """Three layers, of which the first and the last have index keys."""
    return DeviceArena(
        [LATENT] * 3,
        num_blocks=num_blocks,
        block_size=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
        index_dims=[3, 0, 2],
    )


def test_a_block_is_its_latents_then_its_index_keys() -> None:
    arena = make_arena(3)
    for i, layer in enumerate(arena.layers):
        layer[1] = i + 1
    arena.index_keys[0][1] = 4
    arena.index_keys[2][1] = 5
    [latents, keys] = arena.runs(1)

    start = arena.memory.data_ptr()
    found = [
        arena.memory[first - start : first - start + size].view(torch.float32).tolist()
        for first, _, size in (latents, keys)
    ]

    # The first two layers share a selection, so that their rows of a token are side by side.
    assert found == [([1.0] * 12 + [2.0] * 12) * 4 + [3.0] * 48, [4.0] * 12 + [5.0] * 8]
    assert latents[2] + keys[2] == arena.block_bytes == arena.memory.nbytes // 3
    assert (latents[1], keys[1]) == (0, latents[2])  # in its payload
    assert arena.memory.view(torch.float32).count_nonzero() == 144 + 20  # and nothing else


def test_rows_are_numbered_from_a_layers_first() -> None:
    arena = make_arena(3)
    assert arena.groups == [range(2), range(2, 3)]
    rows = torch.arange(3 * 12).repeat_interleave(12).view(arena.storage.shape)
    arena.storage.copy_(rows)
    for layer, cache in enumerate(arena.layers):
        per_block, per_token = row_steps(cache)
        assert (per_block, per_token) == (12, 2 if layer < 2 else 1)
        numbers = (cache[..., 0] - cache[0, 0, 0]).int().tolist()
        assert numbers == [[b * 12 + i * per_token for i in range(4)] for b in range(3)]


def test_8_bit_index_keys_have_their_scales_behind_them() -> None:
    arena = DeviceArena(
        [LATENT] * 2,
        num_blocks=3,
        block_size=4,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        index_dims=[16, 0],
        index_dtype=torch.float8_e4m3fn,
    )
    assert arena.block_bytes == 4 * (2 * 12 * 2 + 16 + 4)
    [scales, none], [keys, empty] = arena.index_scales, arena.index_keys
    assert scales is not None and none is None and empty.numel() == 0
    assert keys.shape[1:] == (4, 16) and scales.shape[1:] == (4,)
    arena.layers[0][1], arena.layers[1][1] = 1, 2
    keys.view(torch.uint8)[1] = 3
    scales[1] = 4
    latents, index = (
        arena.memory[first - arena.memory.data_ptr() :][:size] for first, _, size in arena.runs(1)
    )
    assert latents.view(torch.bfloat16).tolist() == ([1.0] * 12 + [2.0] * 12) * 4
    assert index[:64].tolist() == [3] * 64
    assert index[64:].view(torch.float32).tolist() == [4.0] * 4
    arena.copy_blocks(
        [(1, 2), (1, arena.num_blocks | KEYS_ALONE)]
    )  # the second into the latents of block 0
    assert (keys.view(torch.uint8)[2:4] == 3).all() and (scales[2:4] == 4).all()
    assert arena.layers[0][0].any() and (arena.layers[1][2] == 2).all()


def test_blocks_are_copied_and_cleared_in_both_parts() -> None:
    arena = make_arena(3)
    for tensor in (*arena.layers, *arena.index_keys):
        tensor[0] = 7
    arena.copy_blocks([(0, 2)])
    arena.clear_blocks(0, 1)
    for tensor in (*arena.layers, *arena.index_keys):
        assert not tensor[0].any() and not tensor[1].any() and (tensor[2] == 7).all()


def test_an_index_block_lies_within_the_block_that_it_is_carved_from() -> None:
    arena = make_arena(6)
    pool = BlockPool(5)  # the last one is no request's
    carve = IndexBlocks(pool, first=6, row_bytes=36, index_bytes=5)
    index_blocks = [carve.take() for _ in range(2 * carve.fewest_per_block)]
    numbers = [index_block ^ KEYS_ALONE for index_block in index_blocks]
    carved = {block for block in range(5) if pool.ref_count(block)}
    arena.index_keys[0][5] = 1  # of a block that is not carved
    arena.index_keys[0][4] = 8
    arena.index_keys[2][4] = 9

    arena.copy_blocks([(4, index_block) for index_block in index_blocks])

    changed = {block for block in range(6) if arena.storage[block].any()}
    assert changed == carved
    for number in numbers:
        assert (arena.index_keys[0][number] == 8).all()
        assert (arena.index_keys[2][number] == 9).all()
    within = [number for number in numbers if number >= 6]
    assert arena.storage.count_nonzero() == len(within) * 20
    own = {number for number in numbers if number < 6}
    assert own and own <= carved
    for block in {*range(4)} - own:
        assert not any(keys[block].any() for keys in arena.index_keys)
    assert (arena.index_keys[0][5] == 1).all()


def test_of_an_index_block_the_index_keys_of_a_payload_come_up_alone() -> None:
    arena = make_arena(3)
    block = arena.num_blocks | KEYS_ALONE
    [(latents, keys), [index]] = arena.runs(1), arena.runs(block)
    assert index[1:] == keys[1:] and latents[1:] == (0, keys[1])
    assert index[0] == keys[0] + (arena.num_blocks - 1) * keys[2]
