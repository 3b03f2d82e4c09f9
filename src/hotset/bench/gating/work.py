"""What is compared, and how large it is. Imports no torch."""

import math
from dataclasses import dataclass

from hotset.errors import ConfigError
from hotset.option_fields import Bounds, Group, option

_FIRST_BATCH = 16
_ONE, _SOME = Bounds("1 or more", 1), Bounds("0 or more", 0)
_ABOVE = Bounds("a number above 0", 0, is_open=True)

# Where nothing is given. A GPU has the paper's model and Qwen3-30B-A3B's layer in decode.
ON_A_CPU = {
    **{"experts": 64, "hidden": 256, "ffn": 512, "layers": 4, "max_tokens": 1024},
    **{"decode_tokens": 64, "memory_gib": 1.0, "max_s": 40.0},
}
DECODE_SHAPES = {"cuda": (128, 2048, 768, 8), "cpu": (32, 512, 192, 8)}
SHRUNK = (
    "On a CPU what is not given is smaller than on a GPU: not the paper's shape "
    "(E=512, d=1024, ffn=4096, 24 layers) nor Qwen3-30B-A3B's (E=128, H=2048, I=768)."
)


@dataclass(frozen=True, slots=True)
class Work(Group):
    """What to compare, with the sizes of a GPU.

    Raises:
        ConfigError: a figure that its field does not take, or a model without an MoE layer.
    """

    experts: int = option(512, "E.", bounds=_ONE, otherwise="512; on a CPU 64")
    hidden: int = option(1024, "d.", bounds=_ONE, otherwise="1024; on a CPU 256")
    ffn: int = option(4096, "Of an expert.", bounds=_ONE, otherwise="4096; on a CPU 512")
    top_k: int = option(2, "Experts of a token.", bounds=_ONE, otherwise="2")
    capacity: str = option(
        "0.05,0.25,1.0",
        "Capacity factors f of static gating: an expert gets f * batch rows.",
        metavar="F,F,...",
        otherwise="0.05,0.25,1.0",
    )
    batches: str = option(
        "sweep",
        "Tokens of a batch; sweep doubles from 16 until none fits.",
        metavar="sweep|N,N,...",
        otherwise="sweep",
    )
    max_tokens: int = option(
        262144, "Where the sweep ends.", bounds=_ONE, otherwise="262144; on a CPU 1024"
    )
    layers: int = option(
        24,
        "Of the whole model, every second one MoE; 0 for none.",
        bounds=_SOME,
        otherwise="24; on a CPU 4",
    )
    sequence: int = option(128, "Its attention's.", bounds=_ONE, otherwise="128")
    decode: bool = option(
        True, "Compare with transformers' experts too, in decode with Qwen3-30B-A3B's layer."
    )
    decode_tokens: int = option(256, "Of that.", bounds=_ONE, otherwise="256; on a CPU 64")
    memory_gib: float | None = option(
        None,
        "A call's, beside the weights.",
        bounds=_ABOVE,
        otherwise="what the device has; on a CPU 1",
    )
    repeats: int = option(5, "Timed calls of a batch.", bounds=_ONE, otherwise="5")
    max_s: float = option(
        120.0,
        "Begin nothing that would end later, in seconds.",
        bounds=_ABOVE,
        otherwise="120; on a CPU 40",
    )

    def __post_init__(self) -> None:
        Group.__post_init__(self)
        if self.layers == 1:
            raise ConfigError("a model of 1 layer has no MoE layer: give 2 or more, or 0 for none")
        if any(size < 1 or size != int(size) for size in self._given_batches()):
            raise ConfigError(f"batches is {self.batches!r}; expected whole numbers of tokens")
        for factor in self.factors:
            capacity_of(factor, 1)

    @property
    def factors(self) -> list[float]:
        """The capacities of static gating."""
        return _numbers("capacity", self.capacity)

    def _given_batches(self) -> list[float]:
        return [] if self.batches == "sweep" else _numbers("batches", self.batches)

    def batch_sizes(self, multiple_of: int = 1) -> list[int]:
        """Batches in ascending order, those above a multiple being multiples.

        Raises:
            ConfigError: one is not.
        """
        sizes = sorted({int(size) for size in self._given_batches()})
        if not sizes:
            sizes = [min(_FIRST_BATCH, self.max_tokens)]
            while sizes[-1] < self.max_tokens:
                sizes.append(min(2 * sizes[-1], self.max_tokens))
        for size in sizes:
            if size > multiple_of and size % multiple_of:
                raise ConfigError(
                    f"a batch of {size} tokens is not whole sequences of {multiple_of}"
                )
        return sizes


def capacity_of(factor: float, tokens: int) -> int:
    """Rows of each expert in static gating: C = ceil(f * S).

    Raises:
        ConfigError: there is no such factor.
    """
    if not 0 < factor <= 1:
        raise ConfigError(
            f"a capacity factor of {factor:g} was given: above 0 and up to 1 is right"
        )
    return math.ceil(factor * tokens)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{name} is {text!r}; expected numbers with commas between them"
        ) from None
