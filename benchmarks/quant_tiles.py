"""Tiles of the products of experts in few bits: which are tried, and how long each takes.

A part of `quant_experts.py --sweep`. All of them are compiled first, in a process for each CPU, so
that a sweep takes about as long as its launches. `reads` has what no product can beat: the same
bytes, read in pieces of some bytes of each row, and only added up.
"""

import contextlib
import functools
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from fused_experts import measure

from hotset.cost.tuning import Tile, Tiles
from hotset.kernels.expert_routing import route_rows
from hotset.kernels.fused_experts import sum_rows
from hotset.kernels.narrow_experts import (
    empty_middle,
    gated_up,
    middle_inputs,
    weighted_down,
)
from hotset.kernels.narrow_launch import as_inputs

WIDE = [  # 4-bit codes: 64 bytes of a row are 128 columns
    Tile(64, 128, 4, 4), Tile(64, 128, 4, 6), Tile(64, 256, 4, 3), Tile(64, 256, 4, 4),
    Tile(64, 512, 4, 2), Tile(64, 512, 4, 3), Tile(128, 128, 4, 3), Tile(128, 128, 4, 5),
    Tile(128, 256, 4, 2), Tile(128, 256, 4, 3), Tile(128, 128, 8, 4), Tile(128, 256, 8, 3),
    Tile(128, 512, 8, 2), Tile(256, 128, 8, 3),
]  # fmt: skip
SWEPT = {
    "e2m1": WIDE,
    "int4": [tile for tile in WIDE if tile.depth == 128],
    "e4m3": [
        Tile(64, 128, 4, 4), Tile(64, 128, 4, 6), Tile(64, 64, 4, 6), Tile(128, 128, 4, 3),
        Tile(128, 128, 4, 4), Tile(128, 128, 8, 3), Tile(128, 128, 8, 4), Tile(256, 128, 8, 3),
    ],
    "e4m3 x 8": [
        Tile(64, 128, 4, 4), Tile(64, 128, 4, 6), Tile(64, 128, 4, 8), Tile(64, 64, 4, 8),
        Tile(128, 64, 4, 6), Tile(128, 128, 4, 3), Tile(128, 128, 4, 4), Tile(128, 128, 4, 6),
        Tile(128, 128, 8, 4), Tile(256, 128, 8, 3), Tile(256, 128, 8, 4),
    ],
}  # fmt: skip
MOST_SUMS = 128  # of a thread
READ_BYTES = (64, 128, 256, 512)  # of a row at a time


class Products:
    """Both products of a step, one by one.

    Args:
        layer: as `quant_experts.Layer`.
        weights: of it.
        step: rows, ids and weights.
    """

    def __init__(self, layer: Any, weights: Any, step: Sequence[torch.Tensor]) -> None:
        self.x, self.ids, self.row_weights = step
        self.of, self.table, self.gate = layer.layout, weights.table, layer.gate
        self.biases = weights.biases or (None, None)
        self.source = as_inputs(self.x, layer.form)
        self.middle = empty_middle(self.x, self.ids.numel(), self.of).zero_()
        self.rows = self.x.new_empty(self.ids.numel(), self.x.shape[1])

    def route(self, block_rows: int) -> None:
        """Sort the rows."""
        self.routing = route_rows(self.ids.view(-1), len(self.table), block_rows)

    def up(self, tiles: Tiles) -> None:
        """The first one."""
        gated_up(
            self.source, self.routing, self.table, self.of, self.gate, self.biases[0],
            self.middle, top_k=self.ids.shape[1], tiles=tiles,
        )  # fmt: skip

    def down(self, tiles: Tiles) -> None:
        """The second one, with what rounds its inputs where they are."""
        inputs = middle_inputs(self.middle, self.of.form)
        weighted_down(
            inputs, self.routing, self.table, self.of, self.biases[1], self.row_weights,
            self.rows, tiles=tiles,
        )  # fmt: skip

    def rest(self, block_rows: int) -> None:
        """What is launched beside them."""
        as_inputs(self.x, self.of.form)
        self.route(block_rows)
        sum_rows(self.rows, self.ids, self.x, num_experts=len(self.table))


def candidates(kind: str, mean_rows: float) -> list[Tiles]:
    """What makes sense for experts of so many rows."""
    return [
        Tiles(block_rows, tile, tile)
        for block_rows in (16, 32, 64, 128)
        if mean_rows / 2 <= block_rows <= max(16, 4 * mean_rows)
        for tile in SWEPT[kind]
        if block_rows * tile.columns <= MOST_SUMS * 32 * tile.num_warps
    ]


