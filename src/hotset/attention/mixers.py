"""Layers that keep a state: linear attention, state space, short convolutions.

Their modules ("mixers") call two functions of their Python module, a causal convolution and a scan;
nothing else in them links tokens. `hook_mixers` replaces both, once per process, by functions that
ask the object of the step, which travels with each forward call as the keyword argument `hotset`
(as with attention). Without it they do what they did.

Mixers of Mamba-1 hand no keyword to their scan, and get none from their layer. There the step takes
the place of the mask, and a scan is of the mixer that convolved what it scans.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from hotset.attention.scans import Convolution, GatedDelta, Mamba1, Mamba2, Scan
from hotset.errors import ModelError
from hotset.kernels.state_inputs import in_rows

_CONV, _SELECTIVE = "causal_conv1d_fn", "mamba_selective_scan"
# Keyword arguments that mixers hand on and that do not change the result here.
_NEUTRAL = {"use_cache", "position_ids", "cache_position", "position_embeddings", "return_dict"}
_NEUTRAL |= {"output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep"}
_NEUTRAL |= {"seq_idx", "is_causal"}


class MixerStep:
    """The mixers of all tokens of one step, layer by layer. T = tokens of the step.

    A class and no protocol, as what is compiled asks whether a step is one.
    """

    def convolve(self, layer: int, convolution: Convolution) -> torch.Tensor:
        """`[C, T]`, the dtype of its values: the convolution over the tokens of each sequence."""
        raise NotImplementedError

    def scan(self, layer: int, scan: Scan) -> torch.Tensor:
        """`[T, heads, values]`: the recurrence over the tokens of each sequence."""
        raise NotImplementedError

    def finish(self) -> None:
        """Do what is left once the last layer was computed, if anything."""


class _Call(NamedTuple):
    """What the two functions are handed: the step, and the mixer that asks."""

    step: MixerStep
    mixer: nn.Module

    @property
    def layer(self) -> int:
        """Index of the layer; read where nothing is compiled, as each layer has another."""
        layer = self.mixer.layer_idx
        assert isinstance(layer, int)
        return layer

    @property
    def name(self) -> str:
        """Of the mixer's class."""
        return type(self.mixer).__name__


def mixers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that convolve over tokens: all that keep a state do."""
    for module in model.modules():
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            yield module


def hook_mixers(model: PreTrainedModel) -> None:
    """Have the mixers of `model` ask the step that is handed to a forward call.

    Modules that convolve otherwise, outside of a decoder say, are left alone.
    """
    kinds = {type(mixer) for mixer in mixers(model)}
    selective = {kind for kind in kinds if hasattr(sys.modules[kind.__module__], _SELECTIVE)}
    for module in model.modules():
        if not selective.isdisjoint(map(type, module.children())):
            _hand_on_as_mask(type(module))
    for kind in kinds:
        module = sys.modules[kind.__module__]
        if not hasattr(module, _CONV) or hasattr(kind.forward, "_takes_step"):
            continue
        if kind in selective:
            _replace(module, _CONV, _noted_convolution)
            _replace_selective(module)
            kind.forward = _with_mask(kind.forward)
            continue
        for name, make in {_CONV: _convolution, **_SCANS}.items():
            if hasattr(module, name):
                _replace(module, name, make)
        kind.forward = _with_step(kind.forward)


def step_keywords(model: PreTrainedModel) -> tuple[str, ...]:
    """The keyword arguments by which a forward call hands its step to the layers.

    In transformers 5.17 short convolutions get no other keyword than `seq_idx`.
    """
    forwards = (type(mixer).forward for mixer in mixers(model))
    taken = {getattr(forward, "_takes_step", "hotset") for forward in forwards}
    return tuple(sorted({"hotset", *taken}))


def _with_step(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a mixer, which says in place of the step who asks it."""
    parameters = inspect.signature(forward).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    keyword = "hotset" if takes_all else "seq_idx"

    @functools.wraps(forward)
    def hooked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step = kwargs.get(keyword)
        if isinstance(step, MixerStep):
            kwargs[keyword] = _Call(step, self)
        return forward(self, *args, **kwargs)

    hooked._takes_step = keyword  # type: ignore[attr-defined]
    return hooked


def _hand_on_as_mask(kind: type[nn.Module]) -> None:
    """Have layers of `kind` hand their mixer the step as its mask: they hand it no keyword."""
    forward = kind.forward
    if hasattr(forward, "_hands_on"):
        return

    @functools.wraps(forward)
    def hooked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step = kwargs.get("hotset")
        if isinstance(step, MixerStep):
            kwargs["attention_mask"] = step
        return forward(self, *args, **kwargs)

    hooked._hands_on = True  # type: ignore[attr-defined]
    kind.forward = hooked


