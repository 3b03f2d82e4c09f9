"""One layer's experts, wherever their weights are: the only attribute hung on transformers' module.

`experts_of` gives the `LayerExperts` of a module of transformers' experts interface. All that
differs between versions of transformers is read there, once.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from hotset.experts.host import ColdSource, ExpertLayout, HostExperts
from hotset.experts.narrow import NarrowLayout
from hotset.kernels.narrow_forms import Gate
from hotset.linear.packed import PackedLinear, is_packable

if TYPE_CHECKING:
    from hotset.experts.layer import LayerBuffer
    from hotset.experts.recorder import LayerCounts

# The name that transformers knows dynamic gating by.
IMPLEMENTATION = "hotset"
# The only attribute of ours on transformers' modules.
ATTRIBUTE = "hotset_experts"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A module of that interface: transformers gives it attributes that no class of it declares.
Experts: TypeAlias = Any


class Resident:
    """Weights are parameters of the module. To compute, they must be on its device."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights are on the CPU, packed for float32 products; the module has none.

    Attributes:
        layout: of an expert before it was packed.
        up: of each expert, down: likewise.
    """

    layout: ExpertLayout
    up: list[PackedLinear]
    down: list[PackedLinear]


@dataclass(frozen=True, eq=False)
class Narrow:
    """Weights are on the device in few bits, which kernels widen; the module has none.

    Attributes:
        layout: of an expert as it is computed with.
        narrow: as it is stored.
        payloads: `[E, payload_bytes]` uint8.
    """

    layout: ExpertLayout
    narrow: NarrowLayout
    payloads: torch.Tensor


@dataclass(eq=False)
class Hosted:
    """Weights are in host memory or on disk; the module has none.

    Attributes:
        source: where all are.
        buffer: has some in slots on the device, and computes; None before and between engines.
    """

    source: ColdSource
    buffer: "LayerBuffer | None" = None


State: TypeAlias = Resident | Packed | Narrow | Hosted


@dataclass(frozen=True)
class Shard:
    """The experts that this rank has, whatever state they are in; others have the others.

    Attributes:
        local_ids: from `[T, K]` ids of the router to the rank's own, `num_experts` for others'.
    """

    local_ids: Callable[[torch.Tensor], torch.Tensor]


class LayerExperts:
    """The experts of one layer: their sizes, read from its module once, and where they are.

    The state goes from resident to packed and back, from resident to hosted and back, from resident
    to narrow, and from narrow to hosted and back. A bug that wants another way fails an assertion.
    A rank's shard is of experts in any state; that it is never of hosted ones is checked where
    experts are hosted, and where they are spread.

    Attributes:
        num_experts: E, of this rank.
        up_name: of the first product's weight; its bias is called `<up_name>_bias`.
        is_transposed: whether a weight is `[E, in, out]`, not `[E, out, in]`.
        has_post_norm: whether a norm follows the second product.
        gate: what is between the products, where kernels know it; None for what they do not.
        has_silu_gate: whether an expert is `down(silu(gate) * up)` without bias and norm, each
            weight as `[out, in]`.
        masks_others: whether ids of E and more may come, whose rows add nothing.
        is_spread: whether transformers itself has spread the experts over ranks.
        state: where the weights are.
        is_sliced: whether this rank has a part of each expert.
        is_skipped: whether experts add nothing for now, while a model is probed.
        shard: None where this rank has all experts.
        gather: brings hidden states, ids and weights of all lanes; None where all ranks have the
            same tokens.
        combine: sums over ranks what they compute; None where this one computes all.
        counts: None where no recorder counts.
        narrow_in_file: how the checkpoint has the weights that are to be read in few bits, as they
            are there; None where they are not.
    """

    def __init__(self, module: Experts) -> None:
        # Not a reference: module and experts would keep each other alive until garbage is sought.
        self._module = weakref.ref(module)
        self.num_experts: int = module.num_experts
        self.has_gate = bool(module.has_gate)
        self.has_bias = bool(module.has_bias)
        self.is_transposed = bool(module.is_transposed)
        self.up_name = "gate_up_proj" if self.has_gate else "up_proj"
        # transformers 5.17 has neither this norm nor a mark of its own parallelism.
        self.has_post_norm = bool(getattr(module, "has_post_expert_norm", False))
        is_parallel = getattr(module, "_is_expert_parallel", None)
        self.masks_others = is_parallel is not False
        self.is_spread = is_parallel is True
        self.gate = None if self.has_post_norm or not self.has_gate else _gate_of(module)
        self.has_silu_gate = self.gate == Gate() and not (self.is_transposed or self.has_bias)
        self.state: State = Resident()
        self.is_sliced = False
        self.is_skipped = False
        self.shard: Shard | None = None
        self.gather: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
        self.combine: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.counts: LayerCounts | None = None
        self.narrow_in_file: NarrowLayout | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerExperts":
        """Of the copy of the module that is under way; only resident experts are copied."""
        assert isinstance(self.state, Resident) and self.shard is None and self.counts is None
        other = LayerExperts.__new__(LayerExperts)
        other.__dict__.update(self.__dict__, _module=weakref.ref(memo[id(self.module)]))
        return other

    @property
    def module(self) -> Experts:
        """Transformers' module, which is alive as long as its model is."""
        module = self._module()
        assert module is not None, "the model is gone"
        return module

    @property
    def names(self) -> tuple[str, str]:
        """The weights' names on the module."""
        return self.up_name, "down_proj"

    @property
    def biases(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`[E, n]` of both products, on the device; None where they have none."""
        if not self.has_bias:
            return None
        up, down = (getattr(self.module, f"{name}_bias") for name in self.names)
        return up, down

    @property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`[E, *up]` and `[E, *down]` on the module; None where it has none."""
        up, down = (getattr(self.module, name, None) for name in self.names)
        return None if up is None or down is None else (up, down)

    @property
    def layout(self) -> ExpertLayout:
        """Of one expert as it is computed with, wherever the weights are."""
        if isinstance(self.state, Packed | Narrow):
            return self.state.layout
        if isinstance(self.state, Hosted):
            return self.state.source.layout
        assert self.weights is not None
        up, down = self.weights
        up_shape, down_shape = (up.shape[1], up.shape[2]), (down.shape[1], down.shape[2])
        return ExpertLayout(up_shape, down_shape, up.dtype, self.is_transposed)

    @property
    def is_gated(self) -> bool:
        """Whether dynamic gating computes the layer."""
        return bool(self.module.config._experts_implementation == IMPLEMENTATION)

    @property
    def is_plain(self) -> bool:
        """Whether weights are numbers as they are, not quantised ones; those elsewhere were."""
        weights = [getattr(self.module, name, None) for name in self.names]
        return all(weight is None or weight.dtype in _DTYPES for weight in weights)

    @property
    def hosted(self) -> Hosted | None:
        """The state where the weights are in host memory or on disk; else None."""
        return self.state if isinstance(self.state, Hosted) else None

    @property
    def is_packed(self) -> bool:
        """Whether an engine on the CPU keeps all experts, in a form of its own."""
        return isinstance(self.state, Packed)

    @property
    def narrow(self) -> NarrowLayout | None:
        """How the weights are stored in few bits; None where they are not."""
        if isinstance(self.state, Hosted):
            return self.state.source.narrow
        return self.state.narrow if isinstance(self.state, Narrow) else None

    @property
    def source(self) -> ColdSource:
        """Where all of the hosted experts are."""
        assert isinstance(self.state, Hosted)
        return self.state.source

    @property
    def buffer(self) -> "LayerBuffer":
        """What has some of the hosted experts in slots."""
        assert isinstance(self.state, Hosted) and self.state.buffer is not None
        return self.state.buffer

    def num_bytes(self, device: torch.device | None = None) -> int:
        """What the weights take on `device`, None for anywhere; 0 for those that are hosted."""
        if isinstance(self.state, Packed):
            packed = [*self.state.up, *self.state.down]
            return (
                sum(each.num_bytes for each in packed)
                if device in (None, torch.device("cpu"))
                else 0
            )
        weights: Sequence[torch.Tensor] = self.weights or ()
        if isinstance(self.state, Narrow):
            weights = [self.state.payloads]
        return sum(weight.nbytes for weight in weights if device in (None, weight.device))

    def pack(self) -> None:
        """Pack resident float32 weights on the CPU, as `pack_linears` does. Others stay."""
        if isinstance(self.state, Resident) and all(map(is_packable, self.weights or ())):
            layout = self.layout
            self.state = Packed(layout, *(self._take_packed(name) for name in self.names))

    def unpack(self) -> None:
        """Undo `pack`: the weights are the same bits."""
        if not isinstance(self.state, Packed):
            return
        for name, packed in zip(self.names, (self.state.up, self.state.down), strict=True):
            matrices = [self._as_linear(linear.dense_weight()) for linear in packed]
            packed.clear()
            self._set(name, torch.stack(matrices))
        self.state = Resident()

    def host(self, source: ColdSource) -> None:
        """Leave the weights, which `source` has, to it."""
        assert isinstance(self.state, Resident | Narrow)
        for name in self.names:
            setattr(self.module, name, None)
        self.state = Hosted(source)

    def hold(self, state: Narrow) -> None:
        """Have all weights on the device, in few bits."""
        assert isinstance(self.state, Resident | Hosted)
        for name in self.names:
            setattr(self.module, name, None)
        self.state, self.narrow_in_file = state, state.narrow

    def keep(self, device: torch.device, *, narrow: bool) -> None:
        """Have all weights on the device, from wherever they are; packed ones stay packed.

        With `narrow` experts of host memory stay as they are there.
        """
        if isinstance(self.state, Packed | Narrow):
            return
        weights = self.weights
        if isinstance(self.state, Hosted):
            source = self.state.source
            assert isinstance(source, HostExperts), "from disk nothing comes back"
            if narrow:
                assert source.narrow is not None
                self.hold(Narrow(source.layout, source.narrow, source.payloads.to(device)))
                source.rows.unpin()
                return
            # Matrices of a checkpoint may be kept the other way round.
            is_turned = source.layout.is_transposed != self.is_transposed
            up, down = (m.mT if is_turned else m for m in source.matrices())
            as_rows = torch.contiguous_format
            weights = up.clone(memory_format=as_rows), down.clone(memory_format=as_rows)
            source.rows.unpin()
        assert weights is not None
        for name, weight in zip(self.names, weights, strict=True):
            if self.hosted is not None or weight.device != device:
                self._set(name, weight.to(device))
        self.state = Resident()

    def spread(self, shard: Shard, mine: Sequence[int]) -> int:
        """Keep this rank's experts, `mine` by their ids, and no others; returns bytes let go."""
        assert isinstance(self.state, Resident | Narrow) and self.shard is None
        module, freed_bytes = self.module, 0
        if isinstance(self.state, Narrow):
            payloads = self.state.payloads
            kept = payloads[torch.tensor(mine, device=payloads.device)]
            freed_bytes = payloads.nbytes - kept.nbytes
            self.state = replace(self.state, payloads=kept)
        for name, weight in list(module._parameters.items()):
            if weight is None or weight.shape[:1] != (self.num_experts,):
                continue
            kept = weight.detach()[torch.tensor(mine, device=weight.device)]
            freed_bytes += weight.nbytes - kept.nbytes
            module._parameters[name] = nn.Parameter(kept, requires_grad=weight.requires_grad)
        self.num_experts = module.num_experts = len(mine)
        self.masks_others = True
        self.shard = shard
        return freed_bytes

    def _take_packed(self, name: str) -> list[PackedLinear]:
        """Pack a weight, whose memory is free before the other's is taken."""
        weight = getattr(self.module, name)
        packed = [pack_matrix(self._as_linear(matrix)) for matrix in weight]
        setattr(self.module, name, None)
        return packed

    def _as_linear(self, matrix: torch.Tensor) -> torch.Tensor:
        """One expert's weight, from as it is stored to `[out, in]`, and back."""
        return matrix.t() if self.is_transposed else matrix

    def _set(self, name: str, weight: torch.Tensor) -> None:
        setattr(self.module, name, nn.Parameter(weight, requires_grad=False))


def _gate_of(module: Experts) -> Gate | None:
    """What is between the products of experts with a gate; None where it is unknown."""
    apply = type(module)._apply_gate
    if apply is _default_apply_gate:
        is_silu = type(module.act_fn) in (nn.SiLU, SiLUActivation)
        return Gate() if module.is_concatenated and is_silu else None
    gpt_oss = sys.modules.get("transformers.models.gpt_oss.modeling_gpt_oss")
    if gpt_oss is not None and apply is gpt_oss.GptOssExperts._apply_gate:
        return Gate(float(module.alpha), float(module.limit))
    return None


def experts_of(module: Experts) -> LayerExperts:
    """The experts of a module of transformers' interface; made at the first call."""
    experts: LayerExperts | None = getattr(module, ATTRIBUTE, None)
    if experts is None:
        experts = LayerExperts(module)
        setattr(module, ATTRIBUTE, experts)
    return experts


def experts_layers(model: nn.Module) -> list[LayerExperts]:
    """The layers that transformers' decorator made exchangeable, in the order of the model."""
    return [experts_of(module) for module in model.modules() if is_experts(module)]


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' decorator made it exchangeable."""
    marks = ("is_transposed", "has_gate", "has_bias", "_apply_gate", "num_experts")
    return all(hasattr(module, mark) for mark in marks)


def experts_bytes(model: nn.Module, device: torch.device | None = None) -> int:
    """What the weights of all experts take on `device`, None for anywhere; 0 for hosted ones."""
    return sum(experts.num_bytes(device) for experts in experts_layers(model))


def can_pack() -> bool:
    """Whether PyTorch has the products of packed weights."""
    return bool(torch.backends.mkldnn.is_available())


def pack_matrix(matrix: torch.Tensor) -> PackedLinear:
    """Pack the `[out, in]` float32 weight of one expert."""
    matrix = matrix.contiguous()
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    return PackedLinear(linear)
