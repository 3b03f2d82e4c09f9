"""Figures that were measured on one device and decide how work runs there.

A new GPU is tuned by a row in `TUNINGS`; what a profile of `cost/hardware` says is not repeated
here. `benchmarks/fused_experts.py` and `benchmarks/gpu_suite.py` measure most of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Tile:
    """What one program of a product of experts reads at a time.

    Attributes:
        columns: of the output; in the first product half are of the gate.
        depth: numbers of a row that are read together.
        num_warps: of the program.
        num_stages: pieces of that depth that are on their way or in use.
    """

    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def fitted(
        self, block_rows: int, shared_bytes: int, weight_bits: int = 16, input_bits: int = 16
    ) -> "Tile":
        """The largest part of it that fits into `shared_bytes`."""
        tile = self
        bits = block_rows * input_bits + tile.columns * weight_bits
        while tile.depth * bits * tile.num_stages > 8 * shared_bytes:
            if tile.num_stages > 2:
                tile = replace(tile, num_stages=tile.num_stages - 1)
            else:
                tile = replace(tile, depth=tile.depth // 2)
        return tile


@dataclass(frozen=True)
class Tiles:
    """The programs of both products of experts.

    Attributes:
        block_rows: rows of an expert that a program computes.
        up: of the first product.
        down: of the second one.
    """

    block_rows: int
    up: Tile
    down: Tile


@dataclass(frozen=True)
class NarrowTiles:
    """The tiles of experts and linear layers in few bits.

    Attributes:
        weight_bits: of a code.
        input_bits: of what it is multiplied with.
        by_rows: as `Tuning.expert_tiles`.
    """

    weight_bits: int
    input_bits: int
    by_rows: tuple[tuple[float, Tiles], ...]


def _alike(block_rows: int, tile: Tile) -> Tiles:
    return Tiles(block_rows, up=tile, down=tile)


_TILE = Tile(128, 128, 4, 3)


def _narrow(
    few: Tiles, block_rows: Tiles, most_rows: float, many: Tiles
) -> tuple[tuple[float, Tiles], ...]:
    """Of 1 row of an expert or less, of up to `most_rows`, of up to 32, and of more."""
    tall, taller = _alike(64, _TILE), _alike(128, Tile(128, 128, 8, 3))
    return (1.0, few), (most_rows, block_rows), (32.0, many), (64.0, tall), (float("inf"), taller)


# The fastest of `benchmarks/quant_experts.py --sweep` at 1 and 256 tokens; those of more than 32
# rows of an expert were not tried.
NARROW_TILES = {
    "e2m1": NarrowTiles(
        4, 16, _narrow(_alike(16, Tile(64, 256, 4, 3)), _alike(16, _TILE), 12.0, _alike(32, _TILE))
    ),
    "int4": NarrowTiles(
        4, 16,
        _narrow(
            Tiles(16, up=Tile(128, 128, 4, 5), down=Tile(64, 128, 4, 4)),
            _alike(16, _TILE), 16.0, _alike(32, _TILE),
        ),
    ),
    "e4m3": NarrowTiles(
        8, 16,
        _narrow(
            _alike(16, Tile(64, 128, 4, 4)), _alike(16, _TILE), 8.0,
            _alike(32, Tile(128, 128, 8, 3)),
        ),
    ),
    "e4m3 x 8": NarrowTiles(
        8, 8,
        _narrow(
            Tiles(16, up=Tile(128, 128, 8, 4), down=Tile(64, 128, 4, 4)),
            Tiles(16, up=Tile(128, 128, 4, 4), down=_TILE), 8.0,
            Tiles(32, up=Tile(256, 128, 8, 4), down=_TILE),
        ),
    ),
}  # fmt: skip
# Their products were not timed.
NARROW_TILES |= {"int8": NARROW_TILES["e4m3"], "table4": NARROW_TILES["int4"]}


@dataclass(frozen=True)
class Tuning:
    """The defaults are an H200's, behind PCIe 5 x16.

    Attributes:
        memory_share: of the device's free memory that is used where no size is given; the rest is
            left to the driver and to fragmentation, and on a CPU to other processes.
        mixed_tokens: most tokens of a step of prompts beside decodes. Products reach 650 TFLOP/s
            from about 1,024 rows on, and half of it with 512, where a product of 4,096 columns is
            64 tiles for 132 processors.
        mixed_rows_per_expert: rows of an expert from which products get near that rate.
        row_tile: rows that cost as much as a part of them. The products of a step of 257 to 384
            tokens of an 8B model take 9.8 ms, where 256 take 6.9.
        decode_sizes: sequences of the recorded steps of decodes, ascending.
        mixed_sizes: tokens of all other recorded steps, ascending.
        apart_from_rows: rows from which merged products of `apart_columns` and more are made one
            by one: two of 14,336 columns and what reads them take up to 11 % less time than one of
            28,672, of which it reads halves (docs/performance.md).
        fused_rows_per_expert: mean rows of an expert above which products in bfloat16 are
            PyTorch's: arithmetic bounds them there, and not the reading of weights.
        expert_tiles: tiles by the mean rows of an expert up to which they are used: tall enough
            for most experts to read their weights once, and small enough at the beginning to keep
            every processor busy.
        narrow_tiles: likewise, of weights in few bits, by `kernels.narrow_launch.kind_of`.
        narrow_rows: rows up to which products widen a linear layer's weight in registers. Of more
            it is widened once, which costs 1.1 ps a weight, and multiplied by PyTorch; not yet
            measured.
        scaled_rows: rows from which PyTorch multiplies 8-bit weights and inputs, where it can; not
            yet measured.
        copy_programs: programs that share the copy of one expert out of host memory.
        copy_bytes: that one of them moves at a time. 64 programs of 16 KiB fill the link.
        copies_beside_compute: experts that are copied at once beside other kernels. With 16
            programs each they take an eighth of the threads of half of the processors.
        gather_programs: programs that gather rows from host memory for all users of a step.
        gather_rows: rows that one of them has under way, one per warp; a power of two.
        gather_programs_beside: likewise beside other kernels, which get no processor that one is
            on: a product of Hopper's takes all registers of its processor.
        gather_rows_beside: likewise, so that a few processors keep the link busy.
        launched_layer_s: what a layer costs more in a step that is launched, not replayed: a step
            of 32 layers takes 16.2 ms in place of 11.0 (docs/decisions.md).
        copies_per_call: copies that are submitted to the driver at once. It takes 1 to 2 us to
            prepare one, and starts none of a call before it has them all.
        pin_chunk_bytes: host memory that is pinned at once. That holds a lock of the driver which
            launches need too, so a chunk takes less time than the work queued on the device.
    """

    memory_share: float = 0.9
    mixed_tokens: int = 1024
    mixed_rows_per_expert: int = 512
    row_tile: int = 256
    decode_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 24, *range(32, 4097, 32))
    mixed_sizes: tuple[int, ...] = (16, 32, *range(64, 769, 64), 896, *range(1024, 2049, 256))
    apart_from_rows: int = 192
    apart_columns: int = 8192
    fused_rows_per_expert: int = 1024
    expert_tiles: tuple[tuple[float, Tiles], ...] = (
        (1.0, _alike(16, Tile(64, 128, 4, 4))),
        (8.0, _alike(16, Tile(128, 128, 4, 3))),
        (20.0, _alike(32, Tile(128, 128, 4, 3))),
        (40.0, _alike(64, Tile(128, 64, 4, 4))),
        (float("inf"), _alike(128, Tile(256, 64, 8, 3))),
    )
    narrow_tiles: Mapping[str, NarrowTiles] = field(default_factory=lambda: NARROW_TILES)
    narrow_rows: int = 64
    scaled_rows: int = 256
    copy_programs: int = 16
    copy_bytes: int = 16 * 2**10
    copies_beside_compute: int = 4
    gather_programs: int = 1056
    gather_rows: int = 4
    gather_programs_beside: int = 16
    gather_rows_beside: int = 16
    launched_layer_s: float = 0.16e-3
    copies_per_call: int = 64
    pin_chunk_bytes: int = 64 * 2**20

    def tiles(
        self, num_rows: int, num_experts: int, *, shared_bytes: int, kind: str | None = None
    ) -> Tiles:
        """The tiles for `num_rows` rows of all experts.

        A function of the number of rows alone, whatever the router chose.

        Args:
            num_rows: of all experts together.
            num_experts: of the layer.
            shared_bytes: shared memory that a program can have.
            kind: of weights in few bits, as `narrow_tiles` has it; None is 16 bits.
        """
        table, bits = self.expert_tiles, (16, 16)
        if kind is not None:
            narrow = self.narrow_tiles[kind]
            table, bits = narrow.by_rows, (narrow.weight_bits, narrow.input_bits)
        tiles = next(t for most, t in table if num_rows <= most * num_experts)
        return Tiles(
            tiles.block_rows,
            up=tiles.up.fitted(tiles.block_rows, shared_bytes, *bits),
            down=tiles.down.fitted(tiles.block_rows, shared_bytes, *bits),
        )


# By the type of a device. No GPU but an H200 was tuned for, so that all GPUs have its figures.
TUNINGS = {"cuda": Tuning(), "cpu": Tuning(memory_share=0.25, mixed_tokens=256, row_tile=1)}
