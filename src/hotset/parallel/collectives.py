"""Sums over ranks and pieces put together, each one operation that compilers do not look into.

On GPUs of one host that reach each other's memory, a sum goes through symmetric memory, which
needs no multicast: each rank reads the others' parts and adds them in the order of ranks, so that
all get the same bits. Large sums, and all others, are NCCL's. Which it is follows from the bytes
alone, so that ranks never differ.
"""

import logging

import torch
from torch import distributed
from torch.nn import functional

from hotset.parallel.group import Group, current, least

_log = logging.getLogger(__name__)

# In bytes of a message. Measured on two H200 without multicast, in CUDA graphs: one-shot and NCCL
# 7 us up to 64 KB; two-shot 10 us of 1 MiB (NCCL 13), 59 of 16 MiB (73). Beyond, its copies cost
# what it gains.
_ONE_SHOT_BYTES = 256 * 2**10
_MOST_BYTES = 16 * 2**20
_ALIGNMENT = 16
_THROUGH_SYMMETRIC = "sums over ranks: symmetric memory up to 16 MiB, NCCL beyond"

# PyTorch 2.13 has another name for it, and warns of the older one.
all_gather_pieces = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)

_symmetric: "SymmetricMemory | None" = None


class SymmetricMemory:
    """A buffer on each rank that all of them read and write; see `use_symmetric_memory`.

    Args:
        group: of ranks on one host, with GPUs that reach each other.
        num_bytes: the largest message.

    Raises:
        RuntimeError: this PyTorch or these GPUs have none.
    """

    def __init__(self, group: Group, num_bytes: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        world = distributed.group.WORLD
        assert world is not None
        self._name = world.group_name
        # Of bytes: views of any dtype begin where it does.
        self._buffer = symmetric.empty(num_bytes, dtype=torch.uint8, device=group.device)
        symmetric.rendezvous(self._buffer, self._name)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the kernels sum tensors of this dtype and size."""
        fits = 0 < x.nbytes <= len(self._buffer) and x.nbytes % _ALIGNMENT == 0
        return fits and x.dtype in (torch.float32, torch.bfloat16)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in memory of its own, of a contiguous tensor that it takes."""
        part = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        if x.nbytes <= _ONE_SHOT_BYTES:
            out: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(
                part, x, "sum", self._name
            )
            return out
        part.copy_(x)
        torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", self._name)
        return part.clone()


def use_symmetric_memory() -> str:
    """Have sums of up to 16 MiB go through symmetric memory where all ranks can.

    Every rank has to call it. It compares sums with NCCL's, and all keep to NCCL where one differs.

    Returns:
        A line that says what sums go through; empty on a CPU and with one rank.
    """
    global _symmetric
    group = current()
    if group.size == 1 or group.device.type != "cuda":
        return ""
    if group.num_hosts > 1:
        return "sums over ranks: NCCL, as they are on several hosts"
    if _symmetric is not None:  # of an engine before
        return _THROUGH_SYMMETRIC
    found, reason = None, "another rank cannot"
    try:
        found = SymmetricMemory(group, _MOST_BYTES)
    except (RuntimeError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
    if least([found is not None])[0]:
        assert found is not None
        if least([_is_right(found, group)])[0]:
            _symmetric = found
            return _THROUGH_SYMMETRIC
        reason = "its sums differ from NCCL's"
    _log.warning("sums over ranks go through NCCL: no symmetric memory (%s)", reason)
    return f"sums over ranks: NCCL ({reason})"


def forget_symmetric_memory() -> None:
    """Let go of the buffer, before the group is left."""
    global _symmetric
    _symmetric = None


def _is_right(memory: SymmetricMemory, group: Group) -> bool:
    """Whether small, middle and odd sums are what NCCL has, of integers that any order sums."""
    for num_values in (8, 1000, _ONE_SHOT_BYTES // 2 + 8, _MOST_BYTES // 2):
        values = torch.arange(num_values, device=group.device) % 13 + group.rank
        x = values.to(torch.bfloat16)
        expected = x.clone()
        distributed.all_reduce(expected)
        if not torch.equal(memory.sum(x), expected):
            return False
    return True


@torch.library.custom_op("hotset::all_reduce", mutates_args=())
def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks of what each brings, in memory of its own; the same bits on all."""
    x = x.contiguous()
    if not current().is_alone and _symmetric is not None and _symmetric.takes(x):
        return _symmetric.sum(x)
    out = x.clone()
    if not current().is_alone:
        distributed.all_reduce(out)
    return out


@all_reduce.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("hotset::gather_columns", mutates_args=())
def gather_columns(x: torch.Tensor, num_columns: int) -> torch.Tensor:
    """The columns of all ranks side by side, `[..., P]` each to `[..., num_columns]`.

    Each rank has `ceil(num_columns / N)` of them, the last ones fewer.
    """
    group = current()
    piece = -(-num_columns // group.size)
    rows = functional.pad(x, (0, piece - x.shape[-1])).flatten(0, -2).contiguous()
    pieces = (
        rows.repeat(group.size, 1)
        if group.is_alone
        else rows.new_empty(group.size * len(rows), piece)
    )
    if not group.is_alone and len(rows):
        all_gather_pieces(pieces, rows)
    side_by_side = pieces.view(group.size, len(rows), piece).transpose(0, 1)
    side_by_side = side_by_side.reshape(len(rows), group.size * piece)  # a copy
    return side_by_side[:, :num_columns].reshape(*x.shape[:-1], num_columns)


@gather_columns.register_fake
def _(x: torch.Tensor, num_columns: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], num_columns)


def largest(x: torch.Tensor) -> torch.Tensor:
    """For each number the largest that a rank brings."""
    out = x.contiguous().clone()
    if not current().is_alone:
        distributed.all_reduce(out, distributed.ReduceOp.MAX)
    return out


def share_attended(positions: torch.Tensor) -> None:
    """Fill `positions` with rank 0's where all ranks attend for the same tokens; lanes do not."""
    if current().layout.dp == 1:
        broadcast(positions)


def broadcast(tensor: torch.Tensor) -> None:
    """Fill `tensor` with rank 0's, on the device and in the order of its stream."""
    if not current().is_alone:
        distributed.broadcast(tensor, 0)