def in_short(tile: Tile) -> str:
    """As it is written down in a `Tuning`."""
    return f"Tile({tile.columns}, {tile.depth}, {tile.num_warps}, {tile.num_stages})"


def compile_tiles(layer: Any, tiles: Tiles, make: Any) -> None:
    """Launch both products once, of two experts; what does not fit is left to the sweep to skip.

    Args:
        layer: to take the sizes of.
        tiles: of both.
        make: gives the weights of a layer, and the inputs of a step.
    """
    small = replace(layer, num_experts=2, top_k=min(2, layer.top_k))
    # The number of experts per token is a constant of the program.
    weights, (rows, ids, row_weights) = make(small)
    ids, row_weights = (
        each.repeat(1, layer.top_k)[:, : layer.top_k] for each in (ids, row_weights)
    )
    products = Products(small, weights, (rows, ids.contiguous(), row_weights.contiguous()))
    products.route(tiles.block_rows)
    for product in (products.up, products.down):
        with contextlib.suppress(Exception):  # the sweep meets it again, and says so
            product(tiles)


def compile_all(jobs: Sequence[tuple[Any, Tiles]], make: Any) -> None:
    """`compile_tiles` in processes; the compiler's cache on disk has the results."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=context) as pool:
        for done in [pool.submit(compile_tiles, layer, tiles, make) for layer, tiles in jobs]:
            done.result()


def sweep(layer: Any, weights: Any, steps: Sequence[Any], all_tiles: Sequence[Tiles]) -> list[Any]:
    """All tiles for each product, the fastest first."""
    products = [Products(layer, weights, step) for step in steps]
    num_hit = sum(len(each.ids.unique()) for each in products) / len(products)
    rows: list[dict[str, Any]] = []
    routed = 0
    for tiles in all_tiles:
        if tiles.block_rows != routed:
            routed = tiles.block_rows
            for each in products:
                each.route(routed)
        for name, matrix in zip(("up", "down"), layer.layout.matrices, strict=True):
            calls = [functools.partial(getattr(each, name), tiles) for each in products]
            try:
                took_us = measure(calls)
            except triton.runtime.errors.OutOfResources:
                continue
            except Exception as error:  # whatever the compiler raises
                print(f"{layer.name} {name} {tiles}: {error!r:.200}", file=sys.stderr)
                continue
            rows.append(
                {
                    "layer": layer.name, "tokens": len(products[0].x), "product": name,
                    "block rows": tiles.block_rows, "tile": in_short(tiles.up), "us": took_us,
                    "weights GB/s": round(num_hit * matrix.codes.num_bytes / took_us / 1e3),
                }
            )  # fmt: skip
    rows.sort(key=lambda row: (row["product"], row["us"]))
    rest_us = measure([functools.partial(each.rest, routed) for each in products])
    rest = {"product": "rest", "block rows": routed, "tile": "", "us": rest_us, "weights GB/s": 0}
    return [*rows, {"layer": layer.name, "tokens": len(products[0].x), **rest}]


@triton.jit  # type: ignore[untyped-decorator]
def _read(payloads, out, STEP: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    num_tiles: tl.constexpr = N // 64
    row = tl.program_id(0) % num_tiles * 64 + tl.arange(0, 64)
    at = payloads + (tl.program_id(0) // num_tiles).to(tl.int64) * STEP
    at += row[:, None] * K + tl.arange(0, BYTES)[None, :]
    sums = tl.zeros([64, BYTES], tl.uint8)
    for start in range(0, K, BYTES):
        sums += tl.load(at + start, mask=start + tl.arange(0, BYTES)[None, :] < K, other=0)
    tl.store(out + tl.program_id(0), tl.sum(sums.to(tl.int32)))


def reads(layer: Any, weights: Any) -> list[Any]:
    """GB/s of the codes of the first product, of all experts."""
    rows, num_columns = [], layer.layout.matrices[0].codes.shape[-1]
    num_rows = layer.layout.matrices[0].codes.num_bytes // num_columns // 64 * 64
    grid = (num_rows // 64 * len(weights.payloads),)
    out = torch.empty(grid, dtype=torch.int32, device=weights.payloads.device)
    for num_bytes in READ_BYTES:
        launch = functools.partial(
            _read[grid], weights.payloads, out, STEP=weights.payloads.shape[1], K=num_columns,
            N=num_rows, BYTES=num_bytes,
        )  # fmt: skip
        took_us = measure([launch, launch])
        rate = round(num_rows * num_columns * len(weights.payloads) / took_us / 1e3)
        rows.append(
            {
                "layer": layer.name, "tokens": 0, "product": "read only", "block rows": 0,
                "tile": f"{num_bytes} bytes", "us": took_us, "weights GB/s": rate,
            }
        )  # fmt: skip
    return rows
