"""Parameter counts, and the bytes that each dtype makes of them."""

import math
from dataclasses import dataclass

from hotset.weight_format import (
    AWQ_128,
    FP8_BLOCK,
    FP8_ROW,
    INT4_128,
    MXFP4,
    NF4,
    NVFP4,
    WeightFormat,
)

# By the name that a user gives, how a model's matrices may be stored.
FORMATS = {
    "fp32": WeightFormat("float32"),
    "bf16": WeightFormat("bfloat16"),
    "fp16": WeightFormat("float16"),
    "fp8": FP8_ROW,  # one scale a tensor or channel: less than 0.02 %, not counted
    "fp8_block": FP8_BLOCK,  # DeepSeek-V3
    "int8": WeightFormat("int8", "float32"),
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "nf4": NF4,
    "int4": AWQ_128,
    "int4_symmetric": INT4_128,  # GPTQ, compressed-tensors
    "int4_symmetric_32": WeightFormat("int4", "bfloat16", 1, 32),
}
# Bits one matrix element takes, with the scales its format stores beside it.
WEIGHT_BITS = {name: each.bits() for name, each in FORMATS.items()}


def name_of(stored: WeightFormat) -> str:
    """The name of the format that takes the bits of `stored`, or nearly."""
    alike = [name for name, each in FORMATS.items() if each.code == stored.code]
    return min(alike, key=lambda name: abs(WEIGHT_BITS[name] - stored.bits()))


@dataclass(frozen=True, slots=True)
class Params:
    """Parameter counts: `matrix` ones may be quantised, `vector` ones (norms, biases) never are."""

    matrix: int = 0
    vector: int = 0

    def __add__(self, other: "Params") -> "Params":
        return Params(self.matrix + other.matrix, self.vector + other.vector)

    def __sub__(self, other: "Params") -> "Params":
        return Params(self.matrix - other.matrix, self.vector - other.vector)

    def __floordiv__(self, parts: int) -> "Params":
        """One of some equal parts, the largest where they are not."""
        return Params(-(-self.matrix // parts), -(-self.vector // parts))

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


@dataclass(frozen=True, slots=True)
class Shares:
    """What tensor-parallel ranks do not share out evenly of some parameters.

    Attributes:
        whole: what each rank has all of.
        by_unit: what comes with units, KV heads say, of which each rank has as many, or one.
        num_units: how many.
        heads: by which all the rest is cut; where ranks do not divide them, each has everything.
            None: any number of ranks does.
    """

    whole: Params = Params()
    by_unit: Params = Params()
    num_units: int = 1
    heads: int | None = None

    def are_cut(self, tp: int) -> bool:
        """Whether `tp` ranks share anything out."""
        return self.heads is None or self.heads % tp == 0

    def units(self, tp: int) -> int:
        """That a rank has."""
        return max(1, self.num_units // tp) if self.are_cut(tp) else self.num_units

    def on_rank(self, params: Params, tp: int) -> Params:
        """What each of `tp` ranks has of `params`."""
        if tp == 1 or not self.are_cut(tp):
            return params
        even = params - self.whole - self.by_unit
        return even // tp + self.whole + self.by_unit // self.num_units * self.units(tp)


WHOLE = Shares(heads=1)  # on each rank
