"""Which backend attends to a model's layers."""

import logging
from collections.abc import Sequence

from hotset.attention.backend import AttentionBackend
from hotset.attention.flashinfer.backend import FlashInferBackend
from hotset.attention.flashinfer.kernels import KernelBuild, why_unsupported
from hotset.attention.flashinfer.latent import LatentBackend
from hotset.attention.flashinfer.sparse import SparseBackend
from hotset.attention.gather import GatherBackend
from hotset.attention.hot_rows import HotRows
from hotset.attention.sparse.drawn import DrawnSelection
from hotset.attention.spec import LayerAttention
from hotset.memory.arena import DeviceArena

_log = logging.getLogger(__name__)


def choose_backend(
    arena: DeviceArena,
    layers: Sequence[LayerAttention],
    *,
    max_context: int,
    hot: HotRows | None = None,
    drawn: DrawnSelection | None = None,
    kernels: KernelBuild | None = None,
    waits: bool = True,
) -> AttentionBackend:
    """FlashInfer on a GPU, for layers that it can run; SDPA for the others.

    Args:
        arena: has the KV.
        layers: what each asks for.
        max_context: most tokens of one sequence.
        hot: the rows of hot requests; None where none may be hot.
        drawn: replaces the scores of indexers, for a benchmark; None keeps them.
        kernels: FlashInfer's, being built.
        waits: until all of them are; see the backends.
    """
    if arena.storage.device.type != "cuda":
        return GatherBackend(arena, layers, hot, drawn)
    reason = why_unsupported(layers, arena.storage.device)
    if reason is not None:
        _log.warning("FlashInfer cannot run %s: attention by SDPA, which is slower", reason)
        return GatherBackend(arena, layers, hot, drawn)
    if layers[0].indexer is not None:
        return SparseBackend(
            arena,
            layers,
            max_context=max_context,
            hot=hot,
            drawn=drawn,
            kernels=kernels,
            waits=waits,
        )
    backend = FlashInferBackend if layers[0].latent is None else LatentBackend
    return backend(arena, layers, kernels=kernels, waits=waits)
