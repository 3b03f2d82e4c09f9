"""Engines of two ranks over tiny models; what other ranks call is found here by its name."""

from dataclasses import replace
from typing import Any

from engines import sizes_in_blocks
from tiny_models import make_model

from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.model.cut_model import ModelCutter
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.ranks.driver import Ranks


def load_tiny(family: str, seed: int, changes: dict[str, Any]) -> LoadedModel:
    """This rank's part of a tiny model."""
    model = make_model(family, seed=seed, **changes)
    cutter = ModelCutter(model, family)
    cutter.cut_all(model)
    cutter.join_outputs(model)
    return LoadedModel(model, None, family, f"{family}-{seed}", (2,), 512)


def make_ranked_engine(
    ranks: Ranks,
    family: str = "llama",
    *,
    seed: int = 0,
    overlap: bool | None = None,
    model_changes: dict[str, Any] | None = None,
    **changes: Any,
) -> Engine:
    """As `engines.make_engine`, of several ranks, which are left for other engines.

    Sizes are in blocks of each rank.
    """
    loaded = replace(ranks.load(load_tiny, family, seed, model_changes or {}), ranks=ranks)
    options = sizes_in_blocks(loaded.model, num_ranks=ranks.size, **changes)
    return build_engine(Options.of(tp=ranks.size, **options), loaded, overlap=overlap)
