"""Bring the experts that a step lacks: as each layer needs them, streamed ahead, or on the CPU.

S of a layer's E experts have a slot on the device. A step needs D of them (`Routing.distinct`):

    cache   D(1-h) are copied into slots and the layer waits; h is the share that has a slot, S/E
            under uniform routing.
    stream  all E-S are copied while the layer before computes: a layer takes whichever is longer.
            Only the first layer of a step has nothing before it.
    cpu     some are copied, and the CPU computes the others where they are.
"""

import bisect
import functools
import math
from dataclasses import dataclass

from hotset.cost.routing import Routing

# Of the time of the best other way, for the CPU: less is within what measurements may be off.
_LEAST_GAIN = 0.9
_MOST_TOKENS = 2**20  # beyond any step


@dataclass(frozen=True, slots=True)
class Brought:
    """The cheapest way.

    Attributes:
        plan: `cache`, `stream` or `cpu`.
        seconds: that the step, or the layer, takes longer than with all experts on the device.
        num_moved: experts that come over the link, unless the CPU takes part.
    """

    plan: str
    seconds: float
    num_moved: float


def bring_experts(
    *,
    missed: float,
    absent: float,
    gather_s: float,
    stream_s: float,
    hidden_s: float,
    plan: str = "auto",
    num_layers: int | None = None,
    cpu_s: float | None = None,
) -> Brought:
    """How the experts of a step, or of one layer amid others, are brought soonest.

    Args:
        missed: experts of a layer that are needed and have no slot.
        absent: experts of a layer that have none, needed or not.
        gather_s: to copy one while the layer waits.
        stream_s: to copy one ahead.
        hidden_s: that a layer computes, behind which a stream hides.
        plan: `cache` or `stream` for that one; `auto` for the cheaper, of equal ones `stream`.
        num_layers: of the step; None is one layer that has another before it.
        cpu_s: for the missed experts of a layer where the CPU takes part; None where it cannot. It
            must gain a tenth.
    """
    layers = 1 if num_layers is None else num_layers
    cached = Brought("cache", layers * missed * gather_s, layers * missed)
    late_s = max(0.0, absent * stream_s - hidden_s)
    stream_layers_s = layers * late_s
    if num_layers is not None:
        stream_layers_s += absent * stream_s - late_s  # the first one
    streamed = Brought("stream", stream_layers_s, layers * absent)
    ways = {"cache": [cached], "stream": [streamed]}.get(plan, [streamed, cached])
    best = min(ways, key=lambda way: way.seconds)
    if cpu_s is not None and layers * cpu_s < _LEAST_GAIN * best.seconds:
        return Brought("cpu", layers * cpu_s, 0.0)
    return best


@dataclass(frozen=True, slots=True)
class LayerSlots:
    """The experts of one layer, as an engine chooses between *cache* and *stream* for its steps.

    Attributes:
        num_experts: E.
        num_slots: S, of experts that are on the device.
        copy_s: seconds to copy one to the device.
        read_s: seconds that the device takes to read one from its slot.
    """

    num_experts: int
    num_slots: int
    copy_s: float
    read_s: float

    def streams(self, num_tokens: int, top_k: int) -> bool:
        """Whether a step of `num_tokens` tokens is done sooner if it streams.

        Tokens are expected to choose among the experts alike, and the reading of those that they
        choose is what a stream hides behind.
        """
        needed = Routing().distinct(self.num_experts, top_k, num_tokens)
        absent = self.num_experts - self.num_slots
        brought = bring_experts(
            missed=needed * absent / self.num_experts,
            absent=absent,
            gather_s=self.copy_s,
            stream_s=self.copy_s,
            hidden_s=needed * self.read_s,
        )
        return brought.plan == "stream"


@functools.lru_cache(maxsize=1024)
def streams_from(slots: LayerSlots, top_k: int) -> float:
    """The fewest tokens of a step that streams, as all longer ones do; infinity for no step."""
    found = bisect.bisect_left(
        range(1, _MOST_TOKENS), True, key=lambda tokens: slots.streams(tokens, top_k)
    )
    return math.inf if found == _MOST_TOKENS - 1 else found + 1
