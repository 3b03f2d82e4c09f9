"""The code that Triton makes of experts' kernels for an H200; no GPU is needed to compile it."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

# In a process of its own, as Triton interprets kernels in this one where there is no GPU.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hotset.cost.tuning import TUNINGS

POINTERS = {"addresses": "*i64", "rows": "*i32", "blocks": "*i32", "num_blocks": "*i32"}

def code_of(kernel, sizes, tile):
    names = kernel.arg_names
    pointers = {name: POINTERS.get(name, "*bf16") for name in names if name.islower()}
    if sizes.get("NUM_SCALES"):
        pointers |= {names[0]: "*fp8e4nv"}
        pointers |= {name: "*fp32" for name in names if name.endswith("_scales")}
    sizes = {name: sizes[name] for name in names if name.isupper()}
    source = ASTSource(
        kernel,
        signature=pointers | dict.fromkeys(sizes, "constexpr"),
        constexprs=sizes,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

compiled = []
"""
PLAIN = """
from hotset.kernels.fused_experts import _gated_up, _weighted_down

for mean_rows in map(float, sys.argv[1:]):
    tiles = TUNINGS["cuda"].tiles(int(mean_rows * 128), 128, shared_bytes=227 * 1024)
    for kernel, tile, halves in ((_gated_up, tiles.up, 2), (_weighted_down, tiles.down, 1)):
        sizes = dict(HIDDEN=2048, MIDDLE=768, TOP_K=8, BLOCK_ROWS=tiles.block_rows)
        sizes |= dict(COLUMNS=tile.columns // halves, DEPTH=tile.depth)
        code = code_of(kernel, sizes, tile)
        piece_bytes = 2 * tile.depth * (tiles.block_rows + tile.columns)
        compiled.append([piece_bytes, tile.num_warps, code.metadata.shared, code.asm["ptx"]])
print(json.dumps(compiled))
"""
NARROW = """
import itertools
from dataclasses import replace
from hotset.experts.narrow import NarrowLayout
from hotset.kernels.narrow_experts import _gated_up, _weighted_down
from hotset.kernels.narrow_launch import kind_of, planes_of
from hotset.weight_format import FP8_BLOCK, INT4_128, MXFP4, NVFP4

FORMS = {"mxfp4": (MXFP4, 2880, 2880), "fp8": (FP8_BLOCK, 2048, 768), "int4": (INT4_128, 2048, 768),
         "nvfp4": (NVFP4, 2048, 768), "fp8 x 8": (replace(FP8_BLOCK, input_bits=8), 2048, 768)}
for name, mean_rows in itertools.product(FORMS, map(float, sys.argv[1:])):
    form, hidden, middle = FORMS[name]
    layout = NarrowLayout((2, middle, hidden), (hidden, middle), form)
    tiles = TUNINGS["cuda"].tiles(
        int(mean_rows * 128), 128, shared_bytes=227 * 1024, kind=kind_of(form)
    )
    sizes = dict(HIDDEN=hidden, HIDDEN_WIDTH=hidden, MIDDLE=middle, MIDDLE_WIDTH=middle, TOP_K=8)
    sizes |= dict(BLOCK_ROWS=tiles.block_rows, SCALE_ROWS=layout.matrices[0].scales.shape[-2])
    sizes |= dict(ALPHA=0.0, LIMIT=0.0, HAS_BIAS=False, IN_PAIRS=True)
    for kernel, tile, matrix in zip((_gated_up, _weighted_down), (tiles.up, tiles.down),
                                    layout.matrices):
        sizes |= dict(PLANES=planes_of(form, matrix), COLUMNS=tile.columns, DEPTH=tile.depth)
        sizes |= dict(NUM_SCALES=matrix.shape[-1] // 128 if form.input_bits == 8 else 0)
        code = code_of(kernel, sizes, tile)
        compiled.append([name, code.metadata.shared, code.asm["ptx"]])
print(json.dumps(compiled))
"""


def run(program: str, *arguments: str) -> list[list[Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE + program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    compiled: list[list[Any]] = json.loads(ran.stdout)
    return compiled


@pytest.mark.slow
def test_weights_are_read_asynchronously_16_bytes_at_a_time() -> None:
    compiled = run(PLAIN, "0.1", "16", "64")
    assert len(compiled) == 6
    for piece_bytes, num_warps, shared_bytes, code in compiled:
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", code)
        assert set(copies) == {"0x10"}
        # Each thread copies its part of a piece, before the loop and in it.
        assert len(copies) >= 2 * piece_bytes / (16 * 32 * num_warps)
        # What is left: the block, ids of its rows and their weights.
        assert len(re.findall(r"ld\.global", code)) < 40
        assert shared_bytes <= 227 * 1024


@pytest.fixture(scope="module")
def narrow() -> list[list[Any]]:
    """Form, shared bytes and code of each kernel."""
    return run(NARROW, "0.1", "8", "64")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["mxfp4", "fp8", "int4", "nvfp4"])
def test_narrow_weights_are_widened_in_registers(form: str, narrow: list[list[Any]]) -> None:
    """Codes are read asynchronously, and no weight passes through shared memory on its way."""
    of_form = [(shared_bytes, code) for name, shared_bytes, code in narrow if name == form]
    assert len(of_form) == 6
    for shared_bytes, code in of_form:
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", code)
        assert copies.count("0x10") >= 2 and "0x8" not in copies  # inputs of 8-bit codes: 0x4
        assert "wgmma.mma_async" in code
        # A load of matrices would be of weights: inputs are read by the product itself.
        assert code.count("ldmatrix") < 4 and code.count("st.shared.b16") < 8
        assert shared_bytes <= 227 * 1024


@pytest.mark.slow
def test_8_bit_weights_go_to_the_tensor_cores_as_they_are(narrow: list[list[Any]]) -> None:
    of_form = [(shared_bytes, code) for name, shared_bytes, code in narrow if name == "fp8 x 8"]
    assert len(of_form) == 6
    for shared_bytes, code in of_form:
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", code)
        assert copies.count("0x10") >= 2 and set(copies) <= {"0x10", "0x8"}  # 0x8: of few inputs
        assert "e4m3.e4m3" in code and "ldmatrix" not in code and "cvt.rn.f16x2.e4m3" not in code
        assert shared_bytes <= 227 * 1024
