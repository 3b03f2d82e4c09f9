"""The code that Triton makes of the fused kernels for an H200; no GPU is needed to compile it."""

import json
import os
import re
import subprocess
import sys

import pytest

# In a process of its own, as Triton interprets kernels in this one where there is no GPU.
PROGRAM = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hotset.cost.tuning import TUNINGS
from hotset.kernels.fused_experts import _gated_up, _weighted_down

POINTERS = {"addresses": "*i64", "rows": "*i32", "blocks": "*i32", "num_blocks": "*i32"}
compiled = []
for mean_rows in map(float, sys.argv[1:]):
    tiles = TUNINGS["cuda"].tiles(int(mean_rows * 128), 128, shared_bytes=227 * 1024)
    for kernel, tile, halves in ((_gated_up, tiles.up, 2), (_weighted_down, tiles.down, 1)):
        sizes = dict(HIDDEN=2048, MIDDLE=768, TOP_K=8, BLOCK_ROWS=tiles.block_rows)
        sizes |= dict(COLUMNS=tile.columns // halves, DEPTH=tile.depth)
        names = kernel.arg_names
        pointers = {name: POINTERS.get(name, "*bf16") for name in names if name.islower()}
        sizes = {name: sizes[name] for name in names if name.isupper()}
        source = ASTSource(
            kernel,
            signature=pointers | dict.fromkeys(sizes, "constexpr"),
            constexprs=sizes,
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
        )
        options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        piece_bytes = 2 * tile.depth * (tiles.block_rows + tile.columns)
        compiled.append([piece_bytes, tile.num_warps, code.metadata.shared, code.asm["ptx"]])
print(json.dumps(compiled))
"""


@pytest.mark.slow
def test_weights_are_read_asynchronously_16_bytes_at_a_time() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, "0.1", "16", "64"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    compiled = json.loads(ran.stdout)
    assert len(compiled) == 6
    for piece_bytes, num_warps, shared_bytes, code in compiled:
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", code)
        assert set(copies) == {"0x10"}
        # Each thread copies its part of a piece, before the loop and in it.
        assert len(copies) >= 2 * piece_bytes / (16 * 32 * num_warps)
        # What is left: the block, ids of its rows and their weights.
        assert len(re.findall(r"ld\.global", code)) < 40
        assert shared_bytes <= 227 * 1024
