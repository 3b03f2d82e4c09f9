"""Which part of each layer a rank has: plans of tensor parallelism, read as a table.

A plan says which linear layers are cut by columns of their output, which by rows of their input, so
that the parts of the latter add up. Nothing else of transformers' parallelism is used: the layers
stay what they are, with fewer columns or rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import transformers
from torch import nn

from hotset.cost.layout import shares_heads
from hotset.errors import ConfigError, ModelError
from hotset.parallel.mixer_cuts import find_mixer_cut
from hotset.parallel.parts import Layout, Units, length_of, share
from hotset.parallel.plans import OF_HEADS, REPLICATED, pattern_of, patterns, styles


class Cut(Enum):
    """How a layer is spread over ranks."""

    COLUMNS = "columns"  # of its output; each rank goes on with its own
    ROWS = "rows"  # of its input; the outputs of all ranks are summed
    HEAD = "head"  # columns of the logits, which all ranks put together again
    EXPERTS = "experts"  # of each expert, its middle; the outputs of all ranks are summed
    OWN = "own"  # the first dimension of the module's own parameters, as columns are
    NORM = "norm"  # likewise; its squares are summed over all ranks


# A gathered layer before one whose input is split again is whole on each rank, and so are norms,
# routers and embeddings.
_WHOLE = {
    "colwise_gather_output",
    "colwise_rep",
    "rowwise_split_input",
    "rowwise_rep",
    REPLICATED,
    "replicated_with_grad_allreduce",
    "embedding_rowwise",
    "mla_kv_a_proj",
}
_CUTS = {
    "colwise": Cut.COLUMNS,
    "packed_colwise": Cut.COLUMNS,
    "rowwise": Cut.ROWS,
    "moe_tp_experts": Cut.EXPERTS,
    OF_HEADS: Cut.OWN,
}
_OF_EXPERTS = {"packed_colwise", "colwise", "rowwise", "grouped_gemm", "packed_rowwise"}
_SOME_HEADS = ("k_proj", "v_proj")  # each may be on several ranks, as more heads of queries are
_OF_CHANNELS = ("in_channels", "out_channels", "groups")  # of a convolution


@dataclass(slots=True)
class Table:
    """What the ranks of a model share out.

    Attributes:
        size: of the group.
        cuts: by path of a module; what is not there is whole on each rank.
        layouts: by path, how columns are shared out that are not single ones.
        attributes: by path, numbers of a module, each as long as its layout.
        buffers: by path, buffers of a module whose last dimension is shared out.
        whole: paths of modules that are known to be the same on each rank.
    """

    size: int
    cuts: dict[str, Cut] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    attributes: dict[str, Mapping[str, Layout]] = field(default_factory=dict)
    buffers: dict[str, Mapping[str, Layout]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)

    def columns(self, path: str, num_columns: int, rank: int) -> tuple[slice, ...]:
        """The columns that a rank has of a layer that is cut by columns, or of the head."""
        if self.cuts[path] is Cut.HEAD:
            piece = -(-num_columns // self.size)
            first, last = (min(place * piece, num_columns) for place in (rank, rank + 1))
            return (slice(first, last),)
        return share(self.layouts.get(path, (Units(num_columns),)), rank, self.size)

    def rows(self, in_features: int, rank: int) -> slice:
        """The rows that a rank has of a layer that is cut by rows, or of an expert's middle."""
        piece = in_features // self.size
        return slice(rank * piece, (rank + 1) * piece)


