"""Engines of two ranks over tiny models; what other ranks call is found here by its name."""

from dataclasses import replace
from typing import Any

import torch
from engines import sizes_in_blocks
from tiny_models import make_model
from torch import distributed

from hotset.attention.sparse.indexer import indexers
from hotset.engine import load
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.load import load_on_ranks
from hotset.model.cut_model import ModelCutter
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.parallel.collectives import all_reduce, gather_columns, use_symmetric_memory
from hotset.parallel.group import current
from hotset.ranks.driver import Ranks


def load_tiny(
    family: str, seed: int, changes: dict[str, Any], dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """This rank's part of a tiny model."""
    model = make_model(family, seed=seed, **changes)
    cutter = ModelCutter(model, family)
    cutter.cut_all(model)
    cutter.join_outputs(model)
    model.to(current().device, dtype)
    return LoadedModel(model, None, family, f"{family}-{seed}", (2,), 512)


def make_ranked_engine(
    ranks: Ranks,
    family: str = "llama",
    *,
    seed: int = 0,
    overlap: bool | None = None,
    model_changes: dict[str, Any] | None = None,
    model_dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Engine:
    """As `engines.make_engine`, of several ranks, which are left for other engines.

    Sizes are in blocks of each rank.
    """
    loaded = ranks.load(load_tiny, family, seed, model_changes or {}, model_dtype)
    return engine_over(ranks, loaded, overlap=overlap, **changes)


def engine_over(
    ranks: Ranks, loaded: LoadedModel, *, overlap: bool | None = None, **changes: Any
) -> Engine:
    """An engine over a model whose parts these ranks have loaded."""
    loaded = replace(loaded, ranks=ranks)
    options = sizes_in_blocks(loaded.model, num_ranks=ranks.size, **changes)
    layout = current().layout
    spread = {"tp": layout.tp, "dp": layout.dp, "ep": layout.ep > 1}
    return build_engine(Options.of(**spread, **options), loaded, overlap=overlap)


def make_folder_engine(ranks: Ranks, options: Options) -> Engine:
    """An engine of several ranks over a checkpoint, as `load_engine` makes one."""
    return build_engine(options, replace(ranks.load(load_folder, options), ranks=ranks))


def load_folder(options: Options) -> LoadedModel:
    """This rank's part of a checkpoint."""
    return load._load(options)


def load_otherwise_selecting(family: str) -> LoadedModel:
    """`load_tiny`, but the indexers of rank 1 have other weights."""
    loaded = load_tiny(family, 0, {})
    if current().rank == 1:
        with torch.no_grad():
            for indexer in indexers(loaded.model):
                indexer.weights_proj.weight.neg_()
    return loaded


BAD_TOKEN = 99  # on rank 1


def family_of(options: Options) -> str:
    """What `build_failing` loads: lanes need experts."""
    return "llama" if options.layout.dp == 1 else "qwen3_moe"


def load_failing(family: str, changes: dict[str, Any] | None = None) -> LoadedModel:
    """`load_tiny`, but rank 1 raises where a step has `BAD_TOKEN`."""
    loaded = load_tiny(family, 0, changes or {})

    def fail(embedding: Any, args: tuple[torch.Tensor]) -> None:
        if current().rank == 1 and bool((args[0] == BAD_TOKEN).any()):
            raise ValueError(f"token {BAD_TOKEN} was met")

    loaded.model.get_input_embeddings().register_forward_pre_hook(fail)
    return loaded


def build_failing(options: Options) -> tuple[Engine, LoadedModel]:
    """For a process of its own."""
    torch.set_num_threads(1)
    loaded = load_on_ranks(options, load_failing, family_of(options))
    return build_engine(options, loaded, owns_model=True), loaded


def build_failing_wide(options: Options) -> tuple[Engine, LoadedModel]:
    """`build_failing` with 8 heads, for up to 8 ranks."""
    torch.set_num_threads(1)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    loaded = load_on_ranks(options, load_failing, "llama", heads)
    return build_engine(options, loaded, owns_model=True), loaded


def check_collectives() -> str:
    """Sums and pieces of all sizes, launched and recorded; every rank runs it."""
    note, rank = use_symmetric_memory(), current().rank
    device = current().device
    for num_rows in (1, 3, 64, 1000, 4096, 9000):
        x = (torch.arange(num_rows * 4096, device=device) % 7 + rank).bfloat16().view(num_rows, -1)
        expected = (torch.arange(num_rows * 4096, device=device) % 7 * 2 + 1).view(num_rows, -1)
        assert torch.equal(all_reduce(x).long(), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            summed = all_reduce(x)
            pieces = gather_columns(x[:, :100], 199)
        for _ in range(3):
            summed.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(summed.long(), expected)
        others = x - rank + 1 - rank
        left, right = (x, others) if rank == 0 else (others, x)
        assert torch.equal(pieces, torch.cat([left[:, :100], right[:, :99]], 1))
    distributed.barrier()
    return note
