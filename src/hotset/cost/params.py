"""Parameter counts, and the bytes that each dtype makes of them."""

import math
from dataclasses import dataclass

# Bits one matrix element takes, with the scales its format stores beside it.
WEIGHT_BITS = {
    "fp32": 32.0,
    "bf16": 16.0,
    "fp16": 16.0,
    "fp8": 8.0,  # one scale a tensor or channel: less than 0.02 %, not counted
    "fp8_block": 8.0 + 32 / 128**2,  # a float32 scale for 128 x 128 elements (DeepSeek-V3)
    "int8": 8.0,
    "mxfp4": 4.0 + 8 / 32,  # an 8-bit scale for 32 elements
    "nvfp4": 4.0 + 8 / 16,  # an FP8 scale for 16 elements
    "int4": 4.0 + (16 + 4) / 128,  # AWQ and GPTQ: 16-bit scale, 4-bit zero for 128 elements
}


@dataclass(frozen=True, slots=True)
class Params:
    """Parameter counts: `matrix` ones may be quantised, `vector` ones (norms, biases) never are."""

    matrix: int = 0
    vector: int = 0

    def __add__(self, other: "Params") -> "Params":
        return Params(self.matrix + other.matrix, self.vector + other.vector)

    def __mul__(self, times: int) -> "Params":
        return Params(self.matrix * times, self.vector * times)

    @property
    def count(self) -> int:
        """All of them."""
        return self.matrix + self.vector

    def bytes(self, dtype: str, plain_dtype: str) -> int:
        """Bytes with matrices in `dtype` and vectors in `plain_dtype`, rounded up."""
        bits = self.matrix * WEIGHT_BITS[dtype] + self.vector * WEIGHT_BITS[plain_dtype]
        return math.ceil(bits / 8)
