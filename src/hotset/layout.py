"""How a model is spread over GPUs: tensor, data and expert parallelism.

One object for the planner and the engine. Imports no torch.
"""

import re
from dataclasses import dataclass

from hotset.errors import PlanError

WORDS = ("tp", "dp", "ep", "es")


@dataclass(frozen=True, slots=True)
class Layout:
    """`tp` x `dp` GPUs, of which `ep` x `es` share each set of routed experts.

    Attributes:
        tp: GPUs that share each attention head set and dense matrix.
        dp: groups of `tp` GPUs, each with its own users and its own copy of the dense weights.
        ep: GPUs over which the routed experts are spread whole.
        es: GPUs over which each expert is cut along its middle. 0 becomes `tp` where `ep` is 1,
            else 1.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1
    es: int = 0

    def __post_init__(self) -> None:
        if self.es == 0:
            object.__setattr__(self, "es", self.tp if self.ep == 1 else 1)

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tp * self.dp

    @property
    def expert_gpus(self) -> int:
        """GPUs that hold one set of experts together."""
        return self.ep * self.es

    @property
    def groups_per_expert_set(self) -> int:
        """Data-parallel groups whose tokens meet in one set of experts."""
        return max(1, self.expert_gpus // self.tp)

    def __str__(self) -> str:
        is_one = self.dp == 1 and self.expert_gpus == 1
        parts = [f"tp={self.tp}"] if self.tp > 1 or is_one else []
        parts += [f"dp={self.dp}"] if self.dp > 1 else []
        parts += [f"ep={self.ep}"] if self.ep > 1 else []
        parts += [f"es={self.es}"] if self.es != Layout(self.tp, self.dp, self.ep).es else []
        return ",".join(parts)


def parse_layout(text: str) -> Layout:
    """Read `tp=8`, `dp=8,ep=8`, `dp=2,es=2` or `ep=72` (which is `dp=72,ep=72`).

    Raises:
        PlanError: it says something else.
    """
    sizes: dict[str, int] = {}
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"([a-zA-Z]+)=(\d{1,6})", part)
        if not match:
            raise PlanError(f"layout {text!r} has {part!r}; expected for example tp=2,dp=4,ep=8")
        key, size = match[1].lower(), int(match[2])
        if key not in WORDS:
            raise PlanError(
                f"layout {text!r} asks for {key}, which is not planned; use {', '.join(WORDS)}"
            )
        if key in sizes:
            raise PlanError(f"layout {text!r} gives {key} twice")
        if not 1 <= size <= 100_000:
            raise PlanError(f"layout {text!r}: {key} is {size}; expected 1 or more")
        sizes[key] = size
    tp, ep, es = sizes.get("tp", 1), sizes.get("ep", 1), sizes.get("es", 0)
    dp = sizes.get("dp", max(1, ep * max(1, es) // tp))
    return Layout(tp, dp, ep, es)
