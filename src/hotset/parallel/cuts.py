"""Which part of each layer a rank has: transformers' tensor-parallel plan, read as a table.

The plan (`base_model_tp_plan` of a config, `tp_plan` of a model) says by patterns of names which
linear layers are cut by columns of their output, which by rows of their input, so that the parts
of the latter add up. Nothing else of transformers' parallelism is used: the layers stay what they
are, with fewer columns or rows.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import transformers
from torch import nn

from hotset.cost.layout import shares_heads
from hotset.errors import ConfigError, ModelError

Index = tuple[slice, ...]


class Cut(Enum):
    """How a layer is spread over ranks."""

    COLUMNS = "columns"  # of its output; each rank goes on with its own
    ROWS = "rows"  # of its input; the outputs of all ranks are summed
    HEAD = "head"  # columns of the logits, which all ranks put together again
    EXPERTS = "experts"  # of each expert, its middle; the outputs of all ranks are summed


# A gathered layer before one whose input is split again is whole on each rank, and so are norms,
# routers and embeddings.
_WHOLE = {
    "colwise_gather_output",
    "colwise_rep",
    "rowwise_split_input",
    "rowwise_rep",
    "replicated",
    "replicated_with_grad_allreduce",
    "embedding_rowwise",
}
_CUTS = {"colwise": Cut.COLUMNS, "rowwise": Cut.ROWS, "moe_tp_experts": Cut.EXPERTS}
_OF_EXPERTS = {"packed_colwise", "colwise", "rowwise", "grouped_gemm", "packed_rowwise"}
_SOME_HEADS = ("k_proj", "v_proj")  # each may be on several ranks, as more heads of queries are


@dataclass(frozen=True, slots=True)
class Table:
    """What the ranks of a model share out.

    Attributes:
        size: of the group.
        cuts: by path of a module; what is not there is whole on each rank.
        heads: by path, how many heads a layer of queries, keys or values makes.
    """

    size: int
    cuts: dict[str, Cut]
    heads: dict[str, int]

    def columns(self, path: str, out_features: int, rank: int) -> slice:
        """The columns that a rank has of a layer that is cut by columns, or of the head."""
        if self.cuts[path] is Cut.HEAD:
            piece = -(-out_features // self.size)
            return slice(min(rank * piece, out_features), min((rank + 1) * piece, out_features))
        num_heads = self.heads.get(path, out_features)
        width = out_features // num_heads
        first = rank * num_heads // self.size
        count = max(1, num_heads // self.size)
        return slice(first * width, (first + count) * width)

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
        ModelError: transformers has no plan for it, or one that is not understood here.
    """
    check_heads(model.config.get_text_config(), size, name)
    plan: dict[str, str] = model.tp_plan or {}
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    cuts: dict[str, Cut] = {}
    for path, module in modules.items():
        style = plan.get(_pattern(path))
        if style is None:
            continue
        if module is head:
            cuts[path] = Cut.HEAD
        elif style in _CUTS:
            cuts[path] = _CUTS[style]
        elif style not in _WHOLE:
            raise ModelError(
                f"the tensor-parallel plan of {name} has {style!r} for {path}, which is not "
                "supported; use one GPU"
            )
    if not set(cuts.values()) & {Cut.ROWS, Cut.EXPERTS}:
        raise ModelError(
            f"{name} has no tensor-parallel plan in transformers {transformers.__version__} that "
            "cuts its layers; use one GPU"
        )
    heads = dict(_head_counts(modules, cuts))
    for path in cuts:
        _check(path, modules, cuts, plan, name)
    _check_sizes(modules, cuts, heads, size, name)
    return Table(size, cuts, heads)


def check_heads(config: Any, size: int, name: str) -> None:
    """Raise ConfigError where `size` ranks cannot share the attention heads of a config."""
    num_heads: int = config.num_attention_heads
    num_kv_heads: int = getattr(config, "num_key_value_heads", None) or num_heads
    if not shares_heads(size, [num_heads], num_kv_heads):
        sizes = range(1, num_heads + 1)
        fitting = [ranks for ranks in sizes if shares_heads(ranks, [num_heads], num_kv_heads)]
        raise ConfigError(
            f"tp={size} does not divide the {num_heads} attention heads and {num_kv_heads} KV "
            f"heads of {name}; possible: {', '.join(map(str, fitting))}"
        )


def _pattern(path: str) -> str:
    """A path as plans have it: numbers of layers are stars."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _head_counts(modules: dict[str, nn.Module], cuts: dict[str, Cut]) -> Iterator[tuple[str, int]]:
    """By path of a layer of queries, keys or values: how many heads it makes."""
    for path, cut in cuts.items():
        parent = path.rpartition(".")[0]
        head_dim = getattr(modules[parent], "head_dim", None)
        out_features = getattr(modules[path], "out_features", 0)
        if cut is Cut.COLUMNS and isinstance(head_dim, int) and out_features % head_dim == 0:
            yield path, out_features // head_dim


def _check(
    path: str,
    modules: dict[str, nn.Module],
    cuts: dict[str, Cut],
    plan: dict[str, str],
    name: str,
) -> None:
    """Refuse a block of layers of which the plan leaves open what a rank computes."""
    module, cut = modules[path], cuts[path]
    if cut is Cut.EXPERTS:
        styles = {
            style for pattern, style in plan.items() if pattern.startswith(f"{_pattern(path)}.")
        }
        if styles - _OF_EXPERTS or not styles:
            raise ModelError(f"the plan of {name} cuts the experts {path} in an unknown way")
        return
    if type(module) is not nn.Linear:
        raise ModelError(
            f"the plan of {name} cuts {path}, a {type(module).__name__}; only plain linear layers "
            "are cut: use one GPU"
        )
    if cut is Cut.HEAD:
        return
    parent = path.rpartition(".")[0]
    siblings = {
        child: cuts.get(f"{parent}.{child}") for child, _ in modules[parent].named_children()
    }
    head_dim = getattr(modules[parent], "head_dim", None)
    is_whole = {Cut.COLUMNS, Cut.ROWS} <= set(siblings.values())
    for child, sibling in siblings.items():
        weights = list(modules[f"{parent}.{child}"].parameters())
        if sibling is None and any(tuple(w.shape) != (head_dim,) for w in weights):
            is_whole = False  # of all heads or columns, and so of others than this rank's
    if not is_whole or modules[parent]._parameters:
        raise ModelError(
            f"the tensor-parallel plan of {name} cuts {path}, and leaves out a layer or a "
            "parameter beside it that has all columns; use one GPU"
        )


def _check_sizes(
    modules: dict[str, nn.Module],
    cuts: dict[str, Cut],
    heads: dict[str, int],
    size: int,
    name: str,
) -> None:
    for path, cut in cuts.items():
        module: Any = modules[path]
        if cut is Cut.COLUMNS:
            count = heads.get(path, module.out_features)
            is_shared = path.endswith(_SOME_HEADS) and path in heads and size % count == 0
            if count % size and not is_shared:
                raise ConfigError(
                    f"tp={size} does not divide the {count} columns of {path}; give less"
                )
        elif cut is Cut.ROWS and module.in_features % size:
            raise ConfigError(
                f"tp={size} does not divide the {module.in_features} rows of {path} of {name}; "
                "give less"
            )
