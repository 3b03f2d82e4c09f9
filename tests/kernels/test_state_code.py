"""The code that Triton makes of kernels over states for an H200; no GPU is needed to compile it."""

import json
import os
import re
import subprocess
import sys

import pytest

# In a process of its own, as Triton interprets kernels in this one where there is no GPU. Of
# Qwen3-Next's layers, Kimi Linear's and Nemotron 3's, in bfloat16.
PROGRAM = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hotset.kernels import chunk_pairs, chunk_state, conv_state, decode_state, selective_state

TYPES = dict.fromkeys(("decay", "sums", "mix", "solved", "weights", "pool"), "*fp32")
TYPES |= dict.fromkeys(("rate", "skip", "bias"), "*fp32") | {"scale": "fp32"}
TYPES |= dict.fromkeys(("low", "high"), "fp32")
for name in ("reads", "writes", "before", "starts", "lengths", "firsts", "ends"):
    TYPES[name] = "*i32"
DELTA = dict(HEADS=32, REPEATS=2, VALUES=128, KEYS=128, TILE=32, WIDTH=128, SLOT=19316736)
DELTA |= dict(NORMALISES=True, NO_SEQUENCE=-2, PRECISION="tf32", PART=16, PER_KEY=False)
DELTA |= dict(IS_DELTA=True, HAS_SKIP=False, HAS_BIAS=True, SOFTPLUS=True)
KIMI = DELTA | dict(REPEATS=1, PER_KEY=True)
MAMBA = DELTA | dict(HEADS=64, REPEATS=8, VALUES=64, IS_DELTA=False, HAS_SKIP=True)
JAMBA = dict(SLOT=19316736, VALUES=8192, KEYS=16, WIDTH=16, PART=16, HAS_GATE=True, HAS_SKIP=True)
JAMBA |= dict(HAS_BIAS=True, SOFTPLUS=True, NO_SEQUENCE=-2)
JAMBA_DECODE, JAMBA_SCAN = JAMBA | dict(TILE=128), JAMBA | dict(TILE=32, num_warps=1)
CONV = dict(CHUNKS=16, SLOT=19316736, KERNEL=4, HAS_BIAS=True, SILU=True, ROWS=8, WIDTH=128)
CASES = [
    (decode_state._delta, DELTA), (decode_state._delta, KIMI), (decode_state._mamba2, MAMBA),
    (chunk_pairs.pair_delta, DELTA), (chunk_pairs.sum_decays, KIMI), (chunk_pairs.pair_kimi, KIMI),
    (chunk_pairs.pair_mamba2, MAMBA), (chunk_state._scan, DELTA), (chunk_state._scan, KIMI),
    (chunk_state._scan, MAMBA), (conv_state._convolve, CONV), (conv_state._keep_columns, CONV),
    (selective_state._selective_decode, JAMBA_DECODE),
    (selective_state._selective_scan, JAMBA_SCAN),
]
compiled = []
for kernel, sizes in CASES:
    names, num_warps = kernel.arg_names, sizes.get("num_warps", 4)
    sizes = {name: sizes[name] for name in names if name.isupper()}
    is_number = lambda name: name.endswith("_stride") or name.startswith("num_")
    types = {n: TYPES.get(n, "i32" if is_number(n) else "*bf16") for n in names}
    source = ASTSource(
        kernel,
        signature=types | dict.fromkeys(sizes, "constexpr"),
        constexprs=sizes,
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in names
            if name not in sizes and types[name] != "fp32"
        },
    )
    options = dict(num_warps=num_warps, num_stages=1)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    compiled.append([kernel.fn.__name__, code.metadata.shared, code.asm["ptx"]])
print(json.dumps(compiled))
"""


@pytest.mark.slow
def test_kernels_over_states_compile_and_decodes_read_16_bytes_at_a_time() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    compiled = json.loads(ran.stdout)
    assert len(compiled) == 14
    for name, shared_bytes, code in compiled:
        assert shared_bytes <= 227 * 1024
        if name in ("_delta", "_mamba2"):
            # 4,096 numbers of a state by 128 threads.
            assert len(re.findall(r"ld\.global\S*\.v4\.b32", code)) >= 8
            assert len(re.findall(r"st\.global\S*\.v4\.b32", code)) >= 8
        if name == "_scan":
            assert "wgmma.mma_async" in code