def _with_mask(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As `_with_step`, of mixers that get the step as their mask."""

    @functools.wraps(forward)
    def hooked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step = kwargs.get("attention_mask")
        if isinstance(step, MixerStep):
            kwargs |= {"attention_mask": None, "hotset": _Call(step, self)}
        return forward(self, *args, **kwargs)

    hooked._takes_step = "hotset"  # type: ignore[attr-defined]
    return hooked


def _replace(module: ModuleType, name: str, make: Callable[..., Any]) -> None:
    """Replace a function of `module` by one that asks the step where there is one."""
    plain = getattr(module, name)
    if hasattr(plain, "_asks_step"):
        return
    # transformers binds these names to other packages' kernels where they can be imported, whatever
    # the device.
    ask = torch.compiler.disable(make(inspect.unwrap(plain)))

    @functools.wraps(plain)
    def asking(*args: Any, hotset: Any = None, **kwargs: Any) -> Any:
        call = hotset if isinstance(hotset, _Call) else kwargs.get("seq_idx")
        if not isinstance(call, _Call):
            return plain(*args, **kwargs)
        return ask(call, *args, **kwargs)

    asking._asks_step = True  # type: ignore[attr-defined]
    setattr(module, name, asking)


class _Convolved(threading.local):
    """What the thread's last mixer of Mamba-1 made of its convolution, until it scans."""

    last: tuple[_Call, torch.Tensor] | None = None

    def take(self) -> tuple[_Call, torch.Tensor] | None:
        """Who convolved last, and what came of it; None where that was without a step."""
        last, self.last = self.last, None
        return last


_convolved = _Convolved()


def _replace_selective(module: ModuleType) -> None:
    """As `_replace`, of scans that get no keyword."""
    plain = getattr(module, _SELECTIVE)

    @functools.wraps(plain)
    def asking(*args: Any, **kwargs: Any) -> Any:
        last = _convolved.take()
        return plain(*args, **kwargs) if last is None else _scan_selectively(*last, *args, **kwargs)

    setattr(module, _SELECTIVE, torch.compiler.disable(asking))


def _check_others(call: _Call, others: dict[str, Any]) -> None:
    """Raise ModelError for keywords of unknown meaning."""
    if unknown := [k for k, v in others.items() if v is not None and k not in _NEUTRAL]:
        raise ModelError(f"{call.name} asks for {', '.join(unknown)}: not supported")


def _convolution(original: Callable[..., Any]) -> Callable[..., Any]:
    def ask(
        call: _Call,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **others: Any,
    ) -> torch.Tensor:
        _check_others(call, others)
        convolution = Convolution(hidden_states[0], weight, bias, activation)
        return call.step.convolve(call.layer, convolution).unsqueeze(0)

    return ask


def _noted_convolution(original: Callable[..., Any]) -> Callable[..., Any]:
    convolve = _convolution(original)

    def ask(call: _Call, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = convolve(call, *args, **kwargs)
        _convolved.last = call, output
        return output

    return ask


def _scan_selectively(
    call: _Call,
    convolved: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **others: Any,
) -> torch.Tensor:
    """Ask the step of the mixer that convolved: all but tokens last, `[1, V, T]`, as its caller."""
    _check_others(call, {**others, "return_last_state": return_last_state or None})
    if hidden_states.untyped_storage().data_ptr() != convolved.untyped_storage().data_ptr():
        raise ModelError(f"{call.name} scans something else than what it convolved: not supported")
    scan = Mamba1(
        in_rows(hidden_states[0].T),
        in_rows(dt[0].T),
        A,
        in_rows(B[0].T),
        in_rows(C[0].T),
        None if z is None else in_rows(z[0].T),
        D,
        delta_bias,
        delta_softplus,
    )
    return call.step.scan(call.layer, scan).transpose(0, 1).transpose(1, 2)


def _gated_delta(original: Callable[..., Any]) -> Callable[..., Any]:
    def ask(
        call: _Call,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        chunk_size: int = 64,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        _check_others(call, {**others, "initial_state": initial_state})
        scan = GatedDelta(
            in_rows(query[0]),
            in_rows(key[0]),
            in_rows(value[0]),
            in_rows(g[0]),
            in_rows(beta[0]),
            use_qk_l2norm_in_kernel,
            original,
        )
        return call.step.scan(call.layer, scan).unsqueeze(0), None

    return ask


def _mamba2(original: Callable[..., Any]) -> Callable[..., Any]:
    def ask(
        call: _Call,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        chunk_size: int,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **others: Any,
    ) -> torch.Tensor:
        _check_others(call, {**others, "initial_states": initial_states})
        scan = Mamba2(
            in_rows(hidden_states[0]),
            in_rows(dt[0]),
            A,
            in_rows(B[0]),
            in_rows(C[0]),
            D,
            dt_bias,
            dt_softplus,
            dt_limit,
            original,
        )
        return call.step.scan(call.layer, scan).unsqueeze(0)

    return ask


_SCANS = {
    "torch_chunk_gated_delta_rule": _gated_delta,
    "chunk_kimi_delta_attention": _gated_delta,
    "mamba2_chunk_scan": _mamba2,
}
