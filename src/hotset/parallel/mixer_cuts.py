"""Layers that keep a state, cut by their heads: transformers' plans leave them whole.

Each rank has some heads with their part of the projections, the convolution and the state, and the
outputs of all ranks add up. What a mixer has of a group of heads, such as Mamba-2's B and C, goes
with them. A mixer that does not divide, or has a part that is not known here, stays whole on each
rank: that is right too, and takes more memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from hotset.parallel.norms import is_of_all
from hotset.parallel.parts import Layout, Units, length_of


@dataclass(frozen=True, slots=True)
class MixerCut:
    """How a mixer is cut.

    Attributes:
        columns: by name of a child, or "" for the mixer's own parameters, how the first dimension
            of all their parameters is shared out.
        rows: the child that makes the output of a rank's heads.
        whole: children that each rank has whole.
        attributes: by name of a child, or "", its numbers that are each as long as a layout.
        buffers: of the mixer, whose last dimension is shared out.
        summed: a child that is a gated norm over the channels of all ranks, see `NormOfAll`.
    """

    columns: Mapping[str, Layout]
    rows: str
    whole: tuple[str, ...] = ()
    attributes: Mapping[str, Mapping[str, Layout]] = field(default_factory=dict)
    buffers: Mapping[str, Layout] = field(default_factory=dict)
    summed: str | None = None


def find_mixer_cut(module: nn.Module, size: int) -> MixerCut | None:
    """How a mixer is cut for `size` ranks; None where it is none, or stays whole."""
    for find in (_short_convolution, _gated_delta, _mamba2):
        cut = find(module, size)
        if cut is not None and _is_known(module, cut) and _divides(module, cut, size):
            return cut
    return None


def _short_convolution(module: nn.Module, size: int) -> MixerCut | None:
    """LFM2: two gates and what is convolved, a channel each."""
    conv, in_proj = getattr(module, "conv", None), getattr(module, "in_proj", None)
    if not isinstance(conv, nn.Conv1d) or not isinstance(in_proj, nn.Linear):
        return None
    channels = Units(conv.out_channels)
    if in_proj.out_features != 3 * channels.count or channels.count % size:
        return None
    return MixerCut({"in_proj": (channels,) * 3, "conv": (channels,)}, "out_proj")


def _gated_delta(module: nn.Module, size: int) -> MixerCut | None:
    """Gated DeltaNet: of each head of keys come a query, a key, and some heads of values."""
    names = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
    found = [getattr(module, name, None) for name in names]
    if not all(isinstance(number, int) for number in found):
        return None
    num_keys, num_values, key_dim, value_dim = (int(n) for n in found if isinstance(n, int))
    if num_keys % size:
        return None
    keys, values = Units(num_keys, key_dim), Units(num_values, value_dim)
    numbers = Units(num_values)
    with_all = 2 * key_dim + 2 * value_dim * num_values // num_keys  # of a head of keys
    layouts: dict[str, Layout] = {
        "": (numbers,),
        "conv1d": (keys, keys, values),
        "in_proj_qkvz": (Units(num_keys, with_all),),
        "in_proj_ba": (Units(num_keys, 2 * num_values // num_keys),),
        "in_proj_qkv": (keys, keys, values),
        "q_proj": (keys,),
        "k_proj": (keys,),
        **dict.fromkeys(("v_proj", "in_proj_z", "g_proj"), (values,)),
        **dict.fromkeys(("in_proj_b", "in_proj_a", "a_proj", "b_proj"), (numbers,)),
    }
    columns = {name: layout for name, layout in layouts.items() if not name or _has(module, name)}
    rows = "out_proj" if _has(module, "out_proj") else "o_proj"
    norm = "norm" if _has(module, "norm") else "o_norm"
    if any(w.shape != (value_dim,) for w in module.get_submodule(norm).parameters()):
        return None  # over several heads
    attributes: dict[str, Layout] = {
        "num_k_heads": (Units(num_keys),),
        "num_v_heads": (numbers,),
        "key_dim": (keys,),
        "value_dim": (values,),
        "conv_dim": (keys, keys, values),
    }
    return MixerCut(columns, rows, (norm,), {"": attributes})


def _mamba2(module: nn.Module, size: int) -> MixerCut | None:
    """Mamba-2: groups of heads share B and C; a norm, if any, is over the channels of a group."""
    names = ("num_heads", "head_dim", "n_groups", "ssm_state_size", "intermediate_size")
    found = [getattr(module, name, None) for name in names]
    in_proj, norm = getattr(module, "in_proj", None), getattr(module, "norm", None)
    if not all(isinstance(n, int) for n in found) or not isinstance(in_proj, nn.Linear):
        return None
    num_heads, head_dim, num_groups, state, inner = (int(n) for n in found if isinstance(n, int))
    channels, group = Units(num_heads, head_dim), Units(num_groups, state)
    if num_heads % size:
        return None
    numbers = Units(num_heads)
    columns: dict[str, Layout] = {
        "": (numbers,),
        "in_proj": (channels, channels, group, group, numbers),
        "conv1d": (channels, group, group),
    }
    of_norm: dict[str, Layout] = {}
    summed = None
    if list(norm.parameters() if norm is not None else ()):
        if num_groups == 1 and is_of_all(norm, inner):
            summed = "norm"
        elif num_groups % size:
            return None  # over channels of several ranks
        elif hasattr(norm, "n_groups"):
            of_norm["n_groups"] = (Units(num_groups),)
        elif getattr(norm, "group_size", None) != inner // num_groups:
            return None
        columns["norm"] = (channels,)
    attributes: dict[str, Layout] = {
        "num_heads": (numbers,),
        "n_groups": (Units(num_groups),),
        "intermediate_size": (channels,),
        "conv_dim": (channels, group, group),
    }
    buffers = {"mup_vector": columns["in_proj"]} if hasattr(module, "mup_vector") else {}
    return MixerCut(columns, "out_proj", (), {"": attributes, "norm": of_norm}, buffers, summed)


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def _is_known(module: nn.Module, cut: MixerCut) -> bool:
    """Whether all that a mixer has is known, and of the sizes that are expected."""
    known = (*cut.columns, *cut.whole, cut.rows)
    owners = {name for name, child in module.named_children() if list(child.parameters())}
    if module._parameters:
        owners.add("")
    if not owners <= set(known):
        return False
    for name, layout in cut.columns.items():
        owner = module.get_submodule(name)
        if any(w is not None and len(w) != length_of(layout) for w in owner._parameters.values()):
            return False
    own = dict(module.named_buffers(recurse=False))
    return (
        _has(module, cut.rows)
        and all(
            getattr(module.get_submodule(child), name, None) == length_of(layout)
            for child, attributes in cut.attributes.items()
            for name, layout in attributes.items()
        )
        and own.keys() == cut.buffers.keys()
        and all(own[name].shape[-1] == length_of(layout) for name, layout in cut.buffers.items())
    )


def _divides(module: nn.Module, cut: MixerCut, size: int) -> bool:
    """Whether each rank has as many rows and heads, and what they share."""
    rows = module.get_submodule(cut.rows).in_features
    assert isinstance(rows, int)
    units = [each for layout in cut.columns.values() for each in layout]
    return rows % size == 0 and all(each.are_shared(size) for each in units)
