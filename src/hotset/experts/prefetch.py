"""Experts that the next layer is likely to need, copied into its slots while this one computes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hotset.errors import ConfigError
from hotset.experts.weights import LayerExperts

# From hidden states `[T, H]` to expert ids `[T, K]`.
Router = Callable[[torch.Tensor], torch.Tensor]

_ROUTER_NAMES = ("gate", "router")


class Prefetch:
    """Asks the next layer's router about this layer's input, and copies what it lacks ahead.

    The residual stream changes little from one layer to the next, so most of the answer is right.
    What is wrong has cost a slot and bytes, and nothing else: the layer then routes by its own
    input, and copies what it needs. On a GPU copies have a stream of their own, which forks from
    the stream that computes and joins it again, so that a CUDA graph can record both.

    Args:
        routers: of the layers, in the order in which a step runs them.
        most: experts that are copied ahead for a layer.
        device: of the slots.
    """

    def __init__(self, routers: list[Router], most: int, device: torch.device) -> None:
        self.most = most
        self._routers = routers
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Read by the other stream, so they are kept until it has joined.
        self._lists: tuple[torch.Tensor, torch.Tensor] | None = None

    def predict(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """`[T * K]` expert ids that `layer` would choose for the hidden states `[T, H]`."""
        return self._routers[layer](hidden).reshape(-1)

    def start(
        self,
        lists: tuple[torch.Tensor, torch.Tensor],
        fetch: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> None:
        """Have `fetch` copy experts to slots, by `lists`, while other things are computed."""
        if self._stream is None:
            fetch(*lists)
            return
        self._lists = lists
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            fetch(*lists)

    def join(self) -> None:
        """Have what is computed from here on wait for the copies."""
        if self._stream is not None and self._lists is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._lists = None


def find_routers(model: nn.Module, layers: list[LayerExperts]) -> list[Router]:
    """The routers of `layers`: the modules beside them that choose experts.

    Raises:
        ConfigError: they are not where most architectures have them.
    """
    owners = {id(m.experts): m for m in model.modules() if hasattr(m, "experts")}
    routers: list[Router] = []
    for experts in layers:
        owner = owners.get(id(experts.module))
        router = next(
            (r for n in _ROUTER_NAMES if (r := getattr(owner, n, None)) is not None), None
        )
        place = None if router is None else _place_of_ids(router, model)
        if router is None or place is None:
            raise ConfigError(
                f"expert_prefetch needs the routers of {type(model).__name__}, which are not "
                f"beside its experts as {' or '.join(_ROUTER_NAMES)}, or do not return ids; leave "
                "it out"
            )
        routers.append(partial(_ids, router, place))
    return routers


def _ids(router: Any, place: int, hidden: torch.Tensor) -> torch.Tensor:
    chosen: torch.Tensor = router(hidden)[place]
    return chosen


@torch.inference_mode()
def _place_of_ids(router: nn.Module, model: nn.Module) -> int | None:
    """Which part of its answer to hidden states are expert ids; None where none is.

    Logits, weights and ids have come in different orders with versions of transformers.
    """
    weight = next(iter(router.parameters()), None)
    if weight is None:
        return None
    hidden = weight.new_zeros(1, weight.shape[-1], dtype=next(model.parameters()).dtype)
    answer = router(hidden)
    if not isinstance(answer, tuple):
        return None
    for place, part in enumerate(answer):
        if isinstance(part, torch.Tensor) and part.dtype == torch.int64 and part.dim() == 2:
            return place if len(part) == 1 else None
    return None
