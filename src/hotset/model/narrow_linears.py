"""Linear layers of a quantised checkpoint whose weights stay as the files have them, on a GPU."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import nn

from hotset.checkpoint.tensors import CheckpointTensors
from hotset.kernels.narrow_forms import can_read
from hotset.linear import quant_linear
from hotset.linear.merged import MergedLinear
from hotset.linear.narrow_matrix import Planes
from hotset.linear.quant_linear import QuantEmbedding, QuantLinear, quant_matrix
from hotset.linear.reads import is_replaceable
from hotset.parallel.narrow_parts import can_cut, cut_planes
from hotset.parallel.parts import Part
from hotset.weight_format import WeightFormat

_COLUMNS = 32  # rows of a weight begin where a processor reads at once
_NUM_THREADS = 4  # each holds one weight; they wait for the disk and the link

_log = logging.getLogger(__name__)


def narrow_form(
    tensors: CheckpointTensors, device: torch.device, dtype: torch.dtype
) -> WeightFormat | None:
    """How linear layers stay on `device`, after a trial of their products; None is not at all."""
    form = tensors.narrow_format
    if form is None or device.type != "cuda" or dtype == torch.float32:
        return None
    # One scale of a whole weight stands in each row, so that weights can be merged.
    form = replace(form, rows=form.rows or 1)
    if not can_read(form):
        return None
    if (problem := quant_linear.check(form, dtype, device)) is not None:
        _log.warning("weights in %s are widened, as this GPU's %s", form.name, problem)
        return None
    return form


@torch.no_grad()
def replace_linears(
    model: nn.Module,
    form: WeightFormat,
    shapes: Mapping[str, tuple[int, ...]],
    parts: Mapping[str, Part],
) -> list[str]:
    """Replace linear layers of a model on `meta` by ones in few bits, in place.

    Args:
        model: made of plain layers, cut for this rank.
        form: of the weights.
        shapes: of the weights that are stored in it, by name.
        parts: by name, what this rank has of a weight; all where there is none.

    Returns:
        The names of the weights that layers were made for; others are to be widened.
    """
    holders = Counter(
        id(parameter) for module in model.modules() for parameter in module._parameters.values()
    )
    replaced = []
    for path, layer in list(model.named_modules()):
        name = f"{path}.weight"
        is_own = is_replaceable(layer) and holders[id(layer.weight)] == 1
        if name not in shapes or not is_own or layer.in_features % _COLUMNS:
            continue
        part = parts.get(name)
        if part is not None and not can_cut(form, shapes[name][part.dim], part):
            continue
        matrix = quant_matrix(form, (layer.out_features, layer.in_features))
        bias_dtype = None if layer.bias is None else layer.bias.dtype
        parent, _, child = path.rpartition(".")
        narrow = QuantLinear(matrix, bias_dtype=bias_dtype, device=layer.weight.device)
        setattr(model.get_submodule(parent), child, narrow)
        replaced.append(name)
    return replaced


def fill_linears(
    model: nn.Module,
    names: Collection[str],
    read: Callable[[str, int | None], Planes],
    parts: Mapping[str, Part],
) -> None:
    """Read the weights `names`, or `parts` of them, into the layers, which may be merged by now."""

    def move(name: str) -> None:
        found = model.get_submodule(name.removesuffix(".weight"))
        is_part = isinstance(found, MergedLinear)
        layer, rows = (found.whole, found.columns) if is_part else (found, slice(None))
        assert isinstance(layer, QuantLinear) and isinstance(rows, slice)
        planes, part = read(name, None), parts.get(name)
        if part is not None:
            planes = cut_planes(planes, layer.matrix.form, layer.matrix.form, part)
        layer.set_rows(rows, planes)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for _ in pool.map(move, names):
            pass


def narrow_bytes(model: nn.Module) -> int:
    """What the layers and embeddings that stay in few bits take."""
    kinds = (QuantLinear, QuantEmbedding)
    payloads = {m.payload for m in model.modules() if isinstance(m, kinds)}  # some share one
    return sum(payload.nbytes for payload in payloads)


def rounds_inputs(model: nn.Module) -> bool:
    """Whether those layers are multiplied with inputs in 8 bits."""
    layers = (module for module in model.modules() if isinstance(module, QuantLinear))
    return any(layer.matrix.form.input_bits == 8 for layer in layers)