def find_cuts(model: Any, size: int, name: str) -> Table:
    """The table for a model, on `meta` or not, whose layers are plain.

    Args:
        model: of transformers.
        size: number of ranks.
        name: of the model, for messages.

    Raises:
        ConfigError: its layers do not divide by `size`.
        ModelError: there is no plan for it, or one that is not understood here.
    """
    config = model.config.get_text_config()
    check_heads(config, size, name)
    plan, modules = patterns(model), dict(model.named_modules())
    head, table = model.get_output_embeddings(), Table(size)
    for path, style in styles(modules, plan).items():
        if modules[path] is head:
            table.cuts[path] = Cut.HEAD
        elif style in _CUTS:
            table.cuts[path] = _CUTS[style]
            if style == "packed_colwise":
                table.layouts[path] = (Units(_out_features(modules[path]) // 2),) * 2
            elif style == OF_HEADS:
                table.layouts[path] = (Units(config.num_attention_heads),)
        elif style not in _WHOLE:
            raise ModelError(
                f"the tensor-parallel plan of {name} has {style!r} for {path}, which is not "
                "supported; use one GPU"
            )
        elif style == REPLICATED:
            table.whole.add(path)
    table.layouts.update(_head_counts(modules, table.cuts))
    for path, module in modules.items():
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            _cut_mixer(table, path, module)
    if not set(table.cuts.values()) & {Cut.ROWS, Cut.EXPERTS}:
        raise ModelError(
            f"{name} has no tensor-parallel plan in transformers {transformers.__version__} that "
            "cuts its layers; use one GPU, or dp where it has experts"
        )
    for path in table.cuts:
        _check(path, modules, table, plan, name)
    _check_sizes(modules, table, name)
    return table


def _cut_mixer(table: Table, path: str, module: nn.Module) -> None:
    """Put a layer that keeps a state into the table, if it can be cut."""
    cut = find_mixer_cut(module, table.size)
    if cut is None:
        return
    for name, layout in cut.columns.items():
        where = f"{path}.{name}" if name else path
        child = module.get_submodule(name)
        table.cuts[where] = Cut.COLUMNS if isinstance(child, nn.Linear) else Cut.OWN
        if name and name == cut.summed:
            table.cuts[where] = Cut.NORM
        table.layouts[where] = layout
        if isinstance(child, nn.Conv1d):
            table.attributes[where] = dict.fromkeys(_OF_CHANNELS, layout)
    table.cuts[f"{path}.{cut.rows}"] = Cut.ROWS
    table.whole |= {f"{path}.{name}" for name in cut.whole}
    for name, attributes in cut.attributes.items():
        table.attributes[f"{path}.{name}" if name else path] = attributes
    table.buffers[path] = cut.buffers


def check_heads(config: Any, size: int, name: str) -> None:
    """Raise ConfigError where `size` ranks cannot share the attention heads of a config."""
    try:
        num_heads: int = config.num_attention_heads
        num_kv_heads: int = getattr(config, "num_key_value_heads", None) or num_heads
    except RuntimeError:  # of transformers, where layers differ: each is checked by itself
        return
    if not shares_heads(size, [num_heads], num_kv_heads):
        sizes = range(1, num_heads + 1)
        fitting = [ranks for ranks in sizes if shares_heads(ranks, [num_heads], num_kv_heads)]
        raise ConfigError(
            f"tp={size} does not divide the {num_heads} attention heads and {num_kv_heads} KV "
            f"heads of {name}; possible: {', '.join(map(str, fitting))}"
        )


def _out_features(module: nn.Module) -> int:
    return int(getattr(module, "out_features", 0))


def _head_counts(
    modules: dict[str, nn.Module], cuts: dict[str, Cut]
) -> Iterator[tuple[str, Layout]]:
    """By path of a layer of queries, keys or values: the heads that it makes."""
    for path, cut in cuts.items():
        parent = modules[path.rpartition(".")[0]]
        head_dim = getattr(parent, "head_dim", None)
        if hasattr(type(parent), "expand_kv"):  # keys and values of a head have widths of their own
            num_heads = int(parent.num_heads)  # type: ignore[arg-type]
            head_dim = _out_features(modules[path]) // num_heads
        out_features = _out_features(modules[path])
        if cut is Cut.COLUMNS and isinstance(head_dim, int) and out_features % head_dim == 0:
            yield path, (Units(out_features // head_dim, head_dim),)


def _check(
    path: str, modules: dict[str, nn.Module], table: Table, plan: dict[str, str], name: str
) -> None:
    """Refuse a block of layers of which the plan leaves open what a rank computes."""
    module, cut = modules[path], table.cuts[path]
    if cut is Cut.EXPERTS:
        prefix = f"{pattern_of(path)}."
        of_experts = {style for pattern, style in plan.items() if pattern.startswith(prefix)}
        if of_experts - _OF_EXPERTS or not of_experts:
            raise ModelError(f"the plan of {name} cuts the experts {path} in an unknown way")
        return
    if cut in (Cut.OWN, Cut.NORM):
        return
    if type(module) is not nn.Linear:
        raise ModelError(
            f"the plan of {name} cuts {path}, a {type(module).__name__}; only plain linear layers "
            "are cut: use one GPU"
        )
    if cut is not Cut.HEAD and not _is_complete(path.rpartition(".")[0], modules, table):
        raise ModelError(
            f"the tensor-parallel plan of {name} cuts {path}, and leaves out a layer or a "
            "parameter beside it that has all columns; use one GPU"
        )


def _is_complete(parent: str, modules: dict[str, nn.Module], table: Table) -> bool:
    """Whether all layers of a block are cut, or have nothing to do with heads or columns."""
    block = modules[parent]
    children = {f"{parent}.{name}": child for name, child in block.named_children()}
    head_dim = getattr(block, "head_dim", None)
    for path, child in children.items():
        if path in table.cuts or path in table.whole:
            continue
        if any(tuple(weight.shape) != (head_dim,) for weight in child.parameters()):
            return False  # of all heads or columns, and so of others than this rank's
    if not {Cut.COLUMNS, Cut.ROWS} <= {table.cuts.get(path) for path in children}:
        return False
    return table.cuts.get(parent) is Cut.OWN or not block._parameters


def _check_sizes(modules: dict[str, nn.Module], table: Table, name: str) -> None:
    size = table.size
    for path, cut in table.cuts.items():
        module: Any = modules[path]
        if cut is Cut.COLUMNS:
            columns = Units(module.out_features)
            is_mixer = path.rpartition(".")[0] in table.buffers
            is_shared = is_mixer or (path.endswith(_SOME_HEADS) and path in table.layouts)
            for units in table.layouts.get(path, (columns,)):
                if units.count % size and not (is_shared and units.are_shared(size)):
                    raise ConfigError(
                        f"tp={size} does not divide the {units.count} columns of {path}; give less"
                    )
        elif cut is Cut.ROWS and module.in_features % size:
            raise ConfigError(
                f"tp={size} does not divide the {module.in_features} rows of {path} of {name}; "
                "give less"
            )
        elif cut in (Cut.OWN, Cut.NORM):
            length = length_of(table.layouts[path])
            if any(w is not None and len(w) != length for w in module._parameters.values()):
                raise ModelError(
                    f"{path} of {name} has a parameter that is not one of {length} heads; use one "
                    "GPU"
                )
