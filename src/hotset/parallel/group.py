"""The ranks of this process' model: their numbers, and what they tell each other."""

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from hotset.layout import Layout

# Graphs hold one communicator, whose launches are all on one stream; NVLink multicast is left off
# unless the environment asks for it, as not all machines let a process have it.
_ENVIRONMENT = {
    "NCCL_GRAPH_MIXING_SUPPORT": "0",
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    # One kind of failure is told by one rank: PyTorch's own watchdog would end the process first.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}
_LOOPBACK = "127.0.0.1"


@dataclass(slots=True)
class Group:
    """This rank, and those that it computes with.

    Attributes:
        rank: of this process, from 0 on.
        layout: how these ranks share a model.
        device: of this rank.
        is_alone: whether collectives give back what this rank brings, see `alone`.
        num_hosts: that ranks are on, each with as many of them.
    """

    rank: int
    layout: Layout
    device: torch.device
    is_alone: bool = False
    num_hosts: int = 1

    @property
    def num_local(self) -> int:
        """Ranks that share this host."""
        return self.size // self.num_hosts

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.layout.gpus


_ONE = Group(0, Layout(), torch.device("cpu"), is_alone=True)
_current = _ONE


def current() -> Group:
    """The group of this process; of one rank where none was joined."""
    return _current


def serve_store(size: int, timeout_s: float) -> TCPStore:
    """A place on this host where `size` ranks find each other; see its `port`."""
    return TCPStore(
        _LOOPBACK, 0, size, is_master=True, wait_for_workers=False, timeout=_span(timeout_s)
    )


def find_store(port: int, size: int, timeout_s: float) -> TCPStore:
    """The same place, from another process."""
    return TCPStore(_LOOPBACK, port, size, is_master=False, timeout=_span(timeout_s))


def torchrun_store(timeout_s: float, attempt: str = "") -> Store:
    """The place where ranks that torchrun has started find each other.

    torchrun keeps it when it starts them again; what `attempt` has is its own.
    """
    store: Store = next(rendezvous("env://", timeout=_span(timeout_s)))[0]
    return PrefixStore(attempt, store) if attempt else store


def join(
    store: Store,
    rank: int,
    layout: Layout,
    device: str,
    timeout_s: float,
    *,
    local_rank: int | None = None,
    num_hosts: int = 1,
    is_on_loopback: bool = True,
) -> Group:
    """Become one of the ranks of a layout; returns when all have.

    On a GPU collectives are NCCL's, and gloo's for what is on the CPU; else all are gloo's.

    Args:
        store: where ranks find each other.
        rank: of this process.
        layout: of all ranks.
        device: `cpu` or `cuda`.
        timeout_s: how long a collective on the CPU waits for the others.
        local_rank: the number of the GPU; None is the rank.
        num_hosts: that the ranks are on.
        is_on_loopback: whether ranks reach each other without a network.
    """
    global _current
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if is_on_loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Imported after, its functions would hold the group as a default, and so its threads, for good.
    importlib.import_module("torch.distributed.nn.functional")
    backend, own = "gloo", torch.device("cpu")
    if device == "cuda":
        backend, own = (
            "cpu:gloo,cuda:nccl",
            torch.device("cuda", rank if local_rank is None else local_rank),
        )
        torch.cuda.set_device(own)
    distributed.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=layout.gpus,
        timeout=_span(timeout_s),
        device_id=own if device == "cuda" else None,
    )
    _current = Group(rank, layout, own, num_hosts=num_hosts)
    return _current


def leave(*, is_orderly: bool = True) -> None:
    """Undo `join`, when no rank has a collective under way; or just forget the group."""
    global _current
    if _current is not _ONE and is_orderly:
        distributed.destroy_process_group()
    _current = _ONE


def has_peers() -> bool:
    """Whether the GPUs of this host's ranks reach each other's memory; on a CPU they all do."""
    own = _current.device
    if own.type != "cuda":
        return True
    others = (one for one in range(_current.num_local) if one != own.index)
    return all(torch.cuda.can_device_access_peer(own, one) for one in others)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it this rank runs the model by itself: sums are its own parts, shapes are right."""
    was_alone, _current.is_alone = _current.is_alone, True
    try:
        yield
    finally:
        _current.is_alone = was_alone


def least(values: Sequence[int]) -> list[int]:
    """For each value the least that a rank brings; every rank has to call it."""
    if _current.size == 1:
        return list(values)
    all_values = torch.tensor(values, dtype=torch.int64)
    distributed.all_reduce(all_values, distributed.ReduceOp.MIN)
    found: list[int] = all_values.tolist()
    return found


def agreed(seconds: float) -> float:
    """What rank 0 brings, for choices that go by a stopwatch; every rank has to call it."""
    if _current.size == 1:
        return seconds
    value = torch.tensor([seconds], dtype=torch.float64)
    distributed.broadcast(value, 0)
    return float(value)


def _span(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)
